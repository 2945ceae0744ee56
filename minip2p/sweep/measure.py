"""How far an edited picture is from its source, inside and outside of where its words look.

Shapes:  h w height and width, of a map in cells, of a picture in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..attention import Hook
from ..store import AttentionStore

THRESHOLD = 0.3  # of a map's maximum, above which words look there: LocalBlend's
VISIBLE = 0.05  # a pixel has changed if one of its channels, 0 to 1, has by more
HIGHEST = 60.0  # dB, of pictures that are the same

Words = tuple[Sequence[str], Sequence[str]]  # of the source and of the edited prompt


class Looks(AttentionStore):
    """Keep where the given words look, from the coarse maps alone, as LocalBlend does.

    From every second UNet call: where words look changes slowly, and reading maps takes time.
    """

    def at(self, call: int, calls: int, timestep: int) -> Hook | None:
        return None if call % 2 else super().at(call, calls, timestep)

    def applies_to(self, layer: Any) -> bool:
        return layer.is_cross and (layer.height, layer.width) == self.size


def measure(
    source: Image.Image, edited: Image.Image, store: AttentionStore | None, r: int, words: Words
) -> dict[str, float]:
    """The measurements of picture r of a run, by name; those that make no sense are left out.

    changed: the share of pixels that differ visibly. psnr_ (dB, at most 60) and ssim_ (Wang et al.
    2004) inside and outside of where `words` look. looks_at: the share of the picture that is.
    looks_source, looks_edit: the mean attention of the words in either. looks_iou: of both places.
    """
    x, y = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        for image in (source, edited)
    )
    found = {"changed": ((x - y).abs().amax(dim=1) > VISIBLE).float().mean().item()}
    rows = zip((0, r), words, strict=True)
    maps = [attention(store, row, some) for row, some in rows]
    there = [m for m in maps if m is not None]
    if there:
        places = torch.stack([where(m, x.shape[-2:]) for m in there])
        inside = places.any(dim=0)
        found |= {"looks_at": inside.float().mean().item()} | compared(x, y, inside)
        names = ("looks_source", "looks_edit")
        found |= {n: m.mean().item() for n, m in zip(names, maps, strict=True) if m is not None}
        if len(there) == 2:
            found["looks_iou"] = (
                places.all(dim=0).sum().float() / inside.sum().clamp(min=1)
            ).item()
    return {name: round(value, 5) for name, value in found.items()}


def attention(store: AttentionStore | None, row: int, words: Sequence[str]) -> Tensor | None:
    """The sum of the words' maps, h w; None without words."""
    if store is None or not words:
        return None
    return torch.stack([store.word(word, row) for word in words]).sum(dim=0).cpu()


def where(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Where a map of words, widened by a cell, exceeds the threshold of its maximum. → bool h w"""
    wide = F.max_pool2d(maps[None, None].float(), 3, stride=1, padding=1)
    wide = F.interpolate(wide, size=tuple(size), mode="nearest")[0, 0]
    return wide > THRESHOLD * wide.max()


def compared(x: Tensor, y: Tensor, inside: Tensor) -> dict[str, float]:
    """PSNR and SSIM on both sides of a border. x, y: 1 3 h w in [0, 1]. inside: bool h w"""
    error, similar = (x - y).square().mean(dim=1)[0], ssim(x, y).mean(dim=1)[0]  # h w
    found = {}
    for name, side in (("inside", inside), ("outside", ~inside)):
        if side.any():
            found[f"psnr_{name}"] = min(HIGHEST, -10 * error[side].mean().log10().item())
            found[f"ssim_{name}"] = similar[side].mean().item()
    return found


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Wang et al. 2004, eq. 13, around each pixel, in a Gaussian of 11 x 11. x, y: b c h w"""
    taps = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    c = 5 * x.shape[0] * x.shape[1]
    every = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[None]  # 1 5·b·c h w
    every = F.pad(every, (5, 5, 5, 5), mode="reflect")
    every = F.conv2d(every, taps.view(1, 1, 1, -1).expand(c, -1, -1, -1), groups=c)
    every = F.conv2d(every, taps.view(1, 1, -1, 1).expand(c, -1, -1, -1), groups=c)
    mean_x, mean_y, xx, yy, xy = every[0].unflatten(0, (5, *x.shape[:2]))
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    )
