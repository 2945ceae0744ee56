"""Measure minip2p beside diffusers, on the same weights, with the same result.

    python benchmarks/run.py call bfloat16 pipeline memory --prepared    SD 1.5's size
    python benchmarks/run.py bundled growth                              the bundled model
    python benchmarks/run.py gpu                                         SD 1.5's size on one GPU
    python benchmarks/run.py show plot                                   tables and a plot of all

SD 1.5's size is measured with random weights, on which speed does not depend.

Every part adds its figures to results.json beside this file. Sides of a comparison take turns in
one process, in another order each round; a ratio is the median of the rounds' ratios. Seconds are
wall clock; CPU seconds, of all threads, are less disturbed by other work on the machine. Peak
memory is measured in processes of its own, above the weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

BUNDLED = HERE.parent / "minip2p" / "models" / "emoji"
GUIDANCE = 7.5

Sides = dict[str, Callable[[], Any]]


# --- measuring -----------------------------------------------------------------------------------


def take_turns(
    sides: Sides, rounds: int, base: str, check: dict[str, str], warm: bool = True
) -> list[dict]:
    """A row of figures for each side; ratios to `base`. check: whose output one's should be.

    warm: one round before those that count.
    """
    import torch

    from minip2p import fast

    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Any] = {}
    names = list(sides)
    for number in range(not warm, rounds + 1):
        for name in names if number % 2 else names[::-1]:
            # As by default for diffusers, as minip2p's command line has it for minip2p.
            fast.keep_memory(not name.startswith("diffusers") or name.endswith("kept"))
            wall, cpu = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                output = sides[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(
                f"  {number}/{rounds} {name}: {wall:.2f} s, CPU {cpu:.2f} s",
                file=sys.stderr,
                flush=True,
            )
            outputs.setdefault(name, output.float().cpu())
            if number:
                walls[name].append(wall)
                cpus[name].append(cpu)
    rows = []
    for name in sides:
        row = {"side": name, "seconds": median(walls[name]), "cpu": median(cpus[name])}
        row["ratio"] = median([a / b for a, b in zip(walls[name], walls[base], strict=True)])
        row["cpu ratio"] = median([a / b for a, b in zip(cpus[name], cpus[base], strict=True)])
        row["least cpu ratio"] = min(cpus[name]) / min(cpus[base])
        row["each"] = [[round(s, 3) for s in times] for times in (walls[name], cpus[name])]
        if name in check:
            truth = outputs[check[name]]
            row["error"] = ((outputs[name] - truth).norm() / truth.norm()).item()
        rows.append(row)
    return rows


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def machine(threads: int) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        info: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                info[name.strip()] = value.strip()
        flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in info["flags"]]
        cpu = f"{info['model name']} family {info['cpu family']} ({', '.join(flags)})"
    packages = ("torch", "diffusers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads} | versions


# --- models --------------------------------------------------------------------------------------


def full_size(folder: Path) -> Path:
    """A model of SD 1.5's size with random weights, written once: 4 GB."""
    if (folder / "model_index.json").exists():
        return folder
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    print(f"Writing random weights to {folder}.", file=sys.stderr)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def load_pipeline(folder: Path, dtype: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, safety_checker=None, local_files_only=True
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_both(args: argparse.Namespace) -> tuple[Any, Any]:
    """diffusers' pipeline and minip2p's model, with one copy of the weights."""
    import torch

    import minip2p

    folder, dtype = full_size(args.cache), getattr(torch, args.dtype)
    pipeline = load_pipeline(folder, dtype)
    model = minip2p.load(folder, dtype=dtype, device="cpu")
    for mine, theirs in ((model.unet, pipeline.unet), (model.vae, pipeline.vae.float())):
        mine.load_state_dict(theirs.state_dict(), assign=True)
    return pipeline, model


def fast_model(args: argparse.Namespace) -> Any:
    """minip2p's model after fast.prepare, which replaces weights: a copy of its own."""
    import torch

    import minip2p
    from minip2p import fast

    model = minip2p.load(full_size(args.cache), dtype=getattr(torch, args.dtype), device="cpu")
    start = time.perf_counter()
    fast.prepare(model.unet)
    print(f"Prepared in {time.perf_counter() - start:.1f} s.", file=sys.stderr)
    return model


# --- one UNet call -------------------------------------------------------------------------------


def part_call(args: argparse.Namespace) -> dict:
    from sides import call_sides

    pipeline, model = load_both(args)
    quick = fast_model(args) if args.prepared and args.dtype == "float32" else None
    tables = {}
    for size in args.latents:
        for edits in args.edits:
            title = f"{size}x{size} latents, 1 source + {edits}, {args.dtype}"
            print(title, file=sys.stderr)
            sides, check = call_sides(pipeline.unet, model, quick, edits, size)
            chosen = {k: v for k, v in sides.items() if not args.sides or k in args.sides}
            check = {k: v for k, v in check.items() if k in chosen and v in chosen}
            base = next(iter(chosen))
            tables[title] = take_turns(chosen, args.rounds, base, check, not args.cold)
    return tables


def part_bfloat16(args: argparse.Namespace) -> dict:
    """One plain guided UNet call in bfloat16, beside diffusers in float32, which is the truth."""
    import torch
    from sides import call_sides

    exact = load_pipeline(full_size(args.cache), torch.float32)
    halves = argparse.Namespace(**vars(args) | {"dtype": "bfloat16"})
    pipeline, model = load_both(halves)
    prepared = fast_model(halves) if args.prepared else None
    names = ["diffusers", "minip2p", "minip2p, word swap"]
    names += ["minip2p, prepared", "minip2p, prepared, word swap"] if args.prepared else []
    tables = {}
    for size in args.latents:
        sides = {"diffusers": call_sides(exact.unet, None, None, 1, size)[0]["diffusers"]}
        in_bfloat16 = call_sides(pipeline.unet, model, prepared, 1, size)[0]
        sides |= {f"{name}, bfloat16": in_bfloat16[name] for name in names}
        check = {name: "diffusers" for name in sides if "bfloat16" in name and "swap" not in name}
        title = f"{size}x{size} latents, 1 source + 1"
        tables[title] = take_turns(sides, args.rounds, "diffusers", check, not args.cold)
    return tables


# --- whole runs ----------------------------------------------------------------------------------


def part_pipeline(args: argparse.Namespace) -> dict:
    """Prompts to pictures: text, steps and decoding; the latents are compared."""
    import torch
    from sides import prompts_of

    import minip2p

    steps = args.steps or 3
    pipeline, model = load_both(args)
    quick = fast_model(args) if args.prepared and args.dtype == "float32" else None
    tables = {}
    for size in args.latents:
        for edits in args.edits:
            prompts = prompts_of(edits)
            noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(8888))

            def diffusers(prompts: list[str] = prompts, noise: Any = noise) -> Any:
                latents: list[Any] = []

                def keep_latents(_: Any, step: int, t: Any, kept: dict) -> dict:
                    latents.append(kept["latents"])
                    return {}

                pipeline(
                    prompts,
                    latents=noise.expand(len(prompts), -1, -1, -1).to(pipeline.unet.dtype),
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    callback_on_step_end=keep_latents,
                )
                return latents[-1]

            def ours(
                net: Any, edit: Any, prompts: list[str] = prompts, noise: Any = noise
            ) -> Callable[[], Any]:
                return lambda: (
                    minip2p.generate(
                        net,
                        prompts,
                        edit=edit,
                        latents=noise,
                        num_inference_steps=steps,
                        guidance_scale=GUIDANCE,
                        scheduler="ddim",
                    ).latents
                )

            swap = minip2p.WordSwap(1.0, 1.0)
            sides: Sides = {"diffusers": diffusers}
            for name, net in (("minip2p", model), ("minip2p, prepared", quick)):
                if net:
                    sides |= {name: ours(net, None), f"{name}, word swap": ours(net, swap)}
            title = f"{size}x{size} latents, {len(prompts)} prompts, {steps} steps"
            check = {
                name: "diffusers"
                for name in sides
                if name.startswith("minip2p") and "swap" not in name
            }
            tables[f"{title}, {args.dtype}"] = take_turns(sides, args.rounds, "diffusers", check)
    return tables


