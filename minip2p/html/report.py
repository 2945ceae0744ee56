"""The results of a sweep as one HTML file: contact sheets, plots and the table.

`write_report` fills report.html, whose script draws. The page fetches nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from ..errors import UserError, check
from ..saved import write_files
from ..sweep.results import Row, read_rows
from ..sweep.study import SETTINGS, label
from .template import data_uri, fill, script_json

TEMPLATE = Path(__file__).with_name("report.html")
TITLE = "<title>Sweep "  # near the beginning of every report
THUMBNAIL = 160  # pixels of a picture's longer side, at most
MAKING = "id", "source", "file", "picture", "worker", "device", "minip2p", "error"
MODEL = "model", "weights", "dtype"
SENTENCES = {  # what a figure says
    "psnr_outside": "background kept, dB",
    "ssim_outside": "background kept, SSIM",
    "edited": "change where the words look, 1 - SSIM",
    "psnr_inside": "likeness where the words look, dB",
    "ssim_inside": "likeness where the words look, SSIM",
    "changed": "share of pixels changed",
    "looks_at": "share of the picture that the words look at",
    "looks_source": "mean attention of the words, source",
    "looks_edit": "mean attention of the words, edit",
    "looks_iou": "overlap of where both look",
    "seconds": "seconds a run",
}


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html. Raises UserError if there are no results, or another's page."""
    rows = list(read_rows(folder).values())
    check(rows, f"{folder} has no results.jsonl with rows: give the folder of a sweep.")
    path = folder / "report.html"
    write_files({path: report(rows, folder).encode()}, check_report)
    return path


def check_report(path: Path) -> None:
    """Raise UserError if something else than a report stands there."""
    if path.exists() and TITLE.encode() not in path.read_bytes()[:4096]:
        raise UserError(f"{path} is no report of a sweep and will not be replaced: move it first.")


def report(rows: Sequence[Row], folder: Path) -> str:
    """Return the text of the page. rows: of a table whose pictures are in `folder`."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if not n.endswith("_text")]
    settings = [n for n in names if n in SETTINGS or n in MODEL]
    labels = {n: distinct_labels([row.get(n) for row in rows]) for n in settings}
    if "image" in settings:
        labels["image"] = image_labels(rows)
    if "blend" in settings:
        labels["blend"] = blend_labels(rows)
    varied = [n for n in settings if len(set(labels[n])) > 1]
    if "swap" in varied and "to" in varied:  # the same, longer
        pairs = set(zip(labels["swap"], labels["to"], labels["prompt"], strict=True))
        if len(pairs) == len({(swap, prompt) for swap, _, prompt in pairs}):
            varied.remove("to")
    figures = [figures_of(row) for row in rows]
    order = [*SENTENCES, *names]
    measured = sorted({n for row in figures for n in row} - {*settings, *MAKING}, key=order.index)
    ids = dict.fromkeys(id for row in rows for id in (row["source"], row["id"]))
    thumbnails = {id: thumbnail(folder / f"{id}.png") for id in ids}
    data: dict[str, Any] = {
        "settings": varied,
        "measures": [[n, SENTENCES.get(n, n)] for n in measured],
        "has_images": any(row.get("image") for row in rows),
        "rows": [
            {
                "id": row["id"],
                "source": row["source"],
                "labels": [labels[n][i] for n in varied],
                "figures": [figures[i].get(n) for n in measured],
                "error": str(row["error"]) if "error" in row else None,
            }
            for i, row in enumerate(rows)
        ],
        "pictures": {id: uri for id, uri in thumbnails.items() if uri},
    }
    same = [(n, labels[n][0]) for n in settings if n not in varied and n != "to"]
    values = {
        "title": escape(f"Sweep {folder.resolve().name}: {len(rows)} runs"),
        "same": "\n".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in same),
        "data": script_json(data),
    }
    return fill(TEMPLATE, values)


def distinct_labels(values: Sequence[Any]) -> list[str]:
    """Return a label of each value, long enough to tell different values apart."""
    pairs = [(label(value), json.dumps(value)) for value in values]
    count = Counter(name for name, _ in set(pairs))
    return [name if count[name] == 1 else text for name, text in pairs]


def image_labels(rows: Sequence[Row]) -> list[str]:
    """Return the path of each row's picture below the folder that all pictures share."""
    paths = {str(row["image"]) for row in rows if row.get("image")}
    hashes = {path: {r.get("picture") for r in rows if r.get("image") == path} for path in paths}
    folders = [PurePath(path).parts[:-1] for path in paths]
    shared = len(os.path.commonprefix(folders))  # noqa: RUF071 - of folders, not of letters
    labels = []
    for row in rows:
        path = str(row.get("image") or "")
        name = str(PurePath(*PurePath(path).parts[shared:])) if path else "none"
        is_changed = len(hashes.get(path, ())) > 1  # the file, between two sweeps
        labels.append(f"{name} ({row.get('picture')})" if is_changed else name)
    return labels


def blend_labels(rows: Sequence[Row]) -> list[str]:
    """Return a label of each blend, by the words' part in the swap if all blends are of the swap.

    So a set of pictures has one label for its blends, although each picture has other words.
    """
    blends = [row.get("blend") for row in rows]
    by_part = []
    for row, blend in zip(rows, blends, strict=True):
        if blend:
            swap, words = row.get("swap"), blend.get("words") if isinstance(blend, dict) else None
            if not (isinstance(words, list) and isinstance(swap, list) and len(swap) == 1):
                return distinct_labels(blends)
            old, _, new = str(swap[0]).partition("=")
            if any(word not in (old, new) for word in words):
                return distinct_labels(blends)
            parts = ["replaced word" if word == old else "new word" for word in words]
            blend = {**blend, "words": parts}
        by_part.append(blend)
    return distinct_labels(by_part)


def figures_of(row: Row) -> dict[str, float]:
    """Return a row's finite numbers."""
    row = row | {"edited": 1 - row["ssim_inside"]} if is_figure(row.get("ssim_inside")) else row
    return {name: value for name, value in row.items() if is_figure(value)}


def is_figure(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) < 1e300  # nan is not, and JSON has neither it nor infinity


def thumbnail(path: Path) -> str | None:
    """Return a picture as a data URI, or None if there is none that can be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(small, png_bytes=0, quality=88)
