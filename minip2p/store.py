"""Keep the attention maps of a run: the hook AttentionStore."""

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
from .errors import check, is_whole
from .linear_edit import LinearEdit

PLACES = "down", "mid", "up"


class AttentionStore(Hook):
    """Keep attention maps, averaged over heads and summed over the UNet calls. Changes nothing.

    places: the parts of the UNet, of "down", "mid" and "up". cross, self_attention: the kinds of
    attention. max_pixels: of the largest feature map whose maps are kept; None means 32 x 32, or
    the coarse size where that is larger. A self-attention map has the square of it as entries.
    words: keep only these words' maps, and write down no whole map; None: every token's.
    before_edit: the maps that each prompt had before the edit changed them.
    by_call: keep every UNet call's maps apart.
    Raises UserError for an option that makes no sense.

    The maps are float32 copies, so that no later edit changes them.
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
        self.options: dict[str, Any] = {
            "places": _tuple(places),
            "cross": cross,
            "self_attention": self_attention,
            "max_pixels": max_pixels,
            "words": None if words is None else _tuple(words),
            "before_edit": before_edit,
            "by_call": by_call,
        }
        for name in ("cross", "self_attention", "before_edit", "by_call"):
            value = self.options[name]
            check(isinstance(value, bool), f"{name} is True or False, not {value!r}.")
        check(
            max_pixels is None or is_whole(max_pixels),
            f"max_pixels is a whole number or None, not {max_pixels!r}.",
        )
        for place in _tuple(places):
            check(place in PLACES, f"There is no place {place!r}, only: {', '.join(PLACES)}.")
        self.places, self.words = self.options["places"], self.options["words"]
        self.max_pixels, self.before_edit, self.by_call = max_pixels, before_edit, by_call
        self.kinds = {True: cross, False: self_attention}
        self.begin([], (0, 0))

    def begin(
        self, prompts: Sequence[Prompt], size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        """Forget the last run. size: of the feature map that average() and word() take by default.

        Raises UserError if one of `words` is in no prompt.
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
        """Keep the maps of one layer at one UNet call. maps: b q n"""
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
        """Average over the layers of one size and the UNet calls, or take one `call`. → b h w k

        k: the prompt's tokens, the store's `words`, or for self-attention all h·w pixels.
        size: of the feature map; by default the coarse one, 16 x 16 for a square SD picture.
        Raises UserError, with a list of the maps, if no such map was kept.
        """
        size, places = size or self.size, _tuple(places or self.places)
        pair = isinstance(size, Sequence) and len(size) == 2
        check(pair, f"A size is a pair (height, width), not {size!r}.")

        kept = [
            maps
            for layer, maps in self.maps.items()
            if (layer.is_cross, layer.height, layer.width) == (is_cross, *size)
            and layer.place in places
        ]
        names = {True: "cross", False: "self"}
        layers = {f"{m.place} {m.height}x{m.width} {names[m.is_cross]}" for m in self.maps}
        check(
            kept,
            f"No {names[is_cross]}-attention map of {size[0]}x{size[1]} in {', '.join(places)} was "
            f"kept, only: {', '.join(sorted(layers)) or 'nothing'}.",
        )
        check(
            call is None or (self.by_call and call in range(self.calls)),
            f"The maps of call {call} were not kept apart: store with by_call=True and ask for "
            f"0 to {self.calls - 1}.",
        )
        each = [torch.stack(m).sum(dim=0) / self.calls if call is None else m[call] for m in kept]
        return torch.stack(each).mean(dim=0).unflatten(1, tuple(size))

    def prompt(self, number: int) -> Prompt:
        """Return the prompt of a row. Raises UserError if there is none."""
        check(
            isinstance(number, int) and 0 <= number < len(self.prompts),
            f"There is no prompt number {number!r}: the store has {len(self.prompts)}, "
            "counted from 0.",
        )
        return self.prompts[number]

    def word(self, word: str, prompt: int = 0, **which: Any) -> Tensor:
        """Return how much each pixel looks at `word`, the sum over its tokens. → h w

        which: as for `average`. Raises UserError if the prompt has no such word.
        """
        row = self.prompt(prompt)
        check_words([word], [row])
        is_cross = which.get("is_cross", True)
        check(is_cross, "A word has maps in cross-attention only: leave out is_cross=False.")
        maps = self.average(**which)[prompt]
        if self.words is None:
            return maps[..., row.find(word)].sum(dim=-1)
        # Another spelling of a kept word means the same tokens.
        kept = [n for n, known in enumerate(self.words) if row.find(known) == row.find(word)]
        check(kept, f"Only the words {', '.join(self.words)} were kept, not {word!r}.")
        return maps[..., kept[0]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors. Each layer at each size has one tensor, n b q k.

        n is 1, or with by_call the number of calls. Raises UserError if there is nothing to save,
        or the file can't be written.
        """
        check(self.maps, "This store has seen no run yet, so there are no maps to save.")
        content = {
            "options": self.options,
            "size": self.size,
            "calls": self.calls,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "sites": [astuple(layer) for layer in self.maps],  # layers, in files of every version
        }
        tensors = {_name(layer): torch.stack(maps) for layer, maps in self.maps.items()}
        saved.write(path, "AttentionStore", content, tensors)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> AttentionStore:
        """Read a store that `save` wrote, on the CPU. Raises UserError for any other file."""
        content, tensors = saved.read(path, "AttentionStore")
        try:
            store = AttentionStore(**content["options"])
            h, w = content["size"]
            store.begin([_prompt(**prompt) for prompt in content["prompts"]], (h, w))
            store.calls = content["calls"]
            layers = [_layer(*layer) for layer in content["sites"]]
            store.maps = {layer: list(tensors.pop(_name(layer))) for layer in layers}
            is_sound = all(is_whole(n) and n > 0 for n in (h, w, store.calls)) and not tensors
            is_sound = is_sound and all(map(store._fits, layers))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            is_sound = False
        check(is_sound, f"{path} is damaged: its maps do not fit its settings.")
        return store

    def _fits(self, layer: Layer) -> bool:
        """Tell whether the maps of a layer have the number, shape and values that they can have."""
        pixels, maps = layer.height * layer.width, self.maps[layer]
        columns = (LENGTH if self.words is None else len(self.words)) if layer.is_cross else pixels
        shape = len(self.prompts), pixels, columns
        most = self.calls if self.by_call else 1
        return 1 <= len(maps) <= most and all(
            m.shape == shape and m.dtype in (torch.float32, torch.float64) and m.isfinite().all()
            for m in maps
        )


def _name(layer: Layer) -> str:
    """Name the tensor of a layer in a file."""
    return f"{layer.name} {layer.height}x{layer.width}"


def _layer(name: str, place: str, is_cross: bool, height: int, width: int) -> Layer:
    """Build a layer from JSON. Raises UserError if it is none."""
    is_sound = isinstance(name, str) and place in PLACES and isinstance(is_cross, bool)
    check(is_sound and all(is_whole(n) and n > 0 for n in (height, width)), "damaged")
    return Layer(name, place, is_cross, height, width)


def _prompt(text: str, ids: list[int], spans: list[list[int]], cut: int) -> Prompt:
    """Build a prompt from JSON. Raises UserError if it is none."""
    check(isinstance(text, str) and len(ids) == LENGTH and is_whole(cut), "damaged")
    check(0 <= cut <= len(text) and all(is_whole(i) and i >= 0 for i in ids), "damaged")
    pairs = tuple((start, stop) for start, stop in spans)
    numbers = [n for pair in pairs for n in pair]
    check(all(is_whole(n) and 0 <= n <= len(text) for n in numbers), "damaged")
    check(len(pairs) <= LENGTH - 2, "damaged")
    return Prompt(text, tuple(ids), pairs, cut)


def _tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one word or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
