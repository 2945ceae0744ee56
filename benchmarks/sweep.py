"""Measure what a sweep costs over a loop of `generate`, and how it grows with edits and workers.

    python benchmarks/sweep.py overhead            one process; both sides in turns
    python benchmarks/sweep.py growth              1 to 8 edits a source
    python benchmarks/sweep.py workers             216 runs in a process of one and of two threads,
                                                   and by two Ray workers of one thread each

Overhead: for each group of runs that share a source, the sweep makes, measures, encodes and writes
them; the loop that one would write by hand generates and saves them.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from run import run_python

import minip2p
from minip2p import fast
from minip2p.sweep.__main__ import BATCH, grouped
from minip2p.sweep.results import Table
from minip2p.sweep.study import SweepRun, read, resolve
from minip2p.sweep.worker import Worker

SWAPS = ["squirrel=lion", "burger=pizza", "squirrel=cat", "burger=cake"]
WINDOWS = [0.2, 0.8]  # of cross-attention
STUDY = """
model = "emoji"
prompt = "a painting of a squirrel eating a burger"
swap = {swaps}
cross_replace_steps = {windows}
num_inference_steps = 20
seed = {seeds}
"""


def write_study(path: Path, edits: int, seeds: int) -> Path:
    pairs = list(itertools.product(SWAPS, WINDOWS))[:edits]
    swaps = list(dict.fromkeys(swap for swap, _ in pairs))
    windows = list(dict.fromkeys(window for _, window in pairs))
    path.write_text(STUDY.format(swaps=swaps, windows=windows, seeds=list(range(seeds))))
    return path


def plain_loop(model: minip2p.StableDiffusion, runs: Sequence[SweepRun], folder: Path) -> None:
    """Make and save the pictures of runs that share their source, as one would by hand."""
    first = runs[0].run
    result = minip2p.generate(
        model,
        [first.prompts[0], *(run.run.prompts[1] for run in runs)],
        edit=[run.run.edits[0] for run in runs],
        seed=first.seed,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
    )
    for run, image in zip(runs, result.images[1:], strict=True):
        image.save(folder / f"{run.id}.png")


def overhead(edits: int, seeds: int) -> None:
    """Print what a sweep costs over a plain loop, group by group, the two sides in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = read(write_study(folder / "study.toml", edits, seeds))
        (folder / "sweep").mkdir()
        (folder / "loop").mkdir()
        worker, table, model = Worker(study[0].run), Table(folder / "sweep"), minip2p.load()
        groups = grouped(resolve(study, worker.describe()), BATCH)
        ratios, seconds, cpu_ratios = [], [], []
        for turn, group in enumerate(groups):
            sides = {
                "sweep": lambda group=group: table.add(worker.run(group)),
                "loop": lambda group=group: plain_loop(model, group, folder / "loop"),
            }
            took, used = {}, {}
            for side in sorted(sides, reverse=turn % 2 == 1):
                began, cpu_began = time.perf_counter(), time.process_time()
                sides[side]()
                took[side] = time.perf_counter() - began
                used[side] = time.process_time() - cpu_began
            if turn:  # the first only warms up
                ratios.append(took["sweep"] / took["loop"])
                cpu_ratios.append(used["sweep"] / used["loop"])
                seconds.append(took["loop"] / len(group))
        print(
            f"{len(groups[0])} edits a source, {len(ratios)} groups: a plain loop "
            f"{1 / statistics.median(seconds):.2f} runs/s; sweep / plain loop, medians: "
            f"{statistics.median(ratios):.3f} in seconds, {statistics.median(cpu_ratios):.3f} in "
            "CPU time"
        )


def workers(edits: int, seeds: int, repetitions: int) -> None:
    """Print runs a second of whole commands, their start included, and how latents differ."""
    sides = {
        "one process, one thread": ("1",),
        "one process, two threads": ("2",),
        "two Ray workers of one thread": ("1", "--workers", "2", "--device", "cpu"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = write_study(folder / "study.toml", edits, seeds)
        took: dict[str, list[float]] = {}
        for turn in range(repetitions):
            for side, (threads, *options) in sides.items():
                out = folder / f"{side} {turn}"
                words = ["-m", "minip2p.sweep", str(study), "--out", str(out), "--latents"]
                took.setdefault(side, []).append(run_python([*words, *options], int(threads))[0])
        latents = {
            side: {path.stem: np.load(path) for path in (folder / f"{side} 0").glob("*.npy")}
            for side in sides
        }
        first = latents[next(iter(sides))]
        for side, seconds in took.items():
            assert latents[side].keys() == first.keys()
            difference = max(
                np.abs(latents[side][id] - first[id]).max() / np.abs(first[id]).max()
                for id in first
            )
            rate = edits * seeds / statistics.median(seconds)
            print(
                f"{side}: {rate:.2f} runs/s, {seconds}; latents differ from the first side's by "
                f"{difference:.1e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["overhead", "growth", "workers"])
    parser.add_argument("--edits", type=int, default=8, help="of each source")
    parser.add_argument("--seeds", type=int, default=27)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    fast.keep_memory()
    torch.set_num_threads(os.cpu_count() or 1)
    if args.what == "overhead":
        overhead(args.edits, args.seeds)
    elif args.what == "growth":
        for edits in (1, 2, 4, 8):
            overhead(edits, args.seeds)
    else:
        workers(args.edits, args.seeds, args.repetitions)


if __name__ == "__main__":
    main()
