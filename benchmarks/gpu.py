"""Measure minip2p beside diffusers on one GPU, within minutes: `python benchmarks/run.py gpu`.

The models have SD 1.5's size and random weights, made on the GPU; nothing is downloaded. Parts run
in the order of PARTS, the most important first. After each table everything measured so far is
written to gpu.json in the output folder. A part for which the time that is left does not suffice is
left out, and the file says so; a part that fails does not stop the others.

Sides of a table take turns, in the opposite order every other round. `ms` is the median of the
rounds, `ratio` the median of the rounds' ratios to the table's first side. `issue ms` is the time
that the CPU takes to start all kernels of one call: where it is near `ms`, the GPU waits for
Python. `floor ms` is the call's multiplications at the rate of a large matrix product of the same
type, measured in the part "ceilings".

Without CUDA everything runs on the CPU with a narrow UNet, to see that it works: its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sides import (
    Sides,
    call_inputs,
    diffusers_sides,
    hook_of,
    minip2p_call,
    prompts_of,
)
from torch import Tensor

import minip2p
from minip2p import fast, metrics
from minip2p.pipeline import decode_latents, denoise
from minip2p.scheduler import DDIM
from minip2p.unet import UNet
from minip2p.vae import VAE

HERE = Path(__file__).parent
GUIDANCE = 7.5
TEST_SECONDS = 150  # at most, of the tests; COMPILE_SECONDS likewise
COMPILE_SECONDS = 150
NARROW: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64}
NARROW_VAE = (32, 32, 32, 32)
EDITED = ("word swap", "swap, blend, a word's maps")


@dataclass
class Bench:
    """Hold what all parts share: the device, the sizes, the time that is left, and the results."""

    out: Path
    minutes: float
    device: torch.device
    narrow: bool
    start: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)
    unets: dict[torch.dtype, UNet] = field(default_factory=dict)
    bundled: Any = None

    @property
    def file(self) -> Path:
        return self.out / "gpu.json"

    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.start)

    def keep(self, title: str, rows: Any) -> None:
        """Add a table to the results, print it and write them all."""
        self.results.setdefault("tables", {})[title] = rows
        self.write()
        print(f"\n{title}", flush=True)
        for row in rows if isinstance(rows, list) else [rows]:
            print("  " + ", ".join(f"{k}: {rounded(v)}" for k, v in row.items()), flush=True)

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.file)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], object]) -> float:
        """Return by how many MB `work` raises the memory that tensors take. 0 on the CPU."""
        if self.device.type != "cuda":
            work()
            return 0.0
        self.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    # --- models -----------------------------------------------------------------------------------

    def unet(self, dtype: torch.dtype) -> UNet:
        """Return minip2p's UNet; in every type it has the same random weights."""
        if torch.float32 not in self.unets:
            torch.manual_seed(0)
            with self.device:
                unet = UNet(**(NARROW if self.narrow else {}))
            self.unets[torch.float32] = unet.eval().requires_grad_(False)
        if dtype not in self.unets:
            weights = self.unets[torch.float32].state_dict()
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
            self.unets[dtype] = self.with_weights(weights)
        return self.unets[dtype]

    def with_weights(self, weights: dict[str, Tensor]) -> UNet:
        """Return a new UNet that shares these weights."""
        with torch.device("meta"):
            unet = UNet(**(NARROW if self.narrow else {}))
        unet.load_state_dict(weights, assign=True)
        return unet.eval().requires_grad_(False)

    def recorded_unet(self, dtype: torch.dtype) -> UNet:
        """Return a UNet with the same weights whose calls are replayed as CUDA graphs."""
        unet = self.with_weights(self.unet(dtype).state_dict())
        if self.device.type == "cuda":
            fast.record(unet)
        return unet

    def diffusers_unet(self, dtype: torch.dtype) -> Any:
        """Return diffusers' UNet with minip2p's weights, or None where it is not installed."""
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as error:
            self.results["diffusers"] = f"left out: {error}"
            return None
        sizes = dict(NARROW) if self.narrow else {"cross_attention_dim": 768}
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel(sample_size=64, attention_head_dim=8, **sizes)
        unet.load_state_dict(self.unet(dtype).state_dict(), assign=True)
        return unet.eval().requires_grad_(False)

    def vae(self) -> VAE:
        torch.manual_seed(0)
        with self.device:
            vae = VAE(NARROW_VAE) if self.narrow else VAE()
        return vae.eval().requires_grad_(False)

    def model(self, unet: UNet, vae: VAE | None = None) -> Any:
        """Return a model with this UNet, and the bundled model's tokenizer and windows."""
        if self.bundled is None:
            self.bundled = minip2p.load(device=self.device)
        return replace(self.bundled, unet=unet, vae=vae or self.bundled.vae)


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- timing ---------------------------------------------------------------------------------------


