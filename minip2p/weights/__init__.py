"""Load a Stable Diffusion 1.x, or raise an error of one sentence that says why there is none.

    load()                       the bundled model
    load("some/folder")          diffusers' layout: unet/ vae/ text_encoder/ tokenizer/ scheduler/
    load("model.safetensors")    one file in the layout of the model's authors (LDM)
    load("owner/name")           a repository of the Hugging Face hub

Loading has three steps, whatever the source. The configs and file headers list the tensors, and any
model that is not SD 1.x is rejected with an error that names what differs. Modules without memory
(on the meta device) are compared with that list, name by name and shape by shape. Then every
parameter becomes a view of its mapped file: weights are copied only to change their dtype or
device, one at a time. Pickles are never opened, because opening one can run code.
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
DTYPES = ("float32", "float16", "bfloat16", "float64")


def resolve(source: str, half: bool, ema: bool | None) -> Path:
    """Return the folder or file that a source means; one of the hub is downloaded."""
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


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return the device, by default the fastest that is there. Raises WeightsError if it fails."""
    if device is None:
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else mps)
    try:
        trial = torch.ones(1, dtype=torch.float32, device=device)
        trial.cpu()  # "meta" has nothing to copy
        return trial.device
    except Exception as error:  # of many types: a device of another maker is a missing module
        reason = str(error).split("\n")[0][:200]
        raise WeightsError(f"The device {device} can't be used ({reason}): try cpu.") from error


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype of that name, by default float32. Raises WeightsError for any other."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WeightsError(f"The dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    return getattr(torch, name)


def load(
    source: str | Path = "emoji",
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    ema: bool | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x for inference.

    source: "emoji" (the bundled model), a folder, a .safetensors file, or a hub id "owner/name".
    tokenizer: a folder with vocab.json and merges.txt. A single file needs one: by default CLIP's,
        from the local hub cache or else from the hub.
    device: by default CUDA, else MPS, else the CPU.
    dtype: of UNet and text encoder, as a torch.dtype or its name, by default float32. The VAE is
        always in float32: decoding can overflow in half precision.
    ema: which UNet of a single file that has two: True the average over training (EMA), False the
        model's own. None chooses, and warns if they differ.
    On the CPU the weights stay in their files: do not change those while the model is in use.
    Raises WeightsError, before the weights are read, if there is no model that minip2p can run.
    """
    device, dtype = pick_device(device), pick_dtype(dtype)
    half = dtype.itemsize < 4
    path = resolve(str(source), half, ema)
    if path.is_file():
        configs, tensors, folder = from_single_file(path, ema)
    else:
        configs, tensors, folder = from_folder(path, half)

    noise_levels = schedule.noise_levels(configs["scheduler"])
    sample_size = build.sample_size(configs["unet"])
    text_encoder, unet, vae = build.meta_modules(configs, tensors)

    folder = Path(os.path.expanduser(tokenizer)) if tokenizer else folder or clip_tokenizer()
    clip_bpe = clip.load_tokenizer(folder)
    clip.check_vocabulary(clip_bpe, folder, configs["text_encoder"])
    defaults = dict(configs["defaults"])
    return StableDiffusion(
        tokenizer=clip_bpe,
        text_encoder=build.load_into(text_encoder, read(tensors["text_encoder"], dtype, device)),
        unet=build.load_into(unet, read(tensors["unet"], dtype, device)),
        vae=build.load_into(vae, read(tensors["vae"], torch.float32, device)),
        scheduler=schedule.sampler(configs["scheduler"]),
        schedule=noise_levels,
        sample_size=sample_size,
        vocabulary=tuple(defaults.pop("words", ())),
        defaults=defaults,
    )
