"""What a sweep costs over a bare loop of `generate`, and how it grows with edits and workers.

    python benchmarks/sweep.py overhead            one process; the two sides take turns
    python benchmarks/sweep.py growth              1 to 8 edits a source
    python benchmarks/sweep.py workers             216 runs in a process of one and of two threads,
                                                   and by two Ray workers of one thread each

Overhead: for each group of runs that share a source, what the sweep does (its worker makes,
measures and encodes them, its table writes them) beside the loop one would write: generate, save.
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
from minip2p.sweep.program import grouped, make_jobs
from minip2p.sweep.results import Table
from minip2p.sweep.study import edit_of, read
from minip2p.sweep.worker import Job, Worker

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


def bare(model: minip2p.StableDiffusion, jobs: Sequence[Job], folder: Path) -> None:
    """The loop one would write."""
    of = jobs[0].settings
    prompts = [of["prompt"], *(job.settings["to"] for job in jobs)]
    names = "seed", "num_inference_steps", "guidance_scale"
    result = minip2p.generate(
        model,
        prompts,
        edit=[edit_of(job.settings) for job in jobs],
        **{name: of[name] for name in names},
    )
    for job, image in zip(jobs, result.images[1:], strict=True):
        image.save(folder / f"{job.id}.png")


def overhead(edits: int, seeds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = read(write_study(folder / "study.toml", edits, seeds))
        worker, table, loop = Worker(study.about), Table(folder / "sweep"), folder / "loop"
        table.folder.mkdir()
        loop.mkdir()
        told = worker.tell()
        groups = grouped(make_jobs(study, told), told["pixels"])
        model = minip2p.load()
        ratios, seconds, cpu = [], [], []
        for turn, group in enumerate(groups):

            def sweep(group: Sequence[Job] = group) -> None:
                for row, files in worker.run(group):
                    table.add(row, files)

            def one(group: Sequence[Job] = group) -> None:
                bare(model, group, loop)

            took, used = {}, {}
            for side in (sweep, one) if turn % 2 else (one, sweep):
                began, at = time.perf_counter(), time.process_time()
                side()
                took[side] = time.perf_counter() - began
                used[side] = time.process_time() - at
            if turn:  # the first only warms up
                ratios.append(took[sweep] / took[one])
                cpu.append(used[sweep] / used[one])
                seconds.append(took[one] / len(group))
        print(
            f"{len(groups[0])} edits a source, {len(ratios)} groups: a bare loop "
            f"{1 / statistics.median(seconds):.2f} runs/s; sweep / bare loop, medians: "
            f"{statistics.median(ratios):.3f} in seconds, {statistics.median(cpu):.3f} in CPU time"
        )


def timed(study: Path, out: Path, threads: int, *more: str) -> float:
    """Seconds from the start of the command to its end."""
    command = ["-m", "minip2p.sweep", str(study), "--out", str(out), "--latents", *more]
    return run_python(command, threads)[0]


def workers(edits: int, seeds: int, repetitions: int) -> None:
    """Wall clock of whole commands, starting included, and how far latents are from each other."""
    sides = {
        "one process, one thread": (1,),
        "one process, two threads": (2,),
        "two Ray workers of one thread": (1, "--workers", "2", "--device", "cpu"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = write_study(folder / "study.toml", edits, seeds)
        took: dict[str, list[float]] = {}
        for turn in range(repetitions):
            for side, (threads, *more) in sides.items():
                out = folder / f"{side} {turn}"
                took.setdefault(side, []).append(timed(study, out, threads, *more))
        first = {
            path.stem: np.load(path) for path in (folder / f"{next(iter(sides))} 0").glob("*.npy")
        }
        for side, seconds in took.items():
            there = {p.stem: np.load(p) for p in (folder / f"{side} 0").glob("*.npy")}
            assert there.keys() == first.keys()
            apart = max(
                np.abs(there[id] - first[id]).max() / np.abs(first[id]).max() for id in first
            )
            rate = edits * seeds / statistics.median(seconds)
            print(
                f"{side}: {rate:.2f} runs/s, {seconds}; latents from the first side's: {apart:.1e}"
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
