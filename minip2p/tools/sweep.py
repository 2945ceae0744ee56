"""Every run of a study: python -m minip2p.sweep study.toml --out runs/study.

A picture a run, named by the run's id, and a row in results.jsonl, written as soon as it is there.
What is there is not made again: start the same command after whatever stopped it.
Runs that have the source in common are made in one call of `generate`, and share its row.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from .. import text
from ..sample import generate
from ..settings import make_scheduler
from ..weights import StableDiffusion, load
from . import fast
from .cli import Parser, check_out, fail, number
from .measure import Looks, Words, measure
from .study import Mistakes, Settings, Study, changed_words, edit_of, identify, read, settle
from .study import source_of as source_settings

MOST = 16  # pictures at a time by default: on a CPU more are not faster, and on a GPU hardly
BYTES = 250  # of memory for a latent pixel of a row and a channel of the first level; 175 measured

Row = dict[str, Any]
Files = dict[str, bytes]  # by name


@dataclass(frozen=True)
class Job:
    """A run with its model's part filled in."""

    id: str
    source: str  # the id of its source picture
    settings: Settings
    row: Row  # what the table has of it beforehand


# --- where the work is done -----------------------------------------------------------------------


class Remembering(nn.Module):
    """A text encoder that encodes every text once, alone: the same in whatever batch."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.once = lru_cache(256)(self.one)

    def one(self, *ids: int) -> Tensor:
        device = next(self.encoder.parameters()).device
        return self.encoder(input_ids=torch.tensor([ids], device=device)).last_hidden_state

    def forward(self, input_ids: Tensor) -> Any:
        rows = [self.once(*ids) for ids in input_ids.tolist()]
        return SimpleNamespace(last_hidden_state=torch.cat(rows))


class Worker:
    """A model, and what is made with it."""

    def __init__(self, about: Settings, device: str | None = None, latents: bool = False):
        """about: Study.about. latents: keep them, too."""
        dtype = getattr(torch, about["dtype"])
        model = load(about["model"], tokenizer=about["tokenizer"], device=device, dtype=dtype)
        self.about, self.latents = about, latents
        self.model = replace(model, text_encoder=Remembering(model.text_encoder))

    def tell(self) -> Settings:
        """What settles a run's settings, and how many pixels of pictures fit at a time."""
        model = self.model
        h, w = model.sample_size
        recommended = {"scheduler": model.scheduler, "defaults": model.defaults}
        recommended |= {"height": h * model.vae.f, "width": w * model.vae.f}
        ours = {"id": identity(model), "dtype": self.about["dtype"]}
        return ours | recommended | {"pixels": pixels_that_fit(model)}

    def run(self, jobs: Sequence[Job]) -> list[tuple[Row, Files]]:
        """Jobs of one source, in one call of generate. A job that raises has its error in its row.

        The source picture is among the first job's files.
        """
        try:
            return self.make(jobs)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if len(jobs) > 1:  # which of them it is
            return [made for job in jobs for made in self.run([job])]
        return [(jobs[0].row | {"error": said}, {})]

    def make(self, jobs: Sequence[Job]) -> list[tuple[Row, Files]]:
        settings, edited = jobs[0].settings, [job for job in jobs if job.settings["to"] is not None]
        prompts = [settings["prompt"], *(job.settings["to"] for job in edited)]
        words = [self.words(job.settings) for job in edited]
        all_words = dict.fromkeys(word for pair in words for some in pair for word in some)
        began = time.perf_counter()
        result = generate(
            self.model,
            prompts,
            edit=[edit_of(job.settings) for job in edited] or None,
            store=Looks(words=list(all_words)) if all_words else False,
            **{key: settings[key] for key in OF_GENERATE},
        )
        shared: Row = {
            "seconds": round((time.perf_counter() - began) / len(jobs), 4),
            "device": str(self.model.device),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "minip2p": version("minip2p"),
        }
        source, *images = result.images
        found = {jobs[0].source: (shared, self.files(jobs[0].source, source, result.latents[0]))}
        for r, (job, image) in enumerate(zip(edited, images, strict=True), 1):
            measured = measure(source, image, result.attention, r, words[r - 1])
            files = self.files(job.id, image, result.latents[r])
            found[job.id] = (shared | measured, files)
        made = [(job.row | found[job.id][0], found[job.id][1]) for job in jobs]
        made[0][1].update(found[jobs[0].source][1])
        return made

    def words(self, settings: Settings) -> Words:
        """The changed words that the model sees, in the source and in the edited prompt."""
        old, new = changed_words(settings)
        seen = [
            text.tokenize(self.model.tokenizer, settings[key]).words for key in ("prompt", "to")
        ]
        return [w for w in old if w in seen[0]], [w for w in new if w in seen[1]]

    def files(self, name: str, image: Image.Image, latents: Tensor) -> Files:
        png, array = io.BytesIO(), io.BytesIO()
        info = PngInfo()
        info.add_itxt("minip2p sweep", name)
        image.save(png, "PNG", pnginfo=info, compress_level=1)  # a GPU is faster than zlib at 6
        np.save(array, latents.cpu().numpy())
        kept = {f"{name}.npy": array.getvalue()} if self.latents else {}
        return {f"{name}.png": png.getvalue()} | kept


