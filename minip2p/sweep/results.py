"""The folder of a sweep: its pictures, and results.jsonl with a row for each run.

A row is written after its pictures, and only when the disk has them: whatever stops a sweep, every
row has its pictures. Nothing that no sweep wrote is touched.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..saved import write_files

Row = dict[str, Any]
Files = dict[str, bytes]  # by name

TABLE = "results.jsonl"
ROW_START = b'{"id": "'
PNG_END = b"IEND\xaeB`\x82"  # the last part and its checksum
RUN_ID = "minip2p sweep"  # the text in a picture's file that holds the id of its run


class Table:
    """The rows of results.jsonl by their ids, and the files beside them."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / TABLE
        self.rows = read_rows(folder)

    def unmade(self, runs: Sequence[Any], suffixes: Collection[str]) -> list[Any]:
        """Return the runs that are to be made: all but those with a row and with whole files.

        Of runs whose source lacks a file, one is enough. runs: with an `id` and a `source`, as
        SweepRun has. suffixes: of the files that each id has, .png and perhaps .npy.
        """

        def is_complete(name: str) -> bool:
            return all(is_whole(self.folder / f"{name}{suffix}") for suffix in suffixes)

        made_ids = {id for id, row in self.rows.items() if "error" not in row}
        unmade = {run.id for run in runs if run.id not in made_ids or not is_complete(run.id)}
        sources = {run.source for run in runs if run.id in unmade}
        for run in runs:
            if run.source not in sources and not is_complete(run.source):
                unmade.add(run.id)
            sources.add(run.source)
        return [run for run in runs if run.id in unmade]

    def drop(self, ids: Collection[str]) -> None:
        """Remove the rows of runs that are made again, and unfinished files of a killed sweep."""
        self.rows = {id: row for id, row in self.rows.items() if id not in ids}
        content = "".join(json.dumps(row) + "\n" for row in self.rows.values()).encode()
        if not self.path.exists() or self.path.read_bytes() != content:
            with keeping(self.path):
                write_files({self.path: content}, durable=True)
        for path in self.folder.glob(".*.tmp"):
            if is_id(path.stem[1:]):
                path.unlink()

    def add(self, results: Iterable[tuple[Row, Files]]) -> None:
        """Write the files of some runs, then their rows, and wait until the disk has them."""
        rows, new_files = [], dict[Path, bytes]()
        for row, files in results:
            rows.append(row)
            for name, content in files.items():
                # A source comes with each of its groups, and stays as the first of them made it.
                if name.startswith(row["id"]) or not is_whole(self.folder / name):
                    new_files[self.folder / name] = content
        with keeping(self.path):
            write_files(new_files, durable=True)
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        self.rows |= {row["id"]: row for row in rows}


def read_rows(folder: Path) -> dict[str, Row]:
    """Return the rows of the folder's table by their ids; the last row of an id counts.

    A last line that was cut off is left out. Raises UserError for a line that no sweep wrote.
    """
    path, rows = folder / TABLE, {}
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    *lines, rest = content.split(b"\n")
    # A power cut may leave zeros at the end.
    if not ROW_START.startswith(rest[: len(ROW_START)].rstrip(b"\0")):
        lines.append(rest)
    for n, line in enumerate(lines, 1):
        row = parse_row(line)
        if row is None:
            raise UserError(
                f"{path} line {n} was not written by a sweep: remove the line, or give another "
                "folder."
            )
        rows[row["id"]] = row
    return rows


def parse_row(line: bytes) -> Row | None:
    """Return a line of a table as a row, or None if no sweep wrote it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and is_id(row.get("id")) and is_id(row.get("source"))
    return row if is_row and is_shallow(row) else None


def is_shallow(value: Any, levels: int = 4) -> bool:
    """Tell whether lists and dictionaries are nested in at most so many levels."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(is_shallow(part, levels - 1) for part in parts)


def is_id(value: object) -> bool:
    """Tell whether the value can be a run's id: nothing else becomes the name of a file."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def is_whole(path: Path) -> bool:
    """Tell whether the picture or the latents of a run are complete.

    A PNG has a checksum of each of its parts, and a sweep's PNG the id of its run; an .npy file
    says how long it is.
    """
    try:
        if path.suffix == ".npy":
            np.load(path, mmap_mode="r", allow_pickle=False)
            return True
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            run_id = image.info.get(RUN_ID)
            image.verify()
        return run_id == path.stem and content.endswith(PNG_END)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


@contextmanager
def keeping(path: Path) -> Iterator[None]:
    """Say in the error of a write that what is there is kept. path: of the table"""
    try:
        yield
    except (OSError, UserError) as error:
        sentence = str(error)
        if isinstance(error, OSError):
            sentence = f"{path} can't be written: {error.strerror}"
        raise UserError(
            f"{sentence.rstrip('.')}: what is there is kept, and the same command goes on from "
            "there."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. A killed sweep holds none. Raises UserError if another one has it.

    Where the file system has no locks, warn and go on.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"{path} can't be opened: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another sweep is writing into {folder}: wait until it ends, or give another "
                "folder with --out."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} can't be locked ({error.strerror}): start no second sweep into it.",
                stacklevel=3,
            )
        yield
    finally:
        os.close(handle)
