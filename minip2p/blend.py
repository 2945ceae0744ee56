"""LocalBlend: keep the source wherever no pixel looks at the chosen words (Hertz et al. 2022, 4).

Shapes:  b prompts, row 0 the source · k 77 tokens · q pixels of the coarse feature map ·
         h w height and width of the latents
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .align import LENGTH, Alignment, Prompt
from .attention import Device, Size
from .errors import check, is_number
from .mask import read_mask


@dataclass(frozen=True)
class LocalBlend:
    """Keep the source's latents wherever no pixel looks at the chosen words.

    The mask is where the words' attention, summed over the calls so far and over the layers of the
    coarse size, exceeds `threshold` of its maximum, in the source or in the edit. Attention is read
    before weights, so that a silenced word still has its place; google's code reads it after them.

    words: of the source or the edited prompt; each stands for its counterpart in the other, too.
    start: the fraction of the UNet calls after which blending starts.
    subtract: words whose places are taken out of the mask.
    mask: your own instead of `words`, h w, black where the source stays: see mask.py.
    """

    words: str | Sequence[str] = ()
    threshold: float = 0.3
    start: float = 0.0
    subtract: str | Sequence[str] = ()
    mask: Any = None

    def __post_init__(self) -> None:
        for name in ("words", "subtract"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value
            check(
                isinstance(value, Sequence) and all(isinstance(v, str) for v in value),
                f"A blend's {name} are a word or a list of words, not {value!r}.",
            )
            object.__setattr__(self, name, tuple(value))
        check(
            bool(self.words) != (self.mask is not None),
            "A LocalBlend needs at least one word or a mask, and not both.",
        )
        check(
            self.mask is None or not self.subtract,
            "A LocalBlend subtracts words from words, not from a mask.",
        )
        check(
            is_number(self.threshold) and 0 <= self.threshold < 1,
            f"A blend's threshold must be from 0 to below 1, not {self.threshold!r}.",
        )
        check(
            is_number(self.start) and 0 <= self.start <= 1,
            f"A blend starts at a fraction of the UNet calls from 0 to 1, not at {self.start!r}.",
        )


class Blend:
    """A LocalBlend of row `r` of a run, with the sums of its words' maps and the mask they make."""

    def __init__(
        self,
        spec: LocalBlend,
        r: int,
        prompts: Sequence[Prompt],
        alignment: Alignment,
        latent_size: Size,
        coarse: Size,
        device: Device,
    ):
        self.spec, self.r, self.latent_size, self.coarse = spec, r, latent_size, coarse
        self.text = prompts[r].text
        self.maps: Tensor | None = None  # b q 2, summed over layers and calls
        self.mask: Tensor | None = None  # h w, bool: a mask of the user's own
        self.columns: Tensor | None = None  # b k 2: the tokens of `words`, and those of `subtract`
        if spec.mask is None:
            self.columns = word_columns(spec, r, prompts, alignment).to(device)
        else:
            self.mask = read_mask(spec.mask, latent_size).to(device)

    @property
    def acts(self) -> bool:
        """Tell whether there is a mask, or a word that one of the two prompts has."""
        return self.columns is None or bool(self.columns[..., 0].any())

    def add(self, maps: Tensor) -> None:
        """Add the maps of one layer at one UNet call. maps: b q 2"""
        if self.maps is None:
            self.maps = maps.clone()
        else:
            self.maps += maps  # in place: a recorded call (fast.record) adds to the same tensor

    def __call__(self, latents: Tensor, is_last: bool) -> Tensor:
        """Return the latents with x_e ← x_source + mask (x_e - x_source). latents: b 4 h w"""
        latents, mask = latents.clone(), self.where()
        latents[self.r] = torch.where(mask, latents[self.r], latents[0])
        if is_last and not mask.any():  # only once a run: it waits for the GPU
            warnings.warn(
                f"The blend's mask is empty, so the edit {self.text!r} is the source's picture: "
                "try another threshold, or other words to blend or to subtract.",
                stacklevel=2,
            )
        return latents

    def where(self) -> Tensor:
        """Return the mask of pixels where the edit may differ from the source. → h w, bool"""
        if self.mask is not None:
            return self.mask
        assert self.maps is not None
        words, subtract = self.maps[[0, self.r]].mT.unflatten(2, self.coarse).unbind(dim=1)  # 2 h w
        words = F.max_pool2d(words[:, None], 3, stride=1, padding=1)[:, 0]
        return self.above(words) & ~self.above(subtract)

    def above(self, maps: Tensor) -> Tensor:
        """Return where either map, source's or edit's, exceeds its threshold. maps: 2 h w → h w"""
        maps = F.interpolate(maps[:, None], size=self.latent_size, mode="nearest")[:, 0]
        highest = maps.amax(dim=(1, 2), keepdim=True)
        return (maps > self.spec.threshold * highest).any(dim=0)


def word_columns(
    spec: LocalBlend, r: int, prompts: Sequence[Prompt], alignment: Alignment
) -> Tensor:
    """Return which tokens a blend looks at, in rows 0 and r. → b k 2: `words`, `subtract`"""
    columns = torch.zeros(len(prompts), LENGTH, 2, dtype=torch.float32, device="cpu")
    for n, words in enumerate((spec.words, spec.subtract)):
        for word in words:
            at_source, at_target = alignment.carry(word, prompts[0], prompts[r])
            columns[0, at_source, n] = columns[r, at_target, n] = 1
    return columns
