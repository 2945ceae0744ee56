"""From a prompt to the UNet's context: CLIP's tokenizer and text encoder (Radford et al. 2021).

Module names are the published ones, without the prefix "text_model." that older files have.

Shapes:  b prompts · k = 77 tokens · d width of a token
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .align import LENGTH, Prompt
from .errors import UserError
from .unet import named

if TYPE_CHECKING:
    import tokenizers

# --- tokens ---------------------------------------------------------------------------------------


class Tokenizer:
    """CLIP's byte-pair encoding, as the `tokenizers` library runs it.

    begin, end, pad: the ids of the tokens before, after and beyond a text.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, begin: int, end: int, pad: int):
        bpe.no_truncation()  # a file may ask for either; here `tokenize` does both
        bpe.no_padding()
        self.bpe, self.begin, self.end, self.pad = bpe, begin, end, pad

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of the tokens of `text`, and which characters text[start:end] each is."""
        encoding = self.bpe.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, added ones included."""
        return self.bpe.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self.bpe.get_vocab_size(with_added_tokens=True)


def tokenize(tokenizer: Tokenizer, text: str) -> Prompt:
    """Cut and pad `text` to 77 tokens. Warn, naming what is cut off, if it has more.

    Raises UserError if the text cannot be written in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # a shell hands over bytes that are no UTF-8 as surrogates
        raise UserError(f"The prompt {text!r} is no text in UTF-8: write it again.") from None
    ids, spans = tokenizer.encode(text)
    room = LENGTH - 2
    cut = spans[room][0] if len(ids) > room else len(text)
    if cut < len(text):
        warnings.warn(
            f"A prompt has room for {room} tokens and this one has {len(ids)}; "
            f"the model will not see {text[cut:].strip()!r}.",
            stacklevel=2,
        )
    ids, spans = ids[:room], spans[:room]
    padding = [tokenizer.pad] * (room - len(ids))
    ids = [tokenizer.begin, *ids, tokenizer.end, *padding]
    return Prompt(text, tuple(ids), tuple(spans), cut)


# --- the text encoder -----------------------------------------------------------------------------


class Embeddings(nn.Module):
    """The sum of a token's vector and its position's."""

    def __init__(self, vocabulary: int, d: int):
        super().__init__()
        # Not nn.Embedding's normal numbers: drawn on the meta device, where `load` builds modules,
        # they make torch import its compiler, which takes two seconds.
        tokens, positions = (torch.empty(n, d).uniform_(-0.03, 0.03) for n in (vocabulary, LENGTH))
        self.token_embedding = nn.Embedding.from_pretrained(tokens, freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed tokens. ids: b k → b k d"""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CausalSelfAttention(nn.Module):
    """Self-attention in which a token sees itself and the tokens before it."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.q_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Let each token look at those before it. x: b k d → b k d"""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b heads k d/heads
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class EncoderLayer(nn.Module):
    """A transformer layer with its norms before attention and before the two linear layers."""

    def __init__(self, d: int, d_inner: int, heads: int):
        super().__init__()
        self.self_attn = CausalSelfAttention(d, heads)
        self.layer_norm1 = nn.LayerNorm(d)
        self.mlp = named(fc1=nn.Linear(d, d_inner), act=QuickGELU(), fc2=nn.Linear(d_inner, d))
        self.layer_norm2 = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """CLIP's text transformer. The defaults are the sizes in SD 1.x (ViT-L/14).

    "Clip skip" runs fewer layers than were trained.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
    ):
        super().__init__()
        self.embeddings = Embeddings(vocab_size, hidden_size)
        layers = (
            EncoderLayer(hidden_size, intermediate_size, num_attention_heads)
            for _ in range(num_hidden_layers)
        )
        self.encoder = named(layers=nn.Sequential(*layers))
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the last layer's output after the final norm. ids: b k → b k d

        There is no mask for padding: SD 1.x was trained to see it.
        """
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


def encode(text_encoder: TextEncoder, prompts: Sequence[Prompt]) -> Tensor:
    """Return the context of every prompt: b 77 d.

    Each distinct prompt is encoded once and alone, so that its context does not depend on the
    prompts beside it: a matrix product of another batch size rounds differently.
    """
    device = text_encoder.final_layer_norm.weight.device
    contexts = {
        ids: text_encoder(torch.tensor([ids], dtype=torch.long, device=device))
        for ids in dict.fromkeys(prompt.ids for prompt in prompts)
    }
    return torch.cat([contexts[prompt.ids] for prompt in prompts])