# --- memory --------------------------------------------------------------------------------------


def part_memory(args: argparse.Namespace) -> dict:
    """Each side in processes of its own: the median peak of a UNet call."""
    names = (
        *("diffusers", "diffusers, written-out edit", "minip2p", "minip2p, word swap"),
        *("minip2p, swap and blend", "minip2p, swap, blend, a word's maps"),
        *(["minip2p, prepared", "minip2p, prepared, word swap"] if args.prepared else []),
    )
    names = tuple(name for name in names if not args.sides or name in args.sides)
    tables: dict[str, list] = {}
    for size in args.latents:
        for edits in args.edits:
            title = f"{size}x{size} latents, 1 source + {edits}, {args.dtype}"
            tables[title] = []
            for name in names:
                print(f"  {title}: {name}", file=sys.stderr)
                command = [__file__, "one", "--side", name, "--dtype", args.dtype]
                command += ["--latents", str(size), "--edits", str(edits)]
                command += ["--cache", str(args.cache.resolve()), "--threads", str(args.threads)]
                peaks = []
                for _ in range(args.processes):  # what loading left behind differs by some 50 MB
                    printed = run_python(command, args.threads)[2]
                    peaks.append(json.loads(printed.splitlines()[-1]))
                keys = "extra MB", "model MB"
                tables[title].append(
                    {"side": name} | {key: median([peak[key] for peak in peaks]) for key in keys}
                )
            plain = next(row["extra MB"] for row in tables[title] if row["side"] == "minip2p")
            for row in tables[title]:
                row["of minip2p's"] = row["extra MB"] / plain
    return tables


