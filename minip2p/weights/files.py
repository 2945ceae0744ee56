"""The files of a model: their configs and headers, which are read first, and their tensors."""

from __future__ import annotations

import json
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
WRAPPERS = re.compile(r"^module\.|_orig_mod\.")  # of DataParallel and torch.compile, before names
UNUSED = ("embeddings.position_ids", "text_projection.weight", "logit_scale")  # of CLIP
NOT_SAFETENSORS = {  # the first bytes of files that users take for weights
    rb"PK\x03\x04|\x80[\x02-\x05]": "a pickle (.ckpt, .pt or .bin), which can run code when it is "
    "opened: take the model's .safetensors file",
    rb"version https://git-lfs": "a git-lfs pointer in place of the weights: run `git lfs pull`",
}


class WeightsError(UserError):
    """There is no model that minip2p can load; one sentence says why, and what to do."""


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

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
    """A model's configs and headers. None of its weights has been read."""

    configs: dict[str, Config]  # of the parts, "scheduler" and "defaults"
    tensors: dict[str, Tensors]  # of the parts, by the names of their parameters
    tokenizer: Path | None  # a folder; a single file has none


def damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} is damaged ({reason}): download it or save it again.")


def one_line(error: object, length: int = 400) -> str:
    """Shorten the text of a library's error, so that it can stand inside a sentence."""
    return " ".join(str(error).split())[:length].rstrip(".")


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a WeightsError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WeightsError(
            f"{path} can't be read ({reason}): check that it is there and readable."
        ) from error
    except SafetensorError as error:
        reason = one_line(error).removeprefix("Error while deserializing header: ")
        raise damaged(path, f"it is no whole safetensors file: {reason}") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, which maps it into memory, for tensors on the CPU."""
    from safetensors import safe_open

    with errors_of(path), torch.device("cpu"), safe_open(path, framework="pt") as file:
        yield file


def read_header(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata, without reading the data.

    safetensors checks that the tensors fill the file without overlap.
    """
    with errors_of(path), path.open("rb") as file:
        first_bytes = file.read(64)
    for pattern, description in NOT_SAFETENSORS.items():
        # A header begins with "{", after a length of eight bytes, which may look like a pickle's.
        if first_bytes[8:9] != b"{" and re.match(pattern, first_bytes):
            raise WeightsError(f"{path} is {description}.")
    tensors: Tensors = Tensors(path, {})
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            name = WRAPPERS.sub("", key)
            if name in tensors:
                raise damaged(path, f"{key} stands in it under a second name")
            tensors[name] = Stored(key, part.get_dtype(), tuple(part.get_shape()))
        metadata = file.metadata() or {}
    if not tensors:
        raise damaged(path, "it holds no tensors")
    return tensors, metadata


def read(tensors: Tensors, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read tensors: views of the mapped file if dtype and device (CPU) allow it, else copies."""
    state = {}
    with opened(tensors.path) as file:
        for name, stored in tensors.items():
            tensor = file.get_tensor(stored.key).to(dtype)
            if tensor.data_ptr() % tensor.element_size():  # old files do not pad their header
                tensor = tensor.clone()
            state[name] = tensor.to(device)
    return state


def read_config(path: Path, optional: bool = False) -> Config:
    """Read a JSON file with a table of fields. An optional one that is not there has none."""
    if optional and not path.exists():
        return Config(path, {})
    with errors_of(path):
        content = path.read_bytes()
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON: {error}") from error
    if type(fields) is not dict:
        raise damaged(path, "it is not a table of fields")
    return Config(path, fields)


def renamed(tensors: Tensors, name_of: Callable[[str], str], prefix: str = "") -> Tensors:
    """Return the tensors whose names begin with `prefix`, under new names without it.

    name_of: from a name in the file to the published one, both with the prefix.
    Raises WeightsError for tensors that are not floating point or have the same new name.
    """
    parameters = Tensors(tensors.path, {})
    for name, stored in tensors.items():
        if not name.startswith(prefix):
            continue
        parameter = name_of(name).removeprefix(prefix)
        if parameter in UNUSED:
            continue
        if stored.dtype not in FLOATS:
            raise WeightsError(
                f"{tensors.path} has {stored.key} in {stored.dtype} and not in floating point: "
                "take a version that is not quantised."
            )
        if parameter in parameters:
            raise damaged(tensors.path, f"{stored.key} stands in it under a second name")
        parameters[parameter] = stored
    return parameters


def replace_all(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
