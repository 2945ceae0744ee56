"""What `generate` is asked for, checked and completed by what the model recommends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import text
from .align import Prompt
from .attention import Edit, coarse_size
from .check import check, describe, is_number, is_whole
from .edit import Edits, bind
from .scheduler import DDIM, PNDM
from .store import AttentionStore, Chain
from .weights import StableDiffusion

SCHEDULERS = {"ddim": DDIM, "pndm": PNDM}


def choose(model: StableDiffusion, name: str, given: Any, fallback: Any) -> Any:
    """What the caller gave, else what the model recommends, else SD's usual."""
    return model.defaults.get(name, fallback) if given is None else given


def list_of(prompts: str | Sequence[str]) -> list[str]:
    """Raises ValueError unless it is a prompt or a list of prompts."""
    several = [prompts] if isinstance(prompts, str) else prompts
    check(
        isinstance(several, Sequence) and several,
        f"Give a prompt or a list of prompts, not {describe(prompts)}.",
    )
    for prompt in several:
        check(isinstance(prompt, str), f"A prompt is a string, not {describe(prompt)}.")
    return list(several)


def check_settings(negative_prompt: Any, seed: Any, guidance_scale: Any, store: Any) -> None:
    """Raises ValueError for the first that makes no sense."""
    check(
        isinstance(negative_prompt, str),
        f"The negative prompt is one string for all prompts, not {describe(negative_prompt)}.",
    )
    check(
        is_whole(seed) and 0 <= seed < 2**63,
        f"The seed must be a whole number from 0 to 2**63 - 1, not {seed!r}.",
    )
    check(
        is_number(guidance_scale),
        f"The guidance scale must be a finite number, not {guidance_scale!r}.",
    )
    check(
        isinstance(store, bool | AttentionStore | None),
        f"store is True, False or an AttentionStore, not {describe(store)}.",
    )


def check_latents(latents: Any, b: int) -> None:
    """Raises ValueError unless `latents` can be the noise of b prompts."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents are a tensor, not {describe(latents)}.")
    shape = tuple(latents.shape)
    check(
        len(shape) == 4 and shape[0] in (1, b) and shape[1] == 4 and 0 not in shape,
        f"latents must have the shape (1 or {b}, 4, height, width), not {shape}.",
    )
    check(
        latents.isfinite().all(),
        "latents must be finite numbers, and some are infinite or nan.",
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


def make_scheduler(
    model: StableDiffusion,
    steps: int | None = None,
    scheduler: str | DDIM | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> DDIM:
    """A scheduler for one run; None takes what the model recommends. Raises ValueError."""
    names = ", ".join(SCHEDULERS)
    if scheduler is not None and not isinstance(scheduler, str):
        check(
            hasattr(scheduler, "timesteps") and hasattr(scheduler, "step"),
            f"The scheduler must be one of {names}, or an object with timesteps and step, not "
            f"{describe(scheduler)}.",
        )
        check(
            steps is None and not eta,
            "A scheduler of your own has its steps and its eta already: give them to it alone.",
        )
        return scheduler
    name = choose(model, "scheduler", scheduler, model.scheduler)
    check(name in SCHEDULERS, f"The scheduler must be one of {names}, not {name!r}.")
    steps = choose(model, "num_inference_steps", steps, 50)
    check(is_whole(steps), f"The number of steps must be a whole number, not {steps!r}.")
    return SCHEDULERS[name](steps, eta=eta, generator=generator, **model.schedule)


def bind_to(
    model: StableDiffusion, prompts: Sequence[str], edit: Edits, size: tuple[int, int]
) -> tuple[list[Prompt], Edit | None]:
    """The prompts as tokens, and the edit tied to them. size: h w of the latents"""
    tokens = [text.tokenize(model.tokenizer, prompt) for prompt in prompts]
    coarse = coarse_size(*size, model.unet.levels)

    def tied(one: Edits) -> Edit | None:
        if isinstance(one, Chain):
            return Chain(now for part in one.edits if (now := tied(part)) is not None)
        return bind(
            one,
            tokens,
            latent_size=size,
            coarse=coarse,
            device=model.device,
            defaults=model.defaults,
        )

    return tokens, tied(edit)
