"""The options of python -m minip2p.sample, and the Run that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from . import picture
from .align import DEFAULT, Window, window
from .blend import LocalBlend
from .command import option_of
from .edit import EditOfPrompt, PromptEdit, Reweight
from .errors import UserError, check
from .invert import METHODS
from .outputs import SOFTWARE
from .program import Parser, file, number, split_pair
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
    steps: dict[str, Any] = {"type": number(BOUNDS["num_inference_steps"]), "metavar": "STEPS"}
    scale: dict[str, Any] = {"type": number(BOUNDS["guidance_scale"]), "metavar": "SCALE"}
    add("--steps", dest="num_inference_steps", **steps, help="number of inference steps")
    add("--guidance", dest="guidance_scale", **scale, help="guidance scale; 1 is none")
    undesired = "what the pictures should not show"
    add("--negative", dest="negative_prompt", metavar="PROMPT", help=undesired)
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
    usual = "guidance scale of the inversion; by default --guidance with edit-friendly, else 1"
    add("--inversion-guidance", dest="inversion_guidance_scale", **scale, help=usual)
    add("--put-back", action="store_true", help="also write each edit into the whole picture")

    add = parser.add_argument_group("a closer look").add_argument
    add("--maps", action="store_true", help="also write where each picture attends to each word")
    add("--html", type=file, metavar="FILE", help="write a page to explore the attention maps")
    add("--explain", action="store_true", help="print which tokens are replaced when, and stop")
    return parser


# --- from options to a run ------------------------------------------------------------------------

AN_EDIT = ("swap", "to", "reweight")
A_PICTURE = ("image", "inversion")
OF_AN_EDIT = ("cross_replace_steps", "self_replace_steps", "blend", "baseline", "sweep", "explain")
OF_A_PICTURE = ("fit", "method", "skip", "inversion_guidance_scale")
NEEDS = {  # options: the options of which they need one, and how to give it
    (*AN_EDIT, *A_PICTURE): (["prompt"], "the source prompt: give it first, in quotes"),
    OF_AN_EDIT: (AN_EDIT, "an edit: add --swap OLD=NEW, --to PROMPT or --reweight WORD=2"),
    OF_A_PICTURE: (A_PICTURE, "your own picture: add --image FILE"),
    ("put_back",): (["image"], "the whole picture: add --image FILE"),
}


def is_given(options: argparse.Namespace, name: str) -> bool:
    """Tell whether the command gives an option a value."""
    value = getattr(options, name)
    return not (value is None or value is False or value == [])  # 0 is given


def make_run(options: argparse.Namespace) -> Run:
    """Return the run that the options describe. Raises UserError where they make no sense."""
    if not any(is_given(options, name) for name in ("prompt", *AN_EDIT, *A_PICTURE)):
        example = {"prompt": EXAMPLE[0], "swap": [EXAMPLE[1]], "baseline": True}
        options = argparse.Namespace(**vars(options) | example)
    for names, (needed, remedy) in NEEDS.items():
        is_there = any(is_given(options, name) and getattr(options, name) != "" for name in needed)
        for name in names:
            check(is_there or not is_given(options, name), f"{option_of(name)} needs {remedy}.")
    prompt = options.prompt
    for target in options.to:
        check(target.strip(), f"--to takes a prompt, not {target!r}.")
    targets = [swap_word(prompt, *split_pair("--swap", swap)) for swap in options.swap] + options.to
    if options.reweight and not targets:
        targets = [prompt]
    edits = [*([None] if options.baseline else []), *(parse_edits(options) if targets else [])]
    return Run(
        [prompt, *(target for target in targets for _ in edits)],
        edits * len(targets),
        source=parse_source(options),
        **settings_of(Run, options),
    )


def settings_of(kind: type[Run | SourcePicture], options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that set a field of Run or of SourcePicture."""
    values = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def parse_edits(options: argparse.Namespace) -> list[EditOfPrompt]:
    """Return the edit that all edited prompts share, or with --sweep the edit of each window."""
    option = "--cross-replace-steps"
    pairs = [
        split_pair(option, text, at_last=True) if "=" in text else (DEFAULT, text)
        for text in options.cross_replace_steps
    ]
    windows = by_word(option, pairs, parse_window)
    cross = windows[DEFAULT] if list(windows) == [DEFAULT] else windows or None
    self_window = None
    if options.self_replace_steps is not None:
        self_window = parse_window("--self-replace-steps", options.self_replace_steps)
    edit = PromptEdit(cross, self_window, LocalBlend(options.blend) if options.blend else None)
    edits = [edit] if options.sweep is None else sweep_windows(edit, options.sweep)
    pairs = [split_pair("--reweight", text, at_last=True) for text in options.reweight]
    weights = by_word("--reweight", pairs, parse_weight)
    return [Reweight(weights, edit) if weights else edit for edit in edits]


def sweep_windows(edit: PromptEdit, text: str) -> list[PromptEdit]:
    """Return the edit with each window of cross=0.1,0.5 or self=0.1,0.5."""
    kind, ends = split_pair("--sweep", text)
    check(kind in ("cross", "self"), f"--sweep takes cross=0.1,0.5,0.9 or self=..., not {text!r}.")
    name = f"{kind}_replace_steps"
    is_free = getattr(edit, name) is None
    check(is_free, f"--sweep {kind}=... sets what {option_of(name)} sets: give one.")
    windows = [parse_window("--sweep", end) for end in ends.split(",")]
    is_new = len(set(windows)) == len(windows)
    check(is_new, f"--sweep has a window twice: {text!r}.")
    if kind == "cross":
        return [replace(edit, cross_replace_steps=window) for window in windows]
    return [replace(edit, self_replace_steps=window) for window in windows]


def by_word(
    option: str, pairs: Sequence[tuple[str, str]], parse: Callable[[str, str], Any]
) -> dict[str, Any]:
    """Return the value of each word, for an option that takes WORD=VALUE several times."""
    values: dict[str, Any] = {}
    for word, text in pairs:
        check(word not in values, f"{option} has two values for {word!r}: give one.")
        values[word] = parse(option, text)
    return values


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


def parse_weight(option: str, text: str) -> float:
    """Read a number, which Reweight checks."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} takes a finite number after the =, not {text!r}.") from None


def parse_source(options: argparse.Namespace) -> SourcePicture | None:
    """Return the user's own picture with the settings of its inversion, or None."""
    if not (options.image or options.inversion):
        return None
    check(
        options.image or options.inversion.exists(),
        f"There is no {options.inversion}: add --image FILE to make it.",
    )
    settings = settings_of(SourcePicture, options)
    settings["image"] = options.image and str(options.image)
    settings["guidance_scale"] = options.inversion_guidance_scale
    return SourcePicture(**settings)
