"""A folder in diffusers' layout: unet/ vae/ text_encoder/ tokenizer/ scheduler/"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from .files import Source, WeightsError, read_config, read_header, renamed, replace_all, unreadable

STEMS = {  # of the files with each part's weights
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
NO_WEIGHTS = {  # file names in a folder without one of STEMS
    r"^{part}/.*\.safetensors\.index\.": "its weights are in shards: save them as one file",
    r"^{part}/.*\.(bin|ckpt|pt|pth)$": "its weights are pickles, which can run code when opened: "
    "take a version of the model with .safetensors files",
    r"^[^/]*\.safetensors$": "pass one of the single files in it, or a whole diffusers folder",
    r"": "a diffusers folder has unet/, vae/, text_encoder/ and tokenizer/",
}
OLD_VAE_NAMES = {  # diffusers' up to 0.14, still in SD 1.5's own file → published
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def names_in(folder: Path) -> set[str]:
    """The files of a model's folder, as the hub lists those of a repository."""
    try:
        folders = [part for part in (*STEMS, "tokenizer") if (folder / part).is_dir()]
        inside = {f"{part}/{name}" for part in folders for name in os.listdir(folder / part)}
        return inside.union(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def weights_files(names: Collection[str], half: bool, where: object) -> dict[str, str]:
    """Which file holds each part: the fp16 one for half precision, or where there is no other."""
    files = {}
    for part, stem in STEMS.items():
        variants = [f"{stem}.safetensors", f"{stem}.fp16.safetensors"]
        there = [name for name in sorted(variants, reverse=not half) if name in names]
        if not there:
            raise WeightsError(f"{where} has no {variants[0]}: {why_none(part, names)}.")
        if f"{part}/config.json" not in names:
            raise WeightsError(f"{where} has no {part}/config.json: take the model's whole folder.")
        files[part] = there[0]
    return files


def why_none(part: str, names: Collection[str]) -> str:
    """What a folder has in place of a part's weights."""
    listing = "\n".join(names)
    patterns = {pattern.replace("{part}", part): why for pattern, why in NO_WEIGHTS.items()}
    return next(why for p, why in patterns.items() if re.search(p, listing, re.MULTILINE))


def from_folder(folder: Path, half: bool) -> Source:
    index = read_config(folder / "model_index.json", optional=True)
    if index.get("text_encoder_2") not in (None, [None, None]):
        raise WeightsError(f"{folder} is Stable Diffusion XL or 3: load Stable Diffusion 1.x.")
    files = weights_files(names_in(folder), half, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs = {
        **{part: read_config(folder / part / "config.json") for part in STEMS},
        "scheduler": read_config(scheduler, optional=True),
        "defaults": read_config(folder / "minip2p.json", optional=True),
    }
    headers = {part: read_header(folder / file)[0] for part, file in files.items()}
    tensors = {
        "unet": renamed(headers["unet"], str),
        "vae": renamed(headers["vae"], lambda key: replace_all(key, OLD_VAE_NAMES)),
        "text_encoder": renamed(headers["text_encoder"], lambda k: k.removeprefix("text_model.")),
    }
    return Source(configs, tensors, folder / "tokenizer")
