"""From prompts to pictures: the denoising loop and `generate`.

Shapes:  b prompts, row 0 the source of an edit · h w height and width of the latents
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import settings, text
from .attention import Edit, Guided, Words
from .edit import Edits
from .invert import Inversion, check_source
from .picture import to_images
from .progress import tqdm
from .scheduler import DDIM
from .store import AttentionStore, Chain
from .unet import UNet
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
    settings: dict[str, Any] = field(repr=False)  # what repeats the run, or says that it can't
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
    latents: Any = None,
    source: Inversion | None = None,
    scheduler: str | DDIM | None = None,
    eta: float = 0.0,
    store: bool | AttentionStore = False,
    callback: Callable[[int, int, Tensor], object] | None = None,
    progress: bool = False,
) -> Result:
    """A picture for each prompt; with an `edit`, the first is the source, the others edits of it.

    All prompts start from the same noise, drawn on the CPU in float32 from `seed`: it means the
    same picture on every device. Several pictures of a prompt are as many calls, a seed each.
    None takes what the model recommends, else SD's 50 steps, guidance 7.5, its size and scheduler.

    latents: the noise to start from instead, (1 or b, 4, h, w). source: a given picture, inverted
    with the first prompt, to be edited instead of a generated one; it has its own noise and steps.
    height, width: of the pictures, in pixels. scheduler: "ddim", "pndm", or an object with
    `timesteps` and `step`. eta: DDIM's share of new noise in each step. store: True or an
    AttentionStore keeps attention maps.
    callback: gets call (from 0), calls, and the latents, b 4 h w, after each UNet call.
    Raises ValueError for a setting or an edit that does not fit, and for infinite or nan latents.
    """
    prompts = settings.list_of(prompts)
    guidance = settings.choose(model, "guidance_scale", guidance_scale, 7.5)
    settings.check_settings(negative_prompt, seed, guidance, store, callback)
    latents = settings.as_latents(latents, len(prompts))
    if source is not None:
        sizes = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
        check_source(source, model, prompts, latents=latents, scheduler=scheduler, eta=eta, **sizes)
        latents, scheduler = source.start(model)
        num_inference_steps = None  # the scheduler has them

    h, w = settings.latent_size(model, height, width, latents)
    noise = torch.Generator().manual_seed(int(seed))
    x = torch.randn(1, 4, h, w, generator=noise) if latents is None else latents
    x = x.to(model.device).expand(len(prompts), -1, -1, -1)
    sampler = settings.make_scheduler(model, num_inference_steps, scheduler, eta, noise)

    tokens, bound = settings.bind_to(model, prompts, edit, (h, w))
    kept = AttentionStore() if store is True else store or None
    if kept is not None:
        kept.begin(tokens, settings.coarse_size(h, w, model.unet.levels), model.device)
    follow = None if source is None else source.follow()
    order = [kept, bound] if kept is not None and kept.before_edit else [bound, kept]
    hook = Chain(one for one in [follow, *order] if one is not None)

    words = text.encode(model.text_encoder, tokens)
    settings.check_finite("The text encoder's output", words, model.dtype)
    blank = text.encode(model.text_encoder, [text.tokenize(model.tokenizer, negative_prompt)])
    # What is put back after each step needs no guidance.
    blank = blank.expand(len(prompts) - (follow is not None), -1, -1)
    steps = denoise(model.unet, sampler, x, words, blank, guidance, hook)
    calls = len(sampler.timesteps)
    for call, x in enumerate(tqdm(steps, total=calls, disable=not progress)):
        if callback is not None:
            callback(call, calls, x.clone())
    settings.check_finite("The latents", x, model.dtype)

    images = decode(model, x, progress)
    made_of = prompts, negative_prompt, edit, seed, latents, scheduler, sampler, guidance, source
    about = settings.recorded(*made_of, images[0].size)
    # A clone outside of inference mode: a usual tensor. A copy, for the store may see more runs.
    return Result(images, x.clone(), copy.copy(kept), about, bound, source)


@torch.inference_mode()
def decode(model: StableDiffusion, latents: Tensor, progress: bool = False) -> list[Image.Image]:
    """latents: b 4 h w → b pictures. One at a time: the decoder's peak of memory is the highest."""
    images, hidden = [], not progress or len(latents) == 1
    for x in tqdm(latents.split(1), "decoding", disable=hidden, delay=1):  # seconds, at SD's size
        pixels = model.vae.decode(x.float())
        settings.check_finite("The decoded picture", pixels, torch.float32)
        images += to_images(pixels)
    return images


if __name__ == "__main__":  # not when it is imported: what is above knows no command line
    from .tools.cli import main

    sys.exit(main())
