"""From prompts to pictures: the denoising loop and `generate`.

Shapes:  b prompts, row 0 the source of an edit · n of them with guidance · d width of a token ·
         h w height and width of the latents
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import settings, text
from .align import Prompt
from .attention import CachedContext, Chain, Hook, PromptRows, Size
from .edit import Edits, PromptToPrompt, bind
from .errors import UserError
from .progress import tqdm
from .scheduler import Scheduler, make_scheduler
from .unet import UNet
from .vae import to_images
from .weights import StableDiffusion


def denoise(
    unet: UNet,
    scheduler: Scheduler,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float = 7.5,
    hook: Hook | None = None,
) -> Iterator[Tensor]:
    """Yield the latents after every UNet call: x_T, ..., x_0 without the first.

    x: b 4 h w, pure noise. cond: b 77 d, the prompts' context. uncond: n 77 d, the negative
    prompt's, for the last n prompts; those before are not guided.
    hook: acts on the prompts' rows, and on unconditional rows only in `attend_all_rows`.
    Gradients flow where x, cond or uncond ask for them; `generate` runs without.
    """
    rows, n = len(x), len(uncond) if guidance_scale != 1 else 0
    cached = CachedContext(torch.cat([cond, uncond]) if n else cond)
    calls = len(scheduler.timesteps)
    # Tensors, because torch.compile would make a graph for each number; copied to the device here,
    # because each copy waits for the device.
    timesteps = [torch.as_tensor(t, device=x.device) for t in scheduler.timesteps]
    for call, t in enumerate(scheduler.timesteps):
        step_hook = None if hook is None else hook.at(call, calls, int(t))
        context = cached
        if step_hook is not None:
            x = step_hook.before_step(x)
            edited = step_hook.edit_context(cached.context, rows)
            if edited is not cached.context:
                context = CachedContext(edited)
        # Prompts and unconditional rows in one UNet call, which small models do faster than two.
        model_input = torch.cat([x, x[rows - n :]]) if n else x
        unet_hook = None if step_hook is None else PromptRows(step_hook, rows)
        eps = unet(model_input.to(cond.dtype), timesteps[call], context, unet_hook).float()
        if n:  # classifier-free guidance, Ho & Salimans 2021, eq. 6
            eps, eps_uncond = eps.tensor_split([rows])
            guided = eps_uncond + guidance_scale * (eps[rows - n :] - eps_uncond)
            eps = torch.cat([eps[: rows - n], guided])
        x = scheduler.step(eps, t, x)
        if step_hook is not None:
            x = step_hook.after_step(x)
        yield x


@dataclass
class Result:
    """The pictures of a run, and what else `generate` knows of it."""

    images: list[Image.Image]  # empty with decode=False
    latents: Tensor  # b 4 h w, float32, on the model's device
    store: Any  # the AttentionStore, or None
    run: dict[str, Any] = field(repr=False)  # plain data: `Run.from_dict` repeats the run from it
    edit: PromptToPrompt | None = field(default=None, repr=False)  # as bound to the prompts
    source: Any = field(default=None, repr=False)  # the Inversion that was given, or None

    @property
    def attention(self) -> Any:
        """Return the AttentionStore of the run. Raises UserError if the run kept no maps."""
        if self.store is None:
            raise UserError("This run kept no attention maps: call generate with store=True.")
        return self.store


@torch.no_grad()
def generate(
    model: StableDiffusion,
    prompts: str | Sequence[str],
    *,
    edit: Edits = None,
    hooks: Sequence[Hook] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    seed: int = 8888,
    height: int | None = None,
    width: int | None = None,
    latents: Any = None,
    source: Any = None,
    scheduler: str | Scheduler | None = None,
    eta: float = 0.0,
    store: Any = False,
    callback: Callable[[int, int, Tensor], object] | None = None,
    decode: bool = True,
    progress: bool = False,
) -> Result:
    """Make a picture for each prompt; with an `edit`, the first is the source of the others.

        out = generate(model, ["a photo of a cat", "a photo of a dog"], edit=WordSwap())
        out.images[1].save("dog.png")

    All prompts start from the same noise, drawn on the CPU in float32 from `seed`: it means the
    same picture on every device. Several pictures of a prompt are as many calls, a seed each.
    None takes what the model recommends, else SD's 50 steps, guidance 7.5, its size and scheduler.

    model: what `load` returns. edit: "auto", a WordSwap, Refine or Reweight for all edited prompts,
    or a list with one (or None) for each. hooks: your own, each of which sees the maps that the
    edit and the hooks before it returned. guidance_scale: 1 is none. negative_prompt: what the
    pictures should not show, the same for all.
    latents: the noise to start from instead, (1 or b, 4, h, w). source: an inverted picture
    (`invert`), to be edited instead of a generated one; it has its own noise and steps.
    height, width: of the pictures, in pixels. scheduler: "ddim", "pndm", or an object with
    `timesteps` and `step`. eta: DDIM's share of new noise in each step. store: True or an
    AttentionStore keeps attention maps.
    callback: gets call (from 0), calls, and the latents, b 4 h w, after each UNet call.
    decode: False leaves the latents as they are and makes no images. progress: show a bar.
    Raises UserError for a setting or an edit that does not fit, and for infinite or nan latents.
    """
    prompts = settings.list_of(prompts)
    guidance = settings.choose(model, "guidance_scale", guidance_scale)
    settings.check_settings(negative_prompt, seed, guidance, store, callback, hooks)
    latents = settings.as_latents(latents, len(prompts))
    if source is not None:
        sizes = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
        settings.check_source(source)
        source.check(model, prompts, latents=latents, scheduler=scheduler, eta=eta, **sizes)
        latents, scheduler = source.start(model)
        num_inference_steps = None  # the scheduler has them

    h, w = settings.latent_size(model, height, width, latents)
    generator = torch.Generator().manual_seed(int(seed))
    x = latents
    if x is None:
        x = torch.randn(1, 4, h, w, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(model.device).expand(len(prompts), -1, -1, -1)
    sampler = make_scheduler(model, num_inference_steps, scheduler, eta, generator)

    tokens, hook = bind_edit(model, prompts, edit, (h, w))
    store = settings.as_store(store)
    hold_source = None if source is None else source.hold_source()
    run_hooks = in_order(hold_source, hook, hooks, store)
    for run_hook in run_hooks:
        run_hook.begin(tokens, model.unet.coarse_size(h, w), model.device)

    cond = text.encode(model.text_encoder, tokens)
    settings.check_finite("The text encoder's output", cond, model.dtype)
    settings.warn_unknown_words(model.vocabulary, [negative_prompt])
    uncond = text.encode(model.text_encoder, [text.tokenize(model.tokenizer, negative_prompt)])
    # A source row that is put back after each step needs no guidance.
    n = len(prompts) - (hold_source is not None)
    uncond = uncond.expand(n, -1, -1)
    steps = denoise(model.unet, sampler, x, cond, uncond, guidance, Chain(run_hooks))
    calls = len(sampler.timesteps)
    for call, x in enumerate(tqdm(steps, total=calls, disable=not progress)):
        if callback is not None:
            callback(call, calls, x.clone())
    settings.check_finite("The latents", x, model.dtype)

    images = decode_latents(model, x, progress) if decode else []

    from .record import record  # here: the loop can be read, and run, without it

    run = record(
        model,
        prompts,
        edit,
        sampler,
        size=(h, w),
        negative_prompt=negative_prompt,
        seed=seed,
        guidance_scale=guidance,
        hooks=hooks,
        latents=latents,
        scheduler=scheduler,
        source=source,
    )
    # A copy, for the store may see more runs.
    return Result(images, x, copy.copy(store), run, hook, source)


def bind_edit(
    model: StableDiffusion, prompts: Sequence[str], edit: Edits, latent_size: Size
) -> tuple[list[Prompt], PromptToPrompt | None]:
    """Return the prompts as tokens, and the edit bound to them. latent_size: h w"""
    settings.warn_unknown_words(model.vocabulary, prompts)
    tokens = [text.tokenize(model.tokenizer, prompt) for prompt in prompts]
    hook = bind(
        edit,
        tokens,
        latent_size=latent_size,
        coarse=model.unet.coarse_size(*latent_size),
        defaults=model.defaults,
        device=model.device,
    )
    return tokens, hook


def in_order(
    hold_source: Hook | None, edit: Hook | None, hooks: Sequence[Hook], store: Any
) -> list[Hook]:
    """Return the hooks of a run in the order in which they act.

    A store sees the maps that all others returned, or with before_edit those of the prompts alone.
    """
    if store is not None and store.before_edit:
        order = [hold_source, store, edit, *hooks]
    else:
        order = [hold_source, edit, *hooks, store]
    return [hook for hook in order if hook is not None]


@torch.no_grad()
def decode_latents(
    model: StableDiffusion, latents: Tensor, progress: bool = False
) -> list[Image.Image]:
    """Decode latents into pictures, one at a time: the decoder needs the most memory of all parts.

    latents: b 4 h w → b pictures
    """
    images, hidden = [], not progress or len(latents) == 1
    for x in tqdm(latents.split(1), "decoding", disable=hidden, delay=1):  # seconds, at SD's size
        pixels = model.vae.decode(x.float())
        settings.check_finite("The decoded picture", pixels, torch.float32)
        images += to_images(pixels)
    return images
