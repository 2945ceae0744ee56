"""The command line: python -m minip2p.sample.

One line on standard output for each written file, progress bars on standard error, exit status 2
and one sentence for a mistake of the user's. All files of a run are written, or none.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from .. import fast, show
from ..explain import explain
from ..html.page import PageStore, page
from ..pipeline import Result, generate
from ..scheduler import SCHEDULERS
from ..weights import StableDiffusion, load
from . import files, given, repeat
from .job import Job, fit_words, make_job

VERSION = version("minip2p")
Callback = Callable[[int, int, Tensor], None]


class Once(argparse.Action):
    """Store a value; a second one is a mistake, not a correction."""

    taken = False

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if self.taken:
            raise argparse.ArgumentError(self, f"it can be given only once, not again as {value!r}")
        self.taken = True
        setattr(namespace, self.dest, value)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage lines."""
        raise ValueError(message[:1].upper() + message[1:].rstrip(".") + ".")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m minip2p.sample",
        description="Make a picture from a prompt, and edited ones from it with Prompt-to-Prompt. "
        "Without arguments: a squirrel that eats a burger, a lion without control, and the swap.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minip2p {VERSION}")
    parser.register("action", None, Once)  # the default of add_argument
    add = parser.add_argument
    add("prompt", nargs="?", help="what the (source) picture shows")
    add(
        "--model",
        default="emoji",
        help="emoji (bundled), a diffusers folder, a .safetensors file, a hub id",
    )
    add("--tokenizer", help="a folder with CLIP's tokenizer, beside a single file")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of a single file with two UNets: the average over training, or the model's own",
    )
    add("--steps", type=number(int, 1, 999), help="inference steps")
    add("--guidance", type=number(float, -1000, 1000), help="guidance scale")
    add("--negative", default="", metavar="PROMPT", help="negative prompt")
    add("--seed", type=number(int, 0, 2**63 - 1), default=8888)
    add("--height", type=number(int, 1, 16384), help="of the picture, in pixels")
    add("--width", type=number(int, 1, 16384))
    add("--scheduler", choices=list(SCHEDULERS))
    add("--eta", type=number(float, 0, 1), default=0.0, help="DDIM's share of new noise")
    add("--device", help="cpu, cuda, mps; by default the fastest that is there")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add("--fast", action="store_true",
        help="on a CPU, at SD's size: a quarter to a third less time, 2.2 GB more")  # fmt: skip
    add(
        "--out", type=Path, default=Path("out"), metavar="FOLDER", help="where pictures are written"
    )
    add("--preview", type=Path, metavar="FILE", help="redraw this PNG while the pictures are made")
    add("--repeat", type=Path, metavar="FILE", help="make the run of this picture again")

    add = parser.add_argument_group("edits").add_argument
    add("--swap", action="append", default=[], metavar="OLD=NEW", help="one edited prompt for each")
    add("--to", action="append", default=[], metavar="PROMPT", help="an edited prompt in full")
    add("--reweight", action="append", default=[], metavar="WORD=2", help="turn a word up or down")
    add(
        "--blend",
        action="append",
        default=[],
        metavar="WORD",
        help="change only where this word is",
    )
    windows = "a fraction of the UNet calls, 0.8, or start and end, 0.1,0.8"
    add("--cross-replace-steps", action="append", default=[], metavar="WINDOW",
        help=f"{windows}; or of one word, lion=0.4")  # fmt: skip
    add("--self-replace-steps", metavar="WINDOW", help=windows)
    add("--baseline", action="store_true", help="show each edited prompt without control, too")

    given.add_options(parser.add_argument_group("a given picture"), number)

    add = parser.add_argument_group("looking closer").add_argument
    add("--maps", action="store_true", help="show where each picture looks at each word")
    add("--html", type=Path, metavar="FILE", help="write a page to explore the maps, call by call")
    add("--explain", action="store_true", help="print the alignment and the windows, and stop")
    add("--sweep", metavar="cross=0.1,0.5,0.9", help="one picture for each window; or self=...")
    return parser


def number(kind: type[int] | type[float], low: int, high: int) -> Callable[[str], float]:
    """Reads a number of that kind within those bounds; for argparse."""
    what = "whole number" if kind is int else "number"

    def parse(value: str) -> float:
        try:
            parsed = kind(value)
        except ValueError:
            parsed = math.nan
        if not low <= parsed <= high:
            raise argparse.ArgumentTypeError(
                f"it must be a {what} from {low} to {high}, not {value!r}"
            )
        return parsed

    return parse


def warn_unknown_words(model: StableDiffusion, prompts: Sequence[str]) -> None:
    """A model of a small world says which words it has never seen."""
    known = model.vocabulary
    if known:
        said = re.findall(r"[^\W\d_]+", " ".join(prompts).lower())
        unknown = [word for word in dict.fromkeys(said) if word not in known]
        if unknown:
            warnings.warn(
                f"This model has never seen {', '.join(unknown)}; it knows: {', '.join(known)}.",
                stacklevel=2,
            )


