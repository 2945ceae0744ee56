"""Make every run of a study: python -m minip2p.sweep study.toml --out runs/study.

Each run has a picture, named by the run's id, and a row in results.jsonl, both written as soon as
they are made. What is there is not made again, so the same command goes on after whatever stopped
it. Runs that share their source are made in one call of `generate`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from .. import fast
from ..html.report import write_report
from ..outputs import check_folder
from ..program import Parser, complain, file, number, run_program, say
from ..progress import tqdm
from ..scheduler import make_scheduler
from ..settings import Bounds
from .ray import Work, cluster
from .results import Table, locked
from .study import StudyRun, SweepRun, read, resolve
from .worker import Worker

BATCH = 16  # on a CPU more pictures at a time are not faster, and on a GPU hardly


def grouped(runs: Iterable[SweepRun], batch: int) -> list[list[SweepRun]]:
    """Return groups of runs that share their source: at most `batch` pictures with the source."""
    of_source: dict[str, list[SweepRun]] = {}
    for run in runs:
        of_source.setdefault(run.source, []).append(run)
    groups = []
    for source_runs in of_source.values():
        edits = [run for run in source_runs if run.is_edit]
        parts = [edits[i : i + batch - 1] for i in range(0, len(edits), batch - 1)] or [[]]
        parts[0] = [run for run in source_runs if not run.is_edit] + parts[0]
        groups += parts
    return groups


@contextmanager
def workers(run: StudyRun, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Work]]:
    """Load the study's model. Give its description, and a function from groups to what was made."""
    arguments = run.run, options.device, options.latents
    if options.workers or options.address:
        with cluster(Worker, arguments, options.device, options.workers, options.address) as ray:
            yield ray
    else:
        worker = Worker(*arguments)
        yield worker.describe(), lambda groups: map(worker.run, groups)


def suffixes(options: argparse.Namespace) -> list[str]:
    return [".png", ".npy"] if options.latents else [".png"]


def sweep(study: Sequence[StudyRun], options: argparse.Namespace) -> int:
    """Make every run of the study that is not there. Return how many have an error."""
    folder = options.out
    Table(folder)  # raises UserError for a foreign table before a model is loaded
    with workers(study[0], options) as (model, work):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            table, runs = Table(folder), resolve(study, model)
            todo = table.unmade(runs, suffixes(options))
            table.drop({run.id for run in todo})
            with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run") as bar:
                for results in work(grouped(todo, options.batch)):
                    table.add(results)
                    bar.update(len(results))
    errors = [row for run in runs if "error" in (row := table.rows[run.id])]
    say(f"{table.path}: {len(runs)} runs, {len(todo)} of them new, {len(errors)} with an error")
    for row in errors[:1]:
        complain(f"The first, {row['id']}: {row['error']}")
    return len(errors)


def dry_run(study: Sequence[StudyRun], options: argparse.Namespace) -> None:
    """Print how much there is to do, and how long it takes, estimated by a first call."""
    worker = Worker(study[0].run, options.device)
    runs = resolve(study, worker.describe())
    todo = Table(options.out).unmade(runs, suffixes(options))
    groups = grouped(todo, options.batch)

    def calls(group: Sequence[SweepRun]) -> int:
        run = group[0].run
        return len(make_scheduler(worker.model, run.num_inference_steps, run.scheduler).timesteps)

    def pictures(group: Sequence[SweepRun]) -> int:
        return 1 + sum(run.is_edit for run in group)

    def work(group: Sequence[SweepRun]) -> int:
        run = group[0].run
        assert run.height and run.width
        return calls(group) * pictures(group) * run.height * run.width

    inversions = {group[0].source: calls(group) for group in groups if group[0].run.source}
    unet_calls = sum(map(calls, groups)) + sum(inversions.values())
    say(
        f"{len(study)} runs, {len(runs)} of them different, {len(todo)} to be made: "
        f"{sum(map(pictures, groups))} pictures with their sources in {len(groups)} calls of "
        f"generate, {unet_calls} UNet calls"
    )
    if not groups:
        return
    complain("One call is made to estimate the time; nothing is written.")
    one_step = [replace(r, run=replace(r.run, num_inference_steps=1)) for r in groups[0]]
    worker.run(one_step)  # the first call of all is slower
    began = time.perf_counter()
    worker.run(groups[0])
    took = time.perf_counter() - began
    seconds = took * sum(map(work, groups)) / work(groups[0]) / (options.workers or 1)
    among = f" among {options.workers} workers" if options.workers else ""
    say(f"about {timedelta(seconds=round(seconds))}{among}: the first call took {took:.2f} s")


# --- the command line -----------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m minip2p.sweep",
        description="Make every run of a study; what is there is not made again. "
        "`python -m minip2p.sweep report FOLDER` writes the results as a page.",
    )
    add = parser.add_argument
    add(
        "study",
        type=file,
        help="a .toml file, whose lists are multiplied, or a .jsonl file with a run in each line",
    )
    add("--out", type=file, metavar="FOLDER", help="for the results; default: runs/ and its name")
    add("--dry-run", action="store_true", help="say how many runs there are, and make one call to "
        "estimate how long they take")  # fmt: skip
    add("--batch", type=number(Bounds(2, 256, is_whole=True)), default=BATCH,
        help="pictures in a call, the source among them; default: %(default)s")  # fmt: skip
    add("--device", help="cpu, cuda or mps; default: the fastest one")
    add("--latents", action="store_true", help="keep the latents of each picture, too, as ID.npy")
    add(
        "--workers",
        type=number(Bounds(1, 4096, is_whole=True)),
        help="processes that work at a time, on Ray",
    )
    add("--address", help="of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    return parser


def run(argv: Sequence[str]) -> int:
    if argv[:1] == ["report"]:
        parser = Parser(prog="python -m minip2p.sweep report")
        parser.add_argument("folder", type=file, help="with the results of a sweep")
        say(write_report(parser.parse_args(argv[1:]).folder))
        return 0
    options = make_parser().parse_args(argv)
    study = read(options.study)
    options.out = options.out or Path("runs") / options.study.stem
    check_folder(options.out)
    fast.keep_memory()
    if options.dry_run:
        dry_run(study, options)
        return 0
    return 1 if sweep(study, options) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status: 1 if a run has an error, else run_program's."""
    return run_program(run, argv, "Interrupted: the same command goes on from here.")


if __name__ == "__main__":
    sys.exit(main())
