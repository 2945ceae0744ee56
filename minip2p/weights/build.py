"""From a config to a module without memory, whose parameters the tensors of a file must match."""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..align import LENGTH
from ..text import TextEncoder
from ..unet import UNet
from ..vae import VAE
from .files import Config, Tensors, WeightsError

Module = TypeVar("Module", bound=nn.Module)

# fmt: off
UNET_FIELDS = {  # what minip2p builds, and what SD 1.x means by a field that is absent
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
    "model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "max_position_embeddings": LENGTH,
}
FAMILIES = {  # the models in which a field has this value
    "in_channels = 9": "inpainting models", "in_channels = 8": "instruct-pix2pix models",
    "in_channels = 5": "depth models", "use_linear_projection = True": "Stable Diffusion 2.x",
    "attention_head_dim = [5, 10, 20, 20]": "Stable Diffusion 2.x",
    "cross_attention_dim = 1024": "Stable Diffusion 2.x",
    "hidden_act = gelu": "Stable Diffusion 2.x",
    "addition_embed_type = text_time": "Stable Diffusion XL",
    "cross_attention_dim = 2048": "Stable Diffusion XL",
    "time_cond_proj_dim = 256": "models distilled to few steps (LCM)",
    "mid_block_type = None": "pruned models (BK-SDM)",
    "prediction_type = v_prediction": "v-prediction models",
}
# fmt: on


def unsupported(config: Config, name: str, expected: object) -> WeightsError:
    """Return the error for a field that no Stable Diffusion 1.x has, or that makes no sense."""
    value = f"{name} = {str(config.get(name))[:200]}"
    family = f" as {FAMILIES[value]} have," if value in FAMILIES else ""
    return WeightsError(
        f"{config.path} has {value},{family} where Stable Diffusion 1.x has {expected}: load a 1.x "
        "text-to-image model."
    )


def check_fields(config: Config, fields: dict[str, Any]) -> None:
    """Raise WeightsError unless every field that is there has its value in `fields`."""
    for name, expected in fields.items():
        value = config.get(name, expected)
        levels = value if isinstance(value, list) and value else [value]  # one for each level
        # None, False, 0 and [] mean the same in these fields.
        if any((level or None) != (expected or None) for level in levels):
            raise unsupported(config, name, expected)


def whole_numbers(config: Config, name: str, default: int | list[int], least: int = 1) -> list[int]:
    """Return the field's whole number, or its list of them, as a list."""
    value = default if config.get(name) is None else config[name]
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(n) is int and least <= n <= 2**16 for n in values):
        raise unsupported(config, name, default)
    return values


def whole_number(config: Config, name: str, default: int, least: int = 1) -> int:
    """Return the field's whole number, which may be repeated for every level."""
    values = whole_numbers(config, name, default, least)
    if len(set(values)) > 1:
        raise unsupported(config, name, default)
    return values[0]


def sample_size(config: Config) -> tuple[int, int]:
    """Return height and width of the latents that a UNet was trained on."""
    size = whole_numbers(config, "sample_size", 64)
    if len(size) > 2:
        raise unsupported(config, "sample_size", 64)
    return size[0], size[-1]


def positive_number(config: Config, name: str, default: float, below: float = math.inf) -> float:
    """Return the field's number, more than 0 and less than `below`."""
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value < below:
        raise unsupported(config, name, default)
    return value


