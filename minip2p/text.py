"""A prompt becomes tokens that know their place in it, and the tokens become the UNet's context.

Text encoder and tokenizer are transformers' CLIP (Radford et al. 2021), by weights/clip.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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


def encode(text_encoder: nn.Module, prompts: Sequence[Prompt]) -> Tensor:
    """Return the context of every prompt: b 77 d. No mask: SD 1.x was trained to see the padding.

    Each distinct prompt is encoded once and alone, so that its context does not depend on the
    prompts beside it: a matrix product of another batch size rounds differently.
    """
    device = next(text_encoder.parameters()).device
    contexts: dict[tuple[int, ...], Tensor] = {}
    for prompt in prompts:
        if prompt.ids not in contexts:
            ids = torch.tensor([prompt.ids], device=device)
            contexts[prompt.ids] = text_encoder(input_ids=ids).last_hidden_state
    return torch.cat([contexts[prompt.ids] for prompt in prompts])
