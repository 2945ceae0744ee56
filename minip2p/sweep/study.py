"""A study: a file of settings, with lists to be multiplied, becomes runs.

    prompt = "a painting of a squirrel eating a burger"
    swap = ["squirrel=lion", "burger=pizza"]
    cross_replace_steps = [0.2, 0.8, { lion = 0.4, default_ = 0.8 }]
    seed = [1, 2, 3]

is 2 x 3 x 3 runs. The lists of a [[zip]] group go side by side. In JSONL each line is one run, and
a list a value. Every run is told by the settings that determine its picture: their hash is its id.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..align import DEFAULT, Prompt, check_words, window
from ..blend import LocalBlend
from ..edit import PromptEdit, Refine, Reweight, WordSwap
from ..errors import check, describe, is_number, is_whole
from ..invert import METHODS
from ..scheduler import SCHEDULERS
from ..tools.job import pair
from ..words import bare, swap_word

EDITS = {"auto": PromptEdit, "swap": WordSwap, "refine": Refine, "none": None}
DTYPES = "float32", "float16", "bfloat16"
OF_STUDY = {"model": "emoji", "tokenizer": None, "dtype": "float32"}  # one value for all runs
OF_EDIT = "cross_replace_steps", "self_replace_steps", "blend"  # nothing without an edit
MAKES_EDIT = "swap", "to", "reweight"

Settings = dict[str, Any]


class Mistakes(ValueError):
    """What is wrong with a file: a sentence for each."""

    def __init__(self, sentences: Sequence[str]):
        super().__init__(" ".join(sentences))
        self.sentences = list(dict.fromkeys(sentences))


@dataclass
class Study:
    """model, tokenizer and dtype, and the runs' settings: one of each in ONE, checked."""

    about: Settings
    runs: list[Settings]


# --- one value ------------------------------------------------------------------------------------


def text(value: Any) -> str:
    check(isinstance(value, str), f"it must be a text in quotes, not {describe(value)}")
    return str(value)


def prompt(value: Any) -> str:
    check(text(value).strip(), f"it must be a prompt, not {value!r}")
    return str(value)


def given(value: Any) -> str:
    """The path of a picture, absolute: workers may stand elsewhere."""
    path = Path(text(value)).absolute()
    check(path.is_file(), f"there is no picture {path}")
    return str(path)


def number(low: float, high: float, whole: bool = False) -> Callable[[Any], Any]:
    """Reads a number within those bounds."""
    what, fits = ("whole number", is_whole) if whole else ("number", is_number)

    def parse(value: Any) -> Any:
        check(
            fits(value) and low <= value <= high,
            f"it must be a {what} from {low} to {high}, not {describe(value)}",
        )
        return int(value) if whole else float(value)

    return parse


