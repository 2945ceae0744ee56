"""Prompts, models and small functions that several test files share."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import minip2p
from minip2p.unet import UNet
from minip2p.vae import VAE

EMOJI = Path(minip2p.__file__).parent / "models" / "emoji"
TOKENIZER = EMOJI / "tokenizer"

SQUIRREL = "a photo of a squirrel eating a burger"
LION = "a photo of a lion eating a burger"
PANDA = "a photo of a panda eating a burger"
SNOW = "a photo of a squirrel eating a burger in the snow"


def difference(a: Tensor, b: Tensor) -> float:
    """Return the relative error |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def noise(height: int = 16, width: int = 16, seed: int = 8888) -> Tensor:
    """Draw the noise that a run starts from. height, width: of the latents → 1 4 h w"""
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def mapper_by_hand(
    table: str, source_end: int, target_end: int, refine: bool = False
) -> tuple[Tensor, Tensor]:
    """Write down the mapper and `exists` of a table such as "1; 2 3 <- 2/2; 4-6; 7 <- own".

    The notation is explained in test_align.py. source_end, target_end: positions of the end tokens.
    refine: padding keeps its position instead of moving along with the end token. → 77 77, 77
    """
    mapper, exists = torch.zeros(77, 77), torch.ones(77)
    mapper[0, 0] = 1
    for part in filter(None, table.split("; ")):
        to, _, sources = part.partition(" <- ")
        if sources == "own":
            exists[[int(j) for j in to.split()]] = 0
        elif sources:
            for i, _, share in (source.partition("/") for source in sources.split()):
                mapper[int(i), [int(j) for j in to.split()]] = 1 / int(share or 1)
        else:
            first, _, last = to.partition("-")
            for j in range(int(first), int(last or first) + 1):
                mapper[j, j] = 1
    mapper[source_end, target_end] = 1
    if refine:
        padding = max(source_end, target_end) + 1  # of both prompts begins here
        mapper[range(padding, 77), range(padding, 77)] = 1
        exists[target_end + 1 : padding] = 0
    else:
        for i in range(source_end + 1, 77):
            mapper[i, min(target_end + i - source_end, 76)] = 1
    return mapper, exists


class Outcome(NamedTuple):
    """The exit status of a program and the text that it wrote."""

    status: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """List the lines on standard error other than the progress bar."""
        lines = re.split(r"[\r\n]+", self.err)
        return [line for line in lines if line.strip() and not re.match(r"[\w: ]*\d+%\|", line)]


def picture(path: str | Path) -> Image.Image:
    """Read a picture as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


# --- a toy model ----------------------------------------------------------------------------------

TOY_UNET = {"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
TOY_VAE = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}


def save_toy(folder: Path) -> Path:
    """Save a narrow model with random weights in `folder`, which is to be made. Return the folder.

    It is for tests of everything around a run, whose pictures may be nonsense. Tokenizer, text
    encoder, sizes and recommended settings are the bundled model's.
    """
    shutil.copytree(EMOJI, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model.*"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, tuple[nn.Module, dict]] = {
            "unet": (UNet(**TOY_UNET, cross_attention_dim=128, heads=4), TOY_UNET),
            "vae": (VAE(**TOY_VAE, scaling_factor=0.28944), TOY_VAE),
        }
    for name, (module, sizes) in parts.items():
        config = folder / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
        save_file(module.state_dict(), folder / name / "diffusion_pytorch_model.safetensors")
    return folder
