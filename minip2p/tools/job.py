"""What a command line asks for, as prompts and edits: windows, weights and words are read here."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..align import DEFAULT, Prompt, Window, Windows, window
from ..blend import LocalBlend
from ..edit import PromptEdit, Reweight
from ..text import tokenize
from ..weights import StableDiffusion
from ..words import swap_word
from . import given

EXAMPLE = "a painting of a squirrel eating a burger", "squirrel=lion"
NEED_AN_EDIT = (
    *("cross_replace_steps", "self_replace_steps", "blend"),
    *("baseline", "sweep", "explain"),
)


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


# --- words that not every edit has ---------------------------------------------------------------


def fit_words(model: StableDiffusion, job: Job) -> list[PromptEdit | Reweight | None]:
    """The job's edits, each with those of its words that it has. Which are left out is said.

    A word that no edit has stays in all of them: it is a mistake, and `generate` says so.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prompts that are too long `generate` warns, once
        source, *targets = (tokenize(model.tokenizer, prompt) for prompt in job.prompts)
    lacking: dict[tuple[str, str], list[str]] = {}  # option and word: the prompts without it
    acting = set()
    for edit, target in zip(job.edits, targets, strict=True):
        for option, word in named(edit):
            if acts(edit, option, word, source, target):
                acting.add((option, word))
            else:
                lacking.setdefault((option, word), []).append(target.text)
    if not lacking.keys() <= acting:
        return job.edits
    for (option, word), prompts in lacking.items():
        where = " and ".join(map(repr, dict.fromkeys(prompts)))
        warnings.warn(f"{option} {word} does not act on {where}: no {word!r} there.", stacklevel=2)
    return [
        without(edit, [w for w in named(edit) if not acts(edit, *w, source, target)])
        for edit, target in zip(job.edits, targets, strict=True)
    ]


def named(edit: PromptEdit | Reweight | None) -> list[tuple[str, str]]:
    """The words that an edit names, each with the option that names it."""
    if edit is None:
        return []
    weights, inner = (edit.weights, edit.edit) if isinstance(edit, Reweight) else ({}, edit)
    cross, blend = inner.cross_replace_steps, inner.local_blend
    of_windows = [w for w in cross if w != DEFAULT] if isinstance(cross, dict) else []
    return [
        *(("--reweight", word) for word in weights),
        *(("--cross-replace-steps", word) for word in of_windows),
        *(("--blend", word) for word in (blend.words if blend else ())),
    ]


def acts(
    edit: PromptEdit | Reweight | None, option: str, word: str, source: Prompt, target: Prompt
) -> bool:
    """Whether that option of an edit finds its word in the target, or for a blend in the source."""
    inner = edit.edit if isinstance(edit, Reweight) else edit
    assert inner is not None
    at_source, at_target = inner.align(source, target).carry(word, source, target)
    return bool(at_target or (option == "--blend" and at_source))


def without(
    edit: PromptEdit | Reweight | None, words: Sequence[tuple[str, str]]
) -> PromptEdit | Reweight | None:
    """The edit without what those options say of those words."""
    if edit is None or not words:
        return edit
    if isinstance(edit, Reweight):
        inner = without(edit.edit, words)
        assert isinstance(inner, PromptEdit)
        weights = {w: v for w, v in edit.weights.items() if ("--reweight", w) not in words}
        return replace(edit, weights=weights, edit=inner) if weights else inner
    cross, blend = edit.cross_replace_steps, edit.local_blend
    if isinstance(cross, dict):
        cross = {w: v for w, v in cross.items() if ("--cross-replace-steps", w) not in words}
    if blend:
        kept = [word for word in blend.words if ("--blend", word) not in words]
        blend = replace(blend, words=kept) if kept else None
    return replace(edit, cross_replace_steps=cross, local_blend=blend)
