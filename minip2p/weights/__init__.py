"""A Stable Diffusion 1.x from wherever it lies, or one sentence that says why it can't be had.

    load()                       the bundled model
    load("some/folder")          diffusers' layout: unet/ vae/ text_encoder/ tokenizer/ scheduler/
    load("model.safetensors")    one file in the layout of the model's authors (LDM)
    load("owner/name")           a repository of the Hugging Face hub

Three steps, whatever the source. Configs and file headers alone tell which tensors there are, and
what is no SD 1.x is refused for them. Modules without memory (on the meta device) are compared with
that, name by name and shape by shape. Then every parameter becomes a view of its mapped file:
weights are copied only to change their dtype or device, one at a time. Pickles are never opened,
because opening one can run code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from . import build, clip, schedule
from .files import WeightsError as WeightsError
from .files import read
from .folder import from_folder
from .hub import clip_tokenizer, from_hub
from .model import StableDiffusion as StableDiffusion
from .single_file import from_single_file

EMOJI = Path(__file__).parents[1] / "models" / "emoji"


def find(source: str, half: bool, ema: bool | None) -> Path:
    """The folder or file that a source means."""
    path = EMOJI if source == "emoji" else Path(os.path.expanduser(source))
    exists = source and os.path.exists(path)
    is_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not source.endswith(".safetensors")
    if not exists and not is_hub:
        raise WeightsError(
            f"There is no {source[:300]!r}: name a folder, a .safetensors file, a hub id such as "
            "owner/name, or emoji."
        )
    if ema is not None and not (exists and path.is_file()):
        raise WeightsError(
            f"{source} is no single file: ema=True and ema=False (--ema, --no-ema) choose between "
            "the two UNets that one may have."
        )
    return path if exists else from_hub(source, half)


def usable(device: str | torch.device | None) -> torch.device:
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else mps)
    try:
        tried = torch.ones(1, device=device)
        tried.cpu()  # "meta" has nothing to copy
        return tried.device
    except Exception as error:  # of many kinds: a device of another maker is a missing module
        reason = str(error).split("\n")[0][:200]
        raise WeightsError(f"The device {device} can't be used ({reason}): try cpu.") from error


def load(
    source: str | Path = "emoji",
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ema: bool | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x for inference.

    source: "emoji" (the bundled model), a folder, a .safetensors file, or a hub id "owner/name".
    tokenizer: a folder with vocab.json and merges.txt. A single file needs one: by default CLIP's,
        from the local hub cache or else from the hub.
    device: by default CUDA, else MPS, else the CPU.
    dtype: of UNet and text encoder, by default float32. The VAE is always in float32: decoding can
        overflow in half precision.
    ema: which UNet of a single file that has two: True the average over training (EMA), False the
        model's own. None finds out which one is meant, and warns if they differ.
    On the CPU the weights stay in their files: do not change those while the model is in use.
    Raises WeightsError, before the weights are read, if there is no model that minip2p can run.
    """
    device, dtype = usable(device), dtype or torch.float32
    half = dtype.itemsize < 4
    path = find(str(source), half, ema)
    if path.is_file():
        configs, tensors, folder = from_single_file(path, ema)
    else:
        configs, tensors, folder = from_folder(path, half)

    noise_levels = schedule.noise_levels(configs["scheduler"])
    latents = build.wholes(configs["unet"], "sample_size", 64)
    build.check_text_encoder(configs["text_encoder"], configs["unet"])
    unet = build.blank_unet(configs["unet"], tensors["unet"])
    vae = build.blank_vae(configs["vae"], tensors["vae"])

    folder = Path(tokenizer) if tokenizer else folder or clip_tokenizer()
    words = clip.load_tokenizer(folder)
    clip.check_vocabulary(words, folder, configs["text_encoder"])
    text_weights = read(tensors["text_encoder"], dtype, device)
    text_encoder = clip.load_text_encoder(configs["text_encoder"], text_weights)
    defaults = dict(configs["defaults"])
    return StableDiffusion(
        vocabulary=tuple(defaults.pop("words", ())),
        tokenizer=words,
        text_encoder=text_encoder.to(device),
        unet=build.fill(unet, read(tensors["unet"], dtype, device)),
        vae=build.fill(vae, read(tensors["vae"], torch.float32, device)),
        scheduler=schedule.sampler(configs["scheduler"]),
        schedule=noise_levels,
        sample_size=(latents[0], latents[-1]),
        defaults=defaults,
    )
