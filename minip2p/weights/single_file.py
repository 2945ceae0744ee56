"""A single file in the layout of the model's authors (LDM), seen as a folder.

Its shapes tell what a folder has config files for; its names become the published ones.
"""

from __future__ import annotations

import re
import warnings
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from .ema import takes_average
from .files import Config, Source, Tensors, WeightsError, read_header, renamed, replace_all

LDM_UNET, LDM_EMA = "model.diffusion_model.", "model_ema."
LDM_VAE, LDM_TEXT = "first_stage_model.", "cond_stage_model.transformer."
LDM_TRAINING = ("first_stage_model.loss.", "first_stage_model.model_ema.")  # what it left behind

PARTS = {"UNet": LDM_UNET, "VAE": LDM_VAE, "text encoder": LDM_TEXT}
# Regular expressions of names; the first that matches one decides.
OTHER_MODELS = {  # names in models that are no SD 1.x
    r"^conditioner\.embedders\.|^model\.diffusion_model\.label_emb\.": "Stable Diffusion XL",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.": "a Flux model",
    r"^cond_stage_model\.model\.": "Stable Diffusion 2.x",
}
ADDITIONS = {  # names in what is added to a model
    r"^lora_(unet|te)|[._]lora[._](down|up|A|B)\.|\.(hada_w1_a|lokr_w1)$": "a LoRA",
    r"^control_model\.|controlnet_cond_embedding\.|(^|\.)input_hint_block\.": "a ControlNet",
    r"\.(motion_modules|temporal_transformer)\.": "a motion module (AnimateDiff)",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter",
    r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)(\.|$)": "an optimizer's state",
}

# fmt: off
UNET_NAMES = {  # LDM's → published
    "_model.time_embed.0.": "_model.time_embedding.linear_1.",
    "_model.time_embed.2.": "_model.time_embedding.linear_2.",
    "_model.out.0.": "_model.conv_norm_out.", "_model.out.2.": "_model.conv_out.",
    ".input_blocks.0.0.": ".conv_in.", ".middle_block.0.": ".mid_block.resnets.0.",
    ".middle_block.1.": ".mid_block.attentions.0.", ".middle_block.2.": ".mid_block.resnets.1.",
    ".in_layers.0.": ".norm1.", ".in_layers.2.": ".conv1.", ".emb_layers.1.": ".time_emb_proj.",
    ".out_layers.0.": ".norm2.", ".out_layers.3.": ".conv2.",
    ".skip_connection.": ".conv_shortcut.",
}
VAE_NAMES = {
    ".mid.block_1.": ".mid_block.resnets.0.", ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.": ".mid_block.attentions.0.", ".norm.": ".group_norm.", ".q.": ".to_q.",
    ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0.", ".down.": ".down_blocks.",
    ".block.": ".resnets.", ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
    ".norm_out.": ".conv_norm_out.", ".nin_shortcut.": ".conv_shortcut.",
}
# fmt: on


def unet_name(key: str, n: int) -> str:
    """Return the published name for LDM's, which numbers all blocks in one list.

    n: resnets of a level on the way down.
    """
    key = replace_all(key, UNET_NAMES)
    block = re.search(r"(in|out)put_blocks\.(\d{1,3})\.(\d)\.", key)
    if not block:
        return key
    way = "down" if block[1] == "in" else "up"
    level, j = divmod(int(block[2]) - (way == "down"), n + 1)  # input block 0 is conv_in
    rest = key[block.end() :]
    if rest.startswith("op."):
        return f"{LDM_UNET}down_blocks.{level}.downsamplers.0.conv.{rest[3:]}"
    if rest.startswith("conv."):
        return f"{LDM_UNET}up_blocks.{level}.upsamplers.0.{rest}"
    kind = "attentions" if block[3] == "1" else "resnets"
    return f"{LDM_UNET}{way}_blocks.{level}.{kind}.{j}.{rest}"


def vae_name(key: str, levels: int) -> str:
    """Return the published name for LDM's, which counts the decoder's levels from the finest."""
    key = re.sub(r"\.up\.(\d{1,3})\.", lambda up: f".up_blocks.{levels - 1 - int(up[1])}.", key)
    return replace_all(key, VAE_NAMES)


def check_names(file: Tensors) -> None:
    """Raise WeightsError if the names are not those of SD 1.x. Warn of additions left out."""
    names = "\n".join(file)
    others = [name for name in file if not name.startswith(tuple(PARTS.values()))]
    addition = first_match(ADDITIONS, "\n".join(others))
    lacking = [p for p, prefix in PARTS.items() if not any(n.startswith(prefix) for n in file)]
    kind = first_match(OTHER_MODELS, names)
    if lacking and addition and not kind:
        kind = f"{addition}, not a model"
    if kind:
        raise WeightsError(f"{file.path} is {kind}: load a whole Stable Diffusion 1.x model.")
    if lacking:
        raise WeightsError(
            f"{file.path} has no {' and no '.join(lacking)}: the names of a Stable Diffusion 1.x "
            f"checkpoint begin with {', '.join(PARTS.values())}, and here there is "
            f"{next(iter(file))[:80]!r}; load a whole checkpoint."
        )
    if addition:
        warnings.warn(f"{file.path} has {addition} beside the model: it is left out.", stacklevel=4)


