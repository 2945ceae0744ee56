"""What makes a study's pictures: a model, and one call of `generate` for runs of one source."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .. import text
from ..invert import Inversion, invert
from ..pipeline import generate
from ..weights import StableDiffusion, load
from .measure import Looks, Words, measure
from .results import Files, Row
from .study import Settings, changed_words, edit_of

MOST = 16  # pictures at a time by default: on a CPU more are not faster, and on a GPU hardly
BYTES = 250  # of memory for a latent pixel of a row and a channel of the first level; 175 measured


@dataclass(frozen=True)
class Job:
    """A run with its model's part filled in."""

    id: str
    source: str  # the id of its source picture
    settings: Settings
    row: Row  # what the table has of it beforehand


class Worker:
    """A model, and what is made with it."""

    def __init__(
        self, about: Settings, device: str | None = None, latents: bool = False, beside: int = 0
    ):
        """about: Study.about. latents: keep them, too. beside: workers that share its memory."""
        dtype = getattr(torch, about["dtype"])
        self.model = load(about["model"], tokenizer=about["tokenizer"], device=device, dtype=dtype)
        self.about, self.latents, self.beside = about, latents, beside
        self.once = lru_cache(4)(self.invert)  # an image's runs come one after the other

    def tell(self) -> Settings:
        """What settles a run's settings, and how many pixels of pictures fit at a time."""
        model = self.model
        h, w = model.sample_size
        recommended = {"scheduler": model.scheduler, "defaults": model.defaults}
        recommended |= {"height": h * model.vae.f, "width": w * model.vae.f}
        ours = {"id": identity(model), "dtype": self.about["dtype"]}
        return ours | recommended | {"pixels": pixels_that_fit(model, self.beside)}

    def run(self, jobs: Sequence[Job]) -> list[tuple[Row, Files]]:
        """Jobs of one source, in one call of generate. A job that raises has its error in its row.

        The source picture is among the first job's files.
        """
        try:
            return self.make(jobs)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if len(jobs) > 1:  # which of them it is
            return [made for job in jobs for made in self.run([job])]
        return [(jobs[0].row | {"error": said}, {})]

    def make(self, jobs: Sequence[Job]) -> list[tuple[Row, Files]]:
        settings, edited = jobs[0].settings, [job for job in jobs if job.settings["to"] is not None]
        prompts = [settings["prompt"], *(job.settings["to"] for job in edited)]
        words = [self.words(job.settings) for job in edited]
        all_words = dict.fromkeys(word for pair in words for some in pair for word in some)
        began = time.perf_counter()
        result = generate(
            self.model,
            prompts,
            edit=[edit_of(job.settings) for job in edited] or None,
            store=Looks(words=list(all_words)) if all_words else False,
            **self.start(jobs[0]),
        )
        shared: Row = {
            "seconds": round((time.perf_counter() - began) / len(jobs), 4),
            "device": str(self.model.device),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "minip2p": version("minip2p"),
        }
        source, *images = result.images
        found = {jobs[0].source: (shared, self.files(jobs[0].source, source, result.latents[0]))}
        for r, (job, image) in enumerate(zip(edited, images, strict=True), 1):
            measured = measure(source, image, result.attention, r, words[r - 1])
            files = self.files(job.id, image, result.latents[r])
            found[job.id] = (shared | measured, files)
        made = [(job.row | found[job.id][0], found[job.id][1]) for job in jobs]
        made[0][1].update(found[jobs[0].source][1])
        return made

    def start(self, job: Job) -> dict[str, Any]:
        """What `generate` is to start from: a seed and its like, or a given picture."""
        of, image = job.settings, job.row["image"]
        both = {key: of[key] for key in ("negative_prompt", "guidance_scale")}
        if image is None:
            names = "seed", "num_inference_steps", "scheduler", "eta", "height", "width"
            return both | {key: of[key] for key in names}
        shared = "prompt", "method", "num_inference_steps", "height", "width"
        how = {"image": image} | {key: of[key] for key in shared}
        if of["method"] == "edit-friendly":
            how |= {"guidance_scale": of["guidance_scale"], "seed": of["seed"]}
        return both | {"source": self.once(tuple(how.items()))}

    def invert(self, how: tuple[tuple[str, Any], ...]) -> Inversion:
        return invert(self.model, **dict(how))

    def words(self, settings: Settings) -> Words:
        """The changed words that the model sees, in the source and in the edited prompt."""
        old, new = changed_words(settings)
        seen = [
            text.tokenize(self.model.tokenizer, settings[key]).words for key in ("prompt", "to")
        ]
        return [w for w in old if w in seen[0]], [w for w in new if w in seen[1]]

    def files(self, name: str, image: Image.Image, latents: Tensor) -> Files:
        png, array = io.BytesIO(), io.BytesIO()
        info = PngInfo()
        info.add_itxt("minip2p sweep", name)
        image.save(png, "PNG", pnginfo=info, compress_level=1)  # a GPU is faster than zlib at 6
        np.save(array, latents.cpu().numpy())
        kept = {f"{name}.npy": array.getvalue()} if self.latents else {}
        return {f"{name}.png": png.getvalue()} | kept


def identity(model: StableDiffusion) -> str:
    """A hash of all that a model's pictures depend on: weights, vocabulary, noise levels."""
    digest = hashlib.sha256()
    for part in (model.text_encoder, model.unet, model.vae):
        for name, tensor in part.state_dict().items():
            # Ids of studies made before stay: transformers before 5.6 had text_model., and these
            # names once stood without the VAE's encoder.
            prefix = "text_model." if part is model.text_encoder else "encoder."
            name = name.removeprefix(prefix)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    others = [sorted(model.tokenizer.get_vocab().items()), sorted(model.schedule.items())]
    digest.update(json.dumps([others, model.scheduler, model.sample_size]).encode())
    return digest.hexdigest()[:16]


def pixels_that_fit(model: StableDiffusion, beside: int = 0) -> int:
    """Of pictures to be made at a time: half of the memory that is free, at most MOST pictures."""
    h, w = model.sample_size
    free = free_memory(model.device) // (1 + beside)
    a_row = BYTES * model.unet.conv_in.out_channels * h * w * model.dtype.itemsize // 4
    at_once = min(MOST, free // 2 // (2 * a_row))  # a picture is two rows: prompt and blank
    return max(2, at_once) * h * w * model.vae.f**2


def free_memory(device: torch.device) -> int:
    """In bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    about = Path("/proc/meminfo")
    lines = about.read_text().splitlines() if about.exists() else []
    there = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return there[0] if there else 4 << 30  # other systems: what any machine for this can spare
