"""Measure how far an edited picture is from its source, where its words look and elsewhere.

Shapes:  h w height and width, of a map in cells, of a picture in pixels
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..align import Prompt
from ..attention import Hook, Layer
from ..errors import UserError
from ..metrics import iou, psnr, squared_error, ssim, to_pixels
from ..store import AttentionStore
from ..words import bare, folded

THRESHOLD = 0.3  # words look at a pixel above this share of their map's maximum, as in LocalBlend
VISIBLE = 0.05  # a pixel has changed if one of its channels, 0 to 1, has by more
HIGHEST = 60.0  # dB, for equal pictures

Words = tuple[Sequence[str], Sequence[str]]  # of the source and of the edited prompt


class WordMaps(AttentionStore):
    """Keep where some words look, in the coarse maps alone, as LocalBlend does.

    It reads every second UNet call: where words look changes slowly, and reading takes time.
    """

    def at(self, call: int, calls: int, timestep: int) -> Hook | None:
        return None if call % 2 else super().at(call, calls, timestep)

    def applies_to(self, layer: Layer) -> bool:
        return layer.is_cross and (layer.height, layer.width) == self.size


def changed_words(source: Prompt, target: Prompt, weighted: Sequence[str]) -> Words:
    """Return the words that an edit changes or weighs, in the source and in the edited prompt.

    Two spellings of a word are the same word. weighted: the words that have weights. Words that
    the model does not see are left out, and so are those whose tokens other words already have.
    """
    old, new = ([bare(word) for word in prompt.text.split()] for prompt in (source, target))
    spellings = [folded(word) for word in old], [folded(word) for word in new]
    matcher = difflib.SequenceMatcher(None, *spellings, autojunk=False)
    words: tuple[list[str], list[str]] = list(weighted), list(weighted)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag != "equal":
            words[0].extend(old[a:b])
            words[1].extend(new[c:d])
    return distinct(words[0], source), distinct(words[1], target)


def distinct(words: Sequence[str], prompt: Prompt) -> list[str]:
    """Return the words that have tokens in the prompt which no word before them has."""
    kept, tokens = [], set[int]()
    for word in words:
        try:
            positions = prompt.find(word)
        except UserError:  # it stands beyond the tokens that the model sees
            continue
        if not tokens.issuperset(positions):
            tokens.update(positions)
            kept.append(word)
    return kept


def measure(
    source: Image.Image, edited: Image.Image, store: AttentionStore | None, r: int, words: Words
) -> dict[str, float]:
    """Measure picture r of a run. Return figures by name, without those that have no meaning.

    changed: the share of pixels that differ visibly. psnr_ (dB, at most 60) and ssim_ (Wang et al.
    2004) inside and outside of where `words` look. looks_at: the share of the picture that is.
    looks_source, looks_edit: the mean attention of the words in either. looks_iou: how far both
    places agree. words: none without a store.
    """
    x, y = to_pixels(source), to_pixels(edited)
    figures = {"changed": ((x - y).abs().amax(dim=1) > VISIBLE).float().mean().item()}
    maps = {
        name: torch.stack([store.word(word, row) for word in row_words]).sum(dim=0).cpu()
        for name, row, row_words in zip(("source", "edit"), (0, r), words, strict=True)
        if store is not None and row_words
    }
    if maps:
        places = torch.stack([looked_at(m, x.shape[-2:]) for m in maps.values()])
        inside = places.any(dim=0)
        figures |= {"looks_at": inside.float().mean().item()} | compare(x, y, inside)
        figures |= {f"looks_{name}": m.mean().item() for name, m in maps.items()}
        if len(maps) == 2 and inside.any():
            figures["looks_iou"] = iou(*places)
    return {name: round(value, 5) for name, value in figures.items()}


def looked_at(word_map: Tensor, size: Sequence[int]) -> Tensor:
    """Return where the map of words, widened by a cell, exceeds its threshold. → bool h w"""
    wide = F.max_pool2d(word_map[None, None].float(), 3, stride=1, padding=1)
    wide = F.interpolate(wide, size=tuple(size), mode="nearest")[0, 0]
    return wide > THRESHOLD * wide.max()


def compare(x: Tensor, y: Tensor, inside: Tensor) -> dict[str, float]:
    """Return PSNR and SSIM inside and outside. x, y: 1 3 h w in [0, 1]. inside: bool h w"""
    errors, likeness = squared_error(x, y)[0], ssim(x, y).mean(dim=1)[0]  # h w
    figures = {}
    for name, side in (("inside", inside), ("outside", ~inside)):
        if side.any():
            figures[f"psnr_{name}"] = psnr(errors[side].mean(), HIGHEST)
            figures[f"ssim_{name}"] = likeness[side].mean().item()
    return figures