def part_one(args: argparse.Namespace) -> None:
    """One side alone: a UNet call, and how far memory rises above the loaded model."""
    import torch
    from sides import call_sides

    import minip2p
    from minip2p import fast

    dtype = getattr(torch, args.dtype)
    pipeline = model = quick = None
    if args.side.startswith("diffusers"):
        pipeline = load_pipeline(full_size(args.cache), dtype)
        net = pipeline.unet
    else:
        loaded = minip2p.load(full_size(args.cache), dtype=dtype, device="cpu")
        net = loaded.unet
        if "prepared" in args.side:
            fast.prepare(net)
            quick = loaded
        else:
            model = loaded
        fast.keep_memory(False)  # gives back what preparing took
        fast.keep_memory()
    # Every page of the weights is in memory before the first call, mapped from its file or not.
    [float(p.sum()) for p in net.parameters() if not p.is_mkldnn]
    unet = pipeline and pipeline.unet
    sides, _ = call_sides(unet, model, quick, args.edits[0], args.latents[0])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    with torch.inference_mode():
        for _ in range(2 if "written-out" in args.side else 1):  # its store grows once more
            sides[args.side]()
    extra = resident("VmHWM") - before
    print(json.dumps({"extra MB": extra / 1e6, "model MB": before / 1e6}))


# --- the bundled model ---------------------------------------------------------------------------

COLD = """
import sys, time
clock = []
def lap(): clock.append((time.perf_counter(), time.process_time()))
lap()
import minip2p; lap()
from minip2p import show, text
model = minip2p.load(device="cpu"); lap()
prompts = ["a squirrel eating a burger", "a lion eating a burger"]
text.encode(model.text_encoder, [text.tokenize(model.tokenizer, p) for p in prompts]); lap()
decode = minip2p.pipeline.decode_latents
minip2p.pipeline.decode_latents = lambda *args: (lap(), decode(*args))[1]
settings = {"edit": minip2p.WordSwap(), "num_inference_steps": int(sys.argv[2]), "seed": 8888}
result = minip2p.generate(model, prompts, **settings); lap()
from pathlib import Path
for i, image in enumerate(result.images): image.save(Path(sys.argv[1]) / f"{i}.png")
show.grid([result.images], [prompts]).save(Path(sys.argv[1]) / "row.png"); lap()
for a, b in zip(clock, clock[1:]): print(b[0] - a[0], b[1] - a[1])
"""


