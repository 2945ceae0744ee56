"""minip2p.fast and a compiled UNet compute the same."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import LION, SQUIRREL, difference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minip2p
from minip2p import fast
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


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: keep the operators of a call, and run them again at a replay.

    As in a recording on a GPU, what the call changes in place stays as it was before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple] = []
        self.changed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.is_mutable:
            self.changed.append((args[0], args[0].clone()))
        results = operator(*args, **(kwargs or {}))
        self.operators.append((operator, args, kwargs or {}, results))
        return results

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for tensor, before in reversed(self.changed):
            tensor.copy_(before)

    def replay(self) -> None:
        for operator, args, kwargs, results in self.operators:
            again = tree_leaves(operator(*args, **kwargs))
            for result, value in zip(tree_leaves(results), again, strict=True):
                if isinstance(result, torch.Tensor):
                    result.copy_(value)


def record_on_cpu(unet: UNet, patch: pytest.MonkeyPatch) -> fast.Recorder:
    """Record the calls of a UNet on the CPU, with a Tape in place of each CUDA graph."""
    patch.setattr(torch.cuda, "CUDAGraph", Tape)
    patch.setattr(torch.cuda, "graph", lambda tape, pool: tape)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    patch.setattr(unet, "forward", fast.Recorder(unet.forward))
    return unet.forward


def check_recording(
    model: minip2p.StableDiffusion, record: Callable[[], fast.Recorder], limit: float
) -> None:
    """Compare two runs before and after `record`, with every window state, a blend and a store."""
    blend = minip2p.LocalBlend("squirrel")
    edit = minip2p.WordSwap({"default_": 0.8, "lion": 0.5}, 0.95, local_blend=blend)

    def run(seed: int) -> tuple[torch.Tensor, ...]:
        store = minip2p.AttentionStore(words=["burger"])
        settings = {"num_inference_steps": 12, "seed": seed, "store": store, "decode": False}
        out = minip2p.generate(model, PROMPTS, edit=edit, **settings)
        return out.latents, out.attention.word("burger"), out.edit.blends[0].maps

    truth = [run(seed) for seed in (1, 2)]
    recorder = record()
    recorded = [run(seed) for seed in (1, 2)]
    assert sum(graph is not None for graph in recorder.graphs.values()) >= 3
    for outputs, expected in zip(recorded, truth, strict=True):
        for name, output, expected_output in zip(
            ("latents", "word", "blend"), outputs, expected, strict=True
        ):
            assert difference(output, expected_output) <= limit, name


def test_a_recorded_run_is_the_run_itself_where_a_tape_is_the_graph(toy, monkeypatch):
    check_recording(toy, lambda: record_on_cpu(toy.unet, monkeypatch), limit=0)


@pytest.mark.gpu
def test_a_recorded_run_is_the_run_itself():
    model = minip2p.load(device="cuda")
    check_recording(model, lambda: fast.record(model.unet).forward, limit=1e-4)


@pytest.mark.parametrize(
    "hook",
    [
        minip2p.Hook(),
        minip2p.AttentionStore(),
        minip2p.AttentionStore(words=["burger"], before_edit=True),
        minip2p.AttentionStore(words=["burger"], by_call=True),
    ],
)
def test_hooks_that_python_must_run_are_not_recorded(toy, monkeypatch, hook):
    recorder = record_on_cpu(toy.unet, monkeypatch)
    settings = {"num_inference_steps": 3, "decode": False}
    minip2p.generate(toy, PROMPTS, edit=minip2p.WordSwap(), hooks=[hook], **settings)
    assert not recorder.graphs


def test_only_a_unet_on_a_gpu_is_recorded(wide_unet):
    with pytest.raises(minip2p.UserError, match="not on cpu"):
        fast.record(wide_unet)


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
    few = ["--rounds", "1", "--steps", "2", "--threads", "1"]
    subprocess.run([*command, *few, "--results", str(results)], check=True)
    parts, whole = json.loads(results.read_text())["bundled"].values()
    assert len(parts["rows"]) == 6 and len(whole["rows"]) == 4
