"""A narrow Stable Diffusion 1.x with random weights, in every layout that real files come in.

diffusers and transformers build it, so the tests compare minip2p with something independent of it.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minip2p

State = dict[str, Tensor]
EMOJI_TOKENIZER = Path(minip2p.__file__).parent / "models" / "emoji" / "tokenizer"
WEIGHTS = {  # of each part in a folder
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


class Truth(NamedTuple):
    """The modules that every layout holds, and their weights under the published names."""

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text_encoder: nn.Module
    vocabulary: int

    def states(self) -> dict[str, State]:
        text = self.text_encoder.state_dict().items()
        return {
            "unet": dict(self.unet.state_dict()),
            "vae": dict(self.vae.state_dict()),
            # transformers has the prefix up to 5.5
            "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in text},
        }


def make_truth(vocabulary: int) -> Truth:
    """Draw weights, the same at every call; no two are alike, so that none can be mixed up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 96, 96),
            cross_attention_dim=128,
            attention_head_dim=8,
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_act="quick_gelu",
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
            )
        )
        for module in (unet, vae, text):
            for parameter in module.eval().requires_grad_(False).parameters():
                if parameter.ndim == 1:  # norms begin as ones, biases as zeros
                    parameter += 0.1 * torch.randn_like(parameter)
    return Truth(unet, vae, text, vocabulary)


# --- names ----------------------------------------------------------------------------------------


def sd15_keys() -> list[list[str]]:
    """List the 1130 of SD 1.5: LDM's name, part, published name, LDM's shape, published shape."""
    table = gzip.decompress((Path(__file__).parent / "data" / "sd15_keys.tsv.gz").read_bytes())
    return [line.split("\t") for line in table.decode().splitlines()]


def ldm_state(states: dict[str, State], text_prefix: str = "text_model.") -> State:
    """Return a single file's tensors, with the schedule and counters that real files hold, too."""
    ldm = {(part, published): name for name, part, published, _, _ in sd15_keys()}
    state = {ldm["unet", name]: tensor for name, tensor in states["unet"].items()}
    for name, tensor in states["vae"].items():
        is_1x1 = "attentions" in name and tensor.ndim == 2  # LDM has convolutions there
        state[ldm["vae", name]] = tensor[:, :, None, None] if is_1x1 else tensor
    for name, tensor in states["text_encoder"].items():
        state[f"cond_stage_model.transformer.{text_prefix}{name}"] = tensor
    state[f"cond_stage_model.transformer.{text_prefix}embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    state |= {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000)}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def with_ema(state: State) -> State:
    """Make the UNet's weights the averaged ones, and put other weights in their place."""
    ema = dict(state)
    for name, tensor in state.items():
        if name.startswith("model.diffusion_model."):
            ema["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor
            ema[name] = tensor + 1
    return ema


# --- layouts --------------------------------------------------------------------------------------


def half(state: State) -> State:
    return {k: t.half() if t.is_floating_point() else t for k, t in state.items()}


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; those given as ... are removed."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {k: v for k, v in (content | fields).items() if v is not ...}
    path.write_text(json.dumps(content))


def save_diffusers(folder: Path, truth: Truth, tokenizer: Path) -> Path:
    """Save a folder as today's diffusers does."""
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    diffusers.StableDiffusionPipeline(
        vae=truth.vae,
        text_encoder=truth.text_encoder,
        tokenizer=transformers.CLIPTokenizerFast.from_pretrained(tokenizer),
        unet=truth.unet,
        scheduler=diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


BLOCKS = "_class_name block_out_channels down_block_types up_block_types"
OLD_FIELDS = {  # of configs as of 2022
    "unet/config.json": f"{BLOCKS} cross_attention_dim attention_head_dim",
    "vae/config.json": f"{BLOCKS} layers_per_block",
    "text_encoder/config.json": "model_type hidden_act vocab_size hidden_size intermediate_size "
    "num_hidden_layers num_attention_heads",
    "scheduler/scheduler_config.json": "_class_name num_train_timesteps beta_start beta_end "
    "beta_schedule skip_prk_steps steps_offset",
}


def age(folder: Path, tokenizer: Path) -> None:
    """Turn a folder into one as of 2022: older names, configs with fewer fields."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        for new_name, old_name in old.items():
            name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        state[name] = tensor
    save_file(state, file)

    file = folder / "text_encoder" / "model.safetensors"
    state = {"text_model." + k.removeprefix("text_model."): t for k, t in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)

    for name, fields in OLD_FIELDS.items():
        content = json.loads((folder / name).read_text())
        content = {field: v for field, v in content.items() if field in fields.split()}
        (folder / name).write_text(json.dumps(content))

    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer, folder / "tokenizer", ignore=lambda *_: ["tokenizer.json"])


def make_layouts(folder: Path, tokenizer: Path = EMOJI_TOKENIZER) -> dict[str, Path]:
    """Save `make_truth()` in every layout. → layout: a folder, or a single file

    Layouts with "16" in their name are rounded to float16. tokenizer: a folder with vocab.json and
    merges.txt; by default the bundled model's, which is small.
    """
    truth = make_truth(len(json.loads((tokenizer / "vocab.json").read_text())))
    plain = save_diffusers(folder / "diffusers", truth, tokenizer)
    names = ("diffusers_old", "fp16_variant", "flat_text", "conv_vae")
    layouts = {name: Path(shutil.copytree(plain, folder / name)) for name in names}
    files = {part: f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()}

    age(layouts["diffusers_old"], tokenizer)
    for name in files.values():
        file = layouts["fp16_variant"] / name
        save_file(half(load_file(file)), file.with_suffix(".fp16.safetensors"))
        file.unlink()
    save_file(truth.states()["text_encoder"], layouts["flat_text"] / files["text_encoder"])
    vae = truth.states()["vae"]  # its attention's linear layers saved as 1x1 convolutions
    is_linear = {name: "attentions" in name and tensor.ndim == 2 for name, tensor in vae.items()}
    vae = {k: t[:, :, None, None].contiguous() if is_linear[k] else t for k, t in vae.items()}
    save_file(vae, layouts["conv_vae"] / files["vae"])

    single = ldm_state(truth.states())
    broken_ids = {"cond_stage_model.transformer.embeddings.position_ids": torch.rand(1, 77)}
    for name, state in {
        "single": single,
        "single_fp16": half(single),
        "single_ema": with_ema(single),
        "single_novelai": ldm_state(truth.states(), text_prefix="") | broken_ids,
    }.items():
        layouts[name] = folder / f"{name}.safetensors"
        save_file(state, layouts[name])
    return {"diffusers": plain} | layouts
