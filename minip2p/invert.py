"""Invert a picture: find the latents that lead from noise to it, so that edits can start from it.

    source = invert(model, "bird.png", "a photo of a bird")
    generate(model, ["a photo of a bird", "a photo of a lion"], source=source, edit="auto")

direct          DDIM backwards without guidance (Song et al. 2021, section 4.3). With guidance the
                way forward leads elsewhere, so row 0 is put back on its trajectory after each step
                (Ju et al. 2024): it stays the picture, to the bit, whatever the edits do
edit-friendly   the latent at every level is the picture with independent noise, and each step of
                DDPM gets the new noise that leads from one level to the next, in every row
                (Huberman-Spiegelglas et al. 2024); row 0 is put back as well. Its authors invert
                with a guidance of 3.5 and edit with 15, or with 9 under Prompt-to-Prompt;
                PIE-Bench's comparison inverts with 1 and edits with 7.5
ddim            as direct, but nothing is put back: it shows what guidance does to an inversion

Windows of an edit are fractions of the UNet calls that a run makes, without the skipped steps, so
that 1 always means all of them. The authors of "edit-friendly" count fractions of all n steps from
the first call made: their f is min(1, f n / (n - skip)) here.

Shapes:  n UNet calls · h w height and width of the latents · H W of the picture
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import picture, saved, text
from .attention import CachedContext, Hook, Layer
from .errors import check, describe, is_number
from .picture import Picture
from .progress import tqdm
from .scheduler import DDIM
from .settings import BOUNDS, Bounds, check_finite, choose, latent_size
from .vae import to_images
from .weights import StableDiffusion

METHODS = ("direct", "edit-friendly", "ddim")
KIND = "inversion"  # the kind of a saved file

Predict = Callable[[Tensor, int], Tensor]  # (x: 1 4 h w, timestep) → the noise in it


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture with its trajectory, for generate(source=...): inverted once, edited many times.

    It belongs to one model: the same weights, tokenizer and noise schedule. The precision counts
    as well, since a model in half precision predicts other noise: invert in the one you edit in.
    """

    trajectory: Tensor  # n+1 4 h w, float32 on the CPU: from noise to the picture's latent
    noises: Tensor | None  # n 4 h w: the new noise of every step of "edit-friendly"
    picture: Picture
    reconstruction: Image.Image  # the picture as the VAE draws it: no edit is closer to it
    settings: dict[str, Any]  # the arguments of `invert`
    model: str = field(repr=False)  # StableDiffusion.identity()

    def start(self, model: StableDiffusion) -> tuple[Tensor, DDIM]:
        """Return the noise of a run, 1 4 h w, and the scheduler that follows the trajectory."""
        steps, skip = self.settings["num_inference_steps"], self.settings["skip"]
        return self.trajectory[:1], ReplayDDIM(steps, skip, self.noises, **model.schedule)

    def hold_source(self) -> Hook | None:
        """Return the hook that holds row 0 on the trajectory; None for the method "ddim"."""
        return None if self.settings["method"] == "ddim" else HoldSource(self.trajectory[1:])

    def check(self, model: StableDiffusion, prompts: list[str], **arguments: Any) -> None:
        """Raise UserError unless a run of the prompts can start from this picture.

        arguments: others of `generate` that the source decides; None and 0 are always right.
        """
        check(
            self.model == model.identity(),
            "The source was inverted with another model, noise schedule or precision: invert the "
            "picture with this model.",
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
        """Write it as safetensors, with the picture as the model saw it, not the whole of it.

        Raises UserError if the file can't be written.
        """
        images = {"picture": self.picture.image, "reconstruction": self.reconstruction}
        tensors = {name: torch.from_numpy(np.array(i)) for name, i in images.items()}  # H W 3
        tensors["trajectory"] = self.trajectory
        if self.noises is not None:
            tensors["noises"] = self.noises
        saved.write(path, KIND, {"model": self.model, "settings": self.settings}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Inversion:
        """Read a file that `save` wrote. Raises UserError for any other or a damaged file."""
        content, tensors = saved.read(path, KIND)
        try:
            model, settings = content["model"], read_settings(content["settings"])
            is_sound = re.fullmatch("[0-9a-f]{16}", model) and fits(settings, tensors)
        except (KeyError, TypeError, ValueError):
            is_sound = False
        check(
            is_sound,
            f"{path} is damaged, or of an earlier version of minip2p: invert the picture again.",
        )
        seen, drawn = (
            Image.fromarray(tensors[name].numpy()) for name in ("picture", "reconstruction")
        )
        whole = picture.read(seen, (settings["height"], settings["width"]))
        return cls(tensors["trajectory"], tensors.get("noises"), whole, drawn, settings, model)


class ReplayDDIM(DDIM):
    """DDIM along a trajectory: without the skipped steps, with the noises of the inversion."""

    def __init__(self, steps: int, skip: int = 0, noises: Tensor | None = None, **schedule: Any):
        super().__init__(steps, eta=0.0 if noises is None else 1.0, **schedule)
        self.timesteps, self.skip, self.noises = self.timesteps[skip:], skip, noises

    def noise(self, t: int, x: Tensor) -> Tensor:
        assert self.noises is not None  # or eta is 0
        return self.noises[self.timesteps.index(t)].to(x)


@dataclass(frozen=True, eq=False)
class HoldSource(Hook):
    """Put row 0 back on its trajectory after every step, before a blend reads it."""

    ahead: Tensor  # n 4 h w: row 0 after this call and after each later one

    def at(self, call: int, calls: int, timestep: int) -> Hook:
        return HoldSource(self.ahead[call:])

    def applies_to(self, layer: Layer) -> bool:
        return False

    def after_step(self, latents: Tensor) -> Tensor:
        return torch.cat([self.ahead[:1].to(latents), latents[1:]])


# ---- The inversion -------------------------------------------------------------------------------


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
    """Invert a picture that `prompt` describes.

    image, fit: the picture and how it is made the model's size: see picture.read. height, width:
    of what the model sees, in pixels; None is the model's own size.
    num_inference_steps: of DDIM, whatever the model's scheduler is: a step of PNDM depends on the
    steps before it and can't be inverted. method: one of the above.
    guidance_scale: of the inversion alone; `generate` has the edit's. None is 1, no guidance, and
    for "edit-friendly" what the model recommends.
    skip: the number of first, noisiest steps to leave out: a weaker edit, closer to the picture.
    refinements: how often a step of DDIM is repeated, with the noise predicted at its own result
    (Pan et al. 2023). Only "ddim" needs them.
    seed: of the noise that "edit-friendly" draws.
    callback: gets call (from 0), calls, and the latents, 1 4 h w, after each UNet call.
    progress: show a bar.
    Raises UserError for a picture or a setting that does not fit.
    """
    steps = choose(model, "num_inference_steps", num_inference_steps)
    if guidance_scale is None:
        guidance_scale = model.defaults["guidance_scale"] if method == "edit-friendly" else 1.0
    h, w = latent_size(model, height, width, None)
    settings = read_settings(
        {
            "method": method,
            "prompt": prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "skip": skip,
            "refinements": refinements,
            "seed": seed,
            "height": h * model.vae.f,
            "width": w * model.vae.f,
            "fit": fit,
        }
    )
    source = picture.read(image, (settings["height"], settings["width"]), fit)
    clean = model.vae.encode(source.tensor().to(model.device))  # 1 4 h w
    trajectory, noises = find_trajectory(model, clean, settings, callback, progress)
    check_finite("The inversion", trajectory if noises is None else noises, model.dtype)
    drawn = to_images(model.vae.decode(clean))[0]
    return Inversion(trajectory, noises, source, drawn, settings, model.identity())


def find_trajectory(
    model: StableDiffusion,
    clean: Tensor,
    settings: dict[str, Any],
    callback: Callable[[int, int, Tensor], object] | None,
    progress: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the latents from noise to the clean one, n+1 4 h w, and the noises of the steps.

    clean: 1 4 h w. The noises are n 4 h w, or None where the method draws none.
    """
    is_friendly = settings["method"] == "edit-friendly"
    scheduler = DDIM(settings["num_inference_steps"], eta=float(is_friendly), **model.schedule)
    levels = scheduler.timesteps[settings["skip"] :]
    calls = len(levels) * (1 + settings["refinements"])
    call = itertools.count()
    with tqdm(total=calls, disable=not progress) as bar:

        def after_call(x: Tensor) -> None:
            if callback is not None:
                callback(next(call), calls, x.clone())
            bar.update()

        predict = predictor(model, settings["prompt"], settings["guidance_scale"], after_call)
        if is_friendly:
            return edit_friendly_noises(predict, scheduler, levels, clean, settings["seed"])
        return ddim_inversion(predict, scheduler, levels, clean, settings["refinements"]), None


def predictor(
    model: StableDiffusion, prompt: str, guidance: float, after_call: Callable[[Tensor], None]
) -> Predict:
    """Return the function that predicts the noise in one latent with the prompt and guidance.

    after_call: gets the latent after each UNet call.
    """
    prompts = [prompt] if guidance == 1 else [prompt, ""]
    cond = text.encode(model.text_encoder, [text.tokenize(model.tokenizer, p) for p in prompts])
    context = CachedContext(cond)

    def predict(x: Tensor, t: int) -> Tensor:
        rows = x.to(cond.dtype).expand(len(cond), -1, -1, -1)
        eps = model.unet(rows, torch.as_tensor(t, device="cpu"), context).float()
        after_call(x)
        # classifier-free guidance, Ho & Salimans 2021, eq. 6; without it, the only row
        return eps[-1:] + guidance * (eps[:1] - eps[-1:])

    return predict


def ddim_inversion(
    predict: Predict, scheduler: DDIM, levels: list[int], clean: Tensor, refinements: int = 0
) -> Tensor:
    """Take DDIM's inverse steps from the clean latent up through the levels. → n+1 4 h w"""
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
    """Return a latent at every level, n+1 4 h w, and the new noise of each step, n 4 h w.

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) noise_t      independent noises (Huberman-Spiegelglas, eq. 6)
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


# ---- Checks --------------------------------------------------------------------------------------


def read_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with Python's own numbers. Raises UserError for one out of its bounds."""
    method, prompt = settings["method"], settings["prompt"]
    check(method in METHODS, f"The method is one of {', '.join(METHODS)}, not {method!r}.")
    check(isinstance(prompt, str), f"The prompt is one string, not {describe(prompt)}.")
    steps = BOUNDS["num_inference_steps"].read(settings["num_inference_steps"], "The steps")
    bounds = BOUNDS | {"skip": Bounds(0, steps - 1, is_whole=True)}
    numbers = {name: bounds[name].read(settings[name], name) for name in settings if name in bounds}
    check(
        method != "edit-friendly" or not numbers["refinements"],
        "Refinements are of DDIM's inverse steps, and edit-friendly takes none: leave them out.",
    )
    return settings | numbers


def fits(settings: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Tell whether the tensors of a file are those of an inversion with `settings`."""
    height, width = settings["height"], settings["width"]
    n = settings["num_inference_steps"] - settings["skip"]
    h, w = tensors["trajectory"].shape[2:]
    image, latents = ((height, width, 3), torch.uint8), torch.float32
    expected = {
        "picture": image,
        "reconstruction": image,
        "trajectory": ((n + 1, 4, h, w), latents),
    }
    if settings["method"] == "edit-friendly":
        expected["noises"] = (n, 4, h, w), latents
    return (
        settings["fit"] in picture.FITS
        and len(settings) == 10  # all of which are checked
        and {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected
        and min(h, w) > 0
        and (height % h, width % w, height * w) == (0, 0, width * h)
        and all(bool(t.isfinite().all()) for t in tensors.values())
    )
