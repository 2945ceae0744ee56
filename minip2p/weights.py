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

import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import text
from .unet import UNet
from .vae import VAE

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

EMOJI = Path(__file__).parent / "models" / "emoji"
CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer SD 1.x uses
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

STEMS = {  # of the files with each part's weights
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
VOCABULARY = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
SMALL_FILES = (  # all that is asked of a repository beside its weights
    *("model_index.json", "minip2p.json", "scheduler/scheduler_config.json"),
    *(f"{part}/config.json" for part in STEMS),
    *(f"tokenizer/{name}" for name in (*VOCABULARY, "tokenizer.json")),
)

# Where a single file keeps its parts. The EMA UNet, an average over training, is what folders hold.
LDM_UNET, LDM_EMA = "model.diffusion_model.", "model_ema."
LDM_VAE, LDM_TEXT = "first_stage_model.", "cond_stage_model.transformer."
LDM_TRAINING = ("first_stage_model.loss.", "first_stage_model.model_ema.")  # what it left behind

MAX_HEADER = 100_000_000  # bytes: the format's own limit
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
INTEGERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
BYTES = {**FLOATS, **INTEGERS, "BOOL": 1}  # of one number

MAGIC = {  # first bytes of what is no safetensors file
    rb"PK\x03\x04|\x80[\x02-\x05]": "a pickle (.ckpt, .pt or .bin), which can run code when it is "
    "opened: take the model's .safetensors file",
    rb"version https://git-lfs": "a git-lfs pointer in place of the weights: run `git lfs pull`",
    rb"\s*<": "a web page in place of the weights: download the file itself",
    rb"GGUF": "a GGUF file: take the model's .safetensors file",
}
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
NO_WEIGHTS = {  # file names in a folder without one of STEMS
    r"^{part}/.*\.safetensors\.index\.": "its weights are in shards: save them as one file",
    r"^{part}/.*\.(bin|ckpt|pt|pth)$": "its weights are pickles, which can run code when opened: "
    "take a version of the model with .safetensors files",
    r"^[^/]*\.safetensors$": "pass one of the single files in it, or a whole diffusers folder",
    r"": "a diffusers folder has unet/, vae/, text_encoder/ and tokenizer/",
}

# fmt: off
UNET_FIELDS = {  # what minip2p builds, and SD 1.x means where the field is absent
    "in_channels": 4, "out_channels": 4, "act_fn": "silu", "norm_eps": 1e-5,
    "use_linear_projection": False, "addition_embed_type": None, "time_cond_proj_dim": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "center_input_sample": False,
    "upcast_attention": False, "only_cross_attention": False, "dual_cross_attention": False,
    "class_embed_type": None, "encoder_hid_dim": None, "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default", "attention_type": "default",
}
VAE_FIELDS = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "act_fn": "silu",
    "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
    "shift_factor": None, "latents_mean": None, "latents_std": None,
}
TEXT_FIELDS = {"hidden_act": "quick_gelu", "max_position_embeddings": 77}
SCHEDULER_FIELDS = {
    "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
WHO = {  # has something else there
    "in_channels": "inpainting (9), instruct-pix2pix (8) and depth (5) models",
    "use_linear_projection": "Stable Diffusion 2.x", "attention_head_dim": "Stable Diffusion 2.x",
    "hidden_act": "Stable Diffusion 2.x", "addition_embed_type": "Stable Diffusion XL",
    "time_cond_proj_dim": "models distilled to few steps (LCM)",
    "mid_block_type": "pruned models (BK-SDM)", "prediction_type": "v-prediction models",
}
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
OLD_VAE_NAMES = {  # diffusers' up to 0.14, still in SD 1.5's own file → published
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.",
}
TEXT_UNUSED = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
# fmt: on


class WeightsError(ValueError):
    """What was named is no model that minip2p can load: one sentence says why, and what to do."""


@dataclass
class StableDiffusion:
    """A model that is ready to run, and what its source says about running it."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: UNet
    vae: VAE
    scheduler: str  # "pndm" or "ddim": the model's own
    schedule: dict[str, Any]  # how it was trained: keyword arguments of DDIM and PNDM
    sample_size: tuple[int, int]  # height and width of the latents it was trained on
    defaults: dict[str, Any]  # recommended arguments of generate(), from minip2p.json

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype


class Stored(NamedTuple):
    """One tensor as the header of its file describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Table(dict[str, T]):
    """The tensors of a file by name, or the fields of a config. `path` is the file's."""

    def __init__(self, path: Path, items: Mapping[str, T]):
        super().__init__(items)
        self.path = path


Tensors = Table[Stored]
Config = Table[Any]


class Source(NamedTuple):
    """What configs and headers say of a model. None of its weights has been read."""

    configs: dict[str, Config]  # of the parts, "scheduler" and "defaults"
    tensors: dict[str, Tensors]  # of the parts, by the names of their parameters
    tokenizer: Path | None  # a folder; a single file has none


# ---- Files: the header, the tensors, a config ----------------------------------------------------


def unreadable(path: Path, error: OSError) -> WeightsError:
    reason = error.strerror or str(error)
    return WeightsError(f"{path} can't be read ({reason}): check that it is there and readable.")


def damaged(path: Path, how: str) -> WeightsError:
    return WeightsError(f"{path} is damaged ({how}): download it or save it again.")


def read_header(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; not a byte of the data is read.

    Checks all that the format promises, so that the data can be mapped without surprises.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= MAX_HEADER or start[8:9] != b"{":
                for magic, what in MAGIC.items():
                    if re.match(magic, start):
                        raise WeightsError(f"{path} is {what}.")
                raise damaged(path, "it does not begin as a safetensors file does")
            if 8 + length > size:
                raise damaged(path, f"it ends after {size} bytes, within a header of {length}")
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        entries = json.loads(header.decode(), object_pairs_hook=without_duplicates)
        metadata = entries.pop("__metadata__", {})
        if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
            raise ValueError("its metadata is not a table of texts")
        end = 0
        for begin, stop in sorted(span(name, entry) for name, entry in entries.items()):
            if begin != end:
                raise ValueError(f"tensors overlap or leave a gap at byte {min(begin, end)}")
            end = stop
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise damaged(path, f"its header is wrong: {error}") from error
    if not entries or size != 8 + length + end:
        raise damaged(path, f"it has {size} bytes where its header promises {8 + length + end}")
    tensors = {n: Stored(n, e["dtype"], tuple(e["shape"])) for n, e in entries.items()}
    return Tensors(path, tensors), metadata


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has a name twice")
    return table


def span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends in the data. Raises ValueError if its entry makes no sense."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sane = type(shape) is list and len(shape) <= 8
        sane = sane and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end))
        sane = sane and end - begin == math.prod(shape) * BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane:
        raise ValueError(f"{name[:80]!r} is {str(entry)[:120]}")
    return begin, end


