"""A study: a file of settings, whose lists are multiplied, becomes runs.

    prompt = "a painting of a squirrel eating a burger"
    swap = ["squirrel=lion", "burger=pizza"]
    cross_replace_steps = [0.2, 0.8, { lion = 0.4, default_ = 0.8 }]
    seed = [1, 2, 3]

is 2 x 3 x 3 runs. The lists of a [[zip]] group go side by side. In JSONL each line is one run, and
a list is a value. A run's id is a hash of the settings that determine its picture.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..align import DEFAULT
from ..edit import EditOfPrompt
from ..errors import UserError, check, describe
from ..program import split_pair
from ..record import EDITS, edit_from_dict
from ..run import Run, SourcePicture
from ..words import places, swap_word
from .results import Row

Settings = dict[str, Any]

ONE_FOR_ALL = ["model", "tokenizer", "dtype"]  # a study has one value of each
EDIT = ["swap", "to", "edit", "cross_replace_steps", "self_replace_steps", "reweight", "blend"]
SOURCE = ["image", "method", "inversion_guidance_scale"]
RUN = ["seed", "num_inference_steps", "guidance_scale", "scheduler", "eta", "height", "width"]
SETTINGS = ["prompt", "negative_prompt", *EDIT, *SOURCE, *RUN, *ONE_FOR_ALL]
NEEDS = {  # one of which keys a key needs, and how to give it
    ("cross_replace_steps", "self_replace_steps", "blend"): (
        {"swap", "to", "reweight"},
        "an edit: add swap, to or reweight",
    ),
    ("method", "inversion_guidance_scale"): ({"image"}, "a picture to edit: add image"),
}
# The study's keys for the settings of an edit that name words.
KEY_OF = {"weights": "reweight", "local_blend": "blend", "subtract": "blend"}


class StudyRun(NamedTuple):
    """A run as a study describes it."""

    run: Run
    swaps: list[str]  # "old=new", which the edited prompt was made with


@dataclass(frozen=True)
class SweepRun:
    """A run with the model's defaults filled in."""

    id: str
    source: str  # the id of its source picture
    run: Run
    row: Row  # what the table says of it before it is made

    @property
    def is_edit(self) -> bool:
        """Tell whether its picture is another one than the source."""
        return self.id != self.source


class StudyError(UserError):
    """The mistakes in a study's file, a sentence for each."""

    def __init__(self, sentences: Sequence[str]):
        super().__init__(" ".join(sentences))
        self.sentences = list(sentences)


# --- values ---------------------------------------------------------------------------------------


def check_key(key: str) -> None:
    """Raise UserError, with the nearest key, unless a study has that key."""
    if key not in SETTINGS:
        nearest = difflib.get_close_matches(key, SETTINGS, 1)
        hint = f": is it {nearest[0]}?" if nearest else f", only {', '.join(SETTINGS)}"
        raise UserError(f"there is no setting {key!r}{hint}")


def read_prompt(value: Any) -> str:
    is_prompt = isinstance(value, str) and value.strip()
    check(is_prompt, f"it must be a prompt in quotes, not {describe(value)}")
    return str(value)


def read_words(value: Any) -> list[str]:
    """Return a word, or a list of words, as a list."""
    words = [value] if isinstance(value, str) else value
    is_list = isinstance(words, list) and all(isinstance(w, str) and w.strip() for w in words)
    check(is_list, f"it must be a word or a list of words, not {describe(value)}")
    return list(words)


def read_swaps(value: Any) -> list[tuple[str, str]]:
    """Return the two sides of OLD=NEW, or of a list of them."""
    return [split_pair("a swap", swap) for swap in read_words(value)]


def read_blend(value: Any) -> Settings | None:
    """Return the arguments of a LocalBlend; a word or a list of words stands for `words`."""
    blend = dict(value) if isinstance(value, Mapping) else {"words": read_words(value)}
    check("words" in blend, f"it needs words, and has {', '.join(blend) or 'nothing'}")
    return blend if blend["words"] else None


def read_image(value: Any, folder: Path) -> str:
    """Return the absolute path of a picture. folder: where a relative path begins."""
    check(isinstance(value, str), f"it must be a path in quotes, not {describe(value)}")
    check("://" not in value, f"{value} is a web address: download the picture first")
    path = os.path.abspath(folder / os.path.expanduser(value))
    check(os.path.isfile(path), f"there is no picture {path}")
    return path


READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": read_prompt,
    "to": read_prompt,
    "swap": read_swaps,
    "blend": read_blend,
}


def label(value: Any) -> str:
    """Return a setting's value as a short text: "0.8" for [0, 0.8], "lion 0.4, others 0.8"."""
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, Mapping) and value.keys() >= {"words", "threshold"}:  # a blend
        usual = {"threshold": 0.3, "start": 0.0, "subtract": []}
        options = {name: value.get(name, v) for name, v in usual.items()}
        labels = [f"{n} {label(v)}" for n, v in options.items() if v != usual[n]]
        return ", ".join([label(value["words"]), *labels])
    if isinstance(value, Mapping):
        words = {"others" if word == DEFAULT else word: v for word, v in value.items()}
        return ", ".join(f"{word} {label(v)}" for word, v in words.items())
    is_list = isinstance(value, list | tuple)
    if is_list and len(value) == 2 and all(isinstance(v, float) for v in value):
        start, end = map(label, value)  # a window
        return end if start == "0" else f"{start} to {end}"
    if is_list:
        return ", ".join(json.dumps(v) if "," in str(v) else str(v) for v in value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


# --- one run --------------------------------------------------------------------------------------


@contextmanager
def error_in(key: str) -> Iterator[None]:
    """Begin the sentence of a UserError with the key whose value it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def read_run(values: Settings, folder: Path) -> StudyRun:
    """Return the run of one line, or of one combination. folder: the study's. Raises UserError."""
    settings: Settings = {}
    readers = READERS | {"image": partial(read_image, folder=folder)}
    for key, value in values.items():
        check_key(key)
        with error_in(key):
            value = readers[key](value) if key in readers and value is not None else value
        if value not in (None, []):
            settings[key] = value
    check("prompt" in settings, "prompt: every run needs a prompt, and there is none")
    check(not {"swap", "to"} <= settings.keys(), "to: swap and to both give the edited prompt")
    for keys, (needed, remedy) in NEEDS.items():
        for key in keys:
            is_useful = key not in settings or settings.keys() & needed
            check(is_useful, f"{key}: it needs {remedy}")
    source = None
    if "image" in settings:
        method, image = settings.pop("method", "direct"), settings.pop("image")
        guidance_scale = settings.pop("inversion_guidance_scale", None)
        source = SourcePicture(image, method, guidance_scale=guidance_scale)
    swaps = settings.pop("swap", [])
    prompts, edits = read_edit(settings, swaps)
    run = Run(prompts, edits, source=source, **settings)
    return StudyRun(run, [f"{old}={new}" for old, new in swaps])


def read_edit(
    settings: Settings, swaps: Sequence[tuple[str, str]]
) -> tuple[list[str], list[EditOfPrompt]]:
    """Take the prompts and the edit out of a run's settings. Raises UserError for unknown words."""
    prompt = settings.pop("prompt")
    target = settings.pop("to", prompt if swaps or settings.get("reweight") else None)
    with error_in("swap"):
        for old, new in swaps:
            target = swap_word(target, old, new)
    names = "cross_replace_steps", "self_replace_steps", "reweight", "blend"
    values = {name: settings.pop(name, None) for name in names}
    kind, kinds = settings.pop("edit", "auto"), [*EDITS, "none"]
    check(kind in kinds, f"edit: it is one of {', '.join(kinds)}, not {describe(kind)}")
    edit = None if kind == "none" else edit_from_dict({"edit": kind, **values})
    if target is None:
        return [prompt], []
    for setting, word in edit.named_words() if edit else ():
        is_known = places(prompt, word) or places(target, word)
        where = repr(prompt) if prompt == target else f"{prompt!r} or {target!r}"
        check(is_known, f"{KEY_OF.get(setting, setting)}: there is no word {word!r} in {where}")
    return [prompt, target], [edit]


def resolve(runs: Sequence[StudyRun], model: Settings) -> list[SweepRun]:
    """Return the different runs, with the model's defaults filled in.

    model: its "id", and its "defaults" (settings.defaults_of).
    """
    resolved: dict[str, SweepRun] = {}
    for study_run in runs:
        run = study_run.run.resolved(model["defaults"])
        settings = run.settled(model["id"])
        run_id, source = run.id(model["id"]), run.alone().id(model["id"])
        row: Row = {"id": run_id, "source": source, "file": f"{run_id}.png", "model": run.model}
        row |= {"swap": study_run.swaps, "image": run.source and run.source.image} | settings
        # Texts, because lists and dictionaries can't be grouped by in a table.
        plural = "swap", "cross_replace_steps", "self_replace_steps", "reweight", "blend"
        row |= {f"{name}_text": label(row[name]) for name in plural}
        resolved.setdefault(run_id, SweepRun(run_id, source, run, row))
    return list(resolved.values())


# --- a whole file ---------------------------------------------------------------------------------


def read(path: Path) -> list[StudyRun]:
    """Return the runs of a study. Raises StudyError, or UserError if there is none to be read."""
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"{path} can't be read: {reason}.") from None
    check(path.suffix in PARSERS, f"A study is a {' or '.join(PARSERS)} file, not {path}.")
    with error_in(str(path)):
        parts = PARSERS[path.suffix](content)
    # The combinations of a table share their mistakes, so each sentence is kept once.
    sentences, runs, common = dict[str, None](), [], dict[str, Any]()
    for place, load in parts:
        try:
            with error_in(f"{path}{place}"):
                values = load()
                for key in [key for key in ONE_FOR_ALL if key in values]:
                    is_same = common.setdefault(key, values[key]) == values[key]
                    check(is_same, f"{key}: a study has one for all runs, and this is another")
                runs.append(read_run(values, path.parent))
        except UserError as error:
            sentences[f"{str(error).rstrip('.')}."] = None
    if sentences:
        raise StudyError(list(sentences))
    check(runs, f"{path} has no run: it needs at least a prompt.")
    return [StudyRun(replace(run, **common), swaps) for run, swaps in runs]


