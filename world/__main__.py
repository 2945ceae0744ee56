"""EmojiBench: does a model draw what captions name, and do edits change that and nothing else?

    python -m world                     everything, with the bundled model
    python -m world swap maps --quick   two parts, on the few items that the tests use
    python -m world page                48 pictures, seeds 0 to 47, as they come: page.jpg

captions   pictures of captions: is shown what they name?
sharpness  as crisp as the VAE can draw, and as like unseen renders as other renders are?
swap       one noun exchanged: the new one there, the old one gone, all else as it was? Without
           control, with the model's recommended windows, with LocalBlend
sweep      the same for other windows of cross-attention, and of self-attention
refine     a place or a colour added
reweight   a place or an object silenced, or twice as loud
maps       word maps on noised renders, whose things' places are known
photos     renders inverted, edited, and compared with the true edit; more in photos.py

What pictures show is judged by a detector (detector.py), never by eye: look at --pictures too.
Intervals are 95 %: Wilson's for shares, the bootstrap over items for means.

Shapes:  h w pixels of a picture · 16 16 the detector's cells
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import minip2p

from .bench import ITEMS, STEPS, Bench
from .detector import load
from .figures import Table, tell
from .parts import PARTS, page
from .shared import shared_out


def run(bench: Bench, parts: Sequence[str] = tuple(PARTS)) -> dict[str, Table]:
    """Measure the parts one after the other, and print the table of each."""
    tables = {}
    for part in parts:
        start = time.time()
        tables[part] = PARTS[part](bench).table()
        tell(part, tables[part], time.time() - start)
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="EmojiBench: measure a model of the emoji world.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=", ".join(ITEMS) + ", page; default: all but it"
    )
    parser.add_argument("--model", default="emoji", help="what minip2p.load takes")
    parser.add_argument("--quick", action="store_true", help="few items")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="what was judged, to see")
    parser.add_argument("--workers", type=int, help="processes that share the items, on Ray")
    parser.add_argument("--address", help="auto, or HOST:PORT of a Ray cluster, for the same")
    options = parser.parse_args(arguments)
    names = (*ITEMS, "page")
    if unknown := [part for part in options.parts if part not in names]:
        parser.error(f"there is no part {unknown[0]!r}, only: {', '.join(names)}")

    model = minip2p.load(options.model)
    detector = load()
    print(f"{options.model}: {options.steps} steps; the model recommends {model.defaults}")
    bench = Bench(model, detector, options.quick, options.steps, options.pictures)
    if "page" in options.parts:
        folder = options.pictures or Path(".")
        folder.mkdir(parents=True, exist_ok=True)
        page(bench, folder / "page.jpg")
    parts = [part for part in options.parts or ITEMS if part != "page"]
    if parts and (options.workers or options.address):
        model_and_sizes = options.model, options.quick, options.steps, options.pictures
        try:
            tables = shared_out(parts, model_and_sizes, options.workers, options.address)
        except ValueError as error:  # no Ray, no cluster, or a share that failed
            parser.error(str(error))
    else:
        tables = run(bench, parts)
    if options.out:
        as_dicts = {
            part: {row: {name: f._asdict() for name, f in cs.items()} for row, cs in table.items()}
            for part, table in tables.items()
        }
        settings = {"model": options.model, "steps": options.steps, "quick": options.quick}
        options.out.write_text(json.dumps(settings | {"parts": as_dicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
