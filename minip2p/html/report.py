"""The results of a sweep as one HTML file: contact sheets, plots, the table, all in it.

`write_report` fills report.html, which draws. Nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..align import DEFAULT
from ..errors import check
from ..sweep.results import Row, put, read_rows
from ..sweep.study import ONE
from .template import data_uri, fill, script_json

TEMPLATE = Path(__file__).with_name("report.html")
THUMBNAIL = 160  # pixels of a picture's longer side, at most
ABOUT_THE_MAKING = "id", "source", "picture", "worker", "device", "minip2p", "error"
OF_STUDY = "model", "weights", "dtype"
SENTENCES = {  # what a measurement says
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
    """Write `folder`/report.html. Raises ValueError if there are no results."""
    rows = [
        row | ({"edited": 1 - row["ssim_inside"]} if "ssim_inside" in row else {})
        for row in read_rows(folder).values()
    ]
    check(rows, f"{folder} has no results.jsonl with rows: give the folder of a sweep.")
    path = folder / "report.html"
    put(path, report(rows, folder).encode())
    return path


def report(rows: Sequence[Row], folder: Path) -> str:
    """The text of the page. rows: of a table, whose pictures are in `folder`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    settings = [n for n in names if n in ONE or n in OF_STUDY]
    labels = {n: [label(row.get(n)) for row in rows] for n in settings}
    if "image" in settings:
        labels["image"] = [Path(text).name for text in labels["image"]]
    varied = [n for n in settings if len(set(labels[n])) > 1]
    if "swap" in varied and "to" in varied:  # the same, longer
        pairs = set(zip(labels["swap"], labels["to"], labels["prompt"], strict=True))
        if len(pairs) == len({(swap, prompt) for swap, _, prompt in pairs}):
            varied.remove("to")
    measured = [n for n in names if n not in (*settings, *ABOUT_THE_MAKING)]
    measured.sort(key=lambda n: [*SENTENCES, n].index(n))
    thumbnails = {id: thumbnail(folder / f"{id}.png") for id in sources_and_runs(rows)}
    data: dict[str, Any] = {
        "settings": varied,
        "measures": [[n, SENTENCES.get(n, n)] for n in measured],
        "rows": [
            {
                "id": row["id"],
                "source": row["source"],
                "set": [labels[n][i] for n in varied],
                "found": [row.get(n) for n in measured],
                "error": row.get("error"),
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


def sources_and_runs(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(id for row in rows for id in (row["source"], row["id"])))


def label(value: Any) -> str:
    """A setting's value for people: 0.8 of [0, 0.8], "lion 0.4, others 0.8" of a dict."""
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, dict) and "words" in value:  # a blend
        more = f" without {', '.join(value['subtract'])}" if value["subtract"] else ""
        usual = {"threshold": 0.3, "start": 0.0}
        more += "".join(f", {n} {value[n]:g}" for n, v in usual.items() if value[n] != v)
        return ", ".join(value["words"]) + more
    if isinstance(value, dict):
        return ", ".join(f"{'others' if w == DEFAULT else w} {label(v)}" for w, v in value.items())
    if isinstance(value, list) and all(isinstance(v, float) for v in value):  # a window
        return f"{value[1]:g}" if value[0] == 0 else f"{value[0]:g} to {value[1]:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def thumbnail(path: Path) -> str | None:
    """A picture as a data URI; None if it is not there: its run has an error."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(small, png_bytes=0, quality=88)
