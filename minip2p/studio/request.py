"""Turn the widgets of the studio's page into a `Run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..align import DEFAULT
from ..blend import LocalBlend
from ..edit import PromptEdit, Reweight
from ..errors import check, describe
from ..run import Run, SourcePicture
from ..text import tokenize
from ..weights import StableDiffusion

PROMPT = 1000  # characters; the model sees 77 tokens
# Words that are seldom edited: their rows are folded away.
MINOR = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "the", "to", "with"}


def word_rows(model: StableDiffusion, prompt: Any, edited: Any) -> list[dict[str, Any]]:
    """Return a row for each word that can be edited, as studio.js shows it.

    The edited prompt's words come first. "place" is "both", "edit" or "source": a word of the
    source alone has no window and no weight, but can be blended. Raises UserError unless both are
    prompts of at most 1,000 characters.
    """
    for text in (prompt, edited):
        check(isinstance(text, str), f"A prompt is a string, not {describe(text)}.")
        check(len(text) <= PROMPT, f"A prompt has at most {PROMPT} characters, not {len(text)}.")
    check(prompt.strip(), "Write a prompt first: what the picture shows.")
    if not edited.strip():
        return []
    source, target = (first_spellings(model, text) for text in (prompt, edited))
    rows = []
    for word in dict.fromkeys([*target, *source]):
        place = "source" if word not in target else "both" if word in source else "edit"
        name = target.get(word) or source[word]
        rows.append({"name": name, "place": place, "is_minor": word in MINOR})
    return rows


def first_spellings(model: StableDiffusion, text: str) -> dict[str, str]:
    """Return the words that can be named, as they are first written, by their folded case."""
    spellings: dict[str, str] = {}
    for word in tokenize(model.tokenizer, text).words:
        # A command splits WORD=2 at its first =, and words match in any case.
        if "=" not in word and any(map(str.isalnum, word)):
            spellings.setdefault(word.casefold(), word)
    return spellings


def make_run(
    model: StableDiffusion,
    prompt: Any,
    edited: Any,
    numbers: Mapping[str, Any],
    settings: Any,
    picture: str | None = None,
    loaded: Mapping[str, Any] | None = None,
) -> Run:
    """Return the run that the widgets describe: the source, without control, and the edit.

    numbers: steps, guidance, seed and inversion_guidance. settings: the words' settings, as
    studio.js keeps them; words that have no row are ignored. picture: the name of a source picture.
    loaded: model and tokenizer, as Run has them. Raises UserError for what is out of bounds.
    """
    rows = word_rows(model, prompt, edited)
    check(isinstance(settings, Mapping), f"The settings are a dict, not {describe(settings)}.")

    def of_words(name: str, places: tuple[str, ...] = ("both", "edit")) -> dict[str, Any]:
        values = settings.get(name)
        check(isinstance(values, Mapping), f"The {name} are a dict, not {describe(values)}.")
        names = [row["name"] for row in rows if row["place"] in places]
        return {word: values[word] for word in names if word in values}

    blend = [word for word, is_on in of_words("blend", ("both", "edit", "source")).items() if is_on]
    edit = PromptEdit(
        {DEFAULT: settings.get("cross_replace_steps"), **of_words("windows")},
        settings.get("self_replace_steps"),
        LocalBlend(tuple(blend)) if blend else None,
    )
    weights = {word: weight for word, weight in of_words("weights").items() if weight != 1}
    guidance = numbers["inversion_guidance"]
    source = SourcePicture(picture, guidance_scale=None if guidance == 1 else guidance)
    return Run(
        [prompt, edited, edited] if edited.strip() else [prompt],
        [None, Reweight(weights, edit) if weights else edit] if edited.strip() else (),
        num_inference_steps=numbers["steps"],
        guidance_scale=numbers["guidance"],
        seed=numbers["seed"],
        source=source if picture else None,
        **(loaded or {}),
    )