OF_GENERATE = (
    *("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler", "eta"),
    *("height", "width"),
)


def identity(model: StableDiffusion) -> str:
    """A hash of all that a model's pictures depend on: weights, vocabulary, noise levels."""
    digest = hashlib.sha256()
    for part in (model.text_encoder, model.unet, model.vae):
        for name, tensor in part.state_dict().items():
            name = name.removeprefix("encoder.").removeprefix("text_model.")  # transformers < 5.6
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    others = [sorted(model.tokenizer.get_vocab().items()), sorted(model.schedule.items())]
    digest.update(json.dumps([others, model.scheduler, model.sample_size]).encode())
    return digest.hexdigest()[:16]


def pixels_that_fit(model: StableDiffusion) -> int:
    """Of pictures to be made at a time: half of the memory that is free, at most MOST pictures."""
    h, w = model.sample_size
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    a_row = BYTES * model.unet.conv_in.out_channels * h * w * model.dtype.itemsize // 4
    at_once = min(MOST, free // 2 // (2 * a_row))  # a picture is two rows: prompt and blank
    return max(2, at_once) * h * w * model.vae.f**2


# --- the table ------------------------------------------------------------------------------------


class Table:
    """results.jsonl and the files beside it: a row for each run, the newest last."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "results.jsonl"
        self.rows = read_rows(folder)

    def has(self, id: str) -> bool:
        """Whether the run has been made, and its picture is there."""
        row = self.rows.get(id)
        return row is not None and "error" not in row and (self.folder / f"{id}.png").exists()

    def tidy(self) -> None:
        """Drop what is to be made again: half a line, errors, rows that have lost their picture."""
        self.rows = {id: row for id, row in self.rows.items() if self.has(id)}
        whole = "".join(json.dumps(row) + "\n" for row in self.rows.values()).encode()
        if not self.path.exists() or self.path.read_bytes() != whole:
            put(self.path, whole)

    def add(self, row: Row, files: Files) -> None:
        """The pictures first: a row says that they are there."""
        for name, content in files.items():
            path = self.folder / name
            if name.startswith(row["id"]) or not path.exists():  # a source comes with each group
                put(path, content)
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise refused(self.path, error) from error
        self.rows[row["id"]] = row

    def write_parquet(self) -> Path | None:
        """The same as results.parquet, where pyarrow is installed; lists and dicts as JSON."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError:
            return None
        columns = {name: [row.get(name) for row in self.rows.values()] for name in self.names()}
        for name, values in columns.items():
            if any(isinstance(value, list | dict) for value in values):
                columns[name] = [None if v is None else json.dumps(v) for v in values]
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        put(self.folder / "results.parquet", file.getvalue())
        return self.folder / "results.parquet"

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


def read_rows(folder: Path) -> dict[str, Row]:
    """The rows of a table by their ids, in order. A line that was cut off is passed over."""
    path, rows = folder / "results.jsonl", {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, TypeError, KeyError):
            print(f"{path} line {n} can't be read: its run is made again.", file=sys.stderr)
    return rows


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")  # the same each time: none is left over
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise refused(path, error) from error


def refused(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} can't be written ({error.strerror or error}): what is in {path.parent} is kept, "
        "and the same command goes on from there."
    )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises ValueError if another sweep writes into the folder; a killed one does not."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not on Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another sweep is writing into {folder}: wait for its end.") from None
        yield


# --- what is to be done ---------------------------------------------------------------------------


def make_jobs(study: Study, model: Settings) -> list[Job]:
    """The study's runs, each once: those that mean the same picture are one."""
    jobs: dict[str, Job] = {}
    for run in study.runs:
        settings = settle(run, model)
        own, source = identify(settings), identify(source_settings(settings))
        row = {"id": own, "source": source, "model": study.about["model"], "swap": run["swap"]}
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


Work = Callable[[Sequence[Sequence[Job]]], Iterable[list[tuple[Row, Files]]]]


@contextmanager
def crew(study: Study, options: argparse.Namespace) -> Iterator[tuple[Settings, Work]]:
    """Who does the work: what the model tells, and a function from groups to what was made."""
    arguments = study.about, options.device, options.latents
    if options.workers or options.address:
        from .cluster import cluster

        with cluster(arguments, options.workers, options.address) as those:
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

    print(
        f"{len(study.runs)} runs, {len(jobs)} of them different, {len(todo)} to be made: "
        f"{sum(map(pictures, groups))} pictures with their sources in {len(groups)} calls of "
        f"generate, {sum(map(calls, groups))} UNet calls"
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
    add("--address", help="auto, ray://HOST:PORT: a Ray cluster; a worker for each GPU or node")
    return parser


def run(argv: Sequence[str]) -> int:
    if argv[:1] == ["report"]:
        from .report import write_report

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
