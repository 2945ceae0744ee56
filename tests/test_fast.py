"""minip2p.fast and a compiled UNet compute the same."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import LION, SQUIRREL, difference
from torch import nn

import minip2p
from minip2p import fast
from minip2p.attention import CachedContext, Chain, PromptRows
from minip2p.pipeline import bind_edit
from minip2p.unet import UNet

PROMPTS = [SQUIRREL, LION]


@pytest.fixture
def wide_unet() -> UNet:
    """Return a UNet with every kind of layer that `prepare` replaces."""
    torch.manual_seed(0)
    return UNet((64, 256, 672), 1, 32, 4).eval().requires_grad_(False)


@pytest.fixture
def onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")


# --- on a CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(3, 4, 4), (1, 6, 9), (2, 1, 1), (3, 32, 33)])
def test_winograd_is_the_convolution(onednn, m, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3, padding=1).requires_grad_(False)
    x = torch.randn(size[0], 24, *size[1:])
    truth = copy.deepcopy(conv).double()(x.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        out = fast.Winograd(conv, m)(x.to(memory_format=layout))
        assert difference(out.double(), truth) < 5e-6


# The packed layers have a bfloat16 form where the CPU has one.
LIMITS = {torch.float32: 2e-5}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    LIMITS[torch.bfloat16] = 2e-2


@pytest.mark.parametrize("dtype, limit", LIMITS.items(), ids=str)
@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_prepared_unet_computes_the_same(onednn, wide_unet, size, dtype, limit):
    x, context = torch.randn(3, 4, *size), torch.randn(3, 77, 32)
    truth = wide_unet(x, 500, context)
    prepared = fast.prepare(wide_unet.to(dtype))
    kinds = {type(module) for module in prepared.modules()}
    conv = fast.Winograd if dtype == torch.float32 else fast.PackedConv
    assert {conv, fast.PackedLinear} <= kinds
    for mode in (torch.inference_mode(), torch.enable_grad()):
        with mode:
            out = prepared(x.to(dtype), 500, context.to(dtype)).float()
        assert difference(out, truth) < limit


def test_only_float32_and_bfloat16_on_the_cpu_are_prepared(wide_unet):
    with pytest.raises(minip2p.UserError, match="float16"):
        fast.prepare(wide_unet.to(torch.float16))
    with pytest.raises(minip2p.UserError, match="meta"):
        fast.prepare(wide_unet.float().to("meta"))


def test_an_edited_run_stays_the_same(onednn, model):
    edit = minip2p.WordSwap(local_blend=minip2p.LocalBlend("squirrel"))
    settings = {"edit": edit, "num_inference_steps": 4, "decode": False}
    prepared = copy.copy(model)
    prepared.unet = fast.prepare(copy.deepcopy(model.unet))
    truth = minip2p.generate(model, PROMPTS, **settings).latents
    assert difference(minip2p.generate(prepared, PROMPTS, **settings).latents, truth) < 1e-4


def test_memory_can_be_kept_and_given_back():
    x = torch.randn(1 << 20)
    try:
        has_setting = fast.keep_memory()
        assert not has_setting or sys.platform.startswith("linux")
        assert torch.equal(x + x, 2 * x)
    finally:
        assert fast.keep_memory(False) == has_setting


# --- on a GPU -------------------------------------------------------------------------------------


def edit_and_store(model: minip2p.StableDiffusion) -> tuple[Chain, minip2p.AttentionStore]:
    """Return a hook that swaps a word, blends and reads a word's maps, for latents of 16 x 16."""
    blend = minip2p.LocalBlend("squirrel")
    tokens, hook = bind_edit(model, PROMPTS, minip2p.WordSwap(0.8, 0.4, blend), (16, 16))
    store = minip2p.AttentionStore(words=["burger"])
    store.begin(tokens, (16, 16), model.device)
    return Chain([hook, store]), store


