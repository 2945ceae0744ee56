"""The settings of a run: their bounds, their checks, and the model's defaults."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import Hook
from .errors import UserError, check, describe, is_number, is_whole
from .weights import StableDiffusion


class Bounds(NamedTuple):
    """The least and the greatest value of a number, both allowed."""

    low: float
    high: float
    is_whole: bool = False

    def read(self, value: Any, name: str = "it") -> Any:
        """Return the value as Python's own int or float. Raises UserError if it is out of bounds.

        name: what the error's sentence calls it.
        """
        kind, fits = ("whole number", is_whole) if self.is_whole else ("number", is_number)
        check(
            fits(value) and self.low <= value <= self.high,
            f"{name} must be a {kind} from {self.low} to {self.high}, not {describe(value)}.",
        )
        return int(value) if self.is_whole else float(value)


# By the names of generate's arguments, wherever a number comes from: Python, an option, a file, a
# widget. The largest sides still fail for lack of memory, but with a sentence.
BOUNDS = {
    "num_inference_steps": Bounds(1, 999, is_whole=True),
    "guidance_scale": Bounds(-1000, 1000),
    "seed": Bounds(0, 2**63 - 1, is_whole=True),
    "eta": Bounds(0, 1),
    "height": Bounds(1, 16384, is_whole=True),
    "width": Bounds(1, 16384, is_whole=True),
    "skip": Bounds(0, 998, is_whole=True),
    "refinements": Bounds(0, 99, is_whole=True),
}


def defaults_of(model: StableDiffusion) -> dict[str, Any]:
    """Return what the model recommends for every setting of a run that is left open."""
    height, width = model.sample_size
    return model.defaults | {"height": height * model.vae.f, "width": width * model.vae.f}


def choose(model: StableDiffusion, name: str, value: Any) -> Any:
    """Return the caller's value, or what the model recommends where it is None."""
    return model.defaults[name] if value is None else value


def list_of(prompts: Any) -> list[str]:
    """Return a list of prompts. Raises UserError unless it is a prompt, or a sequence of them."""
    sequence = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    sequence = [sequence] if isinstance(sequence, str) else sequence
    check(
        isinstance(sequence, Sequence) and sequence,
        f"Give a prompt or a list of prompts, not {describe(prompts)}.",
    )
    for prompt in sequence:
        check(isinstance(prompt, str), f"A prompt is a string, not {describe(prompt)}.")
    return [str(prompt) for prompt in sequence]  # numpy has strings of its own


def check_settings(
    negative_prompt: Any, seed: Any, guidance_scale: Any, store: Any, callback: Any, hooks: Any
) -> None:
    """Raise UserError for the first setting that makes no sense."""
    check(
        isinstance(negative_prompt, str),
        f"The negative prompt is one string for all prompts, not {describe(negative_prompt)}.",
    )
    check(
        not isinstance(seed, torch.Generator | list | tuple | range | np.ndarray | Tensor),
        f"The seed must be one whole number, not {describe(seed)}: for several pictures call "
        "generate once for each seed, and for a torch.Generator give its initial_seed().",
    )
    BOUNDS["seed"].read(seed, "The seed")
    BOUNDS["guidance_scale"].read(guidance_scale, "The guidance scale")
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


def warn_unknown_words(vocabulary: Sequence[str], prompts: Sequence[str]) -> None:
    """Warn of words that a model of a small world has never seen. vocabulary: () knows all."""
    text = unicodedata.normalize("NFC", " ".join(prompts).lower())  # é as one letter
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text))
    unknown = [word for word in words if word not in vocabulary]
    if vocabulary and unknown:
        warnings.warn(
            f"This model has never seen {', '.join(unknown)}; it knows: {', '.join(vocabulary)}.",
            stacklevel=2,
        )


def check_source(source: Any) -> None:
    """Raise UserError unless a run can start from `source`."""
    check(
        not isinstance(source, type)
        and all(hasattr(source, name) for name in ("check", "start", "hold_source")),
        f"source is what minip2p.invert returns, not {describe(source)}.",
    )


def as_latents(latents: Any, b: int) -> Tensor | None:
    """Return the noise that b prompts start from in float32: 1 or b, 4 h w. None stays None.

    Raises UserError unless it is a tensor or an array of that shape with finite numbers.
    """
    if latents is None:
        return None
    x = latents
    if isinstance(x, np.ndarray) and x.dtype.kind in "buif":
        # A copy in the machine's byte order: torch warns of one that can't be written to.
        x = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
    if not isinstance(x, Tensor) or x.is_complex():
        raise UserError(
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


def check_finite(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise UserError if a value is infinite or nan: in a picture, these only look black.

    name: what the error's sentence calls the values. dtype: in which they were computed.
    """
    if not values.isfinite().all():
        became = "nan" if values.isnan().any() else "infinite"
        wider = "" if dtype == torch.float32 else "float32 or "
        raise UserError(
            f"{name} became {became} in {str(dtype).removeprefix('torch.')}: "
            f"try {wider}another file of weights."
        )


def latent_size(
    model: StableDiffusion, height: int | None, width: int | None, latents: Tensor | None
) -> tuple[int, int]:
    """Return height and width of the latents, from whichever argument tells them.

    height, width: of the pictures, in pixels. Raises UserError if they contradict each other.
    """
    f, sizes = model.vae.f, []
    latent_sides = latents.shape[-2:] if latents is not None else model.sample_size
    for name, pixels, side in zip(("height", "width"), (height, width), latent_sides, strict=True):
        pixels = side * f if pixels is None else pixels
        check(
            is_whole(pixels) and pixels > 0 and pixels % f == 0,
            f"The {name} must be a positive multiple of {f} pixels, not {pixels!r}.",
        )
        pixels = BOUNDS[name].read(pixels, f"The {name}")
        check(
            latents is None or pixels == side * f,
            f"The {name} is {pixels}, but the latents are for {side * f}: give one.",
        )
        sizes.append(pixels // f)
    return sizes[0], sizes[1]
