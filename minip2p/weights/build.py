"""From a config to a module without memory, which the tensors of a file must match one by one."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..unet import UNet
from ..vae import VAE
from .files import Config, Tensors, WeightsError

Module = TypeVar("Module", bound=nn.Module)

# fmt: off
UNET_FIELDS = {  # what minip2p builds, and SD 1.x means where the field is absent
    "in_channels": 4, "out_channels": 4, "act_fn": "silu", "norm_eps": 1e-5,
    "use_linear_projection": False, "addition_embed_type": None, "time_cond_proj_dim": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "center_input_sample": False,
    "only_cross_attention": False, "mid_block_only_cross_attention": False,
    "dual_cross_attention": False,
    "class_embed_type": None, "encoder_hid_dim": None, "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default", "attention_type": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "timestep_post_act": None,
    "time_embedding_type": "positional", "time_embedding_act_fn": None,
}
VAE_FIELDS = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "act_fn": "silu",
    "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
    "shift_factor": None, "latents_mean": None, "latents_std": None,
}
TEXT_FIELDS = {
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
}
WHO = {  # has something else there
    "in_channels": "inpainting (9), instruct-pix2pix (8) and depth (5) models",
    "use_linear_projection": "Stable Diffusion 2.x", "attention_head_dim": "Stable Diffusion 2.x",
    "hidden_act": "Stable Diffusion 2.x", "addition_embed_type": "Stable Diffusion XL",
    "time_cond_proj_dim": "models distilled to few steps (LCM)",
    "mid_block_type": "pruned models (BK-SDM)", "prediction_type": "v-prediction models",
    "_class_name": "models of another noise (flow matching, EDM, consistency)",
    "use_flow_sigmas": "flow-matching models", "thresholding": "models of pixels, not of latents",
}
# fmt: on


def other(config: Config, name: str, expected: object) -> WeightsError:
    return WeightsError(
        f"{config.path} has {name} = {str(config.get(name))[:200]}, as {WHO.get(name, 'others')} "
        f"have, where Stable Diffusion 1.x has {expected}: load a 1.x text-to-image model."
    )


def check_fields(config: Config, fields: dict[str, Any]) -> None:
    for name, expected in fields.items():
        value = config.get(name, expected)
        for one in value if isinstance(value, list) else [value]:  # it may be given for each level
            # None, False and 0 mean the same in these fields.
            if (one or None) != (expected or None):
                raise other(config, name, expected)


def wholes(config: Config, name: str, default: int | list[int]) -> list[int]:
    """One or more positive whole numbers."""
    value = default if config.get(name) is None else config[name]
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(n) is int and 0 < n <= 2**16 for n in values):
        raise other(config, name, default)
    return values


def whole(config: Config, name: str, default: int) -> int:
    """One positive whole number. It may be repeated for every level."""
    values = wholes(config, name, default)
    if len(set(values)) > 1:
        raise other(config, name, default)
    return values[0]


def number(config: Config, name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise other(config, name, default)
    return value


def blank(kind: type[Module], config: Config, tensors: Tensors, **more: Any) -> Module:
    """A module on the meta device: it needs no memory. Its weights must be exactly `tensors`."""
    layers, groups = whole(config, "layers_per_block", 2), whole(config, "norm_num_groups", 32)
    try:
        with torch.device("meta"):
            module = kind(layers_per_block=layers, norm_num_groups=groups, **more)
    except ValueError as error:  # the groups do not divide a width
        raise WeightsError(f"{config.path} has sizes that don't go together: {error}.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    lacking = [name for name in shapes if name not in tensors]
    unknown = [stored.key for name, stored in tensors.items() if name not in shapes]
    for names, verb in (lacking, "lacks"), (unknown, "has, beyond those of Stable Diffusion 1.x,"):
        if names:
            some = ", ".join(names[:3])
            raise WeightsError(
                f"{tensors.path} {verb} {len(names)} tensor(s), such as {some}: load a whole, "
                "unchanged model."
            )
    for name, stored in tensors.items():
        # A 1x1 convolution is a linear layer: VAEs have one or the other.
        if stored.shape not in (shapes[name], (*shapes[name], 1, 1)):
            raise WeightsError(
                f"{tensors.path} has {stored.key} of shape {stored.shape} where its sizes ask for "
                f"{shapes[name]}: load an unchanged model."
            )
    return module


def blank_unet(config: Config, tensors: Tensors) -> UNet:
    """upcast_attention has no place in UNET_FIELDS: the softmax is in float32 in any case."""
    check_fields(config, UNET_FIELDS)
    widths = wholes(config, "block_out_channels", [320, 640, 1280, 1280])
    # SD 1.x calls the number of heads attention_head_dim.
    field = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    heads, words = whole(config, field, 8), whole(config, "cross_attention_dim", 768)
    if any(width % heads for width in widths):
        raise other(config, field, 8)
    return blank(
        UNet, config, tensors, block_out_channels=widths, cross_attention_dim=words, heads=heads
    )


def blank_vae(config: Config, tensors: Tensors) -> VAE:
    check_fields(config, VAE_FIELDS)
    widths = wholes(config, "block_out_channels", [128, 256, 512, 512])
    scale = number(config, "scaling_factor", 0.18215)
    return blank(VAE, config, tensors, block_out_channels=widths, scaling_factor=scale)


def check_text_encoder(config: Config, unet: Config) -> None:
    """Raises WeightsError if it is not CLIP ViT-L/14, or not the one that the UNet listens to."""
    check_fields(config, TEXT_FIELDS)
    width = whole(config, "hidden_size", 768)
    if width != whole(unet, "cross_attention_dim", 768):
        raise other(unet, "cross_attention_dim", f"its text encoder's width, {width}")


def fill(module: Module, state: dict[str, Tensor]) -> Module:
    """Make these very tensors the parameters of a blank module."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = {name: tensor.reshape(shapes[name]) for name, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
