"""Files as the command line writes them: all of a run's or none, and only over minip2p's own."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

# A run has a picture alone, or a source and its edits. Each kind has these names, in any folder.
EDIT = r"edit-\d+(-baseline|-(cross|self)-[^ /]+)?"
KINDS = (
    re.compile(r"picture(-maps)?\.png"),
    re.compile(rf"(source|reconstruction|row|{EDIT})(-maps|-put-back)?\.png"),
)


def png(image: Image.Image, settings: Mapping[str, Any], path: Path) -> bytes:
    """A PNG with its settings in it. path: where it will be written; for a mistake's sentence."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(
            name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    file = io.BytesIO()
    try:
        image.save(file, "PNG", pnginfo=info)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}.") from error
    return file.getvalue()


def read_png(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """A PNG and the texts in it. Raises ValueError, with the reason, for what can't be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # texts may stand after the pixels
            return image.convert("RGB"), dict(getattr(image, "text", {}))
    except OSError as error:
        reason = error.strerror or "it is no whole PNG"
    except Exception:  # SyntaxError and more, for damaged chunks
        reason = "it is no whole PNG"
    raise ValueError(f"{path} can't be read: {reason}.")


def is_ours(path: Path) -> bool:
    """Whether minip2p wrote that picture or page."""
    try:
        if path.suffix == ".png":
            return {"model", "prompts"} <= read_png(path)[1].keys()
        with path.open("rb") as file:
            return "<title>minip2p · ".encode() in file.read(4096)
    except (OSError, ValueError):
        return False


def of_other_runs(paths: Iterable[Path]) -> list[Path]:
    """Pictures of minip2p that would seem to belong to `paths`: beside them, of a run as theirs."""
    paths, found = set(paths), []
    for folder in sorted({path.parent for path in paths}):
        names = [path.name for path in paths if path.parent == folder]
        kinds = [kind for kind in KINDS if any(map(kind.fullmatch, names))]
        for path in sorted(set(folder.glob("*.png")) - paths):
            as_ours = any(kind.fullmatch(path.name) for kind in kinds) and is_ours(path)
            # One that has another name now is a copy, and belongs to whoever made that.
            if as_ours and read_png(path)[1].get("file") in (None, path.name):
                found.append(path)
    return found


def check_out(folder: Path, option: str = "--out") -> None:
    """Raises ValueError, before time is spent on pictures, if `folder` can't take them."""
    there = folder
    while True:
        try:
            there.stat()
            break
        except (FileNotFoundError, NotADirectoryError):
            there = there.parent
        except (OSError, ValueError) as error:  # a name that is too long, or with a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{option} {str(folder)!r} can't be a folder: {reason}.") from None
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{option} {folder}: {there} is no folder that can be written to.")


def check_free(path: Path, option: str = "--out") -> None:
    """Raises ValueError if something stands there that minip2p did not write."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give another place with {option}.")
    if os.path.lexists(path) and not is_ours(path):
        raise ValueError(
            f"{path} was not written by minip2p, which will not replace it: move it, or give "
            f"another place with {option}."
        )


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write files, under temporary names first: all of them, or none and none half."""
    ready: list[tuple[Path, Path]] = []
    try:
        for path, content in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(
                    dir=path.parent, prefix=f".{path.stem[:99]}-", suffix=path.suffix
                )
                ready.append((Path(name), path))
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.chmod(name, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
            except OSError as error:  # not all of them say which file
                raise ValueError(f"{path} can't be written: {error.strerror or error}.") from error
        for temporary, path in ready:
            os.replace(temporary, path)
    finally:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace_run(files: Mapping[Path, bytes]) -> None:
    """Write a run's files in place of another run's, and say which were there."""
    old = [path for path in files if path.exists()]
    stale = of_other_runs(files)
    write_all(files)
    for path in stale:
        path.unlink(missing_ok=True)
    said = [f"Replaced {', '.join(map(str, old))}"] if old else []
    said += [f"removed {', '.join(map(str, stale))}, of another run"] if stale else []
    if said:
        line = "; ".join(said)
        print(f"{line[:1].upper()}{line[1:]}.", file=sys.stderr)
    for path in files:
        say(path)


def say(path: Path) -> None:
    try:
        print(path, flush=True)
    except BrokenPipeError:  # | head -1: the reader has seen enough, the pictures are still wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