def take_turns(
    bench: Bench,
    sides: Sides,
    *,
    seconds: float,
    rounds: int = 15,
    calls: int = 5,
    same_as: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Time every side. → a row for each; see the top of this file.

    At least 3 rounds, then until `rounds` are done or `seconds` are over. calls: a round's, one
    behind another without waiting. same_as: of a side, the side that computes the same.
    """
    if bench.narrow:
        rounds, calls, seconds = 1, 1, 0
    outputs = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, call in sides.items():
        first = time.perf_counter()
        outputs[name] = call()
        bench.synchronize()
        first = time.perf_counter() - first
        for _ in range(0 if bench.narrow or calls == 1 else 3):  # a recorded UNet replays its third
            call()
        rows[name] = {"side": name, "first ms": 1e3 * first}
        if "recorded" not in name:  # a graph's memory is its own, and stays allocated
            rows[name]["extra MB"] = bench.peak(call)
    times: dict[str, list[float]] = {name: [] for name in sides}
    issued: dict[str, list[float]] = {name: [] for name in sides}
    end, names, turn = time.monotonic() + seconds, list(sides), 0
    while turn < rounds and (turn < 3 or time.monotonic() < end):
        for name in names if turn % 2 == 0 else names[::-1]:
            bench.synchronize()
            start = time.perf_counter()
            sides[name]()
            issued[name].append(1e3 * (time.perf_counter() - start))
            bench.synchronize()
            if calls == 1:
                times[name].append(1e3 * (time.perf_counter() - start))
                continue
            start = time.perf_counter()
            for _ in range(calls):
                sides[name]()
            bench.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
        turn += 1
    base = names[0]
    for name, row in rows.items():
        pairs = zip(times[name], times[base], strict=True)
        row |= {
            "ms": statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in pairs),
            "issue ms": statistics.median(issued[name]),
            "rounds": turn,
        }
        if same_as and same_as.get(name) in outputs:
            truth = outputs[same_as[name]].float()
            row["error"] = ((outputs[name].float() - truth).norm() / truth.norm()).item()
    return list(rows.values())


# --- the parts ------------------------------------------------------------------------------------


def part_ceilings(bench: Bench) -> None:
    """Measure the rates of a large matrix product and of a copy in the GPU's memory."""
    n = 256 if bench.narrow else 8192
    rates: dict[str, float] = {}
    dtypes = (torch.float32,) if bench.narrow else (torch.float16, torch.bfloat16, torch.float32)
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        row = take_turns(bench, {"product": partial(torch.matmul, a, b)}, seconds=2, calls=10)[0]
        rates[f"{name_of(dtype)} TFLOP/s"] = 2 * n**3 / row["ms"] / 1e9
    x = torch.empty(n * n * 16, device=bench.device)
    y = torch.empty_like(x)
    row = take_turns(bench, {"copy": lambda: y.copy_(x)}, seconds=2, calls=10)[0]
    rates["copy TB/s, read and written"] = 2 * x.numel() * 4 / row["ms"] / 1e9
    bench.keep("ceilings", rates)


def part_calls(bench: Bench, dtype: torch.dtype, seconds: float) -> None:
    """Measure one guided UNet call of a source and its edits, inside both windows."""
    for edits in (1, 3):
        calls_table(bench, dtype, 64, edits, seconds)


def calls_table(bench: Bench, dtype: torch.dtype, size: int, edits: int, seconds: float) -> None:
    if bench.narrow:
        size, dtype = 16, torch.float32  # half precision takes minutes on a CPU
    unet = bench.unet(dtype)
    sides: Sides = {}
    reference = bench.diffusers_unet(dtype)
    if reference is not None:
        swap = hook_of(bench.model(unet), "word swap", edits, size)
        sides |= diffusers_sides(reference, swap.mapper[1:], size)
    for edit in (None, *EDITED):
        # Each side has its own hook, since blends and stores sum what they read, and its own
        # recorded UNet, which keeps the graphs of one context.
        for name, net in (("minip2p", unet), ("minip2p, recorded", bench.recorded_unet(dtype))):
            hook = hook_of(bench.model(net), edit, edits, size) if edit else None
            sides[f"{name}, {edit}" if edit else name] = minip2p_call(net, hook, edits + 1, size)
    same_as = {
        "minip2p": "diffusers",
        "minip2p, word swap": "diffusers, written-out edit",
        "minip2p, recorded": "minip2p",
        "minip2p, recorded, word swap": "minip2p, word swap",
    }
    rows = take_turns(bench, sides, seconds=seconds, same_as=same_as)
    floor = floor_of(bench, unet, edits + 1, size, dtype)
    title = f"call: {size}x{size} latents, 1 source + {edits}, {name_of(dtype)}"
    bench.keep(title, [row | floor for row in rows])


def floor_of(
    bench: Bench, unet: UNet, prompts: int, size: int, dtype: torch.dtype
) -> dict[str, float]:
    """Return the TFLOP of a plain call, and the time they take at the measured rate."""
    from torch.utils.flop_counter import FlopCounterMode

    call = minip2p_call(unet, None, prompts, size)
    call()  # the words' keys and values are not part of most calls
    with FlopCounterMode(display=False) as counter:
        call()
    tflop = counter.get_total_flops() / 1e12
    rate = bench.results["tables"].get("ceilings", {}).get(f"{name_of(dtype)} TFLOP/s")
    return {"TFLOP": tflop} | ({"floor ms": 1e3 * tflop / rate} if rate else {})


def part_runs(bench: Bench) -> None:
    """Measure a whole run of 50 steps and its decoding: a source and an edit, in float16.

    The text encoder is left out: it takes some milliseconds. Extra MB: above the weights.
    """
    size, steps = (16, 2) if bench.narrow else (64, 50)
    dtype = torch.float32 if bench.narrow else torch.float16
    unet, vae = bench.unet(dtype), bench.vae()
    x, _, context = call_inputs(unet, 2, size)
    uncond, cond = context.chunk(2)
    scheduler = DDIM(steps)

    def run(net: UNet, edit: str | None, decode: bool) -> Callable[[], Tensor]:
        def work() -> Tensor:
            model = models[net]
            hook = hook_of(model, edit, 1, size) if edit else None
            *_, latents = denoise(net, scheduler, x[:2].float(), cond, uncond, GUIDANCE, hook)
            if decode:
                decode_latents(model, latents)
            return latents

        return work

    recorded = bench.recorded_unet(dtype)
    models = {net: bench.model(net, vae) for net in (unet, recorded)}
    sides: Sides = {}
    pipeline = diffusers_pipeline(bench, dtype, vae)
    if pipeline is not None:

        def diffusers_run(output: str) -> Tensor:
            return pipeline(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond,
                latents=x[:2],
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                output_type=output,
            ).images

        sides["diffusers, 50 steps"] = lambda: diffusers_run("latent")
    for name, net in (("minip2p", unet), ("minip2p, recorded", recorded)):
        for edit in (None, *EDITED):
            sides[f"{name}, {edit or 'plain'}, 50 steps"] = run(net, edit, decode=False)
    sides["minip2p, word swap, 50 steps and decoding"] = run(unet, "word swap", decode=True)
    same_as = {
        "minip2p, plain, 50 steps": "diffusers, 50 steps",
        "minip2p, recorded, plain, 50 steps": "minip2p, plain, 50 steps",
        "minip2p, recorded, word swap, 50 steps": "minip2p, word swap, 50 steps",
        f"minip2p, recorded, {EDITED[1]}, 50 steps": f"minip2p, {EDITED[1]}, 50 steps",
    }
    rows = take_turns(bench, sides, seconds=25, rounds=5, calls=1, same_as=same_as)
    weights = {
        "UNet MB": megabytes(unet),
        "VAE MB": megabytes(vae),
        "text encoder MB": 123.06 * dtype.itemsize,  # CLIP ViT-L/14 has 123.06 M parameters
    }
    bench.keep(f"run: 512 px, 1 source + 1, {name_of(dtype)}", rows)
    bench.keep("weights", weights)


def megabytes(module: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6


def diffusers_pipeline(bench: Bench, dtype: torch.dtype, vae: VAE) -> Any:
    """Return diffusers' pipeline without a text encoder, or None where it is not installed."""
    unet, decoder = bench.diffusers_unet(dtype), diffusers_vae(bench, vae, dtype)
    if unet is None:
        return None
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline(
        vae=decoder,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_vae(bench: Bench, vae: VAE, dtype: torch.dtype) -> Any:
    """Return diffusers' VAE with minip2p's weights, or None where it is not installed."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        return None
    with torch.device("meta"):
        other: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=NARROW_VAE if bench.narrow else (128, 256, 512, 512),
            layers_per_block=2,
        )
    weights = {}
    for name, weight in vae.state_dict().items():
        is_conv = other.state_dict()[name].ndim == 4 and weight.ndim == 2
        weights[name] = (weight[:, :, None, None] if is_conv else weight).to(dtype)
    other.load_state_dict(weights, assign=True)
    return other.eval().requires_grad_(False)


def decoded(decoder: Any, latents: Tensor) -> Tensor:
    """Return diffusers' decoded pictures."""
    return decoder.decode(latents).sample


def part_decode(bench: Bench) -> None:
    """Measure the decoding of one picture, which minip2p does in float32."""
    vae = bench.vae()
    for size in (16,) if bench.narrow else (64, 96):
        latents = torch.randn(1, 4, size, size, device=bench.device)
        sides: Sides = {"minip2p, float32": partial(vae.decode, latents)}
        for dtype in (torch.float32,) if bench.narrow else (torch.float32, torch.float16):
            decoder = diffusers_vae(bench, vae, dtype)
            if decoder is not None:
                scaled = latents.to(dtype) / vae.scaling_factor
                sides[f"diffusers, {name_of(dtype)}"] = partial(decoded, decoder, scaled)
        same_as = {"diffusers, float32": "minip2p, float32"}
        rows = take_turns(bench, sides, seconds=5, calls=2, same_as=same_as)
        bench.keep(f"decode: {8 * size} px", rows)


def part_sizes(bench: Bench) -> None:
    """Measure a call at 768 px, in float16."""
    calls_table(bench, torch.float16, 96, 1, 10)


def part_profile(bench: Bench) -> None:
    """Profile one call of each side: its kernels, how long the GPU works, and the longest ones."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    dtype, size = (torch.float32, 16) if bench.narrow else (torch.float16, 64)
    unet, is_cuda = bench.unet(dtype), bench.device.type == "cuda"
    model = bench.model(unet)
    sides: Sides = {"minip2p": minip2p_call(unet, None, 2, size)}
    for edit in EDITED:
        hook = hook_of(model, edit, 1, size)
        sides[f"minip2p, {edit}"] = minip2p_call(unet, hook, 2, size)
    reference = bench.diffusers_unet(dtype)
    if reference is not None:
        mapper = hook_of(model, "word swap", 1, size).mapper[1:]
        sides |= diffusers_sides(reference, mapper, size)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    rows: list[dict[str, Any]] = []
    for name, call in sides.items():
        for _ in range(2):
            call()
        bench.synchronize()
        with profile(activities=activities) as recording:
            call()
            bench.synchronize()
        device = DeviceType.CUDA if is_cuda else DeviceType.CPU
        kernels: dict[str, list[float]] = {}
        for event in recording.events():
            if event.device_type == device:
                time_us = event.time_range.elapsed_us()
                kernels.setdefault(event.name, []).append(time_us)
        longest = sorted(kernels, key=lambda kernel: -sum(kernels[kernel]))[:10]
        rows.append(
            {
                "side": name,
                "kernels": sum(map(len, kernels.values())),
                "GPU ms": sum(map(sum, kernels.values())) / 1e3,
                "longest": [
                    f"{sum(kernels[k]) / 1e3:.3f} ms, {len(kernels[k])} x {k[:90]}" for k in longest
                ],
            }
        )
    for row in rows:
        print(row["side"], *row["longest"], sep="\n    ", flush=True)
    bench.keep(f"profile: {size}x{size} latents, 1 source + 1, {name_of(dtype)}", rows)


def part_inversion(bench: Bench) -> None:
    """Compare inversions in half precision with float32's, on the bundled model.

    latent error: of the source row's last latents, relative to the picture's. PSNR: of its decoded
    picture, against the VAE's own reconstruction. edit error: of the edit's last latents, relative
    to the same edit in float32.
    """
    prompts, steps = prompts_of(1), 2 if bench.narrow else 50
    dtypes = (torch.float32,) if bench.narrow else (torch.float32, torch.float16, torch.bfloat16)
    image = minip2p.generate(
        minip2p.load(device=bench.device), prompts[0], num_inference_steps=steps
    ).images[0]
    rows: list[Any] = []
    edits: dict[Any, Tensor] = {}
    for dtype in dtypes:
        model = minip2p.load(device=bench.device, dtype=dtype)
        for method, refinements, guidance in (
            ("direct", 0, None),
            ("edit-friendly", 0, None),
            ("ddim", 0, 1.0),
            ("ddim", 3, 1.0),
            ("ddim", 0, None),
        ):
            source = minip2p.invert(
                model,
                image,
                prompts[0],
                num_inference_steps=steps,
                method=method,
                refinements=refinements,
            )
            out = minip2p.generate(
                model, prompts, edit="auto", source=source, guidance_scale=guidance
            )
            clean, latents = source.trajectory[-1], out.latents.cpu()
            pixels, truth = map(metrics.to_pixels, (out.images[0], source.reconstruction))
            side = f"{method}, {refinements} refinements, edit's guidance {guidance or 'default'}"
            edits.setdefault(side, latents[1])
            rows.append(
                {
                    "side": side,
                    "dtype": name_of(dtype),
                    "latent error": relative(latents[0], clean),
                    "PSNR": metrics.psnr((pixels - truth).square().mean(), highest=99.0),
                    "edit error": relative(latents[1], edits[side]),
                }
            )
    bench.keep(f"inversion: bundled model, {steps} steps", rows)


def relative(x: Tensor, truth: Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


def part_compile(bench: Bench) -> None:
    """Measure the same calls compiled, in a process of its own that is ended when time is over."""
    seconds = min(COMPILE_SECONDS, bench.seconds_left() - 100)  # the tests' time
    command = [sys.executable, str(HERE / "run.py"), "gpu", "--part", "compiled"]
    command += ["--out", str(bench.out / "compiled"), "--minutes", str(seconds / 60)]
    run_within(bench, "compile", command, seconds)
    file = bench.out / "compiled" / "gpu.json"
    if file.exists():
        bench.results["tables"] |= json.loads(file.read_text()).get("tables", {})
        bench.write()


def part_compiled(bench: Bench) -> None:
    """Compile one side after another, and time all of them after each."""
    dtype, size = (torch.float32, 16) if bench.narrow else (torch.float16, 64)
    settings: dict[str, Any] = {"backend": "eager"} if bench.narrow else {}
    unet, reference = bench.unet(dtype), bench.diffusers_unet(dtype)
    swap = hook_of(bench.model(unet), "word swap", 1, size)
    sides: Sides = {"minip2p": minip2p_call(unet, None, 2, size)}
    nets: list[tuple[str, Callable[[], Callable[[], Tensor]]]] = []
    title = f"compiled: {size}x{size} latents, 1 source + 1, {name_of(dtype)}"

    def compiled(hook: Any) -> Callable[[], Tensor]:
        net = bench.with_weights(unet.state_dict())
        # Before compiling, a plain call computes the words' keys and values: one graph less.
        call = minip2p_call(net, hook, 2, size)
        call()
        net.compile(**settings)
        return call

    nets.append(("minip2p, compiled", lambda: compiled(None)))
    if reference is not None:
        sides["diffusers"] = diffusers_sides(reference, swap.mapper[1:], size)["diffusers"]

        def compiled_reference() -> Callable[[], Tensor]:
            x, t, context = call_inputs(reference, 2, size)
            net = torch.compile(bench.diffusers_unet(dtype), **settings)
            return lambda: net(x, t, context).sample

        nets.append(("diffusers, compiled", compiled_reference))
    nets.append(("minip2p, word swap, compiled", lambda: compiled(swap)))
    same_as = {"minip2p, compiled": "minip2p", "diffusers, compiled": "diffusers"}
    compile_seconds: dict[str, float] = {}
    for name, make in nets:
        start = time.perf_counter()
        sides[name] = make()
        sides[name]()
        bench.synchronize()
        compile_seconds[name] = time.perf_counter() - start
        rows = take_turns(bench, sides, seconds=3, same_as=same_as)
        seconds = [{"compile s": compile_seconds.get(row["side"], 0.0)} for row in rows]
        bench.keep(title, [row | compiling for row, compiling in zip(rows, seconds, strict=True)])


def part_tests(bench: Bench) -> None:
    """Run the tests that need a GPU."""
    seconds = min(TEST_SECONDS, bench.seconds_left() - 5)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    command += ["-n", "4"] if has_package("pytest-xdist") else []
    command += ["tests/test_fast.py"] if bench.narrow else []
    run_within(bench, "tests", command, seconds)


def has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run_within(bench: Bench, name: str, command: list[str], seconds: float) -> None:
    """Run a program for at most so many seconds; its output goes to a file, the end to results."""
    log = bench.out / f"{name}.log"
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    with log.open("w") as stream:
        try:
            code: Any = subprocess.run(
                command,
                cwd=HERE.parent,
                env=os.environ | {"PYTHONPATH": path},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=max(seconds, 1),
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"ended after {seconds:.0f} s"
    bench.keep(name, {"status": code, "output": log.read_text()[-1500:]})


# Part, seconds that it is expected to take. The first ones matter most.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "ceilings": (part_ceilings, 15),
    "float16": (lambda bench: part_calls(bench, torch.float16, 12), 40),
    "runs": (part_runs, 60),
    "profile": (part_profile, 15),
    "float32": (lambda bench: part_calls(bench, torch.float32, 10), 45),
    "bfloat16": (lambda bench: part_calls(bench, torch.bfloat16, 8), 30),
    "sizes": (part_sizes, 20),
    "decode": (part_decode, 20),
    "inversion": (part_inversion, 40),
    "compile": (part_compile, 160),
    "tests": (part_tests, 30),
}


def measure(args: argparse.Namespace) -> None:
    """Run all parts, or the one that `--part` names."""
    narrow = args.rehearse or not torch.cuda.is_available()
    device = torch.device("cpu" if narrow else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(args.out or Path("out/gpu"), args.minutes, device, narrow)
    bench.results |= {
        "device": "a rehearsal on the CPU" if narrow else torch.cuda.get_device_name(),
        "memory GB": 0 if narrow else torch.cuda.get_device_properties(0).total_memory / 1e9,
        "versions": {
            name: importlib.metadata.version(name) if has_package(name) else None
            for name in ("torch", "diffusers", "transformers")
        },
        "python": sys.version.split()[0],
    }
    parts = {"compiled": (part_compiled, 0.0)} if args.part == "compiled" else PARTS
    for name, (part, seconds) in parts.items():
        if args.part not in (None, name):
            continue
        left = bench.seconds_left()
        report = bench.results.setdefault("parts", {})
        if left < seconds:
            report[name] = f"left out: {left:.0f} s are left and it takes about {seconds:.0f}"
        else:
            print(f"\n== {name}: {left:.0f} s are left", flush=True)
            start = time.monotonic()
            try:
                with torch.no_grad() if name != "tests" else nullcontext():
                    part(bench)
                report[name] = f"{time.monotonic() - start:.1f} s"
            except Exception:  # whatever it is, the other parts are worth having
                report[name] = f"failed: {traceback.format_exc()[-1500:]}"
        print(f"== {name}: {report[name]}", flush=True)
        bench.write()
