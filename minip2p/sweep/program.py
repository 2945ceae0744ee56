"""Every run of a study: python -m minip2p.sweep study.toml --out runs/study.

A picture a run, named by the run's id, and a row in results.jsonl, written as soon as it is there.
What is there is not made again: start the same command after whatever stopped it.
Runs that have the source in common are made in one call of `generate`, and share its row.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from .. import fast
from ..html.report import write_report
from ..progress import tqdm
from ..scheduler import make_scheduler
from ..tools.cli import Parser, fail, number
from ..tools.files import check_out
from .ray import Work, cluster
from .results import Table, only_one
from .study import Mistakes, Settings, Study, identify, read, settle, source_of
from .worker import Job, Worker


def make_jobs(study: Study, model: Settings) -> list[Job]:
    """The study's runs, each once: those that mean the same picture are one."""
    jobs: dict[str, Job] = {}
    for run in study.runs:
        settings = settle(run, model)
        own, source = identify(settings), identify(source_of(settings))
        row = {"id": own, "source": source, "model": study.about["model"], "swap": run["swap"]}
        row["image"] = run["image"]
        jobs.setdefault(own, Job(own, source, settings, row | settings))
    return list(jobs.values())


def grouped(jobs: Iterable[Job], pixels: int, batch: int | None = None) -> list[list[Job]]:
    """Jobs of one source together, as many as make `batch` pictures with it, or fit."""
    of_source: dict[str, list[Job]] = {}
    for job in jobs:
        of_source.setdefault(job.source, []).append(job)
    groups = []
    for source, some in of_source.items():
        size = some[0].settings["height"] * some[0].settings["width"]
        edits = max(1, (batch or pixels // size) - 1)
        edited = [job for job in some if job.id != source]
        parts = [edited[i : i + edits] for i in range(0, len(edited), edits)] or [[]]
        parts[0] = [job for job in some if job.id == source] + parts[0]
        groups += parts
    return groups


@contextmanager
def crew(study: Study, options: argparse.Namespace) -> Iterator[tuple[Settings, Work]]:
    """Who does the work: what the model tells, and a function from groups to what was made."""
    arguments = study.about, options.device, options.latents
    if options.workers or options.address:
        with cluster(Worker, arguments, options.device, options.workers, options.address) as those:
            yield those
    else:
        worker = Worker(*arguments)
        yield worker.tell(), lambda groups: map(worker.run, groups)


def sweep(study: Study, options: argparse.Namespace) -> int:
    """Make every run of the study that is not there. → how many have an error"""
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder), crew(study, options) as (model, work):
        table = Table(folder)
        table.tidy()
        jobs = make_jobs(study, model)
        todo = [job for job in jobs if not table.has(job.id)]
        groups = grouped(todo, model["pixels"], options.batch)
        with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run") as bar:
            for made in work(groups):
                for row, files in made:
                    table.add(row, files)
                bar.update(len(made))
        table.write_parquet()
    errors = [row for job in jobs if "error" in (row := table.rows[job.id])]
    print(f"{table.path}: {len(jobs)} runs, {len(todo)} of them new, {len(errors)} with an error")
    for row in errors[:1]:
        print(f"The first, {row['id']}: {row['error']}", file=sys.stderr)
    return len(errors)


def dry_run(study: Study, options: argparse.Namespace) -> None:
    """Print how much there is to do, and how long it takes by a first group."""
    worker = Worker(study.about, options.device)
    table, model = Table(options.out), worker.tell()
    jobs = make_jobs(study, model)
    todo = [job for job in jobs if not table.has(job.id)]
    groups = grouped(todo, model["pixels"], options.batch)

    def calls(group: Sequence[Job]) -> int:
        of = group[0].settings
        return len(
            make_scheduler(worker.model, of["num_inference_steps"], of["scheduler"]).timesteps
        )

    def work(group: Sequence[Job]) -> int:
        of = group[0].settings
        return calls(group) * pictures(group) * of["height"] * of["width"]

    inversions = {group[0].source: calls(group) for group in groups if group[0].row["image"]}
    unet_calls = sum(map(calls, groups)) + sum(inversions.values())
    print(
        f"{len(study.runs)} runs, {len(jobs)} of them different, {len(todo)} to be made: "
        f"{sum(map(pictures, groups))} pictures with their sources in {len(groups)} calls of "
        f"generate, {unet_calls} UNet calls"
    )
    if groups:
        short = {"num_inference_steps": 1}
        worker.run([replace(job, settings=job.settings | short) for job in groups[0]])  # warms up
        began = time.perf_counter()
        worker.run(groups[0])
        took = time.perf_counter() - began
        seconds = took * sum(map(work, groups)) / work(groups[0]) / (options.workers or 1)
        among = f" among {options.workers} workers" if options.workers else ""
        print(f"about {timedelta(seconds=round(seconds))}{among}: the first call took {took:.2f} s")


def pictures(group: Sequence[Job]) -> int:
    """Of a call of generate: the edits and their source."""
    return 1 + sum(job.id != job.source for job in group)


# --- the command line -----------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m minip2p.sweep",
        description="Make every run of a study; what is there is not made again. "
        "`python -m minip2p.sweep report FOLDER` writes the results as a page.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "study", type=Path, help="a .toml file, whose lists are multiplied, or .jsonl, a run a line"
    )
    add("--out", type=Path, metavar="FOLDER", help="for the results; default: runs/ and its name")
    add("--dry-run", action="store_true", help="say how many runs there are and how long they take")
    add("--batch", type=number(int, 2, 1024), help="pictures at a time; default: as many as fit")
    add("--device", help="cpu, cuda, mps; by default the fastest that is there")
    add("--latents", action="store_true", help="keep each picture's latents, too, as ID.npy")
    add("--workers", type=number(int, 1, 4096), help="processes that work at a time, on Ray")
    add("--address", help="of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    return parser


def run(argv: Sequence[str]) -> int:
    if argv[:1] == ["report"]:
        parser = Parser(prog="python -m minip2p.sweep report")
        parser.add_argument("folder", type=Path, help="with the results of a sweep")
        print(write_report(parser.parse_args(argv[1:]).folder))
        return 0
    options = make_parser().parse_args(argv)
    study = read(options.study)
    options.out = options.out or Path("runs") / options.study.stem
    check_out(options.out)
    fast.keep_memory()
    if options.dry_run:
        dry_run(study, options)
        return 0
    return 1 if sweep(study, options) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 if a run has an error, 2 for a mistake, 130 for an interruption."""
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except Mistakes as mistakes:
        for sentence in mistakes.sentences:
            fail(sentence)
        return 2
    except (OSError, ValueError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return 130
