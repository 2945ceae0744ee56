"""Metrics against scikit-image and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from minip2p import metrics


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 40, 32, generator=rng, dtype=torch.float64)
    return x, (x + 0.2 * torch.randn(x.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)


def test_ssim_and_psnr_are_scikit_image_s():
    x, y = pictures()
    a, b = (t[0].permute(1, 2, 0).numpy() for t in (x, y))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    mean, whole = structural_similarity(a, b, data_range=1, channel_axis=2, full=True, **options)
    assert metrics.ssim(x, y, border="valid").mean().item() == pytest.approx(mean, abs=1e-9)
    inside = np.moveaxis(whole, 2, 0)[:, 5:-5, 5:-5]
    reflected = metrics.ssim(x, y)[0, :, 5:-5, 5:-5].numpy()
    assert abs(reflected - inside).max() < 1e-9
    error = metrics.squared_error(x, y).mean()
    assert metrics.psnr(error) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))


def test_psnr_of_equal_pictures_is_the_highest():
    assert metrics.psnr(0.0) == math.inf and metrics.psnr(0.0, 60) == 60
    assert metrics.psnr(1e-9, 60) == 60 and metrics.psnr(0.01, 60) == pytest.approx(20)


def test_iou():
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    assert metrics.iou(a, b) == pytest.approx(1 / 3)
    assert math.isnan(metrics.iou(a & ~a, b & ~b))


def test_the_frechet_distance_of_known_distributions():
    """For means m and covariances C and D that commute it is |m|² + |C^½ - D^½|² (Frobenius)."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** 0.5  # covariance I
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    a, b = signs * torch.tensor([1.0, 3]) @ turn, signs * torch.tensor([2.0, 5]) @ turn + 1
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, b) == pytest.approx(2 + 1 + 4, rel=1e-6)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a), rel=1e-6)
