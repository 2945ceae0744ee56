"""Runs and edits as plain data: what `Result.run` holds and a file can keep as JSON.

An edit is a dictionary with the names that a study uses, or None for a prompt without an edit:

    {"edit": "swap", "cross_replace_steps": [0.0, 0.8], "self_replace_steps": None,
     "reweight": {"lion": 2.0}, "everywhere": True, "blend": {"words": ["lion"], ...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .align import window
from .blend import LocalBlend
from .edit import EditOfPrompt, Edits, PromptEdit, Refine, Reweight, WordSwap, base, edit_of_each
from .errors import UserError, check, describe
from .scheduler import Scheduler

EDITS = {"auto": PromptEdit, "swap": WordSwap, "refine": Refine}
EDIT_KEYS = "edit", "cross_replace_steps", "self_replace_steps", "reweight", "everywhere", "blend"
BLEND_KEYS = "words", "threshold", "start", "subtract"


def edit_to_dict(edit: EditOfPrompt) -> dict[str, Any] | None:
    """Return an edit as plain data; None for no edit.

    Raises UserError if it holds what only its caller has: a class of their own, or a mask.
    """
    if edit is None:
        return None
    plain = base(edit)
    kind = next((name for name, cls in EDITS.items() if type(plain) is cls), None)
    check(
        kind and type(edit) in (Reweight, type(plain)), f"the edit of type {type(plain).__name__}"
    )
    weights = edit.weights if isinstance(edit, Reweight) else {}
    return {
        "edit": kind,
        "cross_replace_steps": plain_windows(plain.cross_replace_steps),
        "self_replace_steps": plain_windows(plain.self_replace_steps),
        "reweight": {word: float(weight) for word, weight in weights.items()},
        "everywhere": edit.everywhere if isinstance(edit, Reweight) else True,
        "blend": blend_to_dict(plain.local_blend),
    }


def blend_to_dict(blend: LocalBlend | None) -> dict[str, Any] | None:
    """Return a blend as plain data; None for no blend. Raises UserError if it holds a mask."""
    if blend is None:
        return None
    check(blend.mask is None, "the mask of a blend")
    return {
        "words": list(blend.words),
        "threshold": float(blend.threshold),
        "start": float(blend.start),
        "subtract": list(blend.subtract),
    }


def plain_windows(windows: Any) -> Any:
    """Return the window of an edit as (start, end); those of words in a dictionary."""
    if isinstance(windows, Mapping):
        return {str(word): window(of_word) for word, of_word in windows.items()}
    return None if windows is None else window(windows)


def edit_from_dict(data: Any) -> EditOfPrompt:
    """Return the edit that `edit_to_dict` wrote down; keys may be missing. Raises UserError."""
    if data is None:
        return None
    check_table(data, EDIT_KEYS, "an edit")
    kind, blend, weights = data.get("edit", "auto"), data.get("blend"), data.get("reweight")
    check(
        isinstance(kind, str) and kind in EDITS,
        f"An edit is one of {', '.join(EDITS)}, not {describe(kind)}.",
    )
    if blend is not None:
        check_table(blend, BLEND_KEYS, "a blend")
        blend = LocalBlend(**blend)
    cross = plain_windows(data.get("cross_replace_steps"))
    edit = EDITS[kind](cross, plain_windows(data.get("self_replace_steps")), blend)
    everywhere = data.get("everywhere", True)
    check(isinstance(everywhere, bool), f"everywhere is true or false, not {describe(everywhere)}.")
    return Reweight(weights, edit, everywhere) if weights else edit


def check_table(data: Any, keys: Sequence[str], name: str) -> None:
    """Raise UserError unless `data` is a dictionary with these keys or some of them.

    name: of what it describes, for the error's sentence.
    """
    check(isinstance(data, Mapping), f"{name} is a dictionary, not {describe(data)}.".capitalize())
    for key in data:
        check(key in keys, f"There is no {key!r} in {name}; it has {', '.join(keys)}.")


def changed_fields(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass whose values are not their defaults."""
    values = {
        field.name: (getattr(instance, field.name), field.default) for field in fields(instance)
    }
    return {name: value for name, (value, default) in values.items() if value != default}


def record(
    model: Any,
    prompts: list[str],
    edit: Edits,
    sampler: Scheduler,
    *,
    size: tuple[int, int],
    negative_prompt: Any,
    seed: Any,
    guidance_scale: Any,
    hooks: Any,
    latents: Any,
    scheduler: Any,
    source: Any,
) -> dict[str, Any]:
    """Return a run of `generate` as the plain data that `Run.from_dict` takes.

    What only the caller has, and no data can repeat, is listed under "callers_own".
    sampler: the object that the caller's `scheduler` became. size: h w of the latents. The others
    are arguments of `generate`.
    """
    callers_own = [f"the hook {type(hook).__name__}" for hook in hooks]
    edits = []
    for row_edit in edit_of_each(edit, len(prompts) - 1):
        try:
            edits.append(edit_to_dict(row_edit))
        except UserError as error:
            callers_own.append(str(error))
            edits.append({"edit": str(error)})
    run = {
        "prompts": prompts,
        "edits": edits,
        "negative_prompt": negative_prompt,
        "seed": int(seed),
        # PNDM visits one timestep twice.
        "num_inference_steps": len({int(t) for t in sampler.timesteps}),
        "guidance_scale": float(guidance_scale),
        "scheduler": type(sampler).__name__.lower(),
        "eta": float(getattr(sampler, "eta", 0.0)),
        "height": size[0] * model.vae.f,
        "width": size[1] * model.vae.f,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if source is not None:
        inversion = getattr(source, "settings", None)
        if inversion is None:
            callers_own.append(f"the source of type {type(source).__name__}")
        else:
            names = "method", "skip", "fit", "refinements", "guidance_scale"
            run["source"] = {"image": None} | {name: inversion[name] for name in names}
            run |= {"seed": inversion["seed"], "scheduler": "ddim", "eta": 0.0}
            run["num_inference_steps"] = inversion["num_inference_steps"]
    elif latents is not None:
        callers_own.append("the latents")
    if scheduler is sampler and source is None:
        callers_own.append(f"the scheduler {type(sampler).__name__}")
    return run | {"callers_own": list(dict.fromkeys(callers_own))} if callers_own else run
