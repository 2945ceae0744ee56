"""A run as words: the command of python -m minip2p.sample that makes it, and the Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from .align import DEFAULT
from .blend import LocalBlend
from .edit import EditOfPrompt
from .errors import check
from .record import changed_fields, edit_to_dict

if TYPE_CHECKING:
    from .run import Run

PROGRAM = "python", "-m", "minip2p.sample"
OPTIONS = {  # of the settings that have another name there
    "prompt": "the prompt",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "inversion_guidance_scale": "--inversion-guidance",
}
Options = Iterator[tuple[str, str | None]]


# --- a command ------------------------------------------------------------------------------------


def command_of(run: Run, options: Sequence[str] = ()) -> list[str]:
    """Return the command that makes the run's pictures: see Run.command."""
    words = [*PROGRAM, *options]
    for option, value in [*setting_options(run), *edit_options(run)]:
        if value is None:
            words.append(option)
        elif value.startswith("-"):
            words.append(f"{option}={value}")
        else:
            words += [option, value]
    prompt = run.prompts[0]
    return [*words, "--", prompt] if prompt.startswith("-") else [*words, prompt]


def option_of(name: str) -> str:
    """Return the command line's option for a setting."""
    return OPTIONS.get(name) or f"--{name.replace('_', '-')}"


def setting_options(run: Run) -> Options:
    """Yield each option but those of edits, with its value; a switch has None."""
    settings = changed_fields(run)
    if run.source:
        run.need_image()
        check(not run.source.refinements, "The command line has no option for refinements.")
        source = changed_fields(run.source)
        source["inversion_guidance_scale"] = source.pop("guidance_scale", None)
        settings |= {"scheduler": None, "eta": None} | source
    for name, value in settings.items():
        if name == "ema":
            yield ("--ema" if value else "--no-ema"), None
        elif value is not None and name not in ("prompts", "edits", "source"):
            yield option_of(name), plain(value)


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
    kind, ends = swept_windows(edits) if len(edits) > 1 else ("", [])
    edit: Any = edit_to_dict(edits[0]) if edits else None
    check(
        edit
        and all(target_edits == shared for _, target_edits in targets)
        and shared in (edits, [None, *edits])
        and (kind or len(edits) == 1)
        and all(has_options(edit, run.prompts[0], prompt) for prompt, _ in targets),
        "The command line has no options for these edits: use their Python.",
    )
    if shared[0] is None:
        yield "--baseline", None
    if kind:
        yield "--sweep", f"{kind}={','.join(map(plain, ends))}"
        edit[f"{kind}_replace_steps"] = None
    for word, weight in edit["reweight"].items():
        yield "--reweight", f"{word}={plain(weight)}"
    cross = edit["cross_replace_steps"]
    for word, window in cross.items() if isinstance(cross, Mapping) else [(DEFAULT, cross)]:
        if window is not None:
            of_word = "" if word == DEFAULT else f"{word}="
            yield "--cross-replace-steps", of_word + plain(window)
    if edit["self_replace_steps"] is not None:
        yield "--self-replace-steps", plain(edit["self_replace_steps"])
    for word in edit["blend"]["words"] if edit["blend"] else ():
        yield "--blend", word


def swept_windows(edits: Sequence[EditOfPrompt]) -> tuple[str, list[float]]:
    """Return which window alone tells edits apart, "cross" or "self", and its ends.

    The kind is "" if they differ in anything else, or if a window does not begin at 0.
    """
    for kind in ("cross", "self"):
        others: list[Any] = [edit_to_dict(edit) for edit in edits]
        windows = [other.pop(f"{kind}_replace_steps") for other in others]
        is_swept = all(isinstance(w, tuple) and w[0] == 0 for w in windows)
        if is_swept and all(other == others[0] for other in others):
            return kind, [end for _, end in windows]
    return "", []


def has_options(edit: Mapping[str, Any], source: str, target: str) -> bool:
    """Tell whether the command line can describe the edit, as plain data, of these prompts."""
    is_swap = len(source.split()) == len(target.split())
    chosen = "swap" if is_swap else "refine"  # by "auto", which the command line always means
    blend = edit["blend"]
    is_usual_blend = blend is None or LocalBlend(**blend) == LocalBlend(blend["words"])
    return edit["edit"] in ("auto", chosen) and is_usual_blend and edit["everywhere"]


def plain(value: Any) -> str:
    """Write a value as an option takes it: 4 for 4.0, and 0.1,0.8 for a window."""
    if isinstance(value, tuple):
        return ",".join(map(plain, value))
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def quoted(words: Sequence[str]) -> str:
    """Join the words of a command for any shell where they are simple, else for a POSIX shell."""

    def quote(word: str) -> str:
        return f'"{word}"' if re.fullmatch(r"[\w.,=-]*( [\w.,=-]*)+", word) else shlex.quote(word)

    return " ".join(map(quote, words))


# --- Python ---------------------------------------------------------------------------------------


def python_of(run: Run, device: str | None = None) -> str:
    """Return a Python script that makes the run's pictures: see Run.python."""
    changed = changed_fields(run)
    loading = {"source": changed.get("model"), "tokenizer": run.tokenizer, "ema": run.ema}
    loading |= {"dtype": changed.get("dtype"), "device": device}
    lines = ["import minip2p", "", f"model = minip2p.load({', '.join(arguments(**loading))})"]
    edit = list(run.edits) if any(run.edits) else None
    settings = {name: v for name, v in run.settings().items() if name in changed}
    generate = arguments(list(run.prompts), edit=edit, **settings)
    if run.source:
        changed |= changed_fields(run.source)
        inversion = {name: v for name, v in run.inversion().items() if name in changed}
        invert = arguments(run.need_image(), run.prompts[0], **inversion)
        lines.append(f"source = minip2p.invert({', '.join(['model', *invert])})")
        generate.append("source=source")
    lines.append("result = minip2p.generate(")
    lines += [f"    {argument}," for argument in ["model", *generate]]
    return "\n".join([*lines, ")", 'result.images[-1].save("picture.png")', ""])


def arguments(*values: Any, **settings: Any) -> list[str]:
    """Return the arguments of a call as Python. Settings that are None are left out."""
    named = {name: value for name, value in settings.items() if value is not None}
    return [*map(code, values), *(f"{name}={code(value)}" for name, value in named.items())]


def code(value: Any) -> str:
    """Return Python that makes the value. The defaults of an edit are left out."""
    if isinstance(value, list):
        return f"[{', '.join(map(code, value))}]"
    if not is_dataclass(value):
        return repr(value)
    return f"minip2p.{type(value).__name__}({', '.join(arguments(**changed_fields(value)))})"
