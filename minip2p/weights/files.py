"""The files of a model: their headers and configs, which are read first, and their tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import UserError

T = TypeVar("T")

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
UNUSED = ("embeddings.position_ids", "text_projection.weight", "logit_scale")  # of CLIP
MAX_HEADER = 100_000_000  # bytes: the format's own limit
MAGIC = {  # first bytes of what is no safetensors file
    rb"PK\x03\x04|\x80[\x02-\x05]": "a pickle (.ckpt, .pt or .bin), which can run code when it is "
    "opened: take the model's .safetensors file",
    rb"version https://git-lfs": "a git-lfs pointer in place of the weights: run `git lfs pull`",
    rb"\s*<": "a web page in place of the weights: download the file itself",
    rb"GGUF": "a GGUF file: take the model's .safetensors file",
}


class WeightsError(UserError):
    """There is no model that minip2p can load; one sentence says why, and what to do."""


class Stored(NamedTuple):
    """One tensor as the header of its file describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Table(dict[str, T]):
    """The tensors of a file by name, or the fields of a config. `path` is the file's."""

    def __init__(self, path: Path, items: Mapping[str, T]):
        super().__init__(items)
        self.path = path


Tensors = Table[Stored]
Config = Table[Any]


class Source(NamedTuple):
    """What configs and headers say of a model. None of its weights has been read."""

    configs: dict[str, Config]  # of the parts, "scheduler" and "defaults"
    tensors: dict[str, Tensors]  # of the parts, by the names of their parameters
    tokenizer: Path | None  # a folder; a single file has none


def unreadable(path: Path, error: OSError) -> WeightsError:
    reason = error.strerror or str(error)
    return WeightsError(f"{path} can't be read ({reason}): check that it is there and readable.")


def damaged(path: Path, how: str) -> WeightsError:
    return WeightsError(f"{path} is damaged ({how}): download it or save it again.")


def one_line(error: object, length: int = 400) -> str:
    """What an error of a library's says, to stand inside a sentence."""
    return " ".join(str(error).split())[:length].rstrip(".")


def read_header(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; not a byte of the data is read.

    safetensors checks that every tensor lies in the file, beside the others.
    """
    from safetensors import SafetensorError, safe_open

    header, size = header_bytes(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        promised = promised_size(header)
        if promised not in (None, size):
            how = f"it has {size} bytes where its header promises {promised}"
        else:
            reason = one_line(error).removeprefix("Error while deserializing header: ")
            how = f"its header is wrong: {reason}"
        raise damaged(path, how) from error
    if not slices:
        raise damaged(path, "it holds no tensors")
    if twice := names_twice(header):  # safetensors takes the last one without a word
        raise damaged(path, f"its header has the name {twice[0][:80]!r} twice")
    tensors = {
        key: Stored(key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()
    }
    return Tensors(path, tensors), metadata


def header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON at the head of a safetensors file, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= MAX_HEADER or start[8:9] != b"{":
                for magic, what in MAGIC.items():
                    if re.match(magic, start):
                        raise WeightsError(f"{path} is {what}.")
                raise damaged(path, "it does not begin as a safetensors file does")
            if 8 + length > size:
                raise damaged(path, f"it ends after {size} bytes, within a header of {length}")
            file.seek(8)
            return file.read(length), size
    except OSError as error:
        raise unreadable(path, error) from error


def promised_size(header: bytes) -> int | None:
    """How long a file with this header should be, in bytes. None if the header makes no sense."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = [tuple(entry["data_offsets"]) for entry in entries.values()]
        makes_sense = all(0 <= begin <= end for begin, end in spans)
        return 8 + len(header) + max(end for _, end in spans) if makes_sense else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def names_twice(header: bytes) -> list[str]:
    """Names that stand more than once in a table of this JSON."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            found.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    json.loads(header, object_pairs_hook=look)
    return found


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose header has been read before. Its errors become ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise damaged(path, one_line(error)) from error


def read(tensors: Tensors, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Views of the mapped file where it has that dtype and the device is the CPU, else copies."""
    state = {}
    with opened(tensors.path) as file:
        for name, stored in tensors.items():
            tensor = file.get_tensor(stored.key).to(dtype)
            if tensor.data_ptr() % tensor.element_size():  # old files do not pad their header
                tensor = tensor.clone()
            state[name] = tensor.to(device)
    return state


def read_config(path: Path, optional: bool = False) -> Config:
    if optional and not path.exists():
        return Config(path, {})
    try:
        fields = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON: {error}") from error
    if type(fields) is not dict:
        raise damaged(path, "it is not a table of fields")
    return Config(path, fields)


def renamed(tensors: Tensors, name: Callable[[str], str], prefix: str = "") -> Tensors:
    """The tensors below a prefix by the names that `name` makes of theirs, prefix included."""
    found = Tensors(tensors.path, {})
    for key, stored in tensors.items():
        if not key.startswith(prefix):
            continue
        new = name(key).removeprefix(prefix)
        if new in UNUSED:
            continue
        if stored.dtype not in FLOATS:
            raise WeightsError(
                f"{tensors.path} has {key} in {stored.dtype} and not in floating point: take a "
                "version that is not quantised."
            )
        if new in found:
            raise damaged(tensors.path, f"{key} stands in it under a second name")
        found[new] = stored
    return found


def replace_all(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
