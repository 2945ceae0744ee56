"""From prompts to pictures: the denoising loop and `generate`.

Shapes:  b prompts, row 0 the source of an edit · h w height and width of the latents
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import text
from .attention import Edit, Guided, Words, coarse_size
from .edit import Edits
from .invert import Inversion, check_source
from .scheduler import DDIM
from .settings import (
    bind_to,
    check_latents,
    check_settings,
    choose,
    latent_size,
    list_of,
    make_scheduler,
)
from .store import AttentionStore, Chain
from .unet import UNet
from .vae import to_images
from .weights import StableDiffusion


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

    x: b 4 h w, pure noise. words: b 77 d, the prompts' context. blank: n 77 d, the negative
    prompt's, for the last n prompts; those before are not guided.
    edit: acts on the prompts alone, never on the blank half of the guidance.
    """
    rows, n = len(x), len(blank) if guidance_scale != 1 else 0
    context = Words(torch.cat([words, blank]) if n else words)
    calls = len(scheduler.timesteps)
    for call, t in enumerate(scheduler.timesteps):
        now = None if edit is None else edit.at(call, calls)
        at = torch.as_tensor(t)  # a number would have torch.compile make a graph of each
        # Prompts and blanks in one UNet call, which small models do faster than two.
        both = torch.cat([x, x[rows - n :]]) if n else x
        hook = Guided(now, rows) if now is not None and n else now
        eps, blanks = unet(both.to(words.dtype), at, context, hook).float().tensor_split([rows])
        if n:  # classifier-free guidance, Ho & Salimans 2021, eq. 6
            guided = blanks + guidance_scale * (eps[rows - n :] - blanks)
            eps = torch.cat([eps[: rows - n], guided])
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
    source: Inversion | None = field(default=None, repr=False)  # the picture that was given


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
    source: Inversion | None = None,
    scheduler: str | DDIM | None = None,
    eta: float = 0.0,
    store: bool | AttentionStore = False,
    progress: bool = False,
) -> Result:
    """A picture for each prompt; with an `edit`, the first is the source, the others edits of it.

    All prompts start from the same noise, drawn on the CPU in float32 from `seed`, so a seed means
    the same picture on every device, alone or in a batch. None takes what the model recommends,
    else SD's 50 steps, guidance 7.5, the model's own size and scheduler.

    latents: the noise to start from instead, (1 or b, 4, h, w). source: a given picture, inverted
    with the first prompt, to be edited instead of a generated one; it has its own noise and steps.
    height, width: of the pictures, in pixels. scheduler: "ddim", "pndm", or an object with
    `timesteps` and `step`. eta: DDIM's share of new noise in each step. store: True or an
    AttentionStore keeps attention maps.
    Raises ValueError, with what is possible, for a setting or an edit that does not fit.
    """
    prompts = list_of(prompts)
    guidance = choose(model, "guidance_scale", guidance_scale, 7.5)
    check_settings(negative_prompt, seed, guidance, store)
    if latents is not None:
        check_latents(latents, len(prompts))
    if source is not None:
        sizes = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
        check_source(source, model, prompts, latents=latents, scheduler=scheduler, eta=eta, **sizes)
        latents, scheduler = source.start(model)
        num_inference_steps = None  # the scheduler has them

    h, w = latent_size(model, height, width, latents)
    noise = torch.Generator().manual_seed(int(seed))
    x = torch.randn(1, 4, h, w, generator=noise) if latents is None else latents.float()
    x = x.to(model.device).expand(len(prompts), -1, -1, -1)
    scheduler = make_scheduler(model, num_inference_steps, scheduler, eta, noise)

    tokens, bound = bind_to(model, prompts, edit, (h, w))
    kept = AttentionStore() if store is True else store or None
    if kept is not None:
        kept.begin(tokens, coarse_size(h, w, model.unet.levels), model.device)
    follow = None if source is None else source.follow()
    order = [kept, bound] if kept is not None and kept.before_edit else [bound, kept]
    hook = Chain(one for one in [follow, *order] if one is not None)

    words = text.encode(model.text_encoder, tokens)
    blank = text.encode(model.text_encoder, [text.tokenize(model.tokenizer, negative_prompt)])
    # What is put back after each step needs no guidance.
    blank = blank.expand(len(prompts) - (follow is not None), -1, -1)
    steps = denoise(model.unet, scheduler, x, words, blank, guidance, hook)
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
    if source is not None:
        settings |= {"scheduler": "ddim", "source": source.settings}
    # A clone outside of inference mode: a usual tensor. A copy, for the store may see more runs.
    return Result(images, x.clone(), copy.copy(kept), settings, bound, source)


@torch.inference_mode()
def decode(model: StableDiffusion, latents: Tensor) -> list[Image.Image]:
    """latents: b 4 h w → b pictures. One at a time: the decoder's peak of memory is the highest."""
    return [image for x in latents.split(1) for image in to_images(model.vae.decode(x.float()))]


if __name__ == "__main__":  # not when it is imported: what is above knows no command line
    from .tools.cli import main

    sys.exit(main())
