"""The results of a sweep: a folder of pictures, and a table that grows by a row for each run."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Files = dict[str, bytes]  # by name


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
