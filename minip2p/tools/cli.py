"""The command line: python -m minip2p.sample.

One line on standard output for each written file, progress bars on standard error, exit status 2
and one sentence for a mistake of the user's. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..align import DEFAULT, Window, Windows, window
from ..blend import LocalBlend
from ..edit import PromptEdit, Reweight
from ..sample import Result, generate
from ..settings import SCHEDULERS
from ..weights import StableDiffusion, load
from ..words import swap_word
from . import fast, given, show
from .page import PageStore, page
from .table import explain

EXAMPLE = "a painting of a squirrel eating a burger", "squirrel=lion"
NEED_AN_EDIT = (
    *("cross_replace_steps", "self_replace_steps", "blend"),
    *("baseline", "sweep", "explain"),
)


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
    parser.add_argument("--version", action="version", version=f"minip2p {version('minip2p')}")
    parser.register("action", None, Once)  # the default of add_argument
    add = parser.add_argument
    add("prompt", nargs="?", help="what the (source) picture shows")
    add(
        "--model",
        default="emoji",
        help="emoji (bundled), a diffusers folder, a .safetensors file, a hub id",
    )
    add("--tokenizer", help="a folder with CLIP's tokenizer, beside a single file")
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


def pair(option: str, value: str) -> tuple[str, str]:
    """LEFT=RIGHT, split."""
    left, equals, right = value.partition("=")
    if not (left.strip() and equals and right.strip()):
        raise ValueError(f"{option} takes two sides, A=B, not {value!r}.")
    return left.strip(), right.strip()


def parse_weights(values: Sequence[str]) -> dict[str, float]:
    """Any of WORD=2"""
    weights: dict[str, float] = {}
    for value in values:
        word, weight = pair("--reweight", value)
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ValueError(f"--reweight takes a finite number for {word!r}, not {weight!r}.")
        if word in weights:
            raise ValueError(f"--reweight has two weights for {word!r}: give one.")
        weights[word] = factor
    return weights


def parse_window(option: str, value: str) -> tuple[float, float]:
    """0.8 or 0.1,0.8"""
    try:
        start, end = value.split(",") if "," in value else ("0", value)
        return window((float(start), float(end)))
    except ValueError:
        raise ValueError(
            f"{option} takes a fraction of the UNet calls from 0 to 1, 0.8, or a start and an end, "
            f"0.1,0.8, not {value!r}."
        ) from None


def parse_windows(option: str, values: Sequence[str]) -> Windows | None:
    """Any of 0.8, 0.1,0.8 and lion=0.4; None if there is none."""
    windows: dict[str, Window] = {}
    for value in values:
        word, value = pair(option, value) if "=" in value else (DEFAULT, value)
        if word in windows:
            raise ValueError(f"{option} has two windows for {word!r}: give one.")
        windows[word] = parse_window(option, value)
    return windows or None


@dataclass
class Job:
    """What the command line asks for. Row 0 is the source, the rest are edits of it."""

    prompts: list[str]
    edits: list[PromptEdit | Reweight | None]  # one less
    names: list[str]  # of the files
    captions: list[str]

    def add(
        self, prompt: str, edit: PromptEdit | Reweight | None, name: str, remark: str = ""
    ) -> None:
        self.prompts.append(prompt)
        self.edits.append(edit)
        self.names.append(name)
        self.captions.append(f"{prompt} ({remark})" if remark else prompt)


def make_job(args: argparse.Namespace) -> Job:
    """The prompts and edits of a command line. Raises ValueError where they make no sense."""
    is_given = given.check_options(args)
    if (args.swap or args.to or args.reweight) and not (args.prompt or "").strip():
        raise ValueError("An edit needs the source prompt: give it first, in quotes.")
    if blank := [target for target in args.to if not target.strip()]:
        raise ValueError(f"--to takes a prompt, not {blank[0]!r}.")
    if args.prompt is None:
        args.prompt, args.swap, args.baseline = EXAMPLE[0], [EXAMPLE[1]], True
    targets = [swap_word(args.prompt, *pair("--swap", swap)) for swap in args.swap] + args.to
    weights = parse_weights(args.reweight)
    if weights and not targets:
        targets = [args.prompt]
    if not targets:
        for option in NEED_AN_EDIT:
            if getattr(args, option) not in (None, False, []):
                raise ValueError(
                    f"--{option.replace('_', '-')} needs an edit: add --swap OLD=NEW, --to PROMPT "
                    "or --reweight WORD=2."
                )
        return Job([args.prompt], [], ["reconstruction" if is_given else "picture"], [args.prompt])

    # The prompts share each edit, which may name words of any of them.
    edits = [(Reweight(weights, e) if weights else e, label) for e, label in parse_edits(args)]
    job = Job([args.prompt], [], ["reconstruction" if is_given else "source"], [args.prompt])
    for n, target in enumerate(targets, 1):
        if args.baseline:
            job.add(target, None, f"edit-{n}-baseline", "without control")
        for edit, label in edits:
            job.add(target, edit, f"edit-{n}-{label}".replace(" ", "-").rstrip("-"), label)
    return job


def parse_edits(args: argparse.Namespace) -> list[tuple[PromptEdit, str]]:
    """The edit that the options describe, or with --sweep one for each window, and its label."""
    cross = parse_windows("--cross-replace-steps", args.cross_replace_steps)
    self_ = None
    if args.self_replace_steps is not None:
        self_ = parse_window("--self-replace-steps", args.self_replace_steps)
    blend = LocalBlend(args.blend) if args.blend else None
    if args.sweep is None:
        return [(PromptEdit(cross, self_, blend), "")]
    kind, ends = pair("--sweep", args.sweep)
    if kind not in ("cross", "self"):
        raise ValueError(f"--sweep takes cross=0.1,0.5,0.9 or self=..., not {args.sweep!r}.")
    if (cross if kind == "cross" else self_) is not None:
        raise ValueError(f"--sweep {kind}=... sets what --{kind}-replace-steps sets: give one.")
    edits, before = [], set()
    for end in ends.split(","):
        swept = parse_window("--sweep", end)
        if swept in before:
            raise ValueError(f"--sweep has {end} twice, as {args.sweep!r}: give it once.")
        before.add(swept)
        edit = (
            PromptEdit(swept, self_, blend) if kind == "cross" else PromptEdit(cross, swept, blend)
        )
        edits.append((edit, f"{kind} {end.strip()}"))
    return edits


def save(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG with its settings in it."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(
            name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    write_whole(path, lambda file: image.save(file, "PNG", pnginfo=info))


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name first: never half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:  # not all of them say which file
        raise ValueError(f"{path} can't be written: {error.strerror or error}.") from error
    say(path)


def say(path: Path) -> None:
    """A written file, on standard output."""
    try:
        print(path, flush=True)
    except BrokenPipeError:  # | head -1: the reader has seen enough, the pictures are still wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def warn_unknown_words(model: StableDiffusion, prompts: Sequence[str]) -> None:
    """A model of a small world says which words it has never seen."""
    known = model.defaults.get("words")
    if known:
        said = re.findall(r"[^\W\d_]+", " ".join(prompts).lower())
        unknown = [word for word in dict.fromkeys(said) if word not in known]
        if unknown:
            warnings.warn(
                f"This model has never seen {', '.join(unknown)}; it knows: {', '.join(known)}.",
                stacklevel=2,
            )


def write(result: Result, job: Job, args: argparse.Namespace) -> None:
    """Every picture, with --maps its word maps, all pictures side by side, and --html's page."""
    settings = {"model": args.model, "dtype": args.dtype} | result.settings
    for i, (image, name) in enumerate(zip(result.images, job.names, strict=True)):
        own = settings | {"prompt": job.prompts[i], "edit": repr(job.edits[i - 1]) if i else "None"}
        save(image, args.out / f"{name}.png", own)
        if args.maps and result.attention:
            save(show.word_maps(image, result.attention, i), args.out / f"{name}-maps.png", own)
        if args.put_back and result.source and i:
            whole = result.source.picture.put_back(image)
            save(whole, args.out / f"{name}-put-back.png", own)
    images, captions, first = result.images, job.captions, 1
    if result.source:
        images, first = [result.source.picture.image, *images], 2
        captions = ["given", f"{captions[0]} (reconstruction)", *captions[1:]]
    if len(images) > 1:
        # One row; with --sweep, one for each edited prompt.
        columns = args.sweep.count(",") + 1 + args.baseline if args.sweep else len(images)
        starts = range(first, max(len(images), first + 1), columns)
        rows = [images[:first] + images[i : i + columns] for i in starts]
        texts = [captions[:first] + captions[i : i + columns] for i in starts]
        save(show.grid(rows, texts), args.out / "row.png", settings)
    if args.html:
        text = page(replace(result, settings=settings), result.edit, job.names)
        write_whole(args.html, lambda file: file.write(text.encode()))


