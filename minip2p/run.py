"""One run as plain data: what the command line, a study, the studio and a picture's file all hold.

run = Run(("a photo of a cat", "a photo of a dog"), (WordSwap(),), seed=3)
run.generate(model)                        its pictures
Run.from_dict(run.to_dict()) == run        as JSON
run.command(), run.python()                what makes the same pictures elsewhere
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .align import DEFAULT
from .blend import LocalBlend
from .edit import EditOfPrompt, PromptEdit, Refine, Reweight, WordSwap, base
from .errors import UserError, check, describe
from .invert import METHODS, Inversion, invert
from .picture import FITS
from .pipeline import Result, generate
from .record import check_keys, edit_from_dict, edit_to_dict
from .scheduler import SCHEDULERS
from .settings import BOUNDS, list_of
from .weights import StableDiffusion

DTYPES = ("float32", "float16", "bfloat16")
MOST_PROMPTS = 256  # a file from a stranger asks for no more work than this
EXAMPLE = "a painting of a squirrel eating a burger", "squirrel=lion"  # what a newcomer sees first
PROGRAM = "python", "-m", "minip2p.sample"


@dataclass(frozen=True)
class SourcePicture:
    """A picture to be edited, and how it is inverted; `invert` describes the settings."""

    image: str | None  # a file; None where a record leaves its name out
    method: str = "direct"
    skip: int = 0
    fit: str = "crop"
    refinements: int = 0
    guidance_scale: float | None = None  # None: 1, with edit-friendly that of the run

    def __post_init__(self) -> None:
        check(
            isinstance(self.image, str | None),
            f"A picture is the name of a file, not {describe(self.image)}.",
        )
        check_choice("method", self.method, METHODS)
        check_choice("fit", self.fit, FITS)
        for name in ("skip", "refinements", "guidance_scale"):
            read_number(self, name)


@dataclass(frozen=True)
class Run:
    """One call of `generate`, whose arguments it holds. None stands for the model's own default.

    edits: one for each prompt after the first, the source; () is none of them.
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
        for name in ("seed", "num_inference_steps", "guidance_scale", "eta", "height", "width"):
            read_number(self, name)
        check_choice("dtype", self.dtype, DTYPES)
        if self.scheduler is not None:
            check_choice("scheduler", self.scheduler, list(SCHEDULERS))
        for name in ("negative_prompt", "model", "tokenizer"):
            value = getattr(self, name)
            is_text = isinstance(value, str) or (name == "tokenizer" and value is None)
            check(is_text, f"The {name} must be a text, not {describe(value)}.")
        check(isinstance(self.ema, bool | None), f"ema is true or false, not {describe(self.ema)}.")
        check(
            isinstance(self.source, SourcePicture | None),
            f"source is a SourcePicture, not {describe(self.source)}.",
        )
        if self.source:
            check(
                self.scheduler in (None, "ddim") and not self.eta,
                "A given picture is inverted by DDIM without new noise: leave out scheduler and "
                "eta.",
            )

    # --- plain data ------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Any) -> Run:
        """Return the run that `to_dict` or `Result.run` wrote down; None and no key are defaults.

        Raises UserError if the data is no run, or is one that only its caller could repeat.
        """
        check(isinstance(data, Mapping), f"A run is a dictionary, not {describe(data)}.")
        if callers_own := data.get("callers_own"):
            lacking = ", ".join(map(str, callers_own))
            raise UserError(f"This run can't be repeated from its record, which lacks {lacking}.")
        check_keys(data, [field.name for field in fields(cls)], "a run")
        check("prompts" in data, "A run needs prompts, and there are none.")
        settings = {name: value for name, value in data.items() if value is not None}
        edits = settings.get("edits", ())
        check(isinstance(edits, list | tuple), f"edits is a list, not {describe(edits)}.")
        check(len(edits) < MOST_PROMPTS, f"A run has fewer than {MOST_PROMPTS} edits.")
        settings["edits"] = [edit_from_dict(edit) for edit in edits]
        if "source" in settings:
            source = settings["source"]
            check(isinstance(source, Mapping), f"source is a dictionary, not {describe(source)}.")
            check_keys(source, [field.name for field in fields(SourcePicture)], "a source")
            settings["source"] = SourcePicture(**{"image": None, **source})
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
        filled = {name: defaults[name] for name in names if getattr(self, name) is None}
        edits = [with_windows(edit, defaults) for edit in self.edits]
        run = replace(self, edits=edits, **filled)
        if run.source and run.source.guidance_scale is None:
            return replace(
                run, source=replace(run.source, guidance_scale=run.usual_inversion_guidance())
            )
        return run

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
            for name in ("skip", "fit", "refinements"):
                if getattr(self.source, name) != usual(name):
                    settled[name] = getattr(self.source, name)
            if self.source.guidance_scale not in (None, self.usual_inversion_guidance()):
                settled["inversion_guidance_scale"] = self.source.guidance_scale
        return settled

    def id(self, weights: str) -> str:
        """Return the 16 hexadecimal digits that a sweep knows a resolved run by."""
        return identify(self.settled(weights))

    def alone(self) -> Run:
        """Return the run of the source picture, without edits."""
        return replace(self, prompts=self.prompts[:1], edits=())

    # --- what makes them -------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `generate` after the prompts, but for edit and source."""
        names = ["negative_prompt", "num_inference_steps", "guidance_scale", "seed"]
        names += ["height", "width"] if self.source else ["height", "width", "scheduler", "eta"]
        return {name: getattr(self, name) for name in names}

    def generate(self, model: StableDiffusion, **arguments: Any) -> Result:
        """Make the pictures. arguments: others of `generate`; source: the picture, inverted."""
        if self.source and arguments.get("source") is None:
            arguments["source"] = self.invert(model)
        edits = list(self.edits) if any(self.edits) else None
        return generate(model, list(self.prompts), edit=edits, **self.settings(), **arguments)

    def invert(self, model: StableDiffusion, **arguments: Any) -> Inversion:
        """Invert the source picture. arguments: others of `invert`."""
        return invert(model, self.need_image(), self.prompts[0], **self.inversion(), **arguments)

    def inversion(self) -> dict[str, Any]:
        """Return the arguments of `invert` after the image and the prompt."""
        assert self.source
        names = "num_inference_steps", "seed", "height", "width"
        arguments = {name: getattr(self, name) for name in names} | asdict(self.source)
        del arguments["image"]
        if arguments["guidance_scale"] is None and self.source.method == "edit-friendly":
            arguments["guidance_scale"] = self.guidance_scale
        return arguments

    def need_image(self) -> str:
        """Return the name of the source picture. Raises UserError if the run does not have it."""
        if self.source is None or self.source.image is None:
            raise UserError("This run edits a picture that its record lacks: name the picture.")
        return self.source.image

    # --- how they are made elsewhere ------------------------------------------------------------

    def command(self, *options: str) -> list[str]:
        """Return the command that makes the same pictures, as a list of words; `quoted` joins them.

        options: more of them, before the prompt. Raises UserError for what has no option.
        """
        words = [*PROGRAM, *options]
        for option, value in [*run_options(self), *edit_options(self)]:
            if value is None:
                words.append(option)
            elif value.startswith("-"):
                words.append(f"{option}={value}")
            else:
                words += [option, value]
        return [*words, *["--"] * self.prompts[0].startswith("-"), self.prompts[0]]

    def python(self, store: str = "", device: str | None = None) -> str:
        """Return a Python script that makes the same pictures.

        store: Python for generate's `store`, as "PageStore()". device: for `load`.
        """
        loading = {"source": self.model, "tokenizer": self.tokenizer, "ema": self.ema}
        loading |= {"device": device}
        load = [f"{name}={v!r}" for name, v in loading.items() if v not in (None, "emoji")]
        lines = ["import minip2p"]
        if self.dtype != "float32":
            lines.append("import torch")
            load.append(f"dtype=torch.{self.dtype}")
        if store == "PageStore()":
            lines.append("from minip2p.html.page import PageStore")
        lines += ["", f"model = minip2p.load({', '.join(load)})"]
        settings = {"edit": list(self.edits)} if any(self.edits) else {}
        settings |= {name: value for name, value in self.settings().items() if value != usual(name)}
        generate = [repr(list(self.prompts)), *(f"{n}={code(v)}" for n, v in settings.items())]
        if self.source:
            inversion = {n: v for n, v in self.inversion().items() if v != usual(n)}
            invert = [repr(self.need_image()), repr(self.prompts[0])]
            invert += [f"{name}={value!r}" for name, value in inversion.items()]
            lines.append(f"source = minip2p.invert(model, {', '.join(invert)})")
            generate.append("source=source")
        generate += [f"store={store}"] if store else []
        lines += ["result = minip2p.generate(", "    model,"]
        lines += [*(f"    {argument}," for argument in generate), ")"]
        return "\n".join([*lines, 'result.images[-1].save("picture.png")', ""])