def one_of(names: Sequence[str]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        check(value in names, f"it must be one of {', '.join(names)}, not {describe(value)}")
        return str(value)

    return parse


def words(value: Any) -> list[str]:
    """A word or a list of words."""
    several = [value] if isinstance(value, str) else value
    fits = isinstance(several, list) and all(isinstance(v, str) and v.strip() for v in several)
    check(fits, f"it must be a word or a list of words, not {describe(value)}")
    return list(several)


def swaps(value: Any) -> list[str]:
    return ["=".join(pair("a swap", one)) for one in words(value)]


def windows(value: Any) -> Any:
    """A window, or those of some words → the same, each as (start, end)."""
    if not isinstance(value, Mapping):
        return list(window(value))
    return {word: list(window(one)) for word, one in value.items()}


def weights(value: Any) -> dict[str, float]:
    if value == {}:
        return {}
    check(isinstance(value, Mapping), f"it must be words with weights, not {describe(value)}")
    return {word: float(weight) for word, weight in Reweight(value).weights.items()}


def blend(value: Any) -> Settings | None:
    """A word, several, none ([]), or all the arguments of LocalBlend but a mask."""
    given = value if isinstance(value, Mapping) else {"words": words(value)}
    names = "words", "threshold", "start", "subtract"
    for name in given:
        check(name in names, f"it has {', '.join(names)}, and no {name!r}")
    if not given.get("words"):
        return None
    made = LocalBlend(**given)
    numbers = {"threshold": float(made.threshold), "start": float(made.start)}
    return numbers | {"words": list(made.words), "subtract": list(made.subtract)}


# What a run has: how a value is read, and what it is where the file has none.
ONE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "prompt": (prompt, None),
    "image": (given, None),
    "method": (one_of(METHODS), None),
    "negative_prompt": (text, ""),
    "swap": (swaps, []),
    "to": (prompt, None),
    "edit": (one_of(list(EDITS)), "auto"),
    "cross_replace_steps": (windows, None),
    "self_replace_steps": (lambda value: list(window(value)), None),
    "reweight": (weights, {}),
    "blend": (blend, None),
    "seed": (number(0, 2**63 - 1, whole=True), 8888),
    "num_inference_steps": (number(1, 999, whole=True), None),
    "guidance_scale": (number(-1000, 1000), None),
    "scheduler": (one_of(list(SCHEDULERS)), None),
    "eta": (number(0, 1), 0.0),
    "height": (number(1, 16384, whole=True), None),
    "width": (number(1, 16384, whole=True), None),
}
ABOUT = {"model": text, "tokenizer": text, "dtype": one_of(DTYPES)}


# --- one run --------------------------------------------------------------------------------------


class Wrong(ValueError):
    """A mistake in what `key` says."""

    def __init__(self, key: str, error: object):
        super().__init__(str(error))
        self.key = key


def complete(given: Mapping[str, Any]) -> Settings:
    """The settings of one run, of which the file has `given`. Raises Wrong."""
    run = {name: default for name, (_, default) in ONE.items()}
    for key, value in given.items():
        with blaming(key):
            run[key] = ONE[key][0](value)
    with blaming("prompt"):
        check(run["prompt"] is not None, "every run needs a prompt, and there is none")
    with blaming("to"):
        check(not (run["swap"] and run["to"]), "swap and to both give the edited prompt: keep one")
    for key, usual in (("scheduler", "ddim"), ("eta", 0)) if run["image"] else ():
        with blaming(key):
            check(run[key] in (None, usual), f"of a given image it is {usual}: leave it out")
    with blaming("method"):
        check(run["image"] or not run["method"], "it is of a given image, and there is none")
    with blaming("swap"):
        if run["swap"]:
            run["to"] = swapped(run["prompt"], run["swap"])
    if run["to"] is None and run["reweight"]:
        run["to"] = run["prompt"]
    for key in OF_EDIT:
        with blaming(key):
            useless = run[key] is not None and not any(key in given for key in MAKES_EDIT)
            check(not useless, "it needs an edit: add swap, to or reweight")
    for key, named in named_words(run).items():
        with blaming(key):
            check_words(named, plain_prompts(run))
    return run


