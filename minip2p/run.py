"""One run as plain data: what the command line, a study, the studio and a picture's file all hold.

run = Run(("a photo of a cat", "a photo of a dog"), (WordSwap(),), seed=3)
run.generate(model)                        its pictures
Run.from_dict(run.to_dict()) == run        as JSON
run.command(), run.python()                what makes the same pictures elsewhere
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .command import command_of, python_of
from .edit import EditOfPrompt
from .errors import UserError, check, describe
from .invert import METHODS, Inversion, invert
from .picture import FITS
from .pipeline import Result, generate
from .record import changed_fields, check_table, edit_from_dict, edit_to_dict
from .scheduler import SCHEDULERS
from .settings import BOUNDS, list_of
from .weights import StableDiffusion

DTYPES = ("float32", "float16", "bfloat16")
MOST_PROMPTS = 256  # a file from a stranger asks for no more work than this
EXAMPLE = "a painting of a squirrel eating a burger", "squirrel=lion"  # what a newcomer sees first


@dataclass(frozen=True)
class SourcePicture:
    """A picture to be edited, and how it is inverted; `invert` describes the settings."""

    image: str | None = None  # a file; None where a record leaves its name out
    method: str = "direct"
    skip: int = 0
    fit: str = "crop"
    refinements: int = 0
    guidance_scale: float | None = None  # None: 1, with edit-friendly that of the run

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Run:
    """One call of `generate`, whose arguments it holds. None stands for the model's own default.

    edits: one, or None, for each prompt after the first, which is the source; () means no edits.
    Raises UserError for values that no model could take.
    """

    prompts: Sequence[str]
    edits: Sequence[EditOfPrompt] = ()
    negative_prompt: str = ""
    seed: int = 8888
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    source: SourcePicture | None = None
    model: str = "emoji"
    tokenizer: str | None = None
    ema: bool | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        prompts = tuple(list_of(self.prompts))
        n = len(prompts)
        check(n <= MOST_PROMPTS, f"A run has at most {MOST_PROMPTS} prompts, not {n}.")
        edits = tuple(self.edits) or (None,) * (n - 1)
        check(
            len(edits) == n - 1,
            f"A run has an edit, or None, for each prompt after the first: {n - 1}, not "
            f"{len(edits)}.",
        )
        set_field(self, "prompts", prompts)
        # Plain data and back: equal edits become equal objects, however they were written.
        set_field(self, "edits", tuple(edit_from_dict(edit_to_dict(edit)) for edit in edits))
        check_fields(self)
        if self.source:
            check(
                self.scheduler in (None, "ddim") and not self.eta,
                "A given picture is inverted by DDIM without new noise: leave out scheduler and "
                "eta.",
            )

    # --- plain data ------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Any) -> Run:
        """Return the run that `to_dict` or `Result.run` wrote down.

        A key that is missing or None takes its default.
        Raises UserError if the data is no run, or is one that only its caller could repeat.
        """
        check_table(data, [*(field.name for field in fields(cls)), "callers_own"], "a run")
        lacking = ", ".join(map(str, data.get("callers_own") or ()))
        check(not lacking, f"This run can't be repeated from its record, which lacks {lacking}.")
        settings = {name: value for name, value in data.items() if value is not None}
        check("prompts" in settings, "A run needs prompts, and there are none.")
        edits = settings.get("edits", ())
        check(isinstance(edits, list | tuple), f"edits is a list, not {describe(edits)}.")
        settings["edits"] = [edit_from_dict(edit) for edit in edits]
        if "source" in settings:
            names = [field.name for field in fields(SourcePicture)]
            check_table(settings["source"], names, "a source")
            settings["source"] = SourcePicture(**settings["source"])
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the run as data that JSON can hold."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["prompts"] = list(self.prompts)
        data["edits"] = [edit_to_dict(edit) for edit in self.edits]
        data["source"] = self.source and asdict(self.source)
        return data

    # --- what determines the pictures ------------------------------------------------------------

    def resolved(self, defaults: Mapping[str, Any]) -> Run:
        """Return the run with every None filled in. defaults: settings.defaults_of(model)"""
        if self.source:
            defaults = {**defaults, "scheduler": "ddim"}
        names = "num_inference_steps", "guidance_scale", "scheduler", "height", "width"
        edits = [with_windows(edit, defaults) for edit in self.edits]
        run = replace(fill(self, names, defaults), edits=edits)
        if run.source is None:
            return run
        usual_guidance = {"guidance_scale": run.usual_inversion_guidance()}
        return replace(run, source=fill(run.source, ["guidance_scale"], usual_guidance))

    def usual_inversion_guidance(self) -> float | None:
        """Return the guidance scale of the inversion where none is given."""
        is_guided = self.source is not None and self.source.method == "edit-friendly"
        return self.guidance_scale if is_guided else 1.0

    def settled(self, weights: str) -> dict[str, Any]:
        """Return all that determines the pictures of a resolved run with at most one edited prompt.

        weights: the model's identity. What has no effect is left out or is as in a run without it,
        so that runs of the same pictures are equal. Sweeps write this down: the names and the forms
        of the values stay what they are.
        """
        check(len(self.prompts) <= 2, "A run of a sweep has one edited prompt at most.")
        prompt, to = self.prompts[0], self.prompts[1] if len(self.prompts) > 1 else None
        edit = edit_to_dict(self.edits[0]) if self.edits else None
        if edit is None:
            edit = {"edit": "none", "cross_replace_steps": None, "self_replace_steps": None}
            edit |= {"reweight": {}, "blend": None}
            to = None if to == prompt else to
        elif edit.pop("everywhere") is False:
            edit["everywhere"] = False
        names = ["negative_prompt", "seed", "num_inference_steps", "guidance_scale"]
        names += ["scheduler", "eta", "height", "width"]
        settled = {"weights": weights, "dtype": self.dtype, "prompt": prompt, "to": to, **edit}
        settled |= {name: getattr(self, name) for name in names}
        settled |= {"method": None, "picture": None}
        if self.source:
            settled["picture"] = digest(self.need_image())
            settled["method"] = self.source.method
            if self.source.method != "edit-friendly":
                settled["seed"] = None  # no noise is drawn
            changed = changed_fields(self.source)
            settled |= {n: v for n, v in changed.items() if n in ("skip", "fit", "refinements")}
            if self.source.guidance_scale != self.usual_inversion_guidance():
                settled["inversion_guidance_scale"] = self.source.guidance_scale
        return settled

    def id(self, weights: str) -> str:
        """Return the 16 hexadecimal digits that a sweep knows a resolved run by.

        They are the first of the SHA-256 of the settings' canonical JSON. Settings that are None
        are left out, so that one which a later version adds changes no id.
        """
        settings = {key: v for key, v in self.settled(weights).items() if v is not None}
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def alone(self) -> Run:
        """Return the run of the source picture, without edits."""
        return replace(self, prompts=self.prompts[:1], edits=())

    # --- what makes them -------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `generate` after the prompts, except edit and source."""
        names = ["negative_prompt", "num_inference_steps", "guidance_scale", "seed"]
        names += ["height", "width"] if self.source else ["height", "width", "scheduler", "eta"]
        return {name: getattr(self, name) for name in names}

    def generate(self, model: StableDiffusion, **arguments: Any) -> Result:
        """Make the pictures. arguments: further ones of `generate`, as a source inverted before."""
        if self.source and arguments.get("source") is None:
            arguments["source"] = self.invert(model)
        edits = list(self.edits) if any(self.edits) else None
        return generate(model, list(self.prompts), edit=edits, **self.settings(), **arguments)

    def invert(self, model: StableDiffusion, **arguments: Any) -> Inversion:
        """Invert the source picture. arguments: further ones of `invert`."""
        return invert(model, self.need_image(), self.prompts[0], **self.inversion(), **arguments)

    def inversion(self) -> dict[str, Any]:
        """Return the arguments of `invert` after the image and the prompt."""
        assert self.source
        names = "num_inference_steps", "seed", "height", "width"
        arguments = {name: getattr(self, name) for name in names} | asdict(self.source)
        del arguments["image"]
        if arguments["guidance_scale"] is None:
            arguments["guidance_scale"] = self.usual_inversion_guidance()
        return arguments

    def need_image(self) -> str:
        """Return the name of the source picture. Raises UserError if the run does not have it."""
        if self.source is None or self.source.image is None:
            raise UserError("This run edits a picture that its record lacks: name the picture.")
        return self.source.image

    # --- how they are made elsewhere ------------------------------------------------------------

    def command(self, *options: str) -> list[str]:
        """Return the command that makes the same pictures, as a list of words; `quoted` joins them.

        options: further options, which come first. Raises UserError if the run needs an option that
        there is not.
        """
        return command_of(self, options)

    def python(self, device: str | None = None) -> str:
        """Return a Python script that makes the same pictures. device: for `load`"""
        return python_of(self, device)


