"""A folder in diffusers' layout: unet/ vae/ text_encoder/ tokenizer/ scheduler/"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from .. import align, scheduler
from ..errors import UserError, is_number, is_whole
from .files import (
    Config,
    Source,
    WeightsError,
    errors_of,
    read_config,
    read_header,
    renamed,
    replace_all,
)

STEMS = {  # of the files with each part's weights
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
OLD_VAE_NAMES = {  # diffusers' up to 0.14, still in SD 1.5's own file → published
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def from_folder(folder: Path, half: bool) -> Source:
    """Read the configs and the headers of a folder. half: prefer its files in float16

    Raises WeightsError if it is no Stable Diffusion 1.x.
    """
    index = read_config(folder / "model_index.json", optional=True)
    if index.get("text_encoder_2") not in (None, [None, None]):
        raise WeightsError(f"{folder} is Stable Diffusion XL or 3: load Stable Diffusion 1.x.")
    files = weights_files(names_in(folder), half, folder)
    configs = {part: read_config(folder / part / "config.json") for part in STEMS}
    path = folder / "scheduler" / "scheduler_config.json"
    configs["scheduler"] = read_config(path, optional=True)
    configs["defaults"] = read_config(folder / "minip2p.json", optional=True)
    check_defaults(configs["defaults"])
    headers = {part: read_header(folder / file)[0] for part, file in files.items()}
    tensors = {
        "unet": renamed(headers["unet"], str),
        "vae": renamed(headers["vae"], lambda name: replace_all(name, OLD_VAE_NAMES)),
        "text_encoder": renamed(headers["text_encoder"], lambda n: n.removeprefix("text_model.")),
    }
    return Source(configs, tensors, folder / "tokenizer")


def names_in(folder: Path) -> set[str]:
    """List the files of a model's folder, as the hub lists those of a repository."""
    with errors_of(folder):
        folders = [part for part in (*STEMS, "tokenizer") if (folder / part).is_dir()]
        names = {f"{part}/{name}" for part in folders for name in os.listdir(folder / part)}
        return names.union(os.listdir(folder))


def weights_files(names: Collection[str], half: bool, source: object) -> dict[str, str]:
    """Choose the file of each part: the fp16 one for half precision, or if there is no other.

    Raises WeightsError if `names`, the files of `source`, lack the weights or config of a part.
    """
    files = {}
    for part, stem in STEMS.items():
        variants = [f"{stem}.safetensors", f"{stem}.fp16.safetensors"]
        present = [name for name in sorted(variants, reverse=not half) if name in names]
        if not present:
            raise WeightsError(f"{source} has no {variants[0]}: {missing_weights(part, names)}.")
        if f"{part}/config.json" not in names:
            raise WeightsError(
                f"{source} has no {part}/config.json: take the model's whole folder."
            )
        files[part] = present[0]
    return files


def missing_weights(part: str, names: Collection[str]) -> str:
    """Return what to do about a part without weights, from what is there in their place."""
    in_part = [name for name in names if name.startswith(f"{part}/")]
    if any(".safetensors.index." in name for name in in_part):
        return "its weights are in shards: save them as one file"
    if any(name.endswith((".bin", ".ckpt", ".pt", ".pth")) for name in in_part):
        pickles = "its weights are pickles, which can run code when opened"
        return f"{pickles}: take a version of the model with .safetensors files"
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return "pass one of the single files in it, or a whole diffusers folder"
    return "a diffusers folder has unet/, vae/, text_encoder/ and tokenizer/"


def is_window(value: object) -> bool:
    try:
        align.window(value)  # type: ignore[arg-type]
    except UserError:
        return False
    return True


DEFAULTS: dict[str, Callable[[Any], bool]] = {  # fields of minip2p.json, and what they may be
    "num_inference_steps": lambda value: is_whole(value) and value > 0,
    "guidance_scale": is_number,
    "scheduler": lambda value: isinstance(value, str) and value in scheduler.SCHEDULERS,
    "cross_replace_steps": is_window,
    "self_replace_steps": is_window,
    "words": lambda value: isinstance(value, list) and all(isinstance(w, str) for w in value),
}


def check_defaults(config: Config) -> None:
    """Raise WeightsError for a field of minip2p.json that `generate` cannot use."""
    for name, value in config.items():
        if name not in DEFAULTS or not DEFAULTS[name](value):
            raise WeightsError(
                f"{config.path} has {name} = {str(value)[:200]}, which generate() can't use: "
                "correct it or remove it."
            )