@contextmanager
def blaming(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise Wrong(key, error) from None


def swapped(source: str, swaps: Sequence[str]) -> str:
    for swap in swaps:
        source = swap_word(source, *pair("swap", swap))
    return source


def named_words(run: Settings) -> dict[str, list[str]]:
    """The words that its edit names, by the setting that names them; they must be in a prompt."""
    if run["to"] is None:
        return {}
    cross, blend = run["cross_replace_steps"], run["blend"]
    return {
        "cross_replace_steps": [w for w in cross if w != DEFAULT]
        if isinstance(cross, dict)
        else [],
        "reweight": list(run["reweight"]),
        "blend": [*blend["words"], *blend["subtract"]] if blend else [],
    }


def plain_prompts(run: Settings) -> list[Prompt]:
    """Both prompts with words for tokens: enough to find words in, without a tokenizer."""
    found = []
    for one in (run["prompt"], run["to"]):
        spans = tuple(match.span() for match in re.finditer(r"\S+", one))
        found.append(Prompt(one, (), spans, len(one)))
    return found


def changed_words(run: Settings) -> tuple[list[str], list[str]]:
    """The words that an edit is about, in the source and in the edited prompt."""
    source, target = ([bare(w) for w in run[key].split()] for key in ("prompt", "to"))
    old, new = list(run["reweight"]), list(run["reweight"])
    matcher = difflib.SequenceMatcher(None, source, target, autojunk=False)
    for same, a, b, c, d in matcher.get_opcodes():
        if same != "equal":
            old, new = old + source[a:b], new + target[c:d]
    return old, new


def edit_of(run: Settings) -> PromptEdit | Reweight | None:
    kind = EDITS[run["edit"]]
    if kind is None or run["to"] is None:
        return None
    local = LocalBlend(**run["blend"]) if run["blend"] else None
    edit = kind(run["cross_replace_steps"], run["self_replace_steps"], local)
    return Reweight(run["reweight"], edit) if run["reweight"] else edit


# --- a whole file ---------------------------------------------------------------------------------


Line = Callable[[str, Any], int]  # of a key, and of its value
Read = tuple[list[Settings], Line]


def read(path: Path) -> Study:
    """The runs of a study. Raises Mistakes, or ValueError if it can't be read at all."""
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(f"{path} can't be read: {reason}.") from None
    check(path.suffix in READERS, f"A study is a {' or '.join(READERS)} file, not {path}.")
    about, runs, sentences = dict(OF_STUDY), [], Sentences(path)
    first: Settings = {}
    for given, line in READERS[path.suffix](content, sentences):
        try:
            for key in [key for key in given if key in ABOUT]:
                with blaming(key):
                    about[key] = ABOUT[key](value := given.pop(key))
                    check(
                        first.setdefault(key, value) == value,
                        "a study has one, and here is another",
                    )
            runs.append(complete(given))
        except Wrong as error:
            sentences.add(line(error.key, given.get(error.key)), f"{error.key}: {error}")
    if sentences.found:
        raise Mistakes(sentences.found)
    check(runs, f"{path} has no run: it needs at least a prompt.")
    return Study(about, runs)


class Sentences:
    """The mistakes that were found in a file."""

    def __init__(self, path: Path):
        self.path, self.found = path, list[str]()

    def add(self, line: int, what: object) -> None:
        self.found.append(f"{self.path} line {line}: {str(what).rstrip('.')}.")


def from_jsonl(content: str, sentences: Sentences) -> Iterator[tuple[Settings, Line]]:
    for n, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            check(isinstance(given, dict), "a run is an object, {...}")
            for key in given:
                check_key(key)
            yield given, partial(same, n)
        except ValueError as error:  # JSONDecodeError is one
            sentences.add(n, error)


def same(n: int, key: str, value: Any) -> int:
    return n


def from_toml(content: str, sentences: Sentences) -> Iterator[tuple[Settings, Line]]:
    try:
        table = toml().loads(content)
    except ValueError as error:  # TOMLDecodeError is one, and says the line
        raise ValueError(f"{sentences.path}: {error}.") from None
    line = partial(line_of, content.splitlines())
    zips = table.pop("zip", [])
    if not (isinstance(zips, list) and all(isinstance(group, dict) for group in zips)):
        raise ValueError(f"{sentences.path} line {line('zip', None)}: a group is headed [[zip]].")
    chosen, seen = [], set[str]()
    singles: list[Settings] = [{key: value} for key, value in table.items()]
    for i, group in enumerate([*singles, *zips]):
        try:
            for key in group:
                check_key(key)
                check(key not in seen, f"{key} stands in a [[zip]] and a second time")
                seen.add(key)
            chosen.append(alternatives(group, zipped=i >= len(singles)))
        except ValueError as error:
            sentences.add(line(next(iter(group), "zip"), None), error)
    if not sentences.found:
        for some in itertools.product(*chosen):
            yield {key: value for one in some for key, value in one.items()}, line


READERS = {".toml": from_toml, ".jsonl": from_jsonl}


def toml() -> Any:
    for name in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise ValueError("Python 3.10 reads TOML with `pip install tomli`; a .jsonl works everywhere")


def line_of(lines: Sequence[str], key: str, value: Any) -> int:
    """Where the key stands; of a text in a list over several lines, where that does."""
    key_line = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=|\s*\[\[{re.escape(key)}""")
    start = next((n for n, text in enumerate(lines) if key_line.match(text)), 0)
    for n, text in enumerate(lines[start:], start):
        if n > start and re.match(r"\s*(\w+\s*=|\[\[)", text):
            break
        if isinstance(value, str) and value in text:
            return n + 1
    return start + 1


def alternatives(group: Settings, zipped: bool) -> list[Settings]:
    """[{"seed": 1}, {"seed": 2}] of {"seed": [1, 2]}; of a zip group, its rows."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in group.items()}
    lengths = {key: len(values) for key, values in lists.items()}
    for key, n in lengths.items():
        check(n, f"the list of {key} is empty")
    if zipped:
        check(
            lengths and len(set(lengths.values())) == 1,
            "the lists of a [[zip]] group have equal lengths, not "
            + (", ".join(f"{key} {n}" for key, n in lengths.items()) or "none at all"),
        )
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def check_key(key: str) -> None:
    if key in ONE or key in ABOUT:
        return
    close = difflib.get_close_matches(key, [*ONE, *ABOUT], 1)
    hint = f": is it {close[0]}?" if close else f", only {', '.join([*ABOUT, *ONE])}"
    raise ValueError(f"there is no setting {key!r}{hint}")


# --- what determines a picture --------------------------------------------------------------------


def settle(run: Settings, model: Settings) -> Settings:
    """All that determines the picture, and nothing else: what the run leaves open, filled in.

    model: its "id", and what it recommends.
    """
    defaults = model["defaults"]
    usual = {"num_inference_steps": 50, "guidance_scale": 7.5, "scheduler": model["scheduler"]}
    usual |= {"height": model["height"], "width": model["width"]}
    settled = {key: value for key, value in run.items() if key not in ("swap", "image")}
    settled["picture"] = None
    if run["image"]:
        method = run["method"] or "direct"
        settled |= {"picture": digest(run["image"]), "method": method, "scheduler": "ddim"}
        settled["seed"] = run["seed"] if method == "edit-friendly" else None  # no noise is drawn
    for key, value in usual.items():
        if settled[key] is None:
            settled[key] = ONE[key][0](defaults.get(key, value))
    controlled = run["to"] is not None and run["edit"] != "none"
    if controlled:
        for key, value in (("cross_replace_steps", 0.8), ("self_replace_steps", 0.4)):
            if settled[key] is None:
                settled[key] = ONE[key][0](defaults.get(key, value))
    else:  # nothing that an edit has matters
        settled |= dict.fromkeys(OF_EDIT) | {"reweight": {}, "edit": "none"}
        settled["to"] = None if run["to"] == run["prompt"] else run["to"]
    return {"weights": model["id"], "dtype": model["dtype"]} | settled


@lru_cache(1024)
def digest(path: str) -> str:
    """Of a picture's file: where it lies does not matter."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def source_of(settled: Settings) -> Settings:
    """The settings of the run's source picture."""
    alone = {key: ONE[key][1] for key in (*OF_EDIT, "reweight", "to")}
    return settled | alone | {"edit": "none"}


def identify(settled: Settings) -> str:
    """16 hexadecimal digits of the SHA-256 of the settings' canonical JSON.

    What is None is left out, so that a setting which a later version adds changes no id.
    """
    said = {key: value for key, value in settled.items() if value is not None}
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
