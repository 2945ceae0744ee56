"""Measures of how two pictures, masks or sets of features differ.

Shapes:  b pictures · c channels · h w height and width · n m items of a set
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def to_pixels(image: Image.Image) -> Tensor:
    """Return the RGB pixels of an image, from 0 to 1, float32. → 1 3 h w"""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # h w 3
    return pixels.permute(2, 0, 1)[None].to(torch.float32) / 255


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared difference of pixels, averaged over channels. x, y: b c h w → b h w"""
    return (x - y).square().mean(dim=1)


def psnr(mse: Tensor | float, highest: float = math.inf) -> float:
    """Convert a mean squared error of values from 0 to 1 into dB, at most `highest`."""
    mse = float(mse)
    return min(highest, -10 * math.log10(mse)) if mse > 0 else highest


def ssim(x: Tensor, y: Tensor, border: str = "reflect") -> Tensor:
    """Compute structural similarity around each pixel (Wang et al. 2004, eq. 13).

    The window is a Gaussian of 11 x 11 with deviation 1.5. x, y: b c h w, from 0 to 1.
    border: "reflect" or "replicate" continues the pictures over their border → b c h w; "valid"
    takes only windows that lie inside the pictures, as torchmetrics 1.2 → b c h-10 w-10.
    """
    c = x.shape[1]
    taps = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    bell = (taps / taps.sum()).expand(c, 1, 1, -1)

    def mean(t: Tensor) -> Tensor:
        t = t if border == "valid" else F.pad(t, (5, 5, 5, 5), mode=border)
        return F.conv2d(F.conv2d(t, bell, groups=c), bell.mT, groups=c)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance, c1, c2 = mean(x * y) - mean_x * mean_y, 0.01**2, 0.03**2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )


def iou(a: Tensor, b: Tensor) -> float:
    """Compute intersection over union of two masks, bool; nan if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else math.nan


def frechet(a: Tensor, b: Tensor) -> float:
    """Compute the squared distance of the normal distributions of two sets of features.

    (Dowson & Landau 1982; as in FID, Heusel et al. 2017, eq. 6.) a: n c, b: m c
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The trace of (cov_a cov_b)^½ is the sum of the roots of the product's eigenvalues.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(distance + cov_a.trace() + cov_b.trace() - 2 * root)


def difference_in(image: Image.Image, source: Image.Image, mask: Tensor) -> tuple[float, float]:
    """Compute the mean difference of two pictures inside and outside of a mask, in levels of 255.

    mask: h w, bool, of the pictures' size or of a map's, a whole fraction of it.
    """
    differences = 255 * (to_pixels(image) - to_pixels(source)).abs().mean(dim=1)[0]  # h w
    for dim, size in enumerate(differences.shape):
        mask = mask.cpu().repeat_interleave(size // mask.shape[dim], dim)
    return differences[mask].mean().item(), differences[~mask].mean().item()
