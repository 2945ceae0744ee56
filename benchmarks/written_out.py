"""Prompt-to-Prompt the usual way, on diffusers' own UNet: every attention map is written down.

As in google/prompt-to-prompt and diffusers' community pipeline after it: float32 maps, all of
32 x 32 and less of them stored, edited in place. It is what minip2p's speed is measured against.

Shapes:  b prompts, row 0 the source · i heads · q query pixels · k 77 tokens, or pixels
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Controller:
    """Word swap inside both windows, and the attention store that it comes with there."""

    def __init__(self, mapper: Tensor, prompts: int, store: bool = True):
        self.mapper, self.b, self.store = mapper, prompts, store  # mapper: e k k
        self.step: dict[str, list[Tensor]] = defaultdict(list)  # the maps of this UNet call
        self.kept: dict[str, list[Tensor]] = {}  # and the sums over all calls

    def __call__(self, probs: Tensor, is_cross: bool, place: str) -> Tensor:
        """probs: 2b·i q k, the blank half first."""
        prompts = probs[len(probs) // 2 :]
        if self.store and probs.shape[1] <= 32**2:
            self.step[f"{place}_{'cross' if is_cross else 'self'}"].append(prompts)
        maps = prompts.unflatten(0, (self.b, -1))  # b i q k
        if is_cross:
            maps[1:] = torch.einsum("iqw,ewn->eiqn", maps[0], self.mapper)
        elif probs.shape[1] <= 16**2:
            maps[1:] = maps[0]
        return probs

    def end_call(self) -> None:
        for name, maps in self.step.items():
            if name in self.kept:
                for kept, new in zip(self.kept[name], maps, strict=True):
                    kept += new
            else:
                self.kept[name] = maps
        self.step = defaultdict(list)


class Processor:
    """A diffusers attention processor that hands its map to the controller."""

    def __init__(self, controller: Controller, place: str):
        self.controller, self.place = controller, place

    def __call__(
        self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        is_cross = encoder_hidden_states is not None
        seen = encoder_hidden_states if is_cross else x
        q, k, v = (
            attn.head_to_batch_dim(t) for t in (attn.to_q(x), attn.to_k(seen), attn.to_v(seen))
        )
        probs = attn.get_attention_scores(q, k).float()
        probs = self.controller(probs, is_cross, self.place).to(v.dtype)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probs, v)))


def control(unet: Any, controller: Controller) -> None:
    """Put the controller into every attention layer of diffusers' UNet."""
    unet.set_attn_processor(
        {name: Processor(controller, name.split("_")[0]) for name in unet.attn_processors}
    )