def part_bundled(args: argparse.Namespace) -> dict:
    """From a new process to written pictures, on the bundled model: two prompts."""
    steps = str(args.steps or 50)
    prompt = "a squirrel eating a burger"
    with tempfile.TemporaryDirectory() as folder:
        cold = Path(folder, "cold")
        cold.mkdir()  # minip2p.sample replaces nobody else's pictures
        ours, out = ["-m", "minip2p.sample", prompt], ["--out", folder]
        whole_run = [*out, "--steps", steps]
        commands = {
            "minip2p.sample, one picture of 1 step": [*ours, *out, "--steps", "1"],
            "minip2p.sample, one picture": [*ours, *whole_run],
            "minip2p.sample, source and swap": [*ours, "--swap", "squirrel=lion", *whole_run],
            "diffusers, two prompts": [str(HERE / "run.py"), "diffusers-bundled", *whole_run],
        }
        split: list[Any] = []
        whole: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(args.rounds):
            lines = run_python(["-c", COLD, str(cold), steps], args.threads)[2].splitlines()
            split.append([[float(seconds) for seconds in line.split()] for line in lines])
            for name, command in commands.items():
                whole[name].append(run_python(command, args.threads)[:2])
            print(f"  {number + 1}/{args.rounds}", file=sys.stderr)
    parts = ("imports", "load", "text", f"{steps} steps of both", "decode", "write")
    times = dict(zip(parts, zip(*split, strict=True), strict=True))
    return {
        title: [
            {"what": name, "seconds": median([s for s, _ in each])}
            | {"cpu": median([c for _, c in each]), "least cpu": min(c for _, c in each)}
            for name, each in table.items()
        ]
        for title, table in (("one process, by parts", times), ("whole processes", whole))
    }


def run_python(arguments: list[str], threads: int) -> tuple[float, float, str]:
    """Wall and CPU seconds of a new Python process, and what it printed."""
    start, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"A measured process failed:\n{done.stderr}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = now.ru_utime - cpu.ru_utime + now.ru_stime - cpu.ru_stime
    return time.perf_counter() - start, used, done.stdout


def part_diffusers_bundled(args: argparse.Namespace) -> None:
    """The same two prompts through diffusers, written to --out."""
    import torch

    pipeline = load_pipeline(BUNDLED, torch.float32)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8888))
    images = pipeline(
        ["a squirrel eating a burger", "a lion eating a burger"],
        latents=noise.expand(2, -1, -1, -1),
        num_inference_steps=args.steps or 50,
        guidance_scale=4.0,
    ).images
    for i, image in enumerate(images):
        image.save(args.out / f"{i}.png")


def part_growth(args: argparse.Namespace) -> dict:
    """How the cost of a run grows, on the bundled model: edits, sizes, steps; plain and swapped."""
    from sides import prompts_of

    import minip2p

    model = minip2p.load(device="cpu")
    swap = minip2p.WordSwap(1.0, 1.0)

    def both(edits: int = 1, pixels: int = 128, steps: int = 10) -> tuple[Any, Any]:
        def run(edit: Any) -> Callable[[], Any]:
            return lambda: (
                minip2p.generate(
                    model,
                    prompts_of(edits),
                    edit=edit,
                    height=pixels,
                    width=pixels,
                    num_inference_steps=steps,
                ).latents
            )

        return run(None), run(swap)

    tables = {}
    for title, cases in {
        "edits, beside 1 source (128 px, 10 steps)": [
            (str(n), both(edits=n)) for n in (1, 2, 4, 8)
        ],
        "pixels (1 source + 1, 4 steps)": [
            (f"{p} px", both(pixels=p, steps=4)) for p in args.pixels
        ],
        "steps (128 px, 1 source + 1)": [(str(s), both(steps=s)) for s in (10, 25, 50, 100)],
    }.items():
        table = []
        for name, (plain, swapped) in cases:
            sides = {"plain": plain, "swap": swapped}
            rows = take_turns(sides, args.rounds, "plain", {})
            table.append({"what": name} | {row["side"]: row["seconds"] for row in rows})
            table[-1] |= {"swap / plain": rows[1]["ratio"], "cpu ratio": rows[1]["cpu ratio"]}
        tables[title] = table
    return tables


# --- results -------------------------------------------------------------------------------------


def keep_results(path: Path, part: str, tables: dict, args: argparse.Namespace) -> None:
    results = json.loads(path.read_text()) if path.exists() else {}
    command = "python benchmarks/run.py " + " ".join(args.words)
    results.setdefault(part, {}).update(
        {
            title: {"command": command, "machine": machine(args.threads), "rows": rows}
            for title, rows in tables.items()
        }
    )
    path.write_text(json.dumps(results, indent=1) + "\n")


