"""A given picture becomes the source of edits: the way from noise to it is found, step by step.

    found = invert(model, "bird.png", "a photo of a bird")
    generate(model, ["a photo of a bird", "a photo of a lion"], source=found, edit="auto")

direct          DDIM backwards, without guidance (Song et al. 2021, section 4.3). With guidance the
                way forward leads elsewhere, so row 0 is put back on its trajectory after each step
                (Ju et al. 2024): it is the picture, to the bit, whatever the edits do
edit-friendly   every level is the picture with noise of its own, and what leads from one to the
                next is the new noise of DDPM's step, in every row (Huberman-Spiegelglas et al.
                2024); row 0 is put back as well
ddim            as direct, but nothing is put back: shows what guidance does to an inversion

Shapes:  n UNet calls · h w height and width of the latents · H W of the picture
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import picture, saved, text
from .attention import CachedContext, Hook, Layer
from .errors import check, describe, is_number, is_whole
from .picture import Picture
from .progress import tqdm
from .scheduler import DDIM, make_scheduler
from .settings import check_finite, choose, latent_size
from .vae import to_images
from .weights import StableDiffusion

METHODS = ("direct", "edit-friendly", "ddim")
KIND = "inversion"  # what a file says it is

Predict = Callable[[Tensor, int], Tensor]  # (x: 1 4 h w, timestep) → the noise in it


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture and the way to it, for generate(source=...): found once, edited many times."""

    trajectory: Tensor  # n+1 4 h w, float32 on the CPU: from noise to the picture's latent
    noises: Tensor | None  # n 4 h w: the new noise of every step, or none
    picture: Picture  # as it was given
    reconstruction: Image.Image  # as the VAE draws it: no edit keeps more
    settings: dict[str, Any]  # what repeats it
    model: Tensor = field(repr=False)  # whose it is: see `fingerprint`

    def start(self, model: StableDiffusion) -> tuple[Tensor, DDIM]:
        """The noise of a run, 1 4 h w, and the scheduler that leads along the trajectory."""
        steps, skip = self.settings["num_inference_steps"], self.settings["skip"]
        return self.trajectory[:1], ReplayDDIM(steps, skip, self.noises, **model.schedule)

    def hold_source(self) -> Hook | None:
        """Return the hook that holds row 0 on the trajectory. None: its noise leads it."""
        return None if self.settings["method"] == "ddim" else HoldSource(self.trajectory[1:])

    def check(self, model: StableDiffusion, prompts: list[str], **arguments: Any) -> None:
        """Raise UserError unless a run of the prompts can start from this picture.

        arguments: what else generate was given that the source decides; None and 0 ask for nothing.
        """
        numbers = fingerprint(model)
        is_same = numbers.shape == self.model.shape and numbers.allclose(self.model, 0.005, 1e-6)
        check(
            is_same,
            "The source was inverted with another model: invert the picture with this one.",
        )
        check(
            prompts[0] == self.settings["prompt"],
            f"The source was inverted with the prompt {self.settings['prompt']!r}: that must be "
            f"the first prompt, not {prompts[0]!r}.",
        )
        for name, value in arguments.items():
            if name not in self.settings:
                is_none = value is None or (is_number(value) and value == 0)
                check(is_none, f"A source has its own {name} already: leave it out.")
            else:
                check(
                    value is None or value == self.settings[name],
                    f"The source was inverted with {name} {self.settings[name]}, not {value!r}: "
                    "leave it out, or invert the picture again.",
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors. Of the picture, what the model saw."""
        images = {"given": self.picture.image, "reconstruction": self.reconstruction}
        tensors = {name: torch.from_numpy(np.array(i)) for name, i in images.items()}  # H W 3
        tensors |= {"trajectory": self.trajectory, "model": self.model}
        if self.noises is not None:
            tensors["noises"] = self.noises
        saved.write(path, KIND, self.settings, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Inversion:
        """What `save` wrote. Raises ValueError for anything else."""
        settings, tensors = saved.read(path, KIND)
        given, drawn = (
            Image.fromarray(tensors[name].numpy()) for name in ("given", "reconstruction")
        )
        whole = picture.read(given, given.size[::-1])
        parts = tensors["trajectory"], tensors.get("noises"), whole, drawn
        return cls(*parts, settings, tensors["model"])


class ReplayDDIM(DDIM):
    """DDIM on the way of an inversion: without the steps it skipped, with the noises it found."""

    def __init__(self, steps: int, skip: int = 0, noises: Tensor | None = None, **schedule: Any):
        super().__init__(steps, eta=0.0 if noises is None else 1.0, **schedule)
        self.timesteps, self.noises = self.timesteps[skip:], noises

    def noise(self, t: int, x: Tensor) -> Tensor:
        assert self.noises is not None  # or eta is 0
        return self.noises[self.timesteps.index(t)].to(x)


@dataclass(frozen=True, eq=False)
class HoldSource(Hook):
    """Puts row 0 back on its trajectory after every step, before a blend reads it."""

    ahead: Tensor  # n 4 h w: where row 0 is after this call, and after each that is to come

    def at(self, call: int, calls: int, timestep: int) -> Hook:
        return HoldSource(self.ahead[call:])

    def applies_to(self, layer: Layer) -> bool:
        return False

    def after_step(self, latents: Tensor) -> Tensor:
        return torch.cat([self.ahead[:1].to(latents), latents[1:]])


# ---- Finding the way -----------------------------------------------------------------------------


@torch.no_grad()
def invert(
    model: StableDiffusion,
    image: Any,
    prompt: str,
    *,
    num_inference_steps: int | None = None,
    method: str = "direct",
    guidance_scale: float | None = None,
    skip: int = 0,
    refinements: int = 0,
    seed: int = 8888,
    height: int | None = None,
    width: int | None = None,
    fit: str = "crop",
    callback: Callable[[int, int, Tensor], object] | None = None,
    progress: bool = False,
) -> Inversion:
    """Find the way from noise to a picture that `prompt` describes.

    image: the path of a file, a PIL image, an array or a tensor, as picture.read takes it; `fit`
    too. height, width: of what the model sees, in pixels; None is the model's own size.
    method: one of those above. Steps are DDIM's whatever the model's scheduler: PNDM's depend on
    the steps before, and can't be taken backwards.
    guidance_scale: of the inversion. None is none, 1; with "edit-friendly" what the model
    recommends, and the edits should have the same.
    skip: how many of the first, noisiest steps are left out: less edit, closer to the picture.
    refinements: how often a step of DDIM is repeated, with the noise predicted of its own result
    (Pan et al. 2023). Nothing but "ddim" needs it.
    seed: of the noises that "edit-friendly" draws.
    callback: gets call (from 0), calls, and the latents, 1 4 h w, after each UNet call.
    Raises ValueError for a picture or a setting that does not fit.
    """
    scheduler = make_scheduler(model, num_inference_steps, "ddim")
    h, w = latent_size(model, height, width, None)
    settings = {
        "method": method,
        "prompt": prompt,
        "num_inference_steps": len(scheduler.timesteps),
        "guidance_scale": 1.0 if guidance_scale is None else guidance_scale,
        "skip": skip,
        "refinements": refinements,
        "seed": seed,
        "height": h * model.vae.f,
        "width": w * model.vae.f,
        "fit": fit,
    }
    if method == "edit-friendly":
        settings["guidance_scale"] = choose(model, "guidance_scale", guidance_scale)
    check_settings(settings)
    settings = {k: v.item() if hasattr(v, "item") else v for k, v in settings.items()}  # numpy's
    given = picture.read(image, (settings["height"], settings["width"]), fit)

    clean = model.vae.encode(given.tensor().to(model.device))  # 1 4 h w
    levels = scheduler.timesteps[skip:]
    calls = len(levels) * (1 + refinements)
    call = itertools.count()
    with tqdm(total=calls, disable=not progress) as bar:

        def after_call(x: Tensor) -> None:
            if callback is not None:
                callback(next(call), calls, x.clone())
            bar.update()

        predict = predictor(model, prompt, settings["guidance_scale"], after_call)
        if method == "edit-friendly":
            scheduler.eta = 1.0
            trajectory, noises = edit_friendly_noises(predict, scheduler, levels, clean, seed)
        else:
            trajectory, noises = (
                ddim_inversion(predict, scheduler, levels, clean, refinements),
                None,
            )
    check_finite("The inversion", trajectory if noises is None else noises, model.dtype)
    drawn = to_images(model.vae.decode(clean))[0]
    return Inversion(trajectory, noises, given, drawn, settings, fingerprint(model))


def predictor(
    model: StableDiffusion, prompt: str, guidance: float, after_call: Callable[[Tensor], None]
) -> Predict:
    """Return the function that predicts the noise in one latent with the prompt and guidance.

    after_call: gets the latent after each UNet call.
    """
    prompts = [prompt] if guidance == 1 else [prompt, ""]
    words = text.encode(model.text_encoder, [text.tokenize(model.tokenizer, p) for p in prompts])
    context = CachedContext(words)

    def predict(x: Tensor, t: int) -> Tensor:
        rows = x.to(words.dtype).expand(len(words), -1, -1, -1)
        eps = model.unet(rows, torch.as_tensor(t, device="cpu"), context).float()
        after_call(x)
        # classifier-free guidance, Ho & Salimans 2021, eq. 6; without it, the only row
        return eps[-1:] + guidance * (eps[:1] - eps[-1:])

    return predict


def ddim_inversion(
    predict: Predict, scheduler: DDIM, levels: list[int], clean: Tensor, refinements: int = 0
) -> Tensor:
    """DDIM's inverse steps from the clean latent up through the levels. → n+1 4 h w"""
    trajectory = [clean]
    for t in reversed(levels):
        x = trajectory[-1]
        for _ in range(1 + refinements):
            x = scheduler.inverse_step(predict(x, t), t, trajectory[-1])
        trajectory.append(x)
    return torch.cat(trajectory[::-1]).cpu()


def edit_friendly_noises(
    predict: Predict, scheduler: DDIM, levels: list[int], clean: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """A latent at every level, n+1 4 h w, and the new noises that lead from each to the next.

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) noise_t      each noise its own (Huberman-Spiegelglas, eq. 6)
    z_t = (x_next - mean(x_t)) / σ_t       eq. 5
    """
    rng = torch.Generator().manual_seed(int(seed))
    noise = torch.randn(
        len(levels), *clean.shape[1:], generator=rng, dtype=torch.float32, device="cpu"
    ).to(clean)
    alpha_bar = scheduler.alpha_bar[levels].to(clean)[:, None, None, None]
    trajectory = torch.cat([alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise, clean])
    noises = []
    for t, x, x_next in zip(levels, trajectory[:-1, None], trajectory[1:, None], strict=True):
        mean, sigma = scheduler.mean_step(predict(x, t), t, x)
        # A last step to ᾱ = 1 draws no noise.
        noises.append((x_next - mean) / sigma if sigma > 0 else torch.zeros_like(x))
    return trajectory.cpu(), torch.cat(noises).cpu()


# ---- What fits together --------------------------------------------------------------------------


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for the first that makes no sense."""
    method, prompt, guidance = (settings[k] for k in ("method", "prompt", "guidance_scale"))
    check(method in METHODS, f"The method is one of {', '.join(METHODS)}, not {method!r}.")
    check(isinstance(prompt, str), f"The prompt is one string, not {describe(prompt)}.")
    check(is_number(guidance), f"The guidance scale must be a finite number, not {guidance!r}.")
    for name, most in (
        ("seed", 2**63),
        ("skip", settings["num_inference_steps"]),
        ("refinements", 100),
    ):
        value = settings[name]
        check(
            is_whole(value) and 0 <= value < most,
            f"{name} must be a whole number from 0 to {most - 1}, not {value!r}.",
        )
    check(
        method != "edit-friendly" or not settings["refinements"],
        "Refinements are of DDIM's inverse steps, and edit-friendly takes none: leave them out.",
    )


def fingerprint(model: StableDiffusion) -> Tensor:
    """The first number of every bias: of one model the same on any device and nearly the same in
    any precision; another training changes it."""
    parts = model.text_encoder, model.unet, model.vae
    biases = (p for part in parts for name, p in part.named_parameters() if name.endswith("bias"))
    return torch.stack([bias.detach().flatten()[0].float() for bias in biases]).cpu()
