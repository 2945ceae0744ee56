"""The sizes of a model of the world, and the folder that it is saved in."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from minip2p.unet import UNet
from minip2p.vae import VAE

from . import scenes as world

LATENT = 16  # height and width of every latent
HEADS = 4


@dataclass(frozen=True)
class Preset:
    """How large and how long."""

    world: world.World
    pixels: int
    scenes: int  # drawn for training
    vae_channels: tuple[int, ...]
    vae_groups: int
    vae_samples: int
    vae_batch: int
    channels: tuple[int, ...]
    samples: int  # of the UNet and the text encoder
    batch: int
    width: int = 128  # of a token
    text_layers: int = 2
    vae_rate: float = 1e-3
    rate: float = 2e-3
    supervise: float = 0.2  # weight of the loss on word maps; 0 leaves them to themselves
    supervise_until: float = 0.33  # share of the samples after which they are left to themselves
    crop: int = 64  # pixels on each side of what the VAE sees most of the time


PRESETS = {
    "small": Preset(world.SMALL, 128, 60_000, (16, 32, 64, 128), 8, 64_000, 16,
                    (64, 96, 128, 96), 400_000, 64),
    "gpu": Preset(world.SMALL, 128, 200_000, (16, 32, 64, 128), 8, 64_000, 16,
                  (64, 96, 128, 96), 640_000, 128),
}  # fmt: skip


def text_config(preset: Preset, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": preset.width,
        "intermediate_size": 4 * preset.width,
        "num_hidden_layers": preset.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": preset.width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,  # for a DDIM made of this: diffusers' own default is True
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.31.0",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
RECOMMENDED = {
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "scheduler": "ddim",
    "cross_replace_steps": 0.8,  # the windows are chosen by EmojiBench
    "self_replace_steps": 0.6,
}


def configs(preset: Preset, vocabulary: int, scaling_factor: float) -> dict[str, dict[str, Any]]:
    """Return the config.json of each part."""
    levels = len(preset.vae_channels)
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": LATENT,
            "block_out_channels": preset.channels,
            "layers_per_block": 2,
            "cross_attention_dim": preset.width,
            "attention_head_dim": HEADS,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "sample_size": preset.pixels,
            "block_out_channels": preset.vae_channels,
            "layers_per_block": 2,
            "norm_num_groups": preset.vae_groups,
            "scaling_factor": scaling_factor,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "dtype": "float32",  # else transformers computes in the file's half precision
            **text_config(preset, vocabulary),
        },
    }


def save_model(
    preset: Preset, vae: VAE, unet: UNet, text_encoder: nn.Module, tokenizer: Path, out: Path
) -> None:
    """Write a folder in diffusers' layout, float16, for diffusers and minip2p.load() alike."""
    vocabulary = len(json.loads((tokenizer / "vocab.json").read_text()))
    text_state = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in text_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": text_state}
    for part, config in configs(preset, vocabulary, vae.scaling_factor).items():
        write_json(out / part / "config.json", config)
        half = {name: tensor.half().contiguous().cpu() for name, tensor in states[part].items()}
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        temporary = out / part / f"{stem}.tmp"
        save_file(half, temporary, metadata={"format": "pt"})
        temporary.replace(out / part / f"{stem}.safetensors")
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", INDEX)
    write_json(out / "minip2p.json", {**RECOMMENDED, "words": preset.world.words})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
