"""An edit of attention maps as a linear map, for which no attention map is written down.

    M̂_r = (M_map_row[r] diag(keep_r) + M_0 S_r) diag(w_r)      for each prompt's row r

Attention multiplies a map by values, so the matrices can act on the values instead:

    M̂ V = M (diag(keep) diag(w) V) + M_0 (S (diag(w) V))

and each product with a map is one call of the fused kernel. Calling a LinearEdit applies the
definition to maps that are written down; the tests tie `attend` to it.

Shapes:  b rows of the batch, the prompts' rows and after them the unconditional ones ·
         n some of the rows · i heads · d width of a head · q query pixels · k keys · c columns
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention import Device, at_least_float32

# (columns: rows k c, add): add(M̂ @ columns, mean over heads: rows q c) is called at each UNet call
Probe = tuple[Tensor, Callable[[Tensor], None]]


class SourceMaps(NamedTuple):
    """Source maps that replace or join the own map of some rows: M_0 S_r for each such row."""

    rows: list[int]  # n
    mappers: Tensor  # n k k: S of each row

    def values(self, v: Tensor) -> Tensor:
        """Compute S V of each row, in float32 for the fractions in S. v: b i k d → n i k d"""
        of_rows = at_least_float32(torch.stack([v[row] for row in self.rows]))
        return (self.mappers[:, None].to(of_rows.dtype) @ of_rows).to(v.dtype)


@dataclass(frozen=True)
class LinearEdit:
    """The matrices of the formula above. None stands for "no row is changed by this".

    map_row, keep and token_weights have 2·rows entries: the prompts' rows, and as many
    unconditional rows, which use their own maps unchanged.
    """

    map_row: Tensor | None = None  # 2·rows: the row whose map each row uses
    replaced: SourceMaps | None = None  # rows that use M_0 S_r instead of their own map
    keep: Tensor | None = None  # 2·rows k: the share that each token keeps of its own map
    blended: SourceMaps | None = None  # rows that add M_0 S_r to what they keep
    token_weights: Tensor | None = None  # 2·rows k: w
    # Probes see M̂ before the weights: a word that is silenced can still be located.
    probes: tuple[Probe, ...] = ()

    @staticmethod
    def from_dense(
        source: Tensor, keep: Tensor, weights: Tensor, device: Device
    ) -> LinearEdit | None:
        """Build M̂_r = (M_0 source_r + M_r diag(keep_r)) diag(weights_r); None: it changes nothing.

        source: b k k. keep, weights: b k. A source map that is used as it is gets no matrix: a
        product with an identity costs time, and TF32 would round it.
        """
        takes, keeps = source.flatten(1).any(dim=1), keep.any(dim=1)
        replaced = takes & ~keeps
        is_identity = (
            (source == torch.eye(keep.shape[1], device=source.device)).flatten(1).all(dim=1)
        )
        keep = keep.where(~replaced[:, None], 1)

        def source_maps(rows: Tensor) -> SourceMaps | None:
            numbers = rows.nonzero()[:, 0].tolist()
            return SourceMaps(numbers, source[rows].to(device)) if numbers else None

        def factors(prompts: Tensor) -> Tensor | None:
            all_rows = torch.cat([prompts, torch.ones_like(prompts)])
            return None if (all_rows == 1).all() else all_rows.to(device)

        edit = LinearEdit(
            map_row=map_rows(replaced, device) if replaced.any() else None,
            replaced=source_maps(replaced & ~is_identity),
            keep=factors(keep),
            blended=source_maps(takes & keeps),
            token_weights=factors(weights),
        )
        return None if edit.only_reads else edit

    @property
    def only_reads(self) -> bool:
        """Tell whether the maps stay as they are, whatever the probes read of them."""
        parts = self.map_row, self.replaced, self.keep, self.blended, self.token_weights
        return all(part is None for part in parts)

    def then_read(self, probes: Sequence[Probe]) -> LinearEdit:
        """Add probes that see the maps after the token weights: M̂ diag(w) c = M̂ (w c)."""
        weights = self.token_weights
        if weights is not None:
            probes = [(weights[: len(c), :, None] * c, add) for c, add in probes]
        return replace(self, probes=(*self.probes, *probes))

    def __call__(self, probs: Tensor) -> Tensor:
        """Apply the definition to maps that are written down. probs: rows i q k → as probs"""
        n = len(probs)
        edited = probs.clone() if self.map_row is None else probs[self.map_row[:n]]
        if self.replaced:
            rows, mappers = self.replaced
            edited[rows] = edited[rows] @ mappers[:, None].to(probs.dtype)
        if self.keep is not None:
            edited *= self.keep[:n, None, None]
        if self.blended:
            rows, mappers = self.blended
            edited[rows] += probs[0] @ mappers[:, None].to(probs.dtype)
        for columns, add in self.probes:
            add(edited.mean(dim=1) @ columns.to(probs.dtype))
        weights = self.token_weights
        return edited if weights is None else edited * weights[:n, None, None].to(probs.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute M̂ V without the maps. q: b i q d. k, v: b i k d → b i q d"""
        if self.probes:
            self.read(q, k)
        v = v if self.token_weights is None else scale_tokens(self.token_weights, v)
        values = v if self.keep is None else scale_tokens(self.keep, v)
        if self.replaced:
            values = values.clone()
            for row, of_row in zip(self.replaced.rows, self.replaced.values(v), strict=True):
                values[row] = of_row
        q_r, k_r = q, k
        if self.map_row is not None:
            q_r, k_r = (take_rows(t, self.map_row[: len(v)]) for t in (q, k))
        out = scaled_dot_product_attention(q_r, k_r, values)
        if self.blended:
            q_0, k_0 = (t[:1].expand(len(self.blended.rows), -1, -1, -1) for t in (q, k))
            joined = scaled_dot_product_attention(q_0, k_0, self.blended.values(v))
            if out.requires_grad:
                out = out.clone()  # it is written to below, and the kernel's gradient reads it
            for row, of_row in zip(self.blended.rows, joined, strict=True):
                out[row].add_(of_row)  # with += it is written twice
        return out

    def read(self, q: Tensor, k: Tensor) -> None:
        """Give every probe M̂ @ columns: a sum of a map's columns is one more value to attend to."""
        columns = torch.cat([columns for columns, _ in self.probes], dim=-1)  # rows k c
        rows, d = len(columns), q.shape[-1]
        unweighted = replace(self, token_weights=None, probes=())
        q, k = at_least_float32(q[:rows]), at_least_float32(k[:rows])
        maps = []
        for part in columns.split(d, dim=-1):
            values = torch.zeros_like(k)  # as wide as k: the fused kernels require it
            values[..., : part.shape[-1]] = part[:, None]
            maps.append(unweighted.attend(q, k, values)[..., : part.shape[-1]].mean(dim=1))
        sums = torch.cat(maps, dim=-1).split([c.shape[-1] for c, _ in self.probes], dim=-1)
        for (_, add), of_probe in zip(self.probes, sums, strict=True):
            add(of_probe)


def map_rows(from_source: Tensor, device: Device) -> Tensor:
    """Return the index of the map that each row uses: 0, the source's, where `from_source`.

    from_source: b, bool → 2·b: unconditional rows follow the prompts and use their own.
    """
    rows = torch.arange(2 * len(from_source), device=from_source.device)
    rows[: len(from_source)][from_source] = 0
    return rows.to(device)


def take_rows(t: Tensor, rows: Tensor) -> Tensor:
    """Return t[rows], laid out in memory as b q i d, as t is. t: b i q d → n i q d"""
    return t.transpose(1, 2).index_select(0, rows).transpose(1, 2)  # four times as fast as t[rows]


def scale_tokens(factors: Tensor, v: Tensor) -> Tensor:
    """Compute diag(factors) V of each row. factors: at least b k, v: b i k d → as v"""
    return (at_least_float32(v) * factors[: len(v), None, :, None]).to(v.dtype)
