"""What a visitor of the studio asks for, as a run of `generate`, a command and Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..align import DEFAULT, window
from ..blend import LocalBlend
from ..edit import PromptEdit, Reweight
from ..errors import check, describe, is_number
from ..text import tokenize
from ..weights import StableDiffusion

PROMPT = 1000  # characters; the model sees 77 tokens
LIMITS = {"steps": (1, 100), "guidance": (0, 30), "seed": (0, 2**53 - 1), "weight": (-10, 10)}
WHOLE = "steps", "seed"


@dataclass(frozen=True)
class Wish:
    """A picture, or with an edited prompt three: the source, without control, and the edit."""

    prompt: str
    edited: str  # blank: the source alone
    numbers: Mapping[str, float]  # steps, guidance, seed
    windows: Mapping[str, tuple[float, float]]  # of words; "default_" of all others
    layout: tuple[float, float]  # the window of self-attention
    weights: Mapping[str, float]
    blend: tuple[str, ...]
    picture: str | None = None  # the file of a given picture, which is the source then

    @property
    def prompts(self) -> list[str]:
        return [self.prompt, self.edited, self.edited] if self.edited.strip() else [self.prompt]

    @property
    def edit(self) -> PromptEdit | Reweight:
        blend = LocalBlend(self.blend) if self.blend else None
        edit = PromptEdit(self.windows, self.layout, blend)
        return Reweight(self.weights, edit) if self.weights else edit

    def settings(self) -> dict[str, Any]:
        """What `generate` is given after the model, but for source and store."""
        return {
            "prompts": self.prompts,
            "edit": [None, self.edit] if self.edited.strip() else None,
            "num_inference_steps": self.numbers["steps"],
            "guidance_scale": self.numbers["guidance"],
            "seed": self.numbers["seed"],
        }

    def python(self, loaded: Mapping[str, str]) -> str:
        """Python that makes the same pictures, to the bit. loaded: what `load` was given."""
        given = ", ".join(f"{name}={value!r}" for name, value in loaded.items())
        settings = "".join(f"    {k}={code(v)},\n" for k, v in self.settings().items())
        source = ""
        if self.picture:
            asked = f"{Path(self.picture).name!r}, {self.prompt!r}"
            steps = f"num_inference_steps={self.numbers['steps']}"
            source = f"source = minip2p.invert(model, {asked}, {steps})\n"
            settings += "    source=source,\n"
        return (
            "import minip2p\nfrom minip2p.html.page import PageStore\n\n"
            f"model = minip2p.load({given})\n{source}result = minip2p.generate(\n    model,\n"
            f'{settings}    store=PageStore(),\n)\nresult.images[-1].save("edit.png")\n'
        )

    def command(self, loaded: Mapping[str, str]) -> str:
        """A command that makes the same pictures, to the bit."""
        options = [("model" if name == "source" else name, v) for name, v in loaded.items()]
        options += [("image", Path(self.picture).name)] if self.picture else []
        options += [(name, str(value)) for name, value in self.numbers.items()]
        # The maps of a page are written down, and the sums of written maps round differently.
        said = ["python -m minip2p.sample --html out/page.html"]
        if self.edited.strip():
            said.append("--baseline")
            options.append(("to", self.edited))
            for word, (start, end) in self.windows.items():
                of_word = "" if word == DEFAULT else f"{word}="
                options.append(("cross-replace-steps", f"{of_word}{start},{end}"))
            options.append(("self-replace-steps", "{},{}".format(*self.layout)))
            options += [("reweight", f"{word}={weight}") for word, weight in self.weights.items()]
            options += [("blend", word) for word in self.blend]
        said += [f"--{name}{'=' if v[:1] == '-' else ' '}{quoted(v)}" for name, v in options]
        said.append(("-- " if self.prompt[:1] == "-" else "") + quoted(self.prompt))
        return " ".join(said)


def code(value: Any) -> str:
    """Python that makes it again; of an edit, without what it has by default."""
    if isinstance(value, list):
        return f"[{', '.join(map(code, value))}]"
    if not is_dataclass(value):
        return repr(value)
    given = [f.name for f in fields(value) if getattr(value, f.name) != f.default]
    inside = ", ".join(f"{name}={code(getattr(value, name))}" for name in given)
    return f"minip2p.{type(value).__name__}({inside})"


def quoted(text: str) -> str:
    """For any shell, as long as nothing in it is special; else for POSIX'."""
    return f'"{text}"' if re.fullmatch(r"[\w.,=-]*( [\w.,=-]*)+", text) else shlex.quote(text)


def rows(model: StableDiffusion, prompt: Any, edited: Any) -> list[dict[str, Any]]:
    """The words that get a row: of the edited prompt, then those that only the source has.

    The latter have no window and no weight, but can be blended. Raises ValueError unless both are
    prompts of a length that is bearable.
    """
    for text in (prompt, edited):
        check(isinstance(text, str), f"A prompt is a string, not {describe(text)}.")
        check(len(text) <= PROMPT, f"A prompt has at most {PROMPT} characters, not {len(text)}.")
    check(prompt.strip(), "Write a prompt first: what the picture shows.")
    found: dict[str, dict[str, Any]] = {}
    for text, own in ((edited, True), (prompt, False)) if edited.strip() else ():
        for word in tokenize(model.tokenizer, text).words:
            # A command parts WORD=2 at its first =, and words are found in any case.
            if "=" not in word and any(map(str.isalnum, word)):
                found.setdefault(word.casefold(), {"name": word, "own": own})
    return list(found.values())


def within(kind: str, value: Any, name: str) -> float:
    """The number, if it is within the LIMITS of its kind. Raises ValueError."""
    (low, high), whole = LIMITS[kind], kind in WHOLE
    check(
        is_number(value) and low <= value <= high and not (whole and value % 1),
        f"The {name} must be a {'whole ' * whole}number from {low} to {high}, not {value!r}.",
    )
    return int(value) if whole else float(value)


def make_wish(
    model: StableDiffusion,
    prompt: Any,
    edited: Any,
    numbers: Mapping[str, Any],
    said: Any,
    picture: str | None = None,
) -> Wish:
    """What the widgets say. Raises ValueError for what is out of bounds.

    said: of the words, as studio.js keeps it; words that have no row are passed over.
    """
    words = rows(model, prompt, edited)
    check(isinstance(said, Mapping), f"The words' settings are a dict, not {describe(said)}.")

    def part(name: str, own: bool = True) -> dict[str, Any]:
        of_words = said.get(name)
        check(isinstance(of_words, Mapping), f"The {name} are a dict, not {describe(of_words)}.")
        names = [word["name"] for word in words if word["own"] or not own]
        return {word: of_words[word] for word in names if word in of_words}

    weights = {w: within("weight", by, f"weight of {w!r}") for w, by in part("weights").items()}
    return Wish(
        prompt,
        edited,
        {name: within(name, value, name) for name, value in numbers.items()},
        {DEFAULT: window(said.get("all")), **{w: window(v) for w, v in part("windows").items()}},
        window(said.get("layout")),
        {word: weight for word, weight in weights.items() if weight != 1},
        tuple(word for word, is_on in part("blend", own=False).items() if is_on),
        picture,
    )
