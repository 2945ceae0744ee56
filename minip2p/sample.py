"""From prompts to pictures: the denoising loop and `generate`.

Shapes:  b prompts, row 0 the source of an edit · h w height and width of the latents
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import show, text
from .align import Prompt
from .attention import AttentionStore, Chain, Edit, Guided, Words, coarse_size
from .edit import Edits, PromptToPrompt, bind, describe, is_number
from .scheduler import DDIM, PNDM
from .unet import UNet
from .weights import StableDiffusion

SCHEDULERS = {"ddim": DDIM, "pndm": PNDM}


@torch.inference_mode()
def denoise(
    unet: UNet,
    scheduler: DDIM,
    x: Tensor,
    words: Tensor,
    blank: Tensor,
    guidance_scale: float = 7.5,
    edit: Edit | None = None,
) -> Iterator[Tensor]:
    """Yield the latents after every UNet call: x_T, ..., x_0 without the first.

    x: b 4 h w, pure noise. words: b 77 d, the prompts' context. blank: b 77 d, the negative
    prompt's.
    edit: acts on the prompts alone, never on the blank half of the guidance.
    """
    guided = guidance_scale != 1
    context = Words(torch.cat([blank, words]) if guided else words)
    calls = len(scheduler.timesteps)
    for call, t in enumerate(scheduler.timesteps):
        now = None if edit is None else edit.at(call, calls)
        at = torch.as_tensor(t)  # a number would have torch.compile make a graph of each
        if guided:  # both halves in one call, which small models do faster than two
            x_twice = torch.cat([x, x]).to(words.dtype)
            hook = None if now is None else Guided(now, blank=len(x))
            both = unet(x_twice, at, context, hook).float()
            eps_blank, eps_words = both.chunk(2)
            # classifier-free guidance, Ho & Salimans 2021, eq. 6
            eps = eps_blank + guidance_scale * (eps_words - eps_blank)
        else:
            eps = unet(x.to(words.dtype), at, context, now).float()
        x = scheduler.step(eps, t, x)
        x = x if now is None else now.blend(x)
        yield x


@dataclass
class Result:
    """What `generate` returns."""

    images: list[Image.Image]
    latents: Tensor  # b 4 h w, float32, on the model's device
    attention: AttentionStore | None
    settings: dict[str, Any] = field(repr=False)  # what repeats the run
    edit: Edit | None = field(default=None, repr=False)  # as it was bound to the prompts


def generate(
    model: StableDiffusion,
    prompts: str | Sequence[str],
    *,
    edit: Edits = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    seed: int = 8888,
    height: int | None = None,
    width: int | None = None,
    latents: Tensor | None = None,
    scheduler: str | DDIM | None = None,
    eta: float = 0.0,
    store: bool | AttentionStore = False,
    progress: bool = False,
) -> Result:
    """A picture for each prompt; with an `edit`, the first is the source, the others edits of it.

    All prompts start from the same noise, drawn on the CPU in float32 from `seed`, so a seed means
    the same picture on every device, alone or in a batch. None takes what the model recommends,
    else SD's 50 steps, guidance 7.5, the model's own size and scheduler.

    latents: the noise to start from instead, (1 or b, 4, h, w). height, width: of the pictures, in
    pixels. scheduler: "ddim", "pndm", or an object with `timesteps` and `step`. eta: DDIM's share
    of new noise in each step. store: True or an AttentionStore keeps attention maps.
    Raises ValueError, with what is possible, for a setting or an edit that does not fit.
    """
    prompts = _list_of(prompts)
    if not isinstance(negative_prompt, str):
        raise ValueError(
            f"The negative prompt is one string for all prompts, not {describe(negative_prompt)}."
        )
    if not _is_whole(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"The seed must be a whole number from 0 to 2**63 - 1, not {seed!r}.")
    guidance = _choose(model, "guidance_scale", guidance_scale, 7.5)
    if not is_number(guidance) or not math.isfinite(guidance):
        raise ValueError(f"The guidance scale must be a finite number, not {guidance!r}.")
    if not isinstance(store, bool | AttentionStore | None):
        raise ValueError(f"store is True, False or an AttentionStore, not {describe(store)}.")
    if latents is not None:
        _check_latents(latents, len(prompts))

    h, w = _latent_size(model, height, width, latents)
    noise = torch.Generator().manual_seed(int(seed))
    x = torch.randn(1, 4, h, w, generator=noise) if latents is None else latents.float()
    x = x.to(model.device).expand(len(prompts), -1, -1, -1)
    scheduler = make_scheduler(model, num_inference_steps, scheduler, eta, noise)

    tokens = [text.tokenize(model.tokenizer, prompt) for prompt in prompts]
    bound = _bind(model, tokens, edit, (h, w))
    hook = bound
    kept = AttentionStore() if store is True else store or None
    if kept is not None:
        kept.begin(tokens, coarse_size(h, w, model.unet.levels), model.device)
        order = [kept, bound] if kept.before_edit else [bound, kept]
        hook = Chain([one for one in order if one is not None])

    words = text.encode(model.text_encoder, tokens)
    blank = text.encode(model.text_encoder, [text.tokenize(model.tokenizer, negative_prompt)])
    steps = denoise(model.unet, scheduler, x, words, blank.expand_as(words), guidance, hook)
    for x in tqdm(steps, total=len(scheduler.timesteps), disable=not progress):  # noqa: B007
        pass

    images = decode(model, x)
    settings = {
        "prompts": prompts,
        "negative_prompt": negative_prompt,
        "edit": repr(edit),
        "seed": seed,
        "scheduler": type(scheduler).__name__.lower(),
        "num_inference_steps": len(set(scheduler.timesteps)),  # PNDM calls the UNet once more
        "eta": getattr(scheduler, "eta", 0.0),
        "guidance_scale": guidance,
        "height": h * model.vae.f,
        "width": w * model.vae.f,
    }
    # A clone outside of inference mode: a usual tensor.
    return Result(images, x.clone(), kept, settings, bound)


@torch.inference_mode()
def decode(model: StableDiffusion, latents: Tensor) -> list[Image.Image]:
    """latents: b 4 h w → b pictures. One at a time: the decoder's peak of memory is the highest."""
    return [
        image for x in latents.split(1) for image in show.to_images(model.vae.decode(x.float()))
    ]


