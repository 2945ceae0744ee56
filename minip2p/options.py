"""The options of python -m minip2p.sample, and the Run that they describe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import picture
from .align import DEFAULT, Window, window
from .blend import LocalBlend
from .edit import EditOfPrompt, PromptEdit, Reweight
from .errors import UserError, check
from .invert import METHODS
from .outputs import SOFTWARE
from .program import Parser, number, split_pair
from .run import DTYPES, EXAMPLE, Run, SourcePicture
from .scheduler import SCHEDULERS
from .settings import BOUNDS
from .words import swap_word


def make_parser() -> Parser:
    """Return the parser of all options. What an option leaves open is None, False or []."""
    parser = Parser(
        prog="python -m minip2p.sample",
        description="Make a picture from a prompt, and edited pictures from it with "
        "Prompt-to-Prompt. Without arguments: a squirrel eating a burger becomes a lion.",
    )
    parser.add_argument("--version", action="version", version=SOFTWARE.split(",")[0])
    add = parser.add_argument
    add("prompt", nargs="?", help="what the picture shows; the source of all edits")
    add("--model", help="emoji (the default), a folder, a .safetensors file or a hub id")
    add("--tokenizer", metavar="FOLDER", help="CLIP's tokenizer, for a single file")
    add("--ema", action=argparse.BooleanOptionalAction, help="which of a single file's two UNets")
    add("--steps", type=number(BOUNDS["num_inference_steps"]), help="number of inference steps")
    add("--guidance", type=number(BOUNDS["guidance_scale"]), help="guidance scale; 1 is none")
    add("--negative", metavar="PROMPT", help="what the pictures should not show")
    add("--seed", type=number(BOUNDS["seed"]), help="seed of the noise; 8888 by default")
    add("--height", type=number(BOUNDS["height"]), help="height of the pictures in pixels")
    add("--width", type=number(BOUNDS["width"]), help="width of the pictures in pixels")
    add("--scheduler", choices=list(SCHEDULERS), help="sampler; the model's own by default")
    add("--eta", type=number(BOUNDS["eta"]), help="share of new noise in each step of DDIM")
    add("--device", help="cpu, cuda or mps; the fastest available by default")
    add("--dtype", choices=DTYPES, help="precision of the UNet; float32 by default")
    add("--fast", action="store_true", help="use less time and more memory; for SD on a CPU")
    add("--out", type=file, default=Path("out"), metavar="FOLDER", help="folder for the pictures")
    add("--preview", type=file, metavar="FILE", help="redraw this PNG while the pictures are made")
    add("--repeat", type=file, metavar="FILE", help="make the run of this picture again")

    add = parser.add_argument_group("edits").add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--swap", **several, metavar="OLD=NEW", help="add an edit that exchanges a word")
    add("--to", **several, metavar="PROMPT", help="add an edit that leads to this prompt")
    add("--reweight", **several, metavar="WORD=2", help="strengthen or weaken a word")
    add("--blend", **several, metavar="WORD", help="change only the region of this word")
    form = "a fraction of the UNet calls, 0.8, or its start and end, 0.1,0.8"
    cross = f"when cross-attention is replaced: {form}; for one word, lion=0.4"
    add("--cross-replace-steps", **several, metavar="WINDOW", help=cross)
    add("--self-replace-steps", metavar="WINDOW", help=f"when self-attention is replaced: {form}")
    add("--baseline", action="store_true", help="also make each edited prompt without control")
    add("--sweep", metavar="cross=0.1,0.5,0.9", help="make an edit for each window; or self=...")

    add = parser.add_argument_group("your own picture").add_argument
    add("--image", type=file, metavar="FILE", help="edit this picture, which the prompt describes")
    add("--fit", choices=picture.FITS, help="how it becomes the model's size; crop by default")
    keep = "keep the inverted picture in this .safetensors file, or use it if it exists"
    add("--inversion", type=file, metavar="FILE", help=keep)
    add("--method", choices=METHODS, help="method of inversion; direct by default")
    add("--skip", type=number(BOUNDS["skip"]), help="leave out the first steps: smaller changes")
    scale = "guidance scale of the inversion; by default --guidance with edit-friendly, else 1"
    add("--inversion-guidance", type=number(BOUNDS["guidance_scale"]), help=scale)
    add("--put-back", action="store_true", help="also write each edit into the whole picture")

    add = parser.add_argument_group("a closer look").add_argument
    add("--maps", action="store_true", help="also write where each picture attends to each word")
    add("--html", type=file, metavar="FILE", help="write a page to explore the attention maps")
    add("--explain", action="store_true", help="print which tokens are replaced when, and stop")
    return parser


def file(text: str) -> Path:
    """Read the name of a file or a folder, for an option's `type`; ~ is the home folder."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"it must be a file, not the address {text!r}: save it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text!r} can't be found: {error}") from None


# --- from options to a run ------------------------------------------------------------------------

NEED_A_PICTURE = ("fit", "method", "skip", "inversion_guidance", "put_back")
NEED_AN_EDIT = (
    "cross_replace_steps",
    "self_replace_steps",
    "blend",
    "baseline",
    "sweep",
    "explain",
)


def is_given(options: argparse.Namespace, name: str) -> bool:
    """Tell whether the command gives an option a value."""
    value = getattr(options, name)
    return not (value is None or value is False or value == [])  # 0 is given


def option_of(name: str) -> str:
    """Return the option, "--put-back", that argparse stores under a name, "put_back"."""
    return f"--{name.replace('_', '-')}"


