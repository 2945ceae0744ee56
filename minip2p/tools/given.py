"""The command line's given picture: --image, and what belongs to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import check
from ..invert import METHODS, Inversion, ReplayDDIM, invert
from ..picture import FITS, read
from ..scheduler import make_scheduler
from ..weights import StableDiffusion

NEED_A_PICTURE = "fit", "method", "skip", "put_back"


def add_options(group: argparse._ArgumentGroup, number: Callable[..., Any]) -> None:
    """number: what makes a reader of numbers within bounds"""
    add = group.add_argument
    add("--image", metavar="FILE", help="edit this picture; the prompt says what it shows")
    add("--fit", choices=FITS, help="how it is made the model's size; crop by default")
    add(
        "--inversion",
        type=Path,
        metavar="FILE",
        help="keep what is found out about the picture in this .safetensors file, or use what is "
        "there",
    )
    add("--method", choices=METHODS, help="of finding it out; direct by default")
    add("--skip", type=number(int, 0, 998), help="leave out so many of the first steps: less edit")
    add(
        "--put-back",
        action="store_true",
        help="also write each edit in its place in the whole picture",
    )


def check_options(args: argparse.Namespace) -> bool:
    """Whether a picture is given. Raises ValueError where options do not go together."""
    is_given = bool(args.image or args.inversion)
    check(
        not is_given or (args.prompt or "").strip(),
        "A given picture needs the prompt that says what it shows: give it first, in quotes.",
    )
    check(args.image or not args.put_back, "--put-back needs the whole picture: add --image FILE.")
    for option in ("scheduler", "eta"):
        check(
            not is_given or not getattr(args, option),
            f"A given picture is inverted by DDIM without new noise: leave out --{option}.",
        )
    for option in NEED_A_PICTURE:
        check(
            is_given or getattr(args, option) in (None, False),
            f"--{option.replace('_', '-')} needs a given picture: add --image FILE.",
        )
    return is_given


def find(model: StableDiffusion, args: argparse.Namespace) -> Inversion | None:
    """The given picture, inverted now or before."""
    if args.inversion and args.inversion.exists():
        return kept(args)
    if args.image is None:
        check(not args.inversion, f"There is no {args.inversion}: add --image FILE to make it.")
        return None
    return invert(
        model,
        args.image,
        args.prompt,
        num_inference_steps=args.steps,
        method=args.method or METHODS[0],
        guidance_scale=args.guidance if args.method == "edit-friendly" else None,
        skip=args.skip or 0,
        seed=args.seed,
        height=args.height,
        width=args.width,
        fit=args.fit or FITS[0],
        progress=True,
    )


def kept(args: argparse.Namespace) -> Inversion:
    """What --inversion kept. Raises ValueError where other options contradict it."""
    file, source = args.inversion, Inversion.load(args.inversion)
    for option in ("method", "skip", "fit"):
        own, asked = source.settings[option], getattr(args, option)
        check(asked in (None, own), f"{file} was made with --{option} {own}, not {asked}.")
    if args.image is None:
        return source
    size = source.settings["height"], source.settings["width"]
    picture = read(args.image, size, source.settings["fit"])
    same = picture.image.tobytes() == source.picture.image.tobytes()
    check(same, f"{file} is of another picture than {args.image}: name another file.")
    return replace(source, picture=picture)  # with the whole of it, to put edits back


def options(source: Inversion) -> dict[str, Any]:
    """What would invert the picture again in the same way, as options of the command line."""
    names = "method", "skip", "fit", "seed", "height", "width"
    return {"steps": source.settings["num_inference_steps"]} | {
        n: source.settings[n] for n in names
    }


def plan(model: StableDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """The steps and the scheduler that a run has, for --explain: nothing is inverted."""
    if args.inversion and args.inversion.exists():
        return {"scheduler": kept(args).start(model)[1]}
    if args.image is None:
        return {"num_inference_steps": args.steps, "scheduler": args.scheduler}
    steps = len(make_scheduler(model, args.steps, "ddim").timesteps)
    return {"scheduler": ReplayDDIM(steps, args.skip or 0, **model.schedule)}