def first_match(table: dict[str, str], names: str) -> str | None:
    """Return the value of the first pattern that matches one of `names`, a name a line."""
    values = (value for key, value in table.items() if re.search(key, names, re.MULTILINE))
    return next(values, None)


def predicts_v(tensors: Tensors, metadata: dict[str, str]) -> bool:
    """Tell whether a finetune predicts v instead of noise, which weights do not show."""
    try:
        sidecar = tensors.path.with_suffix(".yaml").read_text(errors="replace")
    except OSError:
        sidecar = ""
    config_says_v = re.search(r"^\s*parameterization:\s*[\"']?v\b", sidecar, re.MULTILINE)
    metadata_says_v = metadata.get("modelspec.prediction_type", "epsilon").startswith("v")
    return bool(config_says_v) or metadata_says_v or "v_pred" in tensors


def axis(tensors: Tensors, name: str, i: int = 0) -> int | None:
    """Return the length of an axis of a tensor. None if there is no such tensor or axis."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[i] if len(shape) > i else None


def axes(tensors: Tensors, name: str, start: int = 0, step: int = 1) -> list[int | None]:
    """Return the first axes of the tensors numbered start, start + step, … as far as they go."""
    names = takewhile(tensors.__contains__, (name.format(i) for i in count(start, step)))
    return [axis(tensors, name) for name in names]


def unet_config(file: Tensors, width: int) -> dict[str, Any]:
    """Return a UNet's config.json, from the shapes of its tensors.

    width: of the text encoder, for a UNet that has lost its middle block.
    """
    resnet = LDM_UNET + "input_blocks.{}.0.out_layers.3.weight"
    to_k = LDM_UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    proj_in = LDM_UNET + "middle_block.1.proj_in.weight"
    n = len(axes(file, resnet, 1))  # the downsampler that ends the level is no resnet
    return {
        "in_channels": axis(file, LDM_UNET + "input_blocks.0.0.weight", 1),
        "layers_per_block": n,
        "block_out_channels": axes(file, resnet, 1, n + 1),
        "cross_attention_dim": axis(file, to_k, 1) or width,
        "use_linear_projection": proj_in in file and len(file[proj_in].shape) == 2,
        "time_cond_proj_dim": axis(file, LDM_UNET + "time_embed.cond_proj.weight", 1),
    }


def vae_config(file: Tensors) -> dict[str, Any]:
    """Return a VAE's config.json, from the shapes of its tensors."""
    resnet = LDM_VAE + "encoder.down.0.block.{}.conv2.weight"
    return {
        "layers_per_block": len(axes(file, resnet)),
        "block_out_channels": axes(file, LDM_VAE + "encoder.down.{}.block.0.conv2.weight"),
    }


def text_config(clip: Tensors) -> dict[str, Any]:
    """Return a text encoder's config.json, from the shapes of its tensors."""
    width = axis(clip, "embeddings.token_embedding.weight", 1) or 768
    return {
        "vocab_size": axis(clip, "embeddings.token_embedding.weight"),
        "max_position_embeddings": axis(clip, "embeddings.position_embedding.weight"),
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),  # each is 64 wide, as in CLIP
        "num_hidden_layers": len(axes(clip, "encoder.layers.{}.layer_norm1.weight")),
        "intermediate_size": axis(clip, "encoder.layers.0.mlp.fc1.weight"),
    }


def from_single_file(path: Path, ema: bool | None = None) -> Source:
    """Read a checkpoint's header as if it were a folder. ema: as in `load`

    Raises WeightsError if it is no Stable Diffusion 1.x.
    """
    file, metadata = read_header(path)
    check_names(file)
    for name in [name for name in file if name.startswith(LDM_TRAINING)]:
        del file[name]
    clip = renamed(file, lambda name: name.replace(".text_model.", "."), LDM_TEXT)
    text, vae = text_config(clip), vae_config(file)
    unet = unet_config(file, text["hidden_size"])
    scheduler = {"prediction_type": "v_prediction" if predicts_v(file, metadata) else None}
    fields = {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler}
    # What the shapes do not tell is SD 1.x's default, so that a tensor that is not there is missed
    # when the modules are built.
    configs = {
        part: Config(path, {name: value for name, value in config.items() if value})
        for part, config in (fields | {"defaults": {}}).items()
    }
    averages = {
        name: LDM_EMA + name.removeprefix("model.").replace(".", "")
        for name in file
        if name.startswith(LDM_UNET)
    }
    if takes_average(file, averages, "merge" in " ".join(metadata), ema):
        file.update({name: file[average] for name, average in averages.items()})
    n, levels = unet["layers_per_block"], len(vae["block_out_channels"])
    tensors = {
        "unet": renamed(file, lambda name: unet_name(name, n), LDM_UNET),
        "vae": renamed(file, lambda name: vae_name(name, levels), LDM_VAE),
        "text_encoder": clip,
    }
    return Source(configs, tensors, None)
