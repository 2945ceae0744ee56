"""A single file in the layout of the model's authors (LDM), seen as a folder.

Its shapes tell what a folder has config files for; its names become the published ones.
"""

from __future__ import annotations

import re
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from .files import Config, Source, Tensors, WeightsError, read_header, renamed, replace_all

# Where a single file keeps its parts. The EMA UNet, an average over training, is what folders hold.
LDM_UNET, LDM_EMA = "model.diffusion_model.", "model_ema."
LDM_VAE, LDM_TEXT = "first_stage_model.", "cond_stage_model.transformer."
LDM_TRAINING = ("first_stage_model.loss.", "first_stage_model.model_ema.")  # what it left behind

FOREIGN = {  # names in what is no SD 1.x
    r"^lora_(unet|te)|[._]lora[._](down|up|A|B)\.|\.(hada_w1_a|lokr_w1)$": "a LoRA, not a model",
    r"^control_model\.|controlnet_cond_embedding\.|(^|\.)input_hint_block\.": "a "
    "ControlNet, not a model",
    r"^conditioner\.embedders\.|^model\.diffusion_model\.label_emb\.": "Stable Diffusion XL",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.": "a Flux model",
    r"^cond_stage_model\.model\.": "Stable Diffusion 2.x",
}
LONE = {  # names in what has no UNet where a single file has it
    r"^down_blocks\.": "the UNet of a diffusers folder, without the rest",
    r"^(encoder|decoder)\.conv_in\.|^first_stage_model\.": "a VAE, without the rest",
    r"embeddings\.token_embedding\.": "a text encoder, without the rest",
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
    """The published name for LDM's, which numbers the blocks of n resnets a level in one list."""
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
    """The published name for LDM's, which counts the decoder's levels from the finest."""
    key = re.sub(r"\.up\.(\d{1,3})\.", lambda up: f".up_blocks.{levels - 1 - int(up[1])}.", key)
    return replace_all(key, VAE_NAMES)


def recognise(tensors: Tensors) -> None:
    """Raises WeightsError if the names are not those of SD 1.x, and says whose they are."""
    path, names = tensors.path, "\n".join(tensors)
    has_unet = any(name.startswith(LDM_UNET) for name in tensors)
    for pattern, what in {**FOREIGN, **({} if has_unet else LONE)}.items():
        if re.search(pattern, names, re.MULTILINE):
            raise WeightsError(f"{path} is {what}: load a whole Stable Diffusion 1.x model.")
    if not has_unet and len(tensors) <= 3:
        raise WeightsError(f"{path} is a textual inversion, not a model: load a model.")
    for prefix, part in (LDM_UNET, "UNet"), (LDM_VAE, "VAE"), (LDM_TEXT, "text encoder"):
        if not any(name.startswith(prefix) for name in tensors):
            raise WeightsError(
                f"{path} has no {part} ({prefix}…): load a whole Stable Diffusion 1.x checkpoint."
            )


def predicts_v(tensors: Tensors, metadata: dict[str, str]) -> bool:
    """Whether a finetune predicts v instead of noise, which weights do not show."""
    try:
        sidecar = tensors.path.with_suffix(".yaml").read_text(errors="replace")
    except OSError:
        sidecar = ""
    said = metadata.get("modelspec.prediction_type", "epsilon")
    found = re.search(r"^\s*parameterization:\s*[\"']?v\b", sidecar, re.MULTILINE)
    return bool(found) or said.startswith("v") or "v_pred" in tensors


def axis(tensors: Tensors, name: str, i: int = 0) -> int | None:
    shape = tensors[name].shape if name in tensors else ()
    return shape[i] if len(shape) > i else None


def axes(tensors: Tensors, name: str, start: int = 0, step: int = 1) -> list[int | None]:
    """First axes of the tensors numbered start, start + step, … as far as they go."""
    names = takewhile(tensors.__contains__, (name.format(i) for i in count(start, step)))
    return [axis(tensors, name) for name in names]


def unet_config(file: Tensors) -> dict[str, Any]:
    resnet = LDM_UNET + "input_blocks.{}.0.out_layers.3.weight"
    to_k = LDM_UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    proj_in = LDM_UNET + "middle_block.1.proj_in.weight"
    n = len(axes(file, resnet, 1))  # the downsampler that ends the level is no resnet
    return {
        "in_channels": axis(file, LDM_UNET + "input_blocks.0.0.weight", 1),
        "layers_per_block": n,
        "block_out_channels": axes(file, resnet, 1, n + 1),
        "cross_attention_dim": axis(file, to_k, 1),
        "use_linear_projection": proj_in in file and len(file[proj_in].shape) == 2,
        "time_cond_proj_dim": axis(file, LDM_UNET + "time_embed.cond_proj.weight", 1),
    }


def vae_config(file: Tensors) -> dict[str, Any]:
    resnet = LDM_VAE + "encoder.down.0.block.{}.conv2.weight"
    return {
        "layers_per_block": len(axes(file, resnet)),
        "block_out_channels": axes(file, LDM_VAE + "encoder.down.{}.block.0.conv2.weight"),
    }


def text_config(clip: Tensors) -> dict[str, Any]:
    width = axis(clip, "embeddings.token_embedding.weight", 1) or 768
    return {
        "vocab_size": axis(clip, "embeddings.token_embedding.weight"),
        "max_position_embeddings": axis(clip, "embeddings.position_embedding.weight"),
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),  # each is 64 wide, as in CLIP
        "num_hidden_layers": len(axes(clip, "encoder.layers.{}.layer_norm1.weight")),
        "intermediate_size": axis(clip, "encoder.layers.0.mlp.fc1.weight"),
    }


def from_single_file(path: Path) -> Source:
    file, metadata = read_header(path)
    recognise(file)
    for key in [key for key in file if key.startswith(LDM_TRAINING)]:
        del file[key]
    clip = renamed(file, lambda key: key.replace(".text_model.", "."), LDM_TEXT)
    fields = {
        "unet": unet_config(file),
        "vae": vae_config(file),
        "text_encoder": text_config(clip),
        "scheduler": {"prediction_type": "v_prediction" if predicts_v(file, metadata) else None},
        "defaults": {},
    }
    # Without middle block it has no such tensor: that is what must be said of it then.
    fields["unet"]["cross_attention_dim"] = (
        fields["unet"]["cross_attention_dim"] or fields["text_encoder"]["hidden_size"]
    )
    # What the shapes do not tell is SD 1.x's default, so that a tensor that is not there is missed
    # when the modules are built.
    configs = {
        part: Config(path, {name: value for name, value in those.items() if value})
        for part, those in fields.items()
    }
    ema = {k: LDM_EMA + k[6:].replace(".", "") for k in file if k.startswith(LDM_UNET)}
    if all(name in file for name in ema.values()):
        file.update({key: file[name] for key, name in ema.items()})
    n, levels = fields["unet"]["layers_per_block"], len(fields["vae"]["block_out_channels"])
    tensors = {
        "unet": renamed(file, lambda key: unet_name(key, n), LDM_UNET),
        "vae": renamed(file, lambda key: vae_name(key, levels), LDM_VAE),
        "text_encoder": clip,
    }
    return Source(configs, tensors, None)
