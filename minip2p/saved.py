"""Results in files: tensors and what they are, as safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import check


def write(
    path: str | os.PathLike[str], kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write `tensors`, with `about` as JSON beside them; a file of that name is replaced.

    It has another name until it is complete. Raises ValueError where it can't be written.
    """
    from safetensors.torch import save

    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    metadata = {"format": f"minip2p {kind}", "about": json.dumps(about)}
    try:
        # save_file would make a file that nobody else may read.
        temporary.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, metadata))
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):  # it is not there, or its folder is none
            temporary.unlink()


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote. Raises ValueError for a file that is another's, damaged or not there."""
    from safetensors import SafetensorError, safe_open

    check(Path(path).is_file(), f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}): write it again."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}.") from None
    of = metadata.get("format", "something else")
    check(of == f"minip2p {kind}", f"{path} is no minip2p {kind}: it says that it holds {of!r}.")
    try:
        about = json.loads(metadata["about"])
        check(isinstance(about, dict), "")
    except (KeyError, ValueError):
        raise ValueError(f"{path} is damaged: what its tensors are can't be read.") from None
    return about, tensors