def show(part: str, title: str, rows: Sequence[dict]) -> str:
    """A Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "each"))
    lines = [f"**{part}: {title}**", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        cells = (cell(name, row.get(name)) for name in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name == "error":
        return f"{value:.1e}"
    return f"{value:,.0f}" if "MB" in name else f"{value:.2f}"


def plot(results: dict) -> str:
    """Bars of each `call` table, relative to plain diffusers: an SVG."""
    colours = {"diffusers": "#9aa3ad", "minip2p": "#2f6fb0"}
    body, y = [], 10
    for title, entry in results["call"].items():
        if entry["rows"][0]["side"] != "diffusers":
            continue
        y += 26
        body.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
        for row in entry["rows"]:
            y += 20
            colour = next(c for name, c in colours.items() if row["side"].startswith(name))
            ratio = row["cpu ratio"]
            body.append(f'<text x="10" y="{y}">{row["side"]}</text>')
            body.append(
                f'<rect x="260" y="{y - 12}" width="{ratio * 200:.0f}" height="15" '
                f'fill="{colour}"/>'
            )
            body.append(f'<text x="{266 + ratio * 200:.0f}" y="{y}">{ratio:.2f}</text>')
        body.append(
            f'<line x1="460" x2="460" y1="{y - 20 * len(entry["rows"]) + 6}" y2="{y + 5}" '
            'stroke="#333" stroke-dasharray="3 3"/>'
        )
    y += 30
    body.append(f'<text x="10" y="{y}">CPU time of one UNet call; plain diffusers is 1</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{y + 15}" '
        'font-family="sans-serif" font-size="13">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


PARTS = {
    "call": part_call,
    "bfloat16": part_bfloat16,
    "pipeline": part_pipeline,
    "memory": part_memory,
    "bundled": part_bundled,
    "growth": part_growth,
}
ALONE = {"one": part_one, "diffusers-bundled": part_diffusers_bundled}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", choices=[*PARTS, *ALONE, "gpu", "show", "plot"])
    add("--latents", type=int, nargs="+", default=[32, 64], help="sizes: pixels / 8")
    add("--edits", type=int, nargs="+", default=[1, 3])
    add("--rounds", type=int, default=5)
    add("--processes", type=int, default=3, help="of `memory`, for each side")
    add("--steps", type=int, help="of `pipeline` (3) and `bundled` (50)")
    add("--pixels", type=int, nargs="+", default=[64, 128, 256, 384], help="of `growth`")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--dtype", default="float32")
    add("--prepared", action="store_true", help="beside the rest, minip2p after fast.prepare")
    add("--sides", nargs="+", help="of `call` and `memory`: only these")
    add("--cold", action="store_true", help="of `call`, `bfloat16`: no round to warm up")
    add("--side", help="of `one`")
    add("--out", type=Path, help="folder of `diffusers-bundled` and `gpu` (out/gpu)")
    add(
        "--minutes",
        type=float,
        default=8.0,
        help="of `gpu`: parts for which time is short are left out",
    )
    add("--part", help="of `gpu`: this part alone")
    add("--rehearse", action="store_true", help="of `gpu`: narrow models on the CPU")
    add("--results", type=Path, default=HERE / "results.json")
    add(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "minip2p-benchmark",
        help="where the random weights are kept, 4 GB",
    )
    args = parser.parse_args()
    args.words = [word for word in sys.argv[1:] if not word.startswith(("--results=", "--cache="))]

    import torch

    torch.set_num_threads(args.threads)
    for part in args.parts:
        if part in ALONE:
            ALONE[part](args)
        elif part == "gpu":
            import gpu

            gpu.measure(args)
        elif part == "show":
            for name, tables in json.loads(args.results.read_text()).items():
                for title, entry in tables.items():
                    print(show(name, title, entry["rows"]))
        elif part == "plot":
            (HERE / "plot.svg").write_text(plot(json.loads(args.results.read_text())))
        else:
            tables = PARTS[part](args)
            keep_results(args.results, part, tables, args)
            for title, rows in tables.items():
                print(show(part, title, rows), flush=True)


if __name__ == "__main__":
    main()