def read(tensors: Tensors, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Views of the mapped file where it has that dtype and the device is the CPU, else copies."""
    from safetensors import SafetensorError, safe_open

    state = {}
    try:
        with safe_open(tensors.path, framework="pt") as file:
            for name, stored in tensors.items():
                tensor = file.get_tensor(stored.key).to(dtype)
                if tensor.data_ptr() % tensor.element_size():  # old files do not pad their header
                    tensor = tensor.clone()
                state[name] = tensor.to(device)
    except OSError as error:
        raise unreadable(tensors.path, error) from error
    except SafetensorError as error:
        raise damaged(tensors.path, str(error)) from error
    return state


def read_config(path: Path, optional: bool = False) -> Config:
    if optional and not path.exists():
        return Config(path, {})
    try:
        fields = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON: {error}") from error
    if type(fields) is not dict:
        raise damaged(path, "it is not a table of fields")
    return Config(path, fields)


# ---- From a config to a module without memory, which a header must match -------------------------


def other(config: Config, name: str, expected: object) -> WeightsError:
    return WeightsError(
        f"{config.path} has {name} = {str(config.get(name))[:200]}, as {WHO.get(name, 'others')} "
        f"have, where Stable Diffusion 1.x has {expected}: load a 1.x text-to-image model."
    )


def check_fields(config: Config, fields: dict[str, Any]) -> None:
    for name, expected in fields.items():
        # None, False and 0 mean the same in these fields.
        if (config.get(name, expected) or None) != (expected or None):
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


def schedule(config: Config) -> dict[str, Any]:
    """How training laid out the noise levels."""
    check_fields(config, SCHEDULER_FIELDS)
    return {
        "num_train_timesteps": whole(config, "num_train_timesteps", 1000),
        "beta_start": number(config, "beta_start", 0.00085),
        "beta_end": number(config, "beta_end", 0.012),
        "steps_offset": 1,  # whatever stands there: diffusers corrects old files so, too
        "set_alpha_to_one": bool(config.get("set_alpha_to_one")),
    }


def fill(module: Module, state: dict[str, Tensor]) -> Module:
    """Make these very tensors the parameters of a blank module."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = {name: tensor.reshape(shapes[name]) for name, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


# ---- Names: from those in a file to those of the parameters --------------------------------------


def renamed(tensors: Tensors, name: Callable[[str], str], prefix: str = "") -> Tensors:
    """The tensors below a prefix by the names that `name` makes of theirs, prefix included."""
    found = Tensors(tensors.path, {})
    for key, stored in tensors.items():
        if not key.startswith(prefix) or (new := name(key).removeprefix(prefix)) in TEXT_UNUSED:
            continue
        if stored.dtype not in FLOATS:
            raise WeightsError(
                f"{tensors.path} has {key} in {stored.dtype} and not in floating point: take a "
                "version that is not quantised."
            )
        if new in found:
            raise damaged(tensors.path, f"{key} stands in it under a second name")
        found[new] = stored
    return found


def replace_all(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


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


# ---- Sources: a folder, a single file, the hub ---------------------------------------------------


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
            listing = "\n".join(names)
            why = next(
                why
                for pattern, why in NO_WEIGHTS.items()
                if re.search(pattern.replace("{part}", part), listing, re.MULTILINE)
            )
            raise WeightsError(f"{where} has no {variants[0]}: {why}.")
        if f"{part}/config.json" not in names:
            raise WeightsError(f"{where} has no {part}/config.json: take the model's whole folder.")
        files[part] = there[0]
    return files


def from_folder(folder: Path, half: bool) -> Source:
    index = read_config(folder / "model_index.json", optional=True)
    if index.get("text_encoder_2") not in (None, [None, None]):
        raise WeightsError(f"{folder} is Stable Diffusion XL or 3: load Stable Diffusion 1.x.")
    files = weights_files(names_in(folder), half, folder)
    configs = {part: read_config(folder / part / "config.json") for part in STEMS}
    scheduler, defaults = folder / "scheduler" / "scheduler_config.json", folder / "minip2p.json"
    configs["scheduler"] = read_config(scheduler, optional=True)
    configs["defaults"] = read_config(defaults, optional=True)
    headers = {part: read_header(folder / file)[0] for part, file in files.items()}
    tensors = {
        "unet": renamed(headers["unet"], str),
        "vae": renamed(headers["vae"], lambda key: replace_all(key, OLD_VAE_NAMES)),
        "text_encoder": renamed(headers["text_encoder"], lambda k: k.removeprefix("text_model.")),
    }
    return Source(configs, tensors, folder / "tokenizer")


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


def from_single_file(path: Path) -> Source:
    file, metadata = read_header(path)
    recognise(file)
    for key in [key for key in file if key.startswith(LDM_TRAINING)]:
        del file[key]
    clip = renamed(file, lambda key: key.replace(".text_model.", "."), LDM_TEXT)
    # The shapes tell what a folder has config files for. What they do not tell is SD 1.x's default,
    # so that a tensor that is not there is missed below.
    resnet = LDM_UNET + "input_blocks.{}.0.out_layers.3.weight"
    to_k = LDM_UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    proj_in = LDM_UNET + "middle_block.1.proj_in.weight"
    n = len(axes(file, resnet, 1))
    levels = axes(file, LDM_VAE + "encoder.down.{}.block.0.conv2.weight")
    width = axis(clip, "embeddings.token_embedding.weight", 1) or 768
    fields: dict[str, dict[str, Any]] = {
        "unet": {
            "in_channels": axis(file, LDM_UNET + "input_blocks.0.0.weight", 1),
            "layers_per_block": n,
            "block_out_channels": axes(file, resnet, 1, n + 1),
            "cross_attention_dim": axis(file, to_k, 1) or width,
            "use_linear_projection": proj_in in file and len(file[proj_in].shape) == 2,
            "time_cond_proj_dim": axis(file, LDM_UNET + "time_embed.cond_proj.weight", 1),
        },
        "vae": {
            "layers_per_block": len(axes(file, LDM_VAE + "encoder.down.0.block.{}.conv2.weight")),
            "block_out_channels": levels,
        },
        "text_encoder": {
            "vocab_size": axis(clip, "embeddings.token_embedding.weight"),
            "max_position_embeddings": axis(clip, "embeddings.position_embedding.weight"),
            "hidden_size": width,
            "num_attention_heads": max(1, width // 64),  # each is 64 wide, as in CLIP
            "num_hidden_layers": len(axes(clip, "encoder.layers.{}.layer_norm1.weight")),
            "intermediate_size": axis(clip, "encoder.layers.0.mlp.fc1.weight"),
        },
        "scheduler": {"prediction_type": "v_prediction" if predicts_v(file, metadata) else None},
        "defaults": {},
    }
    configs = {
        part: Config(path, {name: value for name, value in those.items() if value})
        for part, those in fields.items()
    }
    ema = {k: LDM_EMA + k[6:].replace(".", "") for k in file if k.startswith(LDM_UNET)}
    if all(name in file for name in ema.values()):
        file.update({key: file[name] for key, name in ema.items()})
    tensors = {
        "unet": renamed(file, lambda key: unet_name(key, n), LDM_UNET),
        "vae": renamed(file, lambda key: vae_name(key, len(levels)), LDM_VAE),
        "text_encoder": clip,
    }
    return Source(configs, tensors, None)


def cached(repo: str, name: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the local hub cache, if that file is in it."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path).parents[name.count("/")] if isinstance(path, str) else None


def hub_error(repo: str, error: Exception) -> WeightsError:
    from huggingface_hub import errors

    if repo in MOVED:
        why = f"it was deleted in 2024: take {MOVED[repo]}"
    elif isinstance(error, errors.GatedRepoError):
        why = f"accept its terms on https://huggingface.co/{repo}, then run `hf auth login`"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        why = "no such folder is here, and no such public repository on the Hugging Face hub"
    else:  # of many kinds, and of others in each version of the client
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        why = f"no such folder is here, nor all of it in the cache, and the hub fails ({reason})"
    return WeightsError(f"{repo} can't be loaded: {why}.")


def download(repo: str, names: Collection[str], size: int) -> Path:
    """The folder with these files of a repository, of which `size` bytes are yet to come."""
    from huggingface_hub import snapshot_download

    if size:
        amount = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        print(f"Downloading {amount} of {repo} to the Hugging Face cache", file=sys.stderr)
    try:
        return Path(snapshot_download(repo, allow_patterns=list(names)))
    except Exception as error:
        raise hub_error(repo, error) from error


def from_hub(repo: str, half: bool) -> Path:
    """A folder with a repository's model: downloaded as far as need be, or from the cache alone."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except Exception as error:
        if (folder := cached(repo, "unet/config.json")) and is_whole(folder, half):
            return folder
        raise hub_error(repo, error) from error
    there = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = [name for name in SMALL_FILES if name in there]
    files += weights_files(there, half, repo).values()
    return download(repo, files, sum(there[n] for n in files if not cached(repo, n, info.sha)))


def is_whole(folder: Path, half: bool) -> bool:
    names = names_in(folder)
    try:
        weights_files(names, half, folder)
    except WeightsError:
        return False
    return "tokenizer/tokenizer.json" in names or "tokenizer/merges.txt" in names


def clip_tokenizer() -> Path:
    """CLIP's tokenizer for a single file, which has none: from the cache, or else from the hub."""
    folder = cached(CLIP, "merges.txt")
    if folder and cached(CLIP, "vocab.json"):
        return folder
    try:
        return download(CLIP, VOCABULARY, 1_585_859)
    except WeightsError as error:
        raise WeightsError(
            "A single file has no tokenizer: pass as tokenizer the tokenizer/ folder of a Stable "
            f"Diffusion 1.x, since {error}"
        ) from error


def find(source: str, half: bool) -> Path:
    """The folder or file that a source means."""
    path = EMOJI if source == "emoji" else Path(os.path.expanduser(source))
    if source and os.path.exists(path):
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not source.endswith(".safetensors"):
        return from_hub(source, half)
    raise WeightsError(
        f"There is no {source[:300]!r}: name a folder, a .safetensors file, a hub id such as "
        "owner/name, or emoji."
    )


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


def ours(what: object, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of text.py; its errors, and those of the libraries below it, become ours."""
    try:
        return function(*arguments)
    except Exception as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise WeightsError(f"{what} can't be used: {reason}.") from error


def load(
    source: str | Path = "emoji",
    *,
    tokenizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x for inference.

    source: "emoji" (the bundled model), a folder, a .safetensors file, or a hub id "owner/name".
    tokenizer: a folder with vocab.json and merges.txt. A single file needs one: by default CLIP's,
        from the local hub cache or else from the hub.
    device: by default CUDA, else MPS, else the CPU.
    dtype: of UNet and text encoder, by default float32. The VAE is always in float32: decoding can
        overflow in half precision.
    On the CPU the weights stay in their files: do not change those while the model is in use.
    Raises WeightsError, before any weight is read, if there is no model that minip2p can run.
    """
    device, dtype = usable(device), dtype or torch.float32
    half = dtype.itemsize < 4
    path = find(str(source), half)
    configs, tensors, folder = from_single_file(path) if path.is_file() else from_folder(path, half)

    noise_levels = schedule(configs["scheduler"])
    latents = wholes(configs["unet"], "sample_size", 64)
    check_fields(configs["text_encoder"], TEXT_FIELDS)
    width = whole(configs["text_encoder"], "hidden_size", 768)
    if width != whole(configs["unet"], "cross_attention_dim", 768):
        raise other(configs["unet"], "cross_attention_dim", f"its text encoder's width, {width}")
    unet = blank_unet(configs["unet"], tensors["unet"])
    vae = blank_vae(configs["vae"], tensors["vae"])

    folder = Path(tokenizer) if tokenizer else folder or clip_tokenizer()
    words = ours(f"The tokenizer in {folder}", text.load_tokenizer, folder)
    if len(words) != (known := whole(configs["text_encoder"], "vocab_size", 49408)):
        raise WeightsError(
            f"The tokenizer in {folder} has {len(words)} tokens and the text encoder of {path} has "
            f"{known}: pass the tokenizer that the model was made with."
        )
    state = read(tensors["text_encoder"], dtype, device)
    whose = f"The text encoder of {path}"
    text_encoder = ours(whose, text.load_text_encoder, configs["text_encoder"], state)
    scheduler = configs["scheduler"].get("_class_name", "PNDMScheduler")  # SD 1.x's own
    return StableDiffusion(
        tokenizer=words,
        text_encoder=text_encoder.to(device),
        unet=fill(unet, read(tensors["unet"], dtype, device)),
        vae=fill(vae, read(tensors["vae"], torch.float32, device)),
        # DDIM for the classes that are not here: the plainest sampler of the same noise levels.
        scheduler="pndm" if scheduler == "PNDMScheduler" else "ddim",
        schedule=noise_levels,
        sample_size=(latents[0], latents[-1]),
        defaults=dict(configs["defaults"]),
    )
