"""minip2p.fast and a compiled UNet compute the same."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import minip2p
from minip2p import fast
from minip2p.unet import UNet

ONEDNN = torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch is built without oneDNN")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def wide_unet() -> UNet:
    """Wide enough for every kind of faster layer."""
    torch.manual_seed(0)
    return UNet((64, 256, 672), 1, 32, 4).eval().requires_grad_(False)


@pytest.mark.parametrize("m", [2, 4])
def test_winograds_matrices_are_exact(m: int) -> None:
    """In one dimension, with integers: Aᵀ [(G g) ⊙ (Bᵀ d)] is the correlation of d with g."""
    g = torch.tensor([24.0, -48.0, 72.0]).double()  # G divides by up to 24
    d = torch.arange(m + 2).double() ** 2 - 3
    a_t, b_t, big_g = (
        torch.tensor(x[m], dtype=torch.float64) for x in (fast.A_T, fast.B_T, fast.G)
    )
    expected = d.unfold(0, 3, 1) @ g
    assert torch.allclose(a_t @ ((big_g @ g) * (b_t @ d)), expected, rtol=0, atol=1e-10)


@needs_onednn
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(3, 4, 4), (1, 6, 9), (2, 1, 1), (3, 32, 33)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_winograd_is_the_convolution(
    m: int, size: tuple[int, int, int], channels_last: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3, padding=1).requires_grad_(False)
    x = torch.randn(size[0], 24, *size[1:])
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    truth = copy.deepcopy(conv).double()(x.double())
    assert distance(fast.Winograd(conv, m)(x).double(), truth) < 5e-6


BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@needs_onednn
@pytest.mark.parametrize(
    "dtype, limit",
    [
        (torch.float32, 2e-5),
        pytest.param(
            torch.bfloat16,
            2e-2,
            marks=pytest.mark.skipif(not BFLOAT16, reason="this CPU has no bfloat16"),
        ),
    ],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_prepared_unet_computes_the_same(
    wide_unet: UNet, size: tuple[int, int], dtype: torch.dtype, limit: float
) -> None:
    x, context = torch.randn(3, 4, *size), torch.randn(3, 77, 32)
    truth = wide_unet(x, 500, context)
    plain = wide_unet.to(dtype)
    rough = distance(plain(x.to(dtype), 500, context.to(dtype)).float(), truth)
    prepared = fast.prepare(plain)
    kinds = {type(module) for module in prepared.modules()}
    conv = fast.Winograd if dtype == torch.float32 else fast.PackedConv
    assert {conv, fast.PackedLinear} <= kinds
    for mode in (torch.inference_mode(), torch.enable_grad()):
        with mode:
            now = prepared(x.to(dtype), 500, context.to(dtype)).float()
        assert distance(now, truth) < limit
        assert dtype == torch.float32 or distance(now, truth) < 1.1 * rough


def test_only_float32_and_bfloat16_on_the_cpu_are_prepared(wide_unet: UNet) -> None:
    with pytest.raises(ValueError, match="float16"):
        fast.prepare(wide_unet.to(torch.float16))
    with pytest.raises(ValueError, match="meta"):
        fast.prepare(wide_unet.float().to("meta"))


@needs_onednn
def test_an_edited_run_stays_the_same() -> None:
    model = minip2p.load()
    prompts = ["a squirrel eating a burger", "a lion eating a burger"]

    def run() -> torch.Tensor:
        edit = minip2p.WordSwap(local_blend=minip2p.LocalBlend("squirrel"))
        return minip2p.generate(model, prompts, edit=edit, num_inference_steps=5).latents

    truth = run()
    fast.prepare(model.unet)
    assert distance(run(), truth) < 1e-4


@pytest.mark.parametrize(
    "edit, graphs",
    [
        (None, 2),  # the first call, which projects the words; all others
        (minip2p.WordSwap(0.8, 0.4), 4),  # and one for each further state of the windows
        (minip2p.WordSwap(0.8, 0.4, minip2p.LocalBlend("squirrel")), 4),
    ],
    ids=["plain", "swap", "blend"],
)
def test_a_compiled_unet_has_few_graphs_and_no_breaks(edit: object, graphs: int) -> None:
    """Dynamo alone: it records the graphs that a compiler would get, and runs them as they are."""
    testing = pytest.importorskip("torch._dynamo.testing")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("graphs were counted with torch 2.13")
    torch.manual_seed(0)
    model = minip2p.load(device="cpu")
    plain = UNet((32, 32, 32), 1, 128, 4).eval().requires_grad_(False)

    def run(unet: nn.Module) -> torch.Tensor:
        model.unet = unet
        prompts = ["a squirrel eating a burger", "a lion eating a burger"]
        return minip2p.generate(model, prompts, edit=edit, num_inference_steps=10).latents

    torch._dynamo.reset()
    counter = testing.CompileCounter()
    compiled = torch.compile(plain, backend=counter, fullgraph=True)  # a break would raise
    truth = run(plain)
    for _ in range(2):  # the second run needs no further graph
        assert torch.equal(run(compiled), truth)
        assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_memory_can_be_kept_and_given_back() -> None:
    x = torch.randn(1 << 20)
    try:
        there = fast.keep_memory()
        assert not there or sys.platform.startswith("linux")
        assert torch.equal(x + x, 2 * x)
    finally:
        assert fast.keep_memory(False) == there


@pytest.mark.slow
def test_the_bundled_models_benchmark_runs(tmp_path) -> None:
    """It calls the program from outside, where a change of the program goes unseen."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "run.py"), "bundled"]
    results = tmp_path / "results.json"
    subprocess.run([*command, "--rounds", "1", "--results", str(results)], check=True)
    parts, whole = json.loads(results.read_text())["bundled"].values()
    assert len(parts["rows"]) == 6 and len(whole["rows"]) == 4
