"""A picture's run again: the command that made it is in its metadata, as a list in JSON.

Nothing of a file is run as code. Its words go through the command line's own parser, and none of
them can say where a file is to be written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .files import read_png

GIVEN = "image", "inversion"  # files of the user's, whose names are nobody's business
NOT_RECORDED = "repeat", "out", "preview", "explain", *GIVEN
BESIDE = *NOT_RECORDED, "maps", "html", "device"  # may stand beside --repeat


def command(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """What makes the pictures of a command line, as words that say the same to the parser."""
    words = []
    for name, value in vars(args).items():
        if name in ("prompt", *NOT_RECORDED) or value == parser.get_default(name):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            # Of a page the name alone; that it is made is recorded, since it needs maps written
            # down, and those round in another way.
            values = value if isinstance(value, list) else [value.name if name == "html" else value]
            words += [f"--{option}={one}" for one in values]
    return [*words, "--", args.prompt]


def options(words: Sequence[str]) -> set[str]:
    before = itertools.takewhile(lambda word: word != "--", words)  # after it, a prompt
    return {word.partition("=")[0] for word in before if word.startswith("--")}


@dataclass
class Original:
    """A picture that is to be made again."""

    path: Path
    image: Image.Image
    name: str  # it was written as
    args: argparse.Namespace  # that made it

    def compare(self, made: Mapping[str, Image.Image]) -> None:
        """Say so if the picture did not become the same. made: by the name of the file."""
        again = made.get(self.name)
        if again is None or again.size != self.image.size:
            print(f"{self.path} was not made again: no such picture came out.", file=sys.stderr)
            return
        before, after = (np.asarray(image, int) for image in (self.image, again))
        if off := abs(before - after).max():
            print(
                f"{self.name} differs from {self.path} by up to {off} of 255: another model, "
                "device, machine or version made that.",
                file=sys.stderr,
            )


def original(
    argv: Sequence[str],
    args: argparse.Namespace,
    make_parser: Callable[[], argparse.ArgumentParser],
) -> Original:
    """What --repeat names, with the options that are given beside it.

    Raises ValueError if there are others, or if it is no picture with a command of minip2p's.
    """
    allowed = [f"--{name}" for name in BESIDE]
    more = sorted(options(argv) - {*allowed}) + (["a prompt"] if args.prompt is not None else [])
    if more:
        raise ValueError(
            f"--repeat makes a picture's run as it was: leave out {', '.join(more)}; beside it "
            f"there can be {', '.join(allowed[1:])}."
        )
    image, texts = read_png(args.repeat)
    if "command" not in texts:
        raise ValueError(
            f"{args.repeat} does not say how it was made: --repeat takes a picture that minip2p's "
            "command line wrote, with its metadata."
        )
    given = [f"--{name}" for name in GIVEN if getattr(args, name)]
    if "source" in texts and not given:
        raise ValueError(
            f"{args.repeat} was made from a given picture, which is not in it: add --image FILE."
        )
    if "source" not in texts and given:
        raise ValueError(f"{args.repeat} was made from no given picture: leave out {given[0]}.")
    made = read_command(args.repeat, texts["command"], make_parser)
    page = args.out / made.html if made.html else None
    beside = {name: getattr(args, name) for name in NOT_RECORDED}
    beside |= {"maps": args.maps or made.maps, "device": args.device or made.device}
    beside |= {"html": args.html or page}
    again = argparse.Namespace(**vars(made) | beside)
    return Original(args.repeat, image, texts.get("file", ""), again)


def read_command(
    path: Path, text: str, make_parser: Callable[[], argparse.ArgumentParser]
) -> argparse.Namespace:
    """The options of a picture's command. Raises ValueError if minip2p can't have written it."""
    try:
        words = json.loads(text)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError
        args = argparse.Namespace()
        if not options(words) & {"--help", "--version"}:  # these would end the program
            args = make_parser().parse_args(words)
        if command(args, make_parser()) != words:
            raise ValueError
        return args
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(
            f"The command in {path} is damaged, or of another version of minip2p: {text[:99]!r}."
        ) from None