@torch.no_grad()
def test_a_graph_reads_the_maps_that_hooks_read(toy, monkeypatch):
    """All of a Graph but its recording, which needs a GPU: here its call is made but once."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    x, context = torch.randn(4, 4, 16, 16), CachedContext(torch.randn(4, 77, 128))
    outputs, stores, blends = [], [], []
    for recorded in (False, True):
        hook, store = edit_and_store(toy)
        arguments = x, torch.tensor(501), context, PromptRows(hook.at(0, 10, 501), 2)
        if recorded:
            outputs.append(fast.Graph(toy.unet.forward, *arguments, pool=None)(x, 501))
        else:
            outputs.append(toy.unet(*arguments))
        stores.append(store.word("burger"))
        blends.append(hook.hooks[0].blends[0].maps)
    for plain, from_graph in (outputs, stores, blends):
        assert torch.equal(plain, from_graph)


def test_which_hooks_are_recorded(toy):
    """Calls share a graph while their windows are the same; what is not linear has none."""
    chain, store = edit_and_store(toy)
    states = [fast.state_of(chain.at(call, 10, 0)) for call in range(10)]
    assert states[0] == states[3] != states[4] == states[7] != states[8] == states[9]
    assert fast.state_of(edit_and_store(toy)[0].at(0, 10, 0)) != states[0]
    for hook in (minip2p.Hook(), minip2p.AttentionStore(), Chain([store, minip2p.Hook()])):
        assert fast.state_of(hook) is None
    before = minip2p.AttentionStore(words=["burger"], before_edit=True)
    before.begin(store.prompts, (16, 16), toy.device)
    assert fast.state_of(before) is None


def test_only_a_unet_on_a_gpu_is_recorded(wide_unet):
    with pytest.raises(minip2p.UserError, match="not on cpu"):
        fast.record(wide_unet)


@pytest.mark.gpu
def test_a_recorded_run_is_the_run_itself():
    """With every state of the windows, a blend, a word's maps, and a second run after the first."""
    model = minip2p.load(device="cuda")
    blend = minip2p.LocalBlend("squirrel")
    edit = minip2p.WordSwap({"default_": 0.8, "lion": 0.5}, 0.4, local_blend=blend)

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        store = minip2p.AttentionStore(words=["burger"])
        settings = {"num_inference_steps": 12, "seed": seed, "store": store, "decode": False}
        out = minip2p.generate(model, PROMPTS, edit=edit, **settings)
        return out.latents, out.attention.word("burger")

    truth = [run(seed) for seed in (1, 2)]
    fast.record(model.unet)
    recorded = [run(seed) for seed in (1, 2)]
    recorder = model.unet.forward
    assert sum(isinstance(graph, fast.Graph) for graph in recorder.graphs.values()) >= 3
    for (latents, maps), (expected_latents, expected_maps) in zip(recorded, truth, strict=True):
        assert difference(latents, expected_latents) < 1e-4
        assert difference(maps, expected_maps) < 1e-4


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def counter() -> Iterator[object]:
    """Return a backend of torch.compile that counts graphs and runs them as they are."""
    testing = pytest.importorskip("torch._dynamo.testing")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("graphs were counted with torch 2.13")
    torch._dynamo.reset()
    yield testing.CompileCounter()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit, graphs",
    [
        (None, 2),  # the first call, which projects the words; all others
        (minip2p.WordSwap(0.8, 0.4, minip2p.LocalBlend("squirrel")), 4),  # and each window state
    ],
    ids=["plain", "swap and blend"],
)
def test_a_compiled_unet_has_few_graphs_and_no_breaks(toy, counter, edit, graphs):
    compiled = copy.copy(toy)
    compiled.unet = torch.compile(toy.unet, backend=counter, fullgraph=True)  # a break would raise
    settings = {"edit": edit, "num_inference_steps": 10, "decode": False}
    truth = minip2p.generate(toy, PROMPTS, **settings).latents
    for _ in range(2):  # the second run needs no further graph
        assert torch.equal(minip2p.generate(compiled, PROMPTS, **settings).latents, truth)
        assert counter.frame_count == graphs


@pytest.mark.slow
def test_the_bundled_models_benchmark_runs(tmp_path):
    """The benchmark starts the program, where a change of the program goes unseen."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "run.py"), "bundled"]
    results = tmp_path / "results.json"
    subprocess.run([*command, "--rounds", "1", "--results", str(results)], check=True)
    parts, whole = json.loads(results.read_text())["bundled"].values()
    assert len(parts["rows"]) == 6 and len(whole["rows"]) == 4
