"""A given picture becomes the source of edits: the way from noise to it is found, step by step.

    found = invert(model, "bird.png", "a photo of a bird")
    generate(model, ["a photo of a bird", "a photo of a lion"], source=found, edit="auto")

direct          DDIM run backwards without guidance (Song et al. 2021, section 4.3). Guidance would
                lead away from there, so row 0 is put back on its trajectory after every step
                (Ju et al. 2023): it is the picture, to the bit, whatever the edits do
edit-friendly   every level is the picture with noise of its own, and what leads from each to the
                next becomes the new noise of DDPM's step, for all rows (Huberman et al. 2024)
ddim            as direct, but nothing is put back: what guidance does to a plain inversion

Shapes:  n UNet calls · h w height and width of the latents · H W of the picture
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import picture, show, text
from .attention import Edit, Site, Words
from .edit import describe, is_number
from .picture import Picture
from .scheduler import DDIM
from .weights import StableDiffusion

METHODS = ("direct", "edit-friendly", "ddim")
FORMAT = "minip2p inversion 1"  # what a file of one says it is

Predict = Callable[[Tensor, int], Tensor]  # (x: 1 4 h w, timestep) → the noise in it


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture and the way to it, for generate(source=...): invert once, edit many times."""

    trajectory: Tensor  # n+1 4 h w, float32 on the CPU: from noise to the picture's latent
    noises: Tensor | None  # n 4 h w: the new noise of every step; None: there is none
    picture: Picture  # as it was given
    reconstruction: Image.Image  # as the VAE draws it: the best that an edit can keep
    settings: dict[str, Any]  # what repeats it
    model: Tensor = field(repr=False)  # whose it is: see `fingerprint`

    def scheduler(self, model: StableDiffusion) -> DDIM:
        """What leads through the levels of the trajectory."""
        steps, skip = self.settings["num_inference_steps"], self.settings["skip"]
        return Replay(steps, skip, self.noises, **model.schedule)

    def follow(self) -> Edit | None:
        """Holds row 0 on the trajectory; None: it runs free."""
        return None if self.settings["method"] == "ddim" else Follow(self.trajectory[1:])

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a .safetensors file, under a temporary name first: never half of it."""
        path = Path(path)
        tensors = {"trajectory": self.trajectory, "model": self.model}
        if self.noises is not None:
            tensors["noises"] = self.noises
        for name, image in (("given", self.picture.image), ("reconstruction", self.reconstruction)):
            tensors[name] = torch.from_numpy(np.array(image))  # H W 3
        about = {"format": FORMAT, "settings": json.dumps(self.settings)}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            save_file(tensors, Path(folder) / path.name, about)
            os.replace(Path(folder) / path.name, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Inversion:
        """Read what `save` wrote. Raises ValueError for anything else."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is no inversion that can be read: {error}.") from None
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} is not an inversion: make one with minip2p.invert.")
        given, reconstruction = (
            Image.fromarray(tensors[name].numpy()) for name in ("given", "reconstruction")
        )
        return cls(
            tensors["trajectory"],
            tensors.get("noises"),
            picture.read(given, (given.height, given.width)),
            reconstruction,
            json.loads(about["settings"]),
            tensors["model"],
        )


class Replay(DDIM):
    """DDIM on the way of an inversion: without the steps it skipped, and with its new noises."""

    def __init__(self, steps: int, skip: int = 0, noises: Tensor | None = None, **schedule: Any):
        super().__init__(steps, eta=0.0 if noises is None else 1.0, **schedule)
        self.timesteps, self.noises = self.timesteps[skip:], noises

    def noise(self, t: int, x: Tensor) -> Tensor:
        assert self.noises is not None
        return self.noises[self.timesteps.index(t)].to(x)


@dataclass(frozen=True, eq=False)
class Follow(Edit):
    """Puts row 0 back on its trajectory after every step, before a blend reads it."""

    ahead: Tensor  # n 4 h w: where row 0 is after this call and after those to come

    def at(self, call: int, calls: int) -> Edit:
        return Follow(self.ahead[call:])

    def wants(self, site: Site) -> bool:
        return False

    def blend(self, latents: Tensor) -> Tensor:
        return torch.cat([self.ahead[:1].to(latents), latents[1:]])