def parse(loads: Callable[[str], Any], content: str) -> Settings:
    """Return the table that a parser reads. Raises UserError for anything else."""
    try:
        table = loads(content)
    except ValueError as error:
        raise UserError(str(error)) from None
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    check(isinstance(table, dict), "a run is an object, {...}")
    return table


# Where a run stands in a file, and a function that returns its settings.
Part = tuple[str, Callable[[], Settings]]


def parse_jsonl(content: str) -> Iterable[Part]:
    """Return the lines."""
    numbered = enumerate(content.split("\n"), 1)
    lines = [(n, line.removeprefix("\ufeff")) for n, line in numbered if line.strip()]
    return [(f" line {n}", partial(parse, json.loads, line)) for n, line in lines]


MOST_RUNS = 100_000  # they are all read before the first is made
LONG_KEY = re.compile(r"(?:[^\s.]{0,80}[ \t]*\.[ \t]*){200}")  # tomllib's time is quadratic in it


def parse_toml(content: str) -> Iterable[Part]:
    """Return every combination of a table's lists; those of a [[zip]] group go side by side."""
    check(not LONG_KEY.search(content), "it has a key of 200 parts or more, as a.b.c has three")
    table = parse(toml_parser().loads, content)
    zipped = table.pop("zip", [])
    is_list = isinstance(zipped, list) and all(isinstance(group, dict) for group in zipped)
    check(is_list, "zip: a group is headed [[zip]]")
    groups = [*({key: value} for key, value in table.items()), *zipped]
    keys = [key for group in groups for key in group]
    for key in keys:
        check(keys.count(key) == 1, f"{key}: it stands in a [[zip]] and a second time")
    choices = list(map(alternatives, groups))
    n = math.prod(map(len, choices))
    check(n <= MOST_RUNS, f"its lists multiply to {n} runs, and a study has at most {MOST_RUNS}")
    combinations = itertools.product(*choices)
    return (("", partial(dict, ChainMap(*combination))) for combination in combinations)


def alternatives(group: Settings) -> list[Settings]:
    """Return [{"seed": 1}, {"seed": 2}] for {"seed": [1, 2]}, and the rows of a [[zip]] group."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in group.items()}
    lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
    for key, values in lists.items():
        check(values, f"{key}: its list is empty")
    is_even = len({len(values) for values in lists.values()}) == 1
    check(is_even, f"zip: its lists need equal lengths, not {lengths or 'none at all'}")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def toml_parser() -> Any:
    for name in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise UserError("Python 3.10 reads TOML with `pip install tomli`; a .jsonl works everywhere.")


PARSERS: dict[str, Callable[[str], Iterable[Part]]] = {".toml": parse_toml, ".jsonl": parse_jsonl}