# --- fields ---------------------------------------------------------------------------------------


CHOICES = {"method": METHODS, "fit": FITS, "dtype": DTYPES, "scheduler": tuple(SCHEDULERS)}
TYPES = {
    "negative_prompt": (str, "a text"),
    "model": (str, "a text"),
    "tokenizer": (str, "a text"),
    "image": (str, "the name of a file"),
    "ema": (bool, "true or false"),
    "source": (SourcePicture, "a SourcePicture"),
}


def set_field(instance: object, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass while it is made."""
    object.__setattr__(instance, name, value)


def check_fields(instance: Run | SourcePicture) -> None:
    """Raise UserError for a field with a wrong value; make numbers Python's own.

    A field whose default is None may be None.
    """
    for field in fields(instance):
        name, value = field.name, getattr(instance, field.name)
        if value is None and field.default is None:
            continue
        title = f"The {name.replace('_', ' ')}"
        if name in BOUNDS:
            set_field(instance, name, BOUNDS[name].read(value, title))
        elif name in CHOICES:
            is_choice = isinstance(value, str) and value in CHOICES[name]
            options = ", ".join(CHOICES[name])
            check(is_choice, f"{title} is one of {options}, not {describe(value)}.")
        elif name in TYPES:
            kind, noun = TYPES[name]
            check(isinstance(value, kind), f"{title} must be {noun}, not {describe(value)}.")


def with_windows(edit: EditOfPrompt, defaults: Mapping[str, Any]) -> EditOfPrompt:
    """Return the edit with the windows that it leaves open filled in."""
    data = edit_to_dict(edit)
    if data is None:
        return None
    for name in ("cross_replace_steps", "self_replace_steps"):
        if data[name] is None:
            data[name] = defaults[name]
    return edit_from_dict(data)


def fill(instance: Any, names: Sequence[str], defaults: Mapping[str, Any]) -> Any:
    """Return a dataclass with the default of each of these fields that is None."""
    return replace(instance, **{n: defaults[n] for n in names if getattr(instance, n) is None})


# --- ids ------------------------------------------------------------------------------------------


@lru_cache(1024)
def digest(path: str) -> str:
    """Return a hash of a picture's file, so that it does not matter where the file lies."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