@torch.inference_mode()
def invert(
    model: StableDiffusion,
    image: Any,
    prompt: str,
    *,
    method: str = "direct",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    skip: int = 0,
    refinements: int = 0,
    seed: int = 8888,
    height: int | None = None,
    width: int | None = None,
    fit: str = "crop",
    progress: bool = False,
) -> Inversion:
    """Find the way from noise to a picture that `prompt` describes.

    image: the path of a file, a PIL image, an array or a tensor; see `picture.read`, for `fit` too.
    method: "direct", "edit-friendly" or "ddim"; above. The scheduler is DDIM whatever the model's
    own is: PNDM's steps depend on those before, and can't be taken back.
    guidance_scale: of the inversion. None is 1, none, but for "edit-friendly", which takes what the
    model recommends: give it the guidance of the edits to come.
    skip: leave out so many of the first steps, the noisiest: less edit, closer to the picture.
    refinements: repeat each step of DDIM so often with the noise predicted of its own result (Pan
    et al. 2023): matters to "ddim" alone.
    seed: of the noises that "edit-friendly" draws. height, width: in pixels; None is the model's.
    Raises ValueError for a picture or a setting that does not fit.
    """
    from .sample import _choose as choose
    from .sample import _latent_size as latent_size
    from .sample import make_scheduler

    check_settings(method, prompt, skip, refinements, seed)
    h, w = latent_size(model, height, width, None)
    steps = len(make_scheduler(model, num_inference_steps, "ddim").timesteps)
    if skip >= steps:
        raise ValueError(f"Of {steps} steps {skip} can't be skipped: at most {steps - 1}.")
    if guidance_scale is not None and not is_number(guidance_scale):
        raise ValueError(f"The guidance scale must be a number, not {guidance_scale!r}.")
    guidance = 1.0 if guidance_scale is None else guidance_scale
    if method == "edit-friendly":
        guidance = choose(model, "guidance_scale", guidance_scale, 7.5)
    given = picture.read(image, (h * model.vae.f, w * model.vae.f), fit)

    clean = model.vae.encode(given.tensor().to(model.device))  # 1 4 h w
    predict = predictor(model, prompt, guidance)
    noises = None
    if method == "edit-friendly":
        scheduler = DDIM(steps, eta=1.0, **model.schedule)
        rng = torch.Generator().manual_seed(seed)
        levels = scheduler.timesteps[skip:]
        trajectory = independent(scheduler, levels, clean, rng)
        noises = between(predict, scheduler, trajectory, bar(levels, progress)).cpu()
    else:
        scheduler = DDIM(steps, **model.schedule)
        levels = scheduler.timesteps[skip:][::-1]
        trajectory = backwards(predict, scheduler, clean, bar(levels, progress), refinements)
    settings = {
        "method": method,
        "prompt": prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "skip": skip,
        "refinements": refinements,
        "seed": seed,
        "height": given.image.height,
        "width": given.image.width,
        "fit": fit,
    }
    drawn = show.to_images(model.vae.decode(clean))[0]
    return Inversion(trajectory.cpu(), noises, given, drawn, settings, fingerprint(model))


def predictor(model: StableDiffusion, prompt: str, guidance: float) -> Predict:
    """What predicts the noise of one latent, with the prompt and guidance."""
    prompts = [prompt] if guidance == 1 else [prompt, ""]
    tokens = [text.tokenize(model.tokenizer, one) for one in prompts]
    words = text.encode(model.text_encoder, tokens)
    context = Words(words)

    def predict(x: Tensor, t: int) -> Tensor:
        rows = x.to(words.dtype).expand(len(words), -1, -1, -1)
        eps = model.unet(rows, torch.as_tensor(t), context).float()
        # classifier-free guidance, Ho & Salimans 2021, eq. 6; of a single row that row
        return eps[-1:] + guidance * (eps[:1] - eps[-1:])

    return predict


