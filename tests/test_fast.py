"""minip2p.fast computes the same: layer by layer, as a UNet, and in an edited run."""

import copy
import sys

import pytest
import torch
from torch import nn

import minip2p
from minip2p import fast
from minip2p.unet import UNet


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def small_unet() -> UNet:
    torch.manual_seed(0)
    return UNet((64, 96, 128, 128), 1, 32, 4).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(3, 4, 4), (1, 6, 9), (2, 1, 1), (3, 32, 33)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_winograd_is_the_convolution(size: tuple[int, int, int], channels_last: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3, padding=1).requires_grad_(False)
    x = torch.randn(size[0], 24, *size[1:])
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    truth = copy.deepcopy(conv).double()(x.double())
    assert distance(fast.Winograd(conv)(x).double(), truth) < 5e-6
    assert distance(fast.Winograd(conv.double())(x.double()), truth) < 1e-13


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_prepared_unet_computes_the_same(small_unet: UNet, size: tuple[int, int]) -> None:
    x, context = torch.randn(3, 4, *size), torch.randn(3, 77, 32)
    truth = small_unet(x, 500, context)
    kinds = {type(module) for module in fast.prepare(small_unet).modules()}
    assert {fast.Winograd, fast.PackedConv, fast.PackedLinear} <= kinds
    with torch.inference_mode():
        assert distance(small_unet(x, 500, context), truth) < 2e-5
    assert distance(small_unet(x, 500, context), truth) < 2e-5


def test_only_float32_on_the_cpu_is_prepared(small_unet: UNet) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        fast.prepare(small_unet.to(torch.bfloat16))
    with pytest.raises(ValueError, match="meta"):
        fast.prepare(small_unet.float().to("meta"))


def test_an_edited_run_stays_the_same() -> None:
    model = minip2p.load()
    prompts = ["a squirrel eating a burger", "a lion eating a burger"]

    def run() -> torch.Tensor:
        edit = minip2p.WordSwap(local_blend=minip2p.LocalBlend("squirrel"))
        return minip2p.generate(model, prompts, edit=edit, num_inference_steps=5).latents

    truth = run()
    fast.prepare(model.unet)
    assert distance(run(), truth) < 1e-4


def test_memory_can_be_kept_and_given_back() -> None:
    x = torch.randn(1 << 20)
    try:
        there = fast.keep_memory()
        assert not there or sys.platform.startswith("linux")
        assert torch.equal(x + x, 2 * x)
    finally:
        assert fast.keep_memory(False) == there
