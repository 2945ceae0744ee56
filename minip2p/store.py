"""AttentionStore, the hook that keeps attention maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import saved
from .align import LENGTH, Prompt, check_words
from .attention import Hook, Layer
from .errors import check
from .linear_edit import LinearEdit

PLACES = "down", "mid", "up"


class AttentionStore(Hook):
    """Keep attention maps, averaged over heads and summed over the UNet calls. Changes nothing.

    places: which of "down", "mid", "up". cross, self_attention: which kinds. max_pixels: of the
    largest feature map whose maps are kept; None means 32 x 32, or the coarse size where that is
    larger. A self-attention map has the square of it as entries.
    words: keep only these words' maps, for which no whole map is written down; None: every token's.
    before_edit: the maps as each prompt had them, not as the edit left them.
    by_call: keep every UNet call's maps apart.

    Everything is float32 and belongs to the store alone: no later edit reaches it.
    """

    def __init__(
        self,
        *,
        places: Sequence[str] = PLACES,
        cross: bool = True,
        self_attention: bool = False,
        max_pixels: int | None = None,
        words: Sequence[str] | None = None,
        before_edit: bool = False,
        by_call: bool = False,
    ):
        self.places = _tuple(places)
        for place in self.places:
            check(place in PLACES, f"There is no place {place!r}, only: {', '.join(PLACES)}.")
        self.max_pixels, self.before_edit, self.by_call = max_pixels, before_edit, by_call
        self.kinds = {True: cross, False: self_attention}
        self.words = None if words is None else _tuple(words)
        self.begin([], (0, 0))

    def begin(
        self, prompts: Sequence[Prompt], size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        """Forget the last run. size: the feature map that average() and word() take by default.

        Raises ValueError if one of `words` is in no prompt.
        """
        self.prompts, self.size, self.calls = list(prompts), size, 0
        self.maps: dict[Layer, list[Tensor]] = {}  # one sum, or with by_call one map for each call
        self.columns: Tensor | None = None  # b k n: which tokens each of `words` is
        if self.words is not None and prompts:
            check_words(self.words, prompts)
            self.columns = torch.zeros(
                len(prompts), LENGTH, len(self.words), dtype=torch.float32, device=device
            )
            for row, prompt in enumerate(prompts):
                for column, word in enumerate(self.words):
                    self.columns[row, prompt.find(word), column] = 1

    def at(self, call: int, calls: int, timestep: int) -> Hook | None:
        self.calls += 1
        return self

    def applies_to(self, layer: Layer) -> bool:
        pixels, coarse = layer.height * layer.width, self.size[0] * self.size[1]
        most = max(32 * 32, coarse) if self.max_pixels is None else self.max_pixels
        return self.kinds[layer.is_cross] and layer.place in self.places and pixels <= most

    def __call__(self, probs: Tensor, layer: Layer) -> Tensor:
        maps = probs.mean(dim=1)  # b q k
        if self.columns is not None and layer.is_cross:
            maps = maps @ self.columns.to(maps.dtype)
        self.add(layer, maps)
        return probs

    def linear(self, layer: Layer) -> LinearEdit | None:
        if self.columns is None or not layer.is_cross or self.before_edit:
            return None
        return LinearEdit(probes=((self.columns, partial(self.add, layer)),))

    def add(self, layer: Layer, maps: Tensor) -> None:
        """maps: b q n, of one UNet call."""
        kept = self.maps.setdefault(layer, [])
        if self.by_call or not kept:
            kept.append(maps.clone())
        else:
            kept[0] += maps

    def average(
        self,
        size: tuple[int, int] | None = None,
        places: Sequence[str] | None = None,
        is_cross: bool = True,
        call: int | None = None,
    ) -> Tensor:
        """Mean over the layers of one size and over the UNet calls, or of one `call`. → b h w k

        k: the prompt's tokens, the store's `words`, or for self-attention all h·w pixels.
        size: of the feature map; by default the coarse one, 16 x 16 for a square SD picture.
        Raises ValueError, listing what there is, if no such map was kept.
        """
        size, places = size or self.size, _tuple(places or self.places)
        pair = isinstance(size, Sequence) and len(size) == 2
        check(pair, f"A size is a pair (height, width), not {size!r}.")

        def kind(layer: Layer) -> tuple[str, bool, int, int]:
            return layer.place, layer.is_cross, layer.height, layer.width

        asked = [(place, is_cross, *size) for place in places]
        kept = [maps for layer, maps in self.maps.items() if kind(layer) in asked]
        names = {True: "cross", False: "self"}
        all_kinds = sorted({kind(layer) for layer in self.maps})
        listing = ", ".join(f"{place} {h}x{w} {names[c]}" for place, c, h, w in all_kinds)
        check(
            kept,
            f"No {names[is_cross]}-attention map of {size[0]}x{size[1]} in {', '.join(places)} was "
            f"kept, only: {listing or 'nothing'}.",
        )
        check(
            call is None or (self.by_call and call in range(self.calls)),
            f"The maps of call {call} were not kept apart: store with by_call=True and ask for "
            f"0 to {self.calls - 1}.",
        )
        each = [torch.stack(m).sum(dim=0) / self.calls if call is None else m[call] for m in kept]
        return torch.stack(each).mean(dim=0).unflatten(1, tuple(size))

    def prompt(self, number: int) -> Prompt:
        """The prompt of that row. Raises ValueError if there is none."""
        check(
            isinstance(number, int) and 0 <= number < len(self.prompts),
            f"There is no prompt number {number!r}: the store has {len(self.prompts)}, "
            "counted from 0.",
        )
        return self.prompts[number]

    def word(self, word: str, prompt: int = 0, **which: Any) -> Tensor:
        """How much each pixel looks at `word`, summed over its tokens; `which` as in average. → h w

        Raises ValueError if the prompt has no such word.
        """
        text = self.prompt(prompt)
        check_words([word], [text])
        is_cross = which.get("is_cross", True)
        check(is_cross, "A word has maps in cross-attention only: leave out is_cross=False.")
        maps = self.average(**which)[prompt]
        if self.words is None:
            return maps[..., text.find(word)].sum(dim=-1)
        # Another spelling of a kept word means the same tokens.
        kept = [n for n, known in enumerate(self.words) if text.find(known) == text.find(word)]
        check(kept, f"Only the words {', '.join(self.words)} were kept, not {word!r}.")
        return maps[..., kept[0]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors, with all that `load` needs to answer as it does.

        Of each layer and size there is one tensor, n b q k: n is 1, or with by_call the calls.
        Raises ValueError if there is nothing to save, or the file can't be written.
        """
        check(self.maps, "This store has seen no run yet, so there are no maps to save.")
        options = {
            **{"places": self.places, "cross": self.kinds[True], "words": self.words},
            **{"self_attention": self.kinds[False], "max_pixels": self.max_pixels},
            **{"before_edit": self.before_edit, "by_call": self.by_call},
        }
        about = {
            **{"options": options, "size": self.size, "calls": self.calls},
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "sites": [astuple(layer) for layer in self.maps],
        }
        tensors = {_name(layer): torch.stack(maps) for layer, maps in self.maps.items()}
        saved.write(path, "AttentionStore", about, tensors)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> AttentionStore:
        """The store that `save` wrote, on the CPU. Raises ValueError for any other file."""
        about, tensors = saved.read(path, "AttentionStore")
        try:
            store = AttentionStore(**about["options"])
            h, w = about["size"]
            store.begin([_prompt(**prompt) for prompt in about["prompts"]], (h, w))
            store.calls = int(about["calls"])
            layers = [Layer(*layer) for layer in about["sites"]]
            store.maps = {layer: list(tensors.pop(_name(layer))) for layer in layers}
            fit = not tensors and all(map(store._fits, layers))
        except (AttributeError, KeyError, TypeError, ValueError):
            fit = False
        check(fit, f"{path} is damaged: its maps are not what it says of them.")
        return store

    def _fits(self, layer: Layer) -> bool:
        """Whether the maps of that layer are as many and as large as they can be."""
        pixels, maps = layer.height * layer.width, self.maps[layer]
        columns = (LENGTH if self.words is None else len(self.words)) if layer.is_cross else pixels
        right = len(self.prompts), pixels, columns
        most = self.calls if self.by_call else min(self.calls, 1)
        return 1 <= len(maps) <= most and all(one.shape == right for one in maps)


def _name(layer: Layer) -> str:
    """Of its tensor in a file."""
    return f"{layer.name} {layer.height}x{layer.width}"


def _prompt(text: str, ids: list[int], spans: list[list[int]], cut: int) -> Prompt:
    """What became lists in JSON, as it was."""
    return Prompt(text, tuple(ids), tuple((start, stop) for start, stop in spans), cut)


def _tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