def meta_module(
    kind: type[Module], config: Config, tensors: Tensors, layers: int, **sizes: Any
) -> Module:
    """Build a module on the meta device, where it needs no memory.

    layers: how many layers the config asks for; each has at least eight tensors.
    Raises WeightsError unless its parameters are exactly `tensors`.
    """
    if 8 * layers > len(tensors):  # before so many are built
        raise WeightsError(
            f"{config.path} asks for {layers} layers, and {tensors.path} has {len(tensors)} tensors"
            " for them: load a whole, unchanged model."
        )
    try:
        with torch.device("meta"):
            module = kind(**sizes)
    except ValueError as error:  # the groups do not divide a width
        raise WeightsError(f"{config.path} has sizes that don't go together: {error}.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    lacking = [name for name in shapes if name not in tensors]
    unknown = [stored.key for name, stored in tensors.items() if name not in shapes]
    instead = f", and has {unknown[0]}" if lacking and unknown else ""
    for names, verb in (lacking, "lacks"), (unknown, "has, beyond those of Stable Diffusion 1.x,"):
        if names:
            raise WeightsError(
                f"{tensors.path} {verb} {len(names)} tensor(s), such as {', '.join(names[:3])}"
                f"{instead}: load a whole, unchanged model."
            )
    for name, stored in tensors.items():
        # A 1x1 convolution is a linear layer: VAEs have one or the other.
        if stored.shape not in (shapes[name], (*shapes[name], 1, 1)):
            raise WeightsError(
                f"{tensors.path} has {stored.key} of shape {stored.shape} where its sizes ask for "
                f"{shapes[name]}: load an unchanged model."
            )
    return module


def meta_modules(
    configs: dict[str, Config], tensors: dict[str, Tensors]
) -> tuple[TextEncoder, UNet, VAE]:
    """Build the parts of a model on the meta device. Raises WeightsError if it is not SD 1.x."""
    return (
        meta_text_encoder(configs["text_encoder"], tensors["text_encoder"], configs["unet"]),
        meta_unet(configs["unet"], tensors["unet"]),
        meta_vae(configs["vae"], tensors["vae"]),
    )


def meta_unet(config: Config, tensors: Tensors) -> UNet:
    """Build the UNet on the meta device. Raises WeightsError if it is not that of SD 1.x."""
    # upcast_attention has no place in UNET_FIELDS: the softmax is in float32 in any case.
    check_fields(config, UNET_FIELDS)
    sizes = common_sizes(config, [320, 640, 1280, 1280])
    # SD 1.x calls the number of heads attention_head_dim.
    field = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    heads, width = whole_number(config, field, 8), whole_number(config, "cross_attention_dim", 768)
    if any(channels % heads for channels in sizes["block_out_channels"]):
        raise unsupported(config, field, 8)
    layers = sizes["layers_per_block"] * len(sizes["block_out_channels"])
    return meta_module(
        UNet, config, tensors, layers, cross_attention_dim=width, heads=heads, **sizes
    )


def meta_vae(config: Config, tensors: Tensors) -> VAE:
    """Build the VAE on the meta device. Raises WeightsError if it is not that of SD 1.x."""
    check_fields(config, VAE_FIELDS)
    sizes = common_sizes(config, [128, 256, 512, 512])
    scale = positive_number(config, "scaling_factor", 0.18215)
    layers = sizes["layers_per_block"] * len(sizes["block_out_channels"])
    return meta_module(VAE, config, tensors, layers, scaling_factor=scale, **sizes)


def common_sizes(config: Config, widths: list[int]) -> dict[str, Any]:
    """Return the sizes that UNet and VAE have in common. widths: of the levels in SD 1.x"""
    return {
        "block_out_channels": whole_numbers(config, "block_out_channels", widths),
        "layers_per_block": whole_number(config, "layers_per_block", 2),
        "norm_num_groups": whole_number(config, "norm_num_groups", 32),
    }


def meta_text_encoder(config: Config, tensors: Tensors, unet: Config) -> TextEncoder:
    """Build CLIP's text encoder on the meta device.

    The config may have fewer layers than the file ("clip skip"): the last ones are removed from
    `tensors`. Raises WeightsError if it is not that of SD 1.x, or not the one that `unet` was
    trained with.
    """
    check_fields(config, TEXT_FIELDS)
    width = whole_number(config, "hidden_size", 768)
    if width != whole_number(unet, "cross_attention_dim", 768):
        raise unsupported(unet, "cross_attention_dim", f"its text encoder's width, {width}")
    heads = whole_number(config, "num_attention_heads", 12)
    if width % heads:
        raise unsupported(config, "num_attention_heads", 12)
    layers = whole_number(config, "num_hidden_layers", 12, least=0)
    for name in list(tensors):
        layer = re.match(r"encoder\.layers\.(\d{1,6})\.", name)
        if layer and int(layer[1]) >= layers:
            del tensors[name]
    return meta_module(
        TextEncoder, config, tensors, layers,
        vocab_size=whole_number(config, "vocab_size", 49408),
        hidden_size=width,
        intermediate_size=whole_number(config, "intermediate_size", 3072),
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )  # fmt: skip


def load_into(module: Module, state: dict[str, Tensor]) -> Module:
    """Make these very tensors the parameters of a module on the meta device."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = {name: tensor.reshape(shapes[name]) for name, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
