"""The files of the command line: PNGs that tell how they were made, and where they may stand.

Files of other programs are never replaced, and nothing is deleted.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .command import edits_by_target, plain, swept_windows
from .edit import EditOfPrompt
from .errors import UserError, check
from .picture import PNG, quiet
from .program import complain, say
from .run import Run
from .saved import write_files

SOFTWARE = f"minip2p {__version__}, torch {torch.__version__}"


def png(image: Image.Image, texts: Mapping[str, Any], **options: Any) -> bytes:
    """Return a PNG with texts in its metadata; values that are no strings become JSON.

    options: of Pillow's `save`.
    """
    info = PngInfo()
    for name, value in {"Software": SOFTWARE, **texts}.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        info.add_itxt(name, text)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info, **options)
    return file.getvalue()


def read_png(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """Read a PNG and the texts in its metadata. Raises UserError, with the reason, if it can't."""
    try:
        with quiet(), Image.open(path, formats=["PNG"]) as image:
            image.load()  # texts may stand after the pixels
            return image.convert("RGB"), dict(getattr(image, "text", {}))
    except MemoryError:
        raise
    except OSError as error:
        reason = error.strerror or "it is no whole PNG"
    except Exception:  # Pillow raises SyntaxError and more for damaged chunks
        reason = "it is no whole PNG"
    raise UserError(f"{path} can't be read: {reason}.")


# --- names and captions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A picture of a run: the name of its file without .png, and its caption."""

    name: str
    caption: str


def name_outputs(run: Run) -> list[Output]:
    """Name the pictures of a run: edits by the number of their prompt and what tells them apart."""
    targets = edits_by_target(run)
    alone = "picture" if not targets else "source"
    outputs = [Output("reconstruction" if run.source else alone, run.prompts[0])]
    for n, (prompt, edits) in enumerate(targets, 1):
        for edit, label in zip(edits, edit_labels(edits), strict=True):
            suffix = "-baseline" if edit is None else f"-{label}".replace(" ", "-").rstrip("-")
            remark = "without control" if edit is None else label
            outputs.append(
                Output(f"edit-{n}{suffix}", f"{prompt} ({remark})" if remark else prompt)
            )
    return outputs


def edit_labels(edits: list[EditOfPrompt]) -> list[str]:
    """Return a label for each edit of one prompt; "" for a single edit and for None."""
    real = [edit for edit in edits if edit is not None]
    if len(real) < 2:
        return [""] * len(edits)
    kind, ends = swept_windows(real)
    labels = [f"{kind} {plain(end)}" for end in ends] or [str(n) for n in range(len(real))]
    return ["" if edit is None else labels[real.index(edit)] for edit in edits]


# --- places ---------------------------------------------------------------------------------------


def check_folder(folder: Path, option: str = "--out") -> None:
    """Raise UserError, before time is spent on pictures, if files can't be written in a folder."""
    for existing in (folder, *folder.parents):
        try:
            existing.stat()
            break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # a name that is too long, or with a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{option} {str(folder)!r} can't be a folder: {reason}.") from None
    check(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"{option} {folder}: {existing} is no folder that can be written to.",
    )


def check_place(path: Path, option: str = "--out") -> None:
    """Raise UserError if something stands at `path` that minip2p did not write."""
    check(not path.is_dir(), f"{path} is a folder: give another place with {option}.")
    check(
        not os.path.lexists(path) or is_ours(path),
        f"{path} was not written by minip2p, which will not replace it: move it, or give another "
        f"place with {option}.",
    )


def is_ours(path: Path) -> bool:
    """Tell whether minip2p wrote that picture or page, whatever its name is."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        if not head.startswith(PNG):
            return "<title>minip2p · ".encode() in head
        texts = read_png(path)[1]
    except (OSError, UserError):
        return False
    return texts.get("Software", "").startswith("minip2p ") or {"model", "prompts"} <= texts.keys()


def check_places(pictures: Iterable[Path], others: Mapping[str, Path | None]) -> None:
    """Raise UserError if one of the files of a run can't stand in its place.

    others: the file of each option that names one, or None.
    """
    taken = set()
    for path in pictures:
        check_place(path)
        taken.add(path.resolve())
    for option, file in others.items():
        if file is not None:
            check_folder(file.parent, option)
            check_place(file, option)
            is_free = file.resolve() not in taken
            check(is_free, f"{option} {file} is the place of another file: name a free one.")
            taken.add(file.resolve())


def write_run(files: Mapping[Path, bytes]) -> None:
    """Write the files of a run, and print which they are and which of them were replaced."""
    replaced = [path for path in files if path.exists()]
    # Places are checked again: another program may have written there since the run began.
    write_files(files, check_place)
    if replaced:
        complain(f"Replaced {', '.join(map(str, replaced))}.")
    for path in files:
        say(path)


# --- a picture that is made again -----------------------------------------------------------------


def compare(path: Path, image: Image.Image, name: str, pictures: Mapping[str, Image.Image]) -> None:
    """Print how far a repeated picture is from the original, unless it is the same.

    path: of the original. name: of its file when it was written. pictures: the new ones by the
    names of their files.
    """
    again = pictures.get(name)
    if again is None or again.size != image.size:
        complain(f"{path} was not made again: no such picture came out.")
        return
    before, after = (np.asarray(picture, int) for picture in (image, again))
    if difference := abs(before - after).max():
        complain(
            f"{name} differs from {path} by up to {difference} of 255: another model, device, "
            "machine or version made that."
        )
