"""A prompt becomes tokens that know their place in it, and the tokens become the UNet's context.

The text encoder and the tokenizer are transformers' CLIP (Radford et al. 2021), imported only when
one
is loaded: that takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .align import LENGTH, Prompt


def tokenize(tokenizer: Any, text: str) -> Prompt:
    """Cut and pad `text` to 77 tokens. Warns, naming what falls off, where it is longer."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that came from a shell as surrogates
        raise ValueError(f"The prompt {text!r} is no text in UTF-8.") from None
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
    room = LENGTH - 2
    cut = spans[room][0] if len(ids) > room else len(text)
    if cut < len(text):
        warnings.warn(
            f"A prompt has room for {room} tokens and this one has {len(ids)}; "
            f"the model will not see {text[cut:].strip()!r}.",
            stacklevel=2,
        )
    ids, spans = ids[:room], spans[:room]
    padding = [tokenizer.pad_token_id] * (room - len(ids))
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]
    return Prompt(text, tuple(ids), tuple(spans), cut)


@torch.inference_mode()
def encode(text_encoder: nn.Module, prompts: Sequence[Prompt]) -> Tensor:
    """The context of every prompt: b 77 d. No mask: SD 1.x was trained to see the padding."""
    device = next(text_encoder.parameters()).device
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    return text_encoder(input_ids=ids).last_hidden_state


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder. Raises ValueError where there is none."""
    # transformers would build an empty vocabulary from what is missing.
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise ValueError(
            f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt."
        )
    from transformers import CLIPTokenizerFast  # the fast one: it knows character offsets

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The tokenizer in {folder} can't be read: {error}") from error


def load_text_encoder(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """CLIP's text encoder with `state` as its weights: no copy of them is made.

    config: the contents of text_encoder/config.json; SD 1.x, CLIP ViT-L/14, where a field is
    absent.
    state: weights, with or without the prefix "text_model.". Raises ValueError unless they fit
    exactly.
    """
    sd1 = {
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
    sizes = {name: config.get(name, default) for name, default in sd1.items()}
    try:
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**sizes))
    except ImportError as error:  # pip does not know which torch each transformers needs
        raise ValueError(
            f"The installed transformers can't use torch {torch.__version__}: upgrade torch, or "
            "pip install 'transformers<5'."
        ) from error

    # transformers 5.6 dropped the prefix from the module; files have it or not.
    prefix = "text_model." if next(iter(model.state_dict())).startswith("text_model.") else ""
    flat = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    for unused in ("embeddings.position_ids", "text_projection.weight", "logit_scale"):
        flat.pop(unused, None)
    try:
        model.load_state_dict({prefix + name: t for name, t in flat.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"These weights are no CLIP text encoder of this size: {error}") from error

    # The one buffer that files do not hold (old ones do, and merges have damaged it there).
    embeddings = model.get_submodule(prefix + "embeddings")
    positions = torch.arange(sizes["max_position_embeddings"])[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    return model.eval().requires_grad_(False)