def run(argv: Sequence[str] | None) -> None:
    args, rest = make_parser().parse_known_args(argv)
    if rest:
        raise ValueError(
            f"{' '.join(rest)!r} is not understood: a prompt stands in quotes, "
            "and --help lists the options."
        )
    job = make_job(args)
    check_out(args.out)
    if args.inversion:
        check_out(args.inversion.parent, "--inversion")
    if args.html:
        check_out(args.html.parent, "--html")
        if args.html.is_dir():
            raise ValueError(f"--html {args.html} is a folder: name a file in it.")
    model = load(
        args.model, tokenizer=args.tokenizer, device=args.device, dtype=getattr(torch, args.dtype)
    )
    if model.device.type == "cpu":
        fast.keep_memory()
    if args.fast:
        fast.prepare(model.unet)
    warn_unknown_words(model, job.prompts)
    if args.explain:
        print(
            explain(
                model,
                job.prompts,
                job.edits,
                height=args.height,
                width=args.width,
                **given.plan(model, args),
            )
        )
        return
    source = given.find(model, args)
    if source and args.inversion and not args.inversion.exists():
        args.inversion.parent.mkdir(parents=True, exist_ok=True)
        source.save(args.inversion)
        say(args.inversion)
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
        progress=True,
    )
    write(result, job, args)


def fail(error: object) -> int:
    """One line on standard error, whatever the error holds."""
    print(" ".join(str(error).split()).rstrip(".") + ".", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 for an interruption."""
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        run(argv)
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