def write(result: Result, job: Job, args: argparse.Namespace) -> dict[str, Image.Image]:
    """Every picture, with --maps its word maps, all pictures side by side, and --html's page."""
    about = vars(args) | (given.options(result.source) if result.source else {})
    words = repeat.command(argparse.Namespace(**about), make_parser())
    settings = {"model": args.model, "dtype": args.dtype} | result.run
    settings |= {"command": words, "Software": f"minip2p {VERSION}, torch {torch.__version__}"}
    pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {}
    for i, (image, name) in enumerate(zip(result.images, job.names, strict=True)):
        edit = repr(job.edits[i - 1] if i else None)
        own = settings | {"prompt": job.prompts[i], "edit": edit}
        pictures[f"{name}.png"] = image, own
        if args.maps and result.attention:
            maps = show.word_maps(image, result.attention, i)
            pictures[f"{name}-maps.png"] = maps, own
        if args.put_back and result.source and i:
            pictures[f"{name}-put-back.png"] = result.source.picture.put_back(image), own
    if len(result.images) > 1 or result.source:
        pictures["row.png"] = side_by_side(result, job, args), settings

    # All is made before the first is written.
    encoded = {
        args.out / name: files.png(image, own | {"file": name}, args.out / name)
        for name, (image, own) in pictures.items()
    }
    if args.html:
        shown = settings | {"command": shlex.join(words)}
        text = page(replace(result, run=shown), result.edit, job.names)
        encoded[args.html] = text.encode()
    files.replace_run(encoded)
    return {name: image for name, (image, _) in pictures.items()}


def side_by_side(result: Result, job: Job, args: argparse.Namespace) -> Image.Image:
    """All pictures in one row; with --sweep, in one for each edited prompt."""
    images, captions, first = result.images, job.captions, 1
    if result.source:
        images, first = [result.source.picture.image, *images], 2
        captions = ["given", f"{captions[0]} (reconstruction)", *captions[1:]]
    columns = args.sweep.count(",") + 1 + args.baseline if args.sweep else len(images)
    starts = range(first, max(len(images), first + 1), columns)
    rows = [images[:first] + images[i : i + columns] for i in starts]
    return show.grid(rows, [captions[:first] + captions[i : i + columns] for i in starts])


def check_places(job: Job, args: argparse.Namespace) -> None:
    """Raises ValueError, before time is spent on pictures, if they can't be written."""
    files.check_out(args.out)
    names = [*job.names, *(f"{name}-maps" for name in job.names if args.maps)]
    names += [f"{name}-put-back" for name in job.names[1:] if args.put_back]
    names += ["row"] if len(job.names) > 1 or job.names == ["reconstruction"] else []
    pictures = [args.out / f"{name}.png" for name in names]
    for path in pictures:
        files.check_free(path)
    taken = {path.resolve() for path in pictures}
    if args.inversion:
        files.check_out(args.inversion.parent, "--inversion")
    for option, path in (("--html", args.html), ("--preview", args.preview)):
        if path:
            files.check_out(path.parent, option)
            files.check_free(path, option)
            if path.resolve() in taken:
                raise ValueError(f"{option} {path} is the place of another file: name a free one.")
            taken.add(path.resolve())


def previewer(model: StableDiffusion, job: Job, args: argparse.Namespace) -> Callback:
    """Rewrites --preview's file ten times in a run, or after each call where there are fewer."""

    def draw(call: int, calls: int, latents: Tensor) -> None:
        if (call + 1) % max(1, calls // 10) == 0 or call + 1 == calls:
            image = show.row(show.preview(model, latents), job.captions)
            own = {"model": args.model, "prompts": job.prompts, "call": f"{call + 1} of {calls}"}
            files.write_all({args.preview: files.png(image, own, args.preview)})

    return draw


def parse(argv: Sequence[str]) -> argparse.Namespace:
    args, rest = make_parser().parse_known_args(argv)
    if rest:
        raise ValueError(
            f"{' '.join(rest)!r} is not understood: a prompt stands in quotes, "
            "and --help lists the options."
        )
    return args


def run(argv: Sequence[str]) -> None:
    args = parse(argv)
    original = repeat.original(argv, args, make_parser) if args.repeat else None
    args = original.args if original else args
    job = make_job(args)
    check_places(job, args)
    model = load_model(args)
    warn_unknown_words(model, job.prompts)
    job.edits = fit_words(model, job)
    if args.explain:
        size = {"height": args.height, "width": args.width}
        print(explain(model, job.prompts, job.edits, **size, **given.plan(model, args)))
        return
    source = given.find(model, args)
    if source and args.inversion and not args.inversion.exists():
        args.inversion.parent.mkdir(parents=True, exist_ok=True)
        source.save(args.inversion)
        files.say(args.inversion)
    result = generate(
        model,
        job.prompts,
        edit=job.edits or None,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative,
        seed=args.seed,
        height=args.height,
        width=args.width,
        source=source,
        scheduler=args.scheduler,
        eta=args.eta,
        store=PageStore() if args.html else args.maps,
        callback=previewer(model, job, args) if args.preview else None,
        progress=True,
    )
    made = write(result, job, args)
    if args.preview:
        files.say(args.preview)
    if original:
        original.compare(made)


def load_model(args: argparse.Namespace) -> StableDiffusion:
    model = load(
        args.model,
        tokenizer=args.tokenizer,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        ema=args.ema,
    )
    if model.device.type == "cpu":
        fast.keep_memory()
    if args.fast:
        fast.prepare(model.unet)
    return model


def fail(error: object) -> int:
    """One line on standard error, whatever the error holds."""
    print(" ".join(str(error).split()).rstrip(".") + ".", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 for an interruption."""
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (OSError, ValueError) as error:
        return fail(error)
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        return fail("There is not enough memory: ask for smaller pictures or for fewer at a time")
    except KeyboardInterrupt:
        print("Interrupted: pictures that were not finished were not written.", file=sys.stderr)
        return 130
    return 0