# --- fields ---------------------------------------------------------------------------------------


def set_field(instance: object, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass while it is made."""
    object.__setattr__(instance, name, value)


def read_number(instance: object, name: str) -> None:
    """Make a field Python's own number; one whose default is None may be None.

    Raises UserError if it is out of its bounds.
    """
    value = getattr(instance, name)
    if value is not None or usual(name) is not None:
        set_field(instance, name, BOUNDS[name].read(value, f"The {name.replace('_', ' ')}"))


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise UserError unless the value is one of the choices."""
    is_choice = isinstance(value, str) and value in choices
    check(is_choice, f"The {name} is one of {', '.join(choices)}, not {describe(value)}.")


def usual(name: str) -> Any:
    """Return the default of a field of Run or of SourcePicture; they agree."""
    return next(f.default for f in (*fields(Run), *fields(SourcePicture)) if f.name == name)


def with_windows(edit: EditOfPrompt, defaults: Mapping[str, Any]) -> EditOfPrompt:
    """Return the edit with the windows that it leaves open filled in."""
    if edit is None:
        return None
    if isinstance(edit, Reweight):
        inner = with_windows(edit.edit, defaults)
        assert isinstance(inner, PromptEdit)
        return replace(edit, edit=inner)
    names = "cross_replace_steps", "self_replace_steps"
    return replace(edit, **{n: defaults[n] for n in names if getattr(edit, n) is None})


# --- ids ------------------------------------------------------------------------------------------


@lru_cache(1024)
def digest(path: str) -> str:
    """Return a hash of a picture's file, so that it does not matter where the file lies."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def identify(settled: Mapping[str, Any]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the settings' canonical JSON.

    Settings that are None are left out, so that one which a later version adds changes no id.
    """
    values = {key: value for key, value in settled.items() if value is not None}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# --- commands and Python --------------------------------------------------------------------------

OPTIONS = {
    "model": "--model",
    "tokenizer": "--tokenizer",
    "dtype": "--dtype",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "seed": "--seed",
    "scheduler": "--scheduler",
    "eta": "--eta",
    "height": "--height",
    "width": "--width",
}
SOURCE_OPTIONS = {
    "method": "--method",
    "skip": "--skip",
    "fit": "--fit",
    "guidance_scale": "--inversion-guidance",
}
Options = Iterator[tuple[str, str | None]]


def run_options(run: Run) -> Options:
    """Yield the options for all but the edits, each with its value; None where it has none."""
    for name, option in OPTIONS.items():
        has_none = run.source and name in ("scheduler", "eta")
        if getattr(run, name) != usual(name) and not has_none:
            yield option, plain(getattr(run, name))
    if run.ema is not None:
        yield ("--ema" if run.ema else "--no-ema"), None
    if run.source:
        yield "--image", run.need_image()
        check(not run.source.refinements, "The command line has no option for refinements.")
        for name, option in SOURCE_OPTIONS.items():
            if getattr(run.source, name) != usual(name):
                yield option, plain(getattr(run.source, name))


def edits_by_target(run: Run) -> list[tuple[str, list[EditOfPrompt]]]:
    """Return the edited prompts, each with its edits in order: a prompt has several in a sweep.

    A prompt that is given twice is two: a new one begins where an edit comes again.
    """
    targets: list[tuple[str, list[EditOfPrompt]]] = []
    for prompt, edit in zip(run.prompts[1:], run.edits, strict=True):
        if not targets or targets[-1][0] != prompt or edit in targets[-1][1]:
            targets.append((prompt, []))
        targets[-1][1].append(edit)
    return targets


def edit_options(run: Run) -> Options:
    """Yield the options for the edits. Raises UserError for edits that no options describe."""
    targets = edits_by_target(run)
    if not targets:
        return
    for prompt, _ in targets:
        yield "--to", prompt
    shared = targets[0][1]
    edits = [edit for edit in shared if edit is not None]
    is_shared = edits and all(target_edits == shared for _, target_edits in targets)
    check(
        is_shared and shared in (edits, [None, *edits]),
        "The command line has no options for prompts of different edits, or without an edit.",
    )
    if shared[0] is None:
        yield "--baseline", None
    edit = edits[0]
    if len(edits) > 1:
        kind, ends = swept_windows(edits)
        check(kind, "The command line has no options for edits that differ in more than a window.")
        yield "--sweep", f"{kind}={','.join(map(plain, ends))}"
        edit = without_window(edit, kind)
    for prompt, _ in targets:
        check_expressible(edit, run.prompts[0], prompt)
    if isinstance(edit, Reweight):
        for word, weight in edit.weights.items():
            yield "--reweight", f"{word}={plain(float(weight))}"
    cross, self_window = base(edit).cross_replace_steps, base(edit).self_replace_steps
    for word, window in cross.items() if isinstance(cross, Mapping) else [(DEFAULT, cross)]:
        if window is not None:
            of_word = "" if word == DEFAULT else f"{word}="
            yield "--cross-replace-steps", of_word + plain(window)
    if self_window is not None:
        yield "--self-replace-steps", plain(self_window)
    blend = base(edit).local_blend
    for word in blend.words if blend else ():
        yield "--blend", word


def swept_windows(edits: Sequence[PromptEdit | Reweight]) -> tuple[str, list[float]]:
    """Return which window alone tells edits apart, "cross" or "self", and its ends.

    The kind is "" if they differ in anything else, or if a window does not begin at 0.
    """
    for kind in ("cross", "self"):
        windows = [getattr(base(edit), f"{kind}_replace_steps") for edit in edits]
        others = [without_window(edit, kind) for edit in edits]
        is_swept = all(isinstance(w, tuple) and w[0] == 0 for w in windows)
        if is_swept and all(other == others[0] for other in others):
            return kind, [end for _, end in windows]
    return "", []


def without_window(edit: PromptEdit | Reweight, kind: str) -> PromptEdit | Reweight:
    """Return the edit without its window of that kind, "cross" or "self"."""
    plain_edit = replace(base(edit), **{f"{kind}_replace_steps": None})
    return replace(edit, edit=plain_edit) if isinstance(edit, Reweight) else plain_edit


def check_expressible(edit: PromptEdit | Reweight, source: str, target: str) -> None:
    """Raise UserError unless the command line can describe the edit of these prompts."""
    plain_edit, is_swap = base(edit), len(source.split()) == len(target.split())
    chosen = WordSwap if is_swap else Refine  # by "auto", which the command line always means
    blend = plain_edit.local_blend
    is_usual_blend = blend is None or blend == LocalBlend(blend.words)
    check(
        type(plain_edit) in (PromptEdit, chosen)
        and is_usual_blend
        and (not isinstance(edit, Reweight) or edit.everywhere),
        "The command line has no option for some of this edit: use its Python.",
    )


def plain(value: Any) -> str:
    """Return a value as an option has it: 4 for 4.0, and 0.1,0.8 for a window."""
    if isinstance(value, tuple):
        return ",".join(map(plain, value))
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def quoted(words: Sequence[str]) -> str:
    """Join the words of a command for any shell where they are simple, else for a POSIX shell."""

    def quote(word: str) -> str:
        return f'"{word}"' if re.fullmatch(r"[\w.,=-]*( [\w.,=-]*)+", word) else shlex.quote(word)

    return " ".join(map(quote, words))


def code(value: Any) -> str:
    """Return Python that makes the value again; an edit without what it has by default."""
    if isinstance(value, list):
        return f"[{', '.join(map(code, value))}]"
    if not is_dataclass(value):
        return repr(value)
    values = {f.name: getattr(value, f.name) for f in fields(value)}
    changed = [f.name for f in fields(value) if values[f.name] != f.default]
    arguments = ", ".join(f"{name}={code(values[name])}" for name in changed)
    return f"minip2p.{type(value).__name__}({arguments})"