def make_run(options: argparse.Namespace) -> Run:
    """Return the run that the options describe. Raises UserError where they make no sense."""
    check_picture_options(options)
    prompt, swaps, baseline = options.prompt, options.swap, options.baseline
    if swaps or options.to or options.reweight:
        check((prompt or "").strip(), "An edit needs the source prompt: give it first, in quotes.")
    for target in options.to:
        check(target.strip(), f"--to takes a prompt, not {target!r}.")
    if prompt is None:
        prompt, swaps, baseline = EXAMPLE[0], [EXAMPLE[1]], True
    targets = [swap_word(prompt, *split_pair("--swap", swap)) for swap in swaps] + options.to
    if options.reweight and not targets:
        targets = [prompt]
    for name in NEED_AN_EDIT:
        check(
            targets or not is_given(options, name),
            f"{option_of(name)} needs an edit: add --swap OLD=NEW, --to PROMPT or "
            "--reweight WORD=2.",
        )
    edits = [*([None] if baseline else []), *(parse_edits(options) if targets else [])]
    settings = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative,
    }
    names = "seed", "height", "width", "scheduler", "eta", "model", "tokenizer", "ema", "dtype"
    settings |= {name: getattr(options, name) for name in names}
    return Run(
        [prompt, *(target for target in targets for _ in edits)],
        edits * len(targets),
        source=parse_source(options),
        **{name: value for name, value in settings.items() if value is not None},
    )


def parse_edits(options: argparse.Namespace) -> list[EditOfPrompt]:
    """Return the edit that all edited prompts share, or with --sweep the edit of each window."""
    cross = parse_windows(options.cross_replace_steps)
    self_window = None
    if options.self_replace_steps is not None:
        self_window = parse_window("--self-replace-steps", options.self_replace_steps)
    blend = LocalBlend(options.blend) if options.blend else None
    edits = [PromptEdit(cross, self_window, blend)]
    if options.sweep is not None:
        kind, ends = split_pair("--sweep", options.sweep)
        check(
            kind in ("cross", "self"),
            f"--sweep takes cross=0.1,0.5,0.9 or self=..., not {options.sweep!r}.",
        )
        name = f"{kind}_replace_steps"
        check(
            not is_given(options, name),
            f"--sweep {kind}=... sets what {option_of(name)} sets: give one.",
        )
        windows = [parse_window("--sweep", end) for end in ends.split(",")]
        twice = len(set(windows)) < len(windows)
        check(not twice, f"--sweep has a window twice: {options.sweep!r}.")
        swept: list[dict[str, Any]] = [{name: window} for window in windows]
        edits = [replace(edits[0], **changed) for changed in swept]
    weights = parse_weights(options.reweight)
    return [Reweight(weights, edit) if weights else edit for edit in edits]


def parse_window(option: str, text: str) -> Window:
    """Read 0.8 or 0.1,0.8."""
    try:
        start, end = text.split(",") if "," in text else ("0", text)
        return window((float(start), float(end)))
    except ValueError:
        raise UserError(
            f"{option} takes a fraction of the UNet calls from 0 to 1, 0.8, or a start and an end, "
            f"0.1,0.8, not {text!r}."
        ) from None


def parse_windows(texts: Sequence[str]) -> dict[str, Window] | Window | None:
    """Read any of 0.8, 0.1,0.8 and lion=0.4."""
    windows: dict[str, Window] = {}
    for text in texts:
        word, value = DEFAULT, text
        if "=" in text:
            word, value = split_pair("--cross-replace-steps", text, at_last=True)
        check(word not in windows, f"--cross-replace-steps has two windows for {word!r}: give one.")
        windows[word] = parse_window("--cross-replace-steps", value)
    return windows[DEFAULT] if list(windows) == [DEFAULT] else windows or None


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Read any of lion=2."""
    weights: dict[str, float] = {}
    for text in texts:
        word, value = split_pair("--reweight", text, at_last=True)
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        is_finite = math.isfinite(weight)
        check(is_finite, f"--reweight takes a finite number for {word!r}, not {value!r}.")
        check(word not in weights, f"--reweight has two weights for {word!r}: give one.")
        weights[word] = weight
    return weights


# --- the user's own picture -----------------------------------------------------------------------


def check_picture_options(options: argparse.Namespace) -> None:
    """Raise UserError where the options for the user's own picture do not go together."""
    has_picture = bool(options.image or options.inversion)
    check(
        not has_picture or (options.prompt or "").strip(),
        "Your own picture needs the prompt that says what it shows: give it first, in quotes.",
    )
    check(
        options.image or not options.put_back,
        "--put-back needs the whole picture: add --image FILE.",
    )
    for name in NEED_A_PICTURE:
        check(
            has_picture or not is_given(options, name),
            f"{option_of(name)} needs your own picture: add --image FILE.",
        )
    for name in ("scheduler", "eta"):
        check(
            not has_picture or not getattr(options, name),
            f"Your own picture is inverted by DDIM without new noise: leave out {option_of(name)}.",
        )
    check(
        options.image or not options.inversion or options.inversion.exists(),
        f"There is no {options.inversion}: add --image FILE to make it.",
    )


def parse_source(options: argparse.Namespace) -> SourcePicture | None:
    """Return the user's own picture with the settings of its inversion, or None."""
    if not (options.image or options.inversion):
        return None
    settings = {
        "method": options.method,
        "skip": options.skip,
        "fit": options.fit,
        "guidance_scale": options.inversion_guidance,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    return SourcePicture(options.image and str(options.image), **settings)
