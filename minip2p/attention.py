"""Attention, and the one line where Prompt-to-Prompt reaches into it.

    probs = softmax(q kᵀ / √d)      who looks at what: the attention map
    probs = edit(probs, site)       Prompt-to-Prompt (Hertz et al. 2022, algorithm 1)
    out   = probs v

An edit is a hook that sees every prompt's map, row 0 the source's, and returns the maps to use
instead. It travels as an argument, unet(x, t, context, edit), so nothing is registered and nothing
is undone. An edit that is linear in the maps can say so, with a Mix: then no map is written down.

Shapes:  b batch, one row a prompt · i heads · d width · q query pixels, h·w ·
         k keys, 77 tokens or again pixels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Size = tuple[int, int]  # height, width
Device = torch.device | str


@dataclass(frozen=True)
class Site:
    """The address of one attention layer, and the size of the feature map passing through."""

    name: str  # "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    place: str  # "down", "mid" or "up"
    is_cross: bool  # True: pixels look at words (attn2). False: pixels look at pixels (attn1).
    height: int = 0  # of the feature map; 0 as long as none has come
    width: int = 0


class Edit:
    """What can be done to attention maps during a run. Subclass it and override what you need.

    The example doubles a word's attention during the first half of the run:

        class Louder(minip2p.Edit):
            def at(self, call, calls):
                return self if call < calls / 2 else None

            def __call__(self, probs, site):
                if site.is_cross:
                    probs[1:, ..., 5] *= 2
                return probs
    """

    def at(self, call: int, calls: int) -> Edit | None:
        """What UNet call `call` of `calls`, from 0, needs; or None. (PNDM: n steps are n + 1.)"""
        return self

    def wants(self, site: Site) -> bool:
        """Whether this layer's map is to be seen. False keeps the layer's fast path."""
        return True

    def __call__(self, probs: Tensor, site: Site) -> Tensor:
        """probs: b i q k in float32, row 0 the source's, yours to change → the maps to use."""
        mix = self.mix(site)
        return probs if mix is None else mix(probs)

    def mix(self, site: Site) -> Mix | None:
        """The same edit as a linear map, for which no map is written down; None: it has none."""
        return None

    def blend(self, latents: Tensor) -> Tensor:
        """latents: b 4 h w, after the scheduler's step → the latents to go on with."""
        return latents


class Taken(NamedTuple):
    """What some rows take over of the source's map."""

    rows: list[int]  # n
    matrices: Tensor  # n k k: S of each

    def of(self, v: Tensor) -> Tensor:
        """S V of each row, in float32 for the fractions in S. v: b i k d → n i k d"""
        taken = precise(torch.stack([v[row] for row in self.rows]))
        return (self.matrices[:, None].to(taken.dtype) @ taken).to(v.dtype)


