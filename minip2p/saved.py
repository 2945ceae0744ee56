"""Files that are written whole or not at all, and tensors with their description in them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError, check


def write_files(
    files: Mapping[Path, bytes],
    check_place: Callable[[Path], None] = lambda path: None,
    durable: bool = False,
) -> None:
    """Write files in place of others of their names.

    Each is written whole or not at all, and all are ready before the first takes its place. Should
    one fail to take its place after others have, those stay, and the error names them.
    check_place: raises an error if a file may not stand there; it is asked just before.
    durable: wait until the disk has the files, so that a power cut leaves none of them empty.
    Raises UserError if a file can't be written.
    """
    temporaries = {path: path.with_name(f".{secrets.token_hex(8)}.tmp") for path in files}
    placed: list[Path] = []
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporaries[path].open("xb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        for path in files:
            check_place(path)
        for path in files:
            temporaries[path].replace(path)
            placed.append(path)
        for folder in {path.parent for path in files} if durable else ():
            sync_folder(folder)
    except OSError as error:
        done = f"; already written: {', '.join(map(str, placed))}" if placed else ""
        reason = error.strerror or error
        raise UserError(f"{path} can't be written: {reason}{done}.") from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):  # it has its place, or its folder is none
                temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of a folder's files, where the system can tell."""
    with suppress(OSError):  # Windows opens no folders, and some network disks sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write(
    path: str | os.PathLike[str],
    kind: str,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write tensors as safetensors with a description in the metadata. See `write_files`."""
    from safetensors.torch import save

    metadata = {"format": f"minip2p {kind}", "about": json.dumps(description)}
    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata)
    write_files({Path(os.path.expanduser(path)): content})


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` wrote: the description and the tensors.

    Raises UserError for a file that is missing, damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(os.path.expanduser(path))
    try:
        check(path.is_file(), f"There is no file {path}.")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}): write it again."
        ) from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    of = metadata.get("format", "something else")
    check(of == f"minip2p {kind}", f"{path} is no minip2p {kind}: it says that it holds {of!r}.")
    try:
        description = json.loads(metadata["about"])
        check(isinstance(description, dict), "")
    except (KeyError, ValueError, RecursionError):
        raise UserError(
            f"{path} is damaged: the description of its tensors can't be read."
        ) from None
    return description, tensors