def explain(
    model: StableDiffusion,
    prompts: Sequence[str],
    edit: Edits = "auto",
    *,
    num_inference_steps: int | None = None,
    scheduler: str | DDIM | None = None,
    height: int | None = None,
    width: int | None = None,
) -> str:
    """What an edit will do, as a table: which tokens take over whose attention, and when."""
    tokens = [text.tokenize(model.tokenizer, prompt) for prompt in _list_of(prompts)]
    bound = _bind(model, tokens, edit, _latent_size(model, height, width, None))
    if not isinstance(bound, PromptToPrompt):
        raise ValueError(
            f"Only Prompt-to-Prompt's own edits can be explained, not {describe(edit)}."
        )
    calls = len(make_scheduler(model, num_inference_steps, scheduler).timesteps)
    return bound.explain(calls)


def make_scheduler(
    model: StableDiffusion,
    steps: int | None = None,
    scheduler: str | DDIM | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> DDIM:
    """A scheduler for one run; None takes what the model recommends. Raises ValueError."""
    if scheduler is not None and not isinstance(scheduler, str):
        if not hasattr(scheduler, "timesteps") or not hasattr(scheduler, "step"):
            raise ValueError(
                f"The scheduler must be one of {', '.join(SCHEDULERS)}, or an object with "
                f"timesteps and step, not {describe(scheduler)}."
            )
        if steps is not None or eta:
            raise ValueError(
                "A scheduler of your own has its steps and its eta already: give them to it alone."
            )
        return scheduler
    name = _choose(model, "scheduler", scheduler, model.scheduler)
    if name not in SCHEDULERS:
        raise ValueError(f"The scheduler must be one of {', '.join(SCHEDULERS)}, not {name!r}.")
    steps = _choose(model, "num_inference_steps", steps, 50)
    if not _is_whole(steps):
        raise ValueError(f"The number of steps must be a whole number, not {steps!r}.")
    return SCHEDULERS[name](steps, eta=eta, generator=generator, **model.schedule)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _list_of(prompts: str | Sequence[str]) -> list[str]:
    """Raises ValueError unless it is a prompt or a list of prompts."""
    several = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(several, Sequence) or not several:
        raise ValueError(f"Give a prompt or a list of prompts, not {describe(prompts)}.")
    for prompt in several:
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt is a string, not {describe(prompt)}.")
    return list(several)


def _check_latents(latents: Tensor, b: int) -> None:
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents are a tensor, not {describe(latents)}.")
    n, channels, h, w = latents.shape if latents.ndim == 4 else (0, 0, 0, 0)
    if n not in (1, b) or channels != 4 or not h or not w:
        raise ValueError(
            f"latents must have the shape (1 or {b}, 4, height, width), not {tuple(latents.shape)}."
        )
    if not latents.isfinite().all():
        raise ValueError("latents must be finite numbers, and some are infinite or nan.")


def _choose(model: StableDiffusion, name: str, given: Any, fallback: Any) -> Any:
    """What the caller gave, else what the model recommends, else SD's usual."""
    return model.defaults.get(name, fallback) if given is None else given


def _bind(
    model: StableDiffusion, prompts: Sequence[Prompt], edit: Edits, latent_size: tuple[int, int]
) -> Edit | None:
    return bind(
        edit,
        prompts,
        latent_size=latent_size,
        coarse=coarse_size(*latent_size, model.unet.levels),
        device=model.device,
        defaults=model.defaults,
    )


def _latent_size(
    model: StableDiffusion, height: int | None, width: int | None, latents: Tensor | None
) -> tuple[int, int]:
    """Height and width of the latents, from whichever of the three says it."""
    f = model.vae.f
    given = latents.shape[-2:] if latents is not None else model.sample_size
    sizes = []
    for name, pixels, size in (("height", height, given[0]), ("width", width, given[1])):
        if pixels is None:
            pixels = size * f
        elif not _is_whole(pixels) or pixels <= 0 or pixels % f:
            raise ValueError(
                f"The {name} must be a positive multiple of {f} pixels, not {pixels!r}."
            )
        elif latents is not None and pixels != size * f:
            raise ValueError(
                f"The {name} is {pixels}, but the latents are for {size * f}: give one."
            )
        sizes.append(pixels // f)
    return sizes[0], sizes[1]


if __name__ == "__main__":
    from .cli import main

    sys.exit(main())