def backwards(
    predict: Predict, scheduler: DDIM, clean: Tensor, levels: Iterable[int], refinements: int
) -> Tensor:
    """DDIM's inverse steps from the clean latent through `levels`, ascending. → n+1 4 h w"""
    trajectory = [clean]
    for t in levels:
        x = trajectory[-1]
        for _ in range(1 + refinements):
            x = scheduler.inverse_step(predict(x, t), t, trajectory[-1])
        trajectory.append(x)
    return torch.cat(trajectory[::-1])


def independent(scheduler: DDIM, levels: list[int], clean: Tensor, rng: torch.Generator) -> Tensor:
    """The clean latent with new noise at every level, and itself at last. → n+1 4 h w

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) noise_t (Huberman et al. 2024, eq. 6): unlike the latents of a run,
    whose noises depend on each other.
    """
    noise = torch.randn(len(levels), *clean.shape[1:], generator=rng).to(clean)
    alpha_bar = scheduler.alpha_bar[levels].to(clean)[:, None, None, None]
    return torch.cat([alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise, clean])


def between(predict: Predict, scheduler: DDIM, trajectory: Tensor, levels: Iterable[int]) -> Tensor:
    """The new noise with which each step leads from one latent to the next. → n 4 h w

    z = (x_next - mean) / σ (Huberman et al. 2024, eq. 5)
    """
    noises = []
    for x, x_next, t in zip(trajectory[:-1, None], trajectory[1:, None], levels, strict=True):
        mean, sigma = scheduler.mean_step(predict(x, t), t, x)
        # A last step to ᾱ = 1 draws no noise.
        noises.append((x_next - mean) / sigma if sigma > 0 else torch.zeros_like(x))
    return torch.cat(noises)


def bar(levels: list[int], progress: bool) -> Iterable[int]:
    return tqdm(levels, desc="inversion", disable=not progress)


# ---- Whether a source fits -----------------------------------------------------------------------


def fingerprint(model: StableDiffusion) -> Tensor:
    """The first number of every bias: equal for the same model on any device, nearly equal in any
    precision, and for no two that were trained differently."""
    parts = model.text_encoder, model.unet, model.vae
    biases = (p for part in parts for name, p in part.named_parameters() if name.endswith("bias"))
    return torch.stack([bias.flatten()[0].float() for bias in biases]).cpu()


def check_source(
    source: object, model: StableDiffusion, prompts: list[str], asked: dict[str, Any]
) -> None:
    """Raises ValueError unless a run of `prompts` with the settings asked for can start from it.

    asked: settings that the source has already, None where they were left open.
    """
    if not isinstance(source, Inversion):
        raise ValueError(f"source is what minip2p.invert returns, not {describe(source)}.")
    mine = fingerprint(model)
    if mine.shape != source.model.shape or not mine.allclose(source.model, rtol=0.005, atol=1e-6):
        raise ValueError("The source was inverted with another model: invert the picture again.")
    if prompts[0] != source.settings["prompt"]:
        raise ValueError(
            f"The source was inverted with the prompt {source.settings['prompt']!r}, so the first "
            f"prompt must be that, not {prompts[0]!r}."
        )
    for name, value in asked.items():
        own = source.settings.get(name)
        if value is not None and value != own:
            raise ValueError(
                f"The source was inverted with {name} {own}, not {value!r}: leave it out, or "
                "invert the picture again."
                if name in source.settings
                else f"A source brings its own noise and scheduler: leave out {name}."
            )


def check_settings(method: str, prompt: str, skip: int, refinements: int, seed: int) -> None:
    if method not in METHODS:
        raise ValueError(f"The method is one of {', '.join(METHODS)}, not {method!r}.")
    if not isinstance(prompt, str):
        raise ValueError(f"The prompt is one string, not {describe(prompt)}.")
    for name, value in (("skip", skip), ("refinements", refinements), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ValueError(f"{name} must be a whole number from 0, not {value!r}.")
    if refinements and method == "edit-friendly":
        raise ValueError(
            "Refinements are of DDIM's inverse steps, which edit-friendly does not take: leave "
            "them out."
        )
