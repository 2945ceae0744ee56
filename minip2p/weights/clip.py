"""CLIP's text encoder and tokenizer (Radford et al. 2021), which are transformers'.

They are imported only when one is loaded: that takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..align import LENGTH
from .build import whole
from .files import Config, WeightsError, one_line

SD1 = {  # CLIP ViT-L/14: what a field means that a config does not have
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,  # these three only choose the pooled output, which SD does not use
    "eos_token_id": 2,
    "pad_token_id": 1,
}


@contextmanager
def ours(beginning: str) -> Iterator[None]:
    """Makes of any error of the libraries, which raise many kinds, a sentence that begins so."""
    try:
        yield
    except Exception as error:
        raise WeightsError(f"{beginning}: {one_line(error)}.") from error


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder. Raises WeightsError where there is none."""
    # transformers would build an empty vocabulary from what is missing.
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise WeightsError(
            f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt."
        )
    with ours(f"The tokenizer in {folder} can't be read"):
        from transformers import CLIPTokenizerFast  # the fast one: it knows character offsets

        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def check_vocabulary(tokenizer: Any, folder: Path, config: Config) -> None:
    """Raises WeightsError if the tokenizer is not the one that the text encoder listens to."""
    known = whole(config, "vocab_size", 49408)
    if len(tokenizer) != known:
        raise WeightsError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens and the text encoder of "
            f"{config.path} has {known}: pass the tokenizer that the model was made with."
        )


def blank_text_encoder(sizes: dict[str, Any]) -> nn.Module:
    """CLIP's text encoder on the meta device: it needs no memory."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            return CLIPTextModel(CLIPTextConfig(**sizes))
    except ImportError as error:  # pip does not know which torch each transformers needs
        raise ValueError(
            f"The installed transformers can't use torch {torch.__version__}: upgrade torch, or "
            "pip install 'transformers<5'"
        ) from error


def is_skipped(name: str, sizes: dict[str, Any]) -> bool:
    """Whether it is of a layer above the last one to run, as "clip skip" leaves them in files."""
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= sizes["num_hidden_layers"]


def load_text_encoder(config: Config, state: dict[str, Tensor]) -> nn.Module:
    """CLIP's text encoder with `state` as its weights: no copy of them is made.

    config: text_encoder/config.json. state: weights without the prefix "text_model.". The config
    may have fewer layers than there are weights: then the last ones are left out.
    Raises WeightsError unless they fit exactly otherwise.
    """
    sizes = {name: config.get(name, default) for name, default in SD1.items()}
    with ours(f"The text encoder of {config.path} can't be used"):
        model = blank_text_encoder(sizes)
        # transformers 5.6 dropped the prefix from the module.
        has_prefix = next(iter(model.state_dict())).startswith("text_model.")
        prefix = "text_model." if has_prefix else ""
        named = {prefix + name: t for name, t in state.items() if not is_skipped(name, sizes)}
        model.load_state_dict(named, strict=True, assign=True)
        # The one buffer that files do not hold (old ones do, and merges have damaged it there).
        embeddings = model.get_submodule(prefix + "embeddings")
        positions = torch.arange(sizes["max_position_embeddings"], device="cpu")[None]
        embeddings.register_buffer("position_ids", positions, persistent=False)
    return model.eval().requires_grad_(False)
