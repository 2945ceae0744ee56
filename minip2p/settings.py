"""What `generate` is asked for: checked, completed by what the model recommends, and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import Hook
from .blend import LocalBlend
from .edit import PromptEdit, Refine, Reweight, WordSwap
from .errors import check, describe, is_number, is_whole
from .scheduler import Scheduler
from .weights import StableDiffusion


def choose(model: StableDiffusion, name: str, value: Any) -> Any:
    """Return the caller's value, or where it is None what the model recommends."""
    return model.defaults[name] if value is None else value


def list_of(prompts: Any) -> list[str]:
    """Raises ValueError unless it is a prompt, or a list, tuple or array of prompts."""
    several = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    several = [several] if isinstance(several, str) else several
    check(
        isinstance(several, Sequence) and several,
        f"Give a prompt or a list of prompts, not {describe(prompts)}.",
    )
    for prompt in several:
        check(isinstance(prompt, str), f"A prompt is a string, not {describe(prompt)}.")
    return [str(prompt) for prompt in several]  # numpy has strings of its own


def check_settings(
    negative_prompt: Any, seed: Any, guidance_scale: Any, store: Any, callback: Any, hooks: Any
) -> None:
    """Raise UserError for the first setting that makes no sense."""
    check(
        isinstance(negative_prompt, str),
        f"The negative prompt is one string for all prompts, not {describe(negative_prompt)}.",
    )
    instead = ""
    if isinstance(seed, torch.Generator):
        instead = ": give its initial_seed(), or latents=torch.randn(1, 4, h, w, generator=...)"
    elif isinstance(seed, list | tuple | range | np.ndarray | Tensor):
        instead = ": for several pictures, call generate once for each seed"
    check(
        is_whole(seed) and 0 <= seed < 2**63,
        f"The seed must be a whole number from 0 to 2**63 - 1, not {describe(seed)}{instead}.",
    )
    check(
        is_number(guidance_scale),
        f"The guidance scale must be a finite number, not {guidance_scale!r}.",
    )
    check(
        isinstance(store, bool | None) or hasattr(store, "before_edit"),
        f"store is True, False or an AttentionStore, not {describe(store)}.",
    )
    check(
        isinstance(hooks, list | tuple) and all(isinstance(hook, Hook) for hook in hooks),
        f"hooks is a list of objects of subclasses of minip2p.Hook, not {describe(hooks)}.",
    )
    check(
        callback is None or callable(callback),
        f"callback is a function of call, calls and latents, not {describe(callback)}.",
    )


def as_store(store: Any) -> Any:
    """Return the AttentionStore of a run, or None. True makes a new one."""
    if store is not True:
        return store or None
    from .store import AttentionStore  # only here: a run without a store needs none of it

    return AttentionStore()


def check_source(source: Any) -> None:
    """Raise UserError unless a run can start from `source`."""
    check(
        all(hasattr(source, name) for name in ("check", "start", "hold_source")),
        f"source is what minip2p.invert returns, not {describe(source)}.",
    )


def as_latents(latents: Any, b: int) -> Tensor | None:
    """The noise of b prompts, given as a tensor or an array, in float32; None if it is not given.

    Raises ValueError unless it can be that.
    """
    if latents is None:
        return None
    x = latents
    try:
        if isinstance(x, np.ndarray):  # a copy: torch warns of one that can't be written to
            x = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
    except TypeError:  # an array of strings or of objects
        x = None
    if not isinstance(x, Tensor) or x.is_complex():
        raise ValueError(
            f"latents are a tensor or an array of real numbers, not {describe(latents)}."
        )
    shape = tuple(x.shape)
    check(
        len(shape) == 4 and shape[0] in (1, b) and shape[1] == 4 and 0 not in shape,
        f"latents must have the shape (1 or {b}, 4, height, width), not {shape}.",
    )
    check(
        x.isfinite().all(),
        "latents must be finite numbers, and some are infinite or nan.",
    )
    return x.float()