@dataclass(frozen=True)
class Mix:
    """An edit as a linear map: M̂_r = (M_look[r] diag(o_r) + M_0 S_r) diag(w_r) for each row r."""

    # look, own and scale go on for as many rows again: the blank ones, which they leave alone.
    look: Tensor | None = None  # 2·rows; None: every row through its own map
    only: Taken | None = None  # rows that look through M_0 alone, and not as it is: M_0 S_r
    own: Tensor | None = None  # 2·rows k: o; None: all ones
    also: Taken | None = None  # rows that take M_0 S_r beside their own map
    scale: Tensor | None = None  # 2·rows k: w; None: all ones
    # (columns: rows k c, add) pairs: add(M̂ @ columns: rows q c, mean over heads) is called each
    # time, with M̂ as it is before the scale: a word that is silenced can still be found.
    reads: tuple[tuple[Tensor, Callable[[Tensor], None]], ...] = ()

    def __call__(self, probs: Tensor) -> Tensor:
        """The definition, on maps that are written down. probs: rows i q k → rows i q k"""
        n = len(probs)
        mixed = probs.clone() if self.look is None else probs[self.look[:n]]
        if self.only:
            rows, matrices = self.only
            mixed[rows] = mixed[rows] @ matrices[:, None].to(probs.dtype)
        if self.own is not None:
            mixed *= self.own[:n, None, None]
        if self.also:
            rows, matrices = self.also
            mixed[rows] += probs[0] @ matrices[:, None].to(probs.dtype)
        for columns, add in self.reads:
            add(mixed.mean(dim=1) @ columns.to(probs.dtype))
        return mixed if self.scale is None else mixed * self.scale[:n, None, None].to(probs.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """self(maps of q and k) @ v, without the maps: (M S diag(w)) V = M (S (diag(w) V))

        q: b i q d. k, v: b i k d → b i q d
        """
        v = v if self.scale is None else times(self.scale, v)
        values = v if self.own is None else times(self.own, v)
        if self.only:
            values = values.clone()
            for row, part in zip(self.only.rows, self.only.of(v), strict=True):
                values[row] = part
        look = None if self.look is None else self.look[: len(v)]
        q_r, k_r = (q, k) if look is None else (rows_of(t, look) for t in (q, k))
        out = scaled_dot_product_attention(q_r, k_r, values)
        if self.also:
            q_0, k_0 = (t[:1].expand(len(self.also.rows), -1, -1, -1) for t in (q, k))
            more = scaled_dot_product_attention(q_0, k_0, self.also.of(v))
            for row, part in zip(self.also.rows, more, strict=True):
                out[row].add_(part)  # with += it is written twice
        return out

    def read(self, q: Tensor, k: Tensor) -> None:
        """Hand out M̂ @ columns: the sum of some columns of a map is one more value to attend to."""
        columns = torch.cat([columns for columns, _ in self.reads], dim=-1)  # rows k c
        rows, d, unscaled = len(columns), q.shape[-1], replace(self, scale=None)
        q, k = precise(q[:rows]), precise(k[:rows])
        maps = []
        for some in columns.split(d, dim=-1):
            values = torch.zeros_like(k)  # as wide as k: the fast kernels ask for it
            values[..., : some.shape[-1]] = some[:, None]
            maps.append(unscaled.attend(q, k, values)[..., : some.shape[-1]].mean(dim=1))
        parts = torch.cat(maps, dim=-1).split([c.shape[-1] for c, _ in self.reads], dim=-1)
        for (_, add), part in zip(self.reads, parts, strict=True):
            add(part)


def rows_of(t: Tensor, look: Tensor) -> Tensor:
    """t[look], in memory in the order b q i d as t is: else the output is copied. t: b i q d"""
    return t.transpose(1, 2).index_select(0, look).transpose(1, 2)  # four times as fast as t[look]


def times(factors: Tensor, v: Tensor) -> Tensor:
    """diag(factors) V of each row. factors: at least b k, v: b i k d → as v"""
    return (precise(v) * factors[: len(v), None, :, None]).to(v.dtype)


class Guided(Edit):
    """`edit` sees the first `rows` rows, those of the prompts, and not the negative prompt's."""

    def __init__(self, edit: Edit, rows: int):
        self.edit, self.rows = edit, rows

    def wants(self, site: Site) -> bool:
        return self.edit.wants(site)

    def mix(self, site: Site) -> Mix | None:
        return self.edit.mix(site)  # leaves later rows alone by itself

    def __call__(self, probs: Tensor, site: Site) -> Tensor:
        return torch.cat([self.edit(probs[: self.rows], site), probs[self.rows :]])


class Words:
    """The context of a run: each layer's keys and values of it are computed once for all calls."""

    def __init__(self, context: Tensor):
        self.context = context  # b 77 d_context
        self.projected: dict[Attention, tuple[Tensor, Tensor]] = {}

    def keys_values(self, layer: Attention) -> tuple[Tensor, Tensor]:
        if layer not in self.projected:
            self.projected[layer] = layer.keys_values(self.context)
        return self.projected[layer]


def precise(t: Tensor) -> Tensor:
    """At least float32: half precision would lose digits of a softmax and of a mixture of maps."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Attention(nn.Module):
    """Multi-head attention: self-attention without a context, cross-attention with one."""

    def __init__(self, d: int, d_context: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(d, d, bias=bias)
        self.to_k = nn.Linear(d_context, d, bias=bias)
        self.to_v = nn.Linear(d_context, d, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(d, d))  # Sequential, so that the key is to_out.0
        self.site = Site("", "", False)  # UNet.__init__ gives each of its layers a real one

    def forward(
        self, x: Tensor, context: Tensor | Words | None = None, edit: Edit | None = None
    ) -> Tensor:
        """x: b h w i·d, pixels that look at `context`, b 77 d_context, or at each other → as x"""
        pixels = x.flatten(1, 2)  # b q i·d
        q = self.by_head(self.to_q(pixels))
        if isinstance(context, Words):
            k, v = context.keys_values(self)
        else:
            k, v = self.keys_values(pixels if context is None else context)

        site = replace(self.site, height=x.shape[1], width=x.shape[2])
        if edit is None or not edit.wants(site):
            out = scaled_dot_product_attention(q, k, v)  # the map is never written down
        elif (mix := edit.mix(site)) is not None:
            if mix.reads:
                mix.read(q, k)
            out = mix.attend(q, k, v)  # edited, and still never written down
        else:
            probs = (precise(q) * q.shape[-1] ** -0.5 @ precise(k).mT).softmax(dim=-1)  # b i q k
            probs = edit(probs, site)
            out = (probs @ precise(v)).to(v.dtype)

        return self.to_out(out.transpose(1, 2).flatten(2)).view(x.shape)

    def by_head(self, t: Tensor) -> Tensor:
        """b q i·d → b i q d"""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of what is looked at, b k d_context → twice b i k d"""
        return self.by_head(self.to_k(seen)), self.by_head(self.to_v(seen))