def check_finite(what: str, computed: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where numbers ended: in a picture, infinite and nan just look black.

    dtype: in which they were computed.
    """
    if not computed.isfinite().all():
        became = "nan" if computed.isnan().any() else "infinite"
        wider = "" if dtype == torch.float32 else "float32 or "
        raise ValueError(
            f"{what} became {became} in {str(dtype).removeprefix('torch.')}: "
            f"try {wider}another file of weights."
        )


def latent_size(
    model: StableDiffusion, height: int | None, width: int | None, latents: Tensor | None
) -> tuple[int, int]:
    """Height and width of the latents, from whichever of the three says it."""
    f, sizes = model.vae.f, []
    given = latents.shape[-2:] if latents is not None else model.sample_size
    for name, pixels, size in (("height", height, given[0]), ("width", width, given[1])):
        pixels = size * f if pixels is None else pixels
        check(
            is_whole(pixels) and pixels > 0 and pixels % f == 0,
            f"The {name} must be a positive multiple of {f} pixels, not {pixels!r}.",
        )
        check(
            latents is None or pixels == size * f,
            f"The {name} is {pixels}, but the latents are for {size * f}: give one.",
        )
        sizes.append(pixels // f)
    return sizes[0], sizes[1]


# --- what is recorded ----------------------------------------------------------------------------

NOT_HERE = "the caller's own, not in the settings"  # so these alone can't repeat the run


def recorded(
    prompts: list[str],
    negative_prompt: str,
    edit: Any,
    hooks: Sequence[Hook],
    seed: int,
    latents: Any,
    scheduler: Any,
    sampler: Scheduler,
    guidance_scale: float,
    source: Any,
    size: tuple[int, int],
) -> dict[str, Any]:
    """What repeats a run, in plain numbers and strings, or says where it can't: NOT_HERE.

    latents, scheduler: as `generate` was given them, or as a given picture, `source`, has them.
    sampler: what became of the scheduler. size: width and height of the pictures, in pixels.
    """
    name, eta = type(sampler).__name__.lower(), float(getattr(sampler, "eta", 0.0))
    own = scheduler is sampler and source is None
    settings = {
        "prompts": prompts,
        "negative_prompt": negative_prompt,
        "edit": written(edit),
        # Of given latents it made nothing, unless DDIM drew more noise.
        "seed": int(seed) if latents is None or (eta and scheduler is not sampler) else None,
        "scheduler": f"{name}: {NOT_HERE}" if own else name,
        # PNDM calls the UNet once more.
        "num_inference_steps": len({int(t) for t in sampler.timesteps}),
        "eta": eta,
        "guidance_scale": float(guidance_scale),
        "height": size[1],
        "width": size[0],
    }
    if hooks:
        settings["hooks"] = [f"{type(hook).__name__}: {NOT_HERE}" for hook in hooks]
    if source is not None:
        return settings | {"scheduler": "ddim", "source": source.settings, "picture": NOT_HERE}
    if latents is not None:
        settings["latents"] = NOT_HERE
    return settings


def written(edit: Any) -> str:
    """An edit as Python that makes it again, with NOT_HERE for what only the caller has."""
    if is_whole(edit):
        return str(int(edit))
    if is_number(edit):
        return str(float(edit))
    if edit is None or isinstance(edit, str | bool):
        return repr(edit)
    if isinstance(edit, Mapping):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in edit.items()) + "}"
    if isinstance(edit, list | tuple):
        both = "()" if isinstance(edit, tuple) else "[]"
        last = "," if isinstance(edit, tuple) and len(edit) == 1 else ""
        return f"{both[0]}{', '.join(map(written, edit))}{last}{both[1]}"
    name = type(edit).__name__
    if type(edit) in (PromptEdit, WordSwap, Refine, Reweight, LocalBlend):
        parts = (f"{f.name}={written(getattr(edit, f.name))}" for f in fields(edit))
        return f"{name}({', '.join(parts)})"
    return f"<{name}: {NOT_HERE}>"
