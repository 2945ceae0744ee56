"""The Prompt-to-Prompt edits: word swap, refinement, re-weighting, and the local blend.

What a user writes (WordSwap, Refine, Reweight) is bound to the prompts once a run. The result, a
PromptToPrompt, says at every UNet call which linear map each attention layer applies:

    M̂_e = M_source S + M_e diag(o)

    cross-attention    S = mapper diag(a α w)    o = (1 - a α) w
    self-attention     S = identity              o = 0               in its window, at coarse sites

with, for each token, α 1 in its window and 0 outside, a its `exists` and w its weight.

Shapes:  b prompts, row 0 the source · e edited prompts, b - 1 · k 77 tokens · n blends
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .align import (
    DEFAULT,
    LENGTH,
    Alignment,
    Prompt,
    Window,
    Windows,
    calls_of,
    check_words,
    refinement,
    replacement,
    token_weights,
    token_windows,
    window,
)
from .attention import Edit, Mix, Rows, Site


def is_number(value: object) -> bool:
    """Whether it is a real number of any library, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def describe(value: object) -> str:
    """What a message says was given: short values themselves, of others the kind."""
    if isinstance(value, type):
        return f"the class {value.__name__} without ()"
    short = len(repr(value)) <= 40 and "<" not in repr(value)
    return repr(value) if short else f"an object of type {type(value).__name__}"


# --- what a user writes --------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalBlend:
    """Keep the source's latents outside the places that the given words look at.

    The mask is where the words' attention, summed over the calls so far and over the layers of the
    coarse size, exceeds `threshold` of its maximum, in the source or in the edit (Hertz et al.
    2022, section 4, "local editing").

    words: of the source or the edited prompt; each stands for its counterpart in the other prompt
    too.
    start: the fraction of the UNet calls after which blending starts.
    subtract: words whose places are taken out of the mask.
    mask: your own mask instead of `words`: h w, in latent or in picture pixels, above 0.5 is
    edited.
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
            if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"A blend's {name} are a word or a list of words, not {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if bool(self.words) == (self.mask is not None):
            raise ValueError("A LocalBlend needs at least one word or a mask, and not both.")
        if self.subtract and self.mask is not None:
            raise ValueError("A LocalBlend subtracts words from words, not from a mask.")
        if not is_number(self.threshold) or not 0 <= self.threshold < 1:
            raise ValueError(
                f"A blend's threshold must be from 0 to below 1, not {self.threshold!r}."
            )
        if not is_number(self.start) or not 0 <= self.start <= 1:
            raise ValueError(
                "A blend starts at a fraction of the UNet calls from 0 to 1, "
                f"not at {self.start!r}."
            )


@dataclass(frozen=True)
class PromptEdit:
    """What WordSwap and Refine share. By itself, "auto": whichever of the two fits the prompts.

    cross_replace_steps: the window in which cross-attention is replaced: a fraction of the UNet
    calls, a (start, end) pair, or a dict from words to either, with "default_" for all other
    tokens.
    self_replace_steps: the window in which coarse self-attention, the layout, is the source's.
    None takes the model's own recommendation, else 0.8 and 0.4.
    """

    cross_replace_steps: Windows | None = None
    self_replace_steps: Window | None = None
    local_blend: LocalBlend | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.local_blend, LocalBlend | None):
            raise ValueError(f"local_blend is a LocalBlend, not {describe(self.local_blend)}.")

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        """WordSwap where both prompts have as many words, Refine where not."""
        as_many = len(source.text.split()) == len(target.text.split())
        return (replacement if as_many else refinement)(source, target)


@dataclass(frozen=True)
class WordSwap(PromptEdit):
    """Exchange words: the edited picture looks at its words where the source looked at theirs.

    Needs as many words in both prompts (Hertz et al. 2022, section 3.2, "word swap"); for the
    windows see PromptEdit.
    """

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        return replacement(source, target)


@dataclass(frozen=True)
class Refine(PromptEdit):
    """Add or remove words: tokens that both prompts share are looked at where the source's were.

    (Hertz et al. 2022, section 3.2, "adding a new phrase"); for the windows see PromptEdit.
    """

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        return refinement(source, target)


@dataclass(frozen=True)
class Reweight:
    """Turn words up or down: each one's column of the attention map is multiplied by its weight.

    weights: from words to factors; 0 silences a word, a negative one pushes away from it. Maps are
    not renormalised, as in the paper's code. The weights act at every UNet call, inside and outside
    of the windows of `edit` (Hertz et al. 2022, section 3.2, "attention re-weighting").
    edit: the edit it comes on top of. To weigh a prompt against itself, give the same prompt twice.
    """

    weights: Mapping[str, float]
    edit: PromptEdit = PromptEdit()

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise ValueError(
                'Reweight takes a dict from words to weights, {"word": 2.0}, '
                f"not {self.weights!r}."
            )
        for word, weight in self.weights.items():
            if not is_number(weight) or not math.isfinite(weight):
                raise ValueError(
                    f"The weight of {word!r} must be one finite number, not {weight!r}."
                )
        if not isinstance(self.edit, PromptEdit):
            raise ValueError(
                f"A Reweight comes on top of a WordSwap or Refine, not of {describe(self.edit)}."
            )


# What `generate` takes as `edit`; a list has one for each edited prompt, None to leave it alone.
Edits = (
    Edit | PromptEdit | Reweight | Literal["auto"] | Sequence[PromptEdit | Reweight | None] | None
)


# --- what a run is given -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The edit of one prompt, in tokens."""

    prompt: Prompt
    alignment: Alignment
    windows: list[tuple[float, float]]  # of cross-attention, one for each token
    self_window: tuple[float, float]
    weights: Tensor  # k
    blend: LocalBlend | None


def bind(
    edit: Edits,
    prompts: Sequence[Prompt],
    *,
    latent_size: tuple[int, int],
    coarse: tuple[int, int],
    device: torch.device | str = "cpu",
    defaults: Mapping[str, Any] | None = None,
) -> Edit | None:
    """Tie an edit to the prompts of a run. Every word is found, and every mistake, here.

    latent_size: h w of the latents. coarse: h w of the largest feature maps whose self-attention is
    replaced, where LocalBlend looks too. defaults: the model's recommended windows.
    Raises ValueError where the edit does not fit the prompts.
    """
    if edit is None or isinstance(edit, Edit):
        return edit
    source, targets = prompts[0], prompts[1:]
    if not targets:
        raise ValueError(
            "An edit needs an edited prompt after the source prompt, and there is none."
        )
    if edit == "auto":
        edit = PromptEdit()
    if isinstance(edit, PromptEdit | Reweight):
        edit = [edit] * len(targets)
    elif not isinstance(edit, list | tuple):
        raise ValueError(
            'edit is "auto", a WordSwap, Refine or Reweight, a list with one for each edited '
            f"prompt, or an object of a subclass of minip2p.Edit, not {describe(edit)}."
        )
    if len(edit) != len(targets):
        raise ValueError(
            f"A list of edits has one for each edited prompt: {len(targets)}, not {len(edit)}."
        )
    rows = []
    for target, one in zip(targets, edit, strict=True):
        # An edit that several prompts share may name words of any of them.
        sharing = [source, *(t for t, other in zip(targets, edit, strict=True) if other is one)]
        rows.append(
            None if one is None else _bind_row(one, source, target, sharing, defaults or {})
        )
    return PromptToPrompt(source, rows, latent_size, coarse, device)


def _bind_row(
    edit: PromptEdit | Reweight,
    source: Prompt,
    target: Prompt,
    sharing: Sequence[Prompt],
    defaults: Mapping[str, Any],
) -> Row:
    weights: Mapping[str, float] = {}
    if isinstance(edit, Reweight):
        weights, edit = edit.weights, edit.edit
    if not isinstance(edit, PromptEdit):
        raise ValueError(
            "An edited prompt's edit is a WordSwap, Refine, Reweight or None, "
            f"not {describe(edit)}."
        )
    cross, self_ = edit.cross_replace_steps, edit.self_replace_steps
    cross = defaults.get("cross_replace_steps", 0.8) if cross is None else cross
    self_ = defaults.get("self_replace_steps", 0.4) if self_ is None else self_

    alignment = edit.align(source, target)
    named = (
        [*(w for w in cross if w != DEFAULT), *weights] if isinstance(cross, Mapping) else weights
    )
    check_words(list(named), sharing)
    for word in named:
        if not any(edit.align(source, t).carry(word, source, t)[1] for t in sharing[1:]):
            raise ValueError(
                f"The word {word!r} is in the source prompt alone and nothing takes its place: "
                f"name a word of {target.text!r}."
            )
    if blend := edit.local_blend:
        check_words([*blend.words, *blend.subtract], sharing)
    return Row(
        target,
        alignment,
        token_windows(cross, source, target, alignment),
        window(self_),
        token_weights(weights, source, target, alignment),
        blend,
    )


class PromptToPrompt(Edit):
    """The edits of one run, row by row; None leaves a row alone. Make a new one for each run."""

    def __init__(
        self,
        source: Prompt,
        rows: Sequence[Row | None],
        latent_size: tuple[int, int],
        coarse: tuple[int, int],
        device: torch.device | str = "cpu",
    ):
        self.source, self.rows, self.coarse, self.device = source, rows, coarse, device
        self.blends = [
            _Blend(source, row, r, len(rows) + 1, latent_size, coarse, device)
            for r, row in enumerate(rows, 1)
            if row and row.blend
        ]
        self.windows = sorted({w for row in rows if row for w in (*row.windows, row.self_window)})
        self.made: dict[tuple[bool, ...], tuple[Mix | None, Mix | None]] = {}

    def at(self, call: int, calls: int) -> Edit | None:
        blends = [b for b in self.blends if call in calls_of((b.blend.start, 1.0), calls)]
        inside = tuple(call in calls_of(w, calls) for w in self.windows)
        if inside not in self.made:  # a window has opened or closed
            self.made[inside] = self._cross(call, calls), self._self(call, calls)
        return _Call(
            *self.made[inside],
            tuple((b.columns, b.add) for b in self.blends if b.columns is not None),
            self.coarse,
            blends,
        )

    def explain(self, calls: int) -> str:
        """A table for each edited prompt: whose attention a token takes over, at which calls."""
        tables = [f"Source: {self.source.text}"]
        for r, row in enumerate(self.rows, 1):
            if row is None:
                tables.append(f"Edit {r}: without control.")
                continue
            lines = [("token", "looks where the source looks at", "in the UNet's calls", "")]
            for j in range(1, row.prompt.end):
                parts = (row.alignment.mapper[:, j] * row.alignment.exists[j]).tolist()
                names = [
                    _token(self.source, i)
                    if part == 1
                    else f"1/{1 / part:.0f} {_token(self.source, i)}"
                    for i, part in enumerate(parts)
                    if part
                ]
                when = _calls(row.windows[j], calls) if names else ""
                weight = "" if row.weights[j] == 1 else f"weight {row.weights[j]:g} in all"
                source = " + ".join(names) or "(nothing: new)"
                lines.append((_token(row.prompt, j), source, when, weight))
            size = f"{self.coarse[0]} x {self.coarse[1]}"
            layout = f"(self-attention up to {size})", _calls(row.self_window, calls), ""
            lines += [("", "", "", ""), ("layout", *layout)]
            if row.blend:
                what = ", ".join(row.blend.words) or "your own mask"
                if row.blend.subtract:
                    what += f" without {', '.join(row.blend.subtract)}"
                lines.append(("blend", f"({what})", _calls((row.blend.start, 1.0), calls), ""))
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            text = ("  ".join(map(str.ljust, line, widths)) for line in lines)
            table = "\n".join(f"  {line}".rstrip() for line in text)
            tables.append(f"Edit {r}: {row.prompt.text}\n\n{table}")
        return "\n\n".join(tables)

    def _cross(self, call: int, calls: int) -> Mix | None:
        """S = mapper diag(a α w) and o = (1 - a α) w of every row."""
        own, source = (
            torch.ones(len(self.rows) + 1, LENGTH),
            torch.zeros(len(self.rows) + 1, LENGTH, LENGTH),
        )
        for r, row in enumerate(self.rows, 1):
            if row:
                inside = {w: float(call in calls_of(w, calls)) for w in set(row.windows)}
                alpha = torch.tensor([inside[w] for w in row.windows]) * row.alignment.exists
                source[r] = row.alignment.mapper * (alpha * row.weights)
                own[r] = (1 - alpha) * row.weights
        own_rows, source_rows = (
            [r for r, t in enumerate(matrices) if t.any()] for matrices in (own, source)
        )
        if not source_rows and bool((own == 1).all()):
            return None
        own, source = own[own_rows].to(self.device), source[source_rows].to(self.device)
        return Mix(
            self._rows(own_rows),
            None if bool((own == 1).all()) else own,
            self._rows(source_rows) if source_rows else None,
            source if source_rows else None,
        )

    def _self(self, call: int, calls: int) -> Mix | None:
        """S = identity and o = 0 of the rows that are in their window."""
        inside = [
            r
            for r, row in enumerate(self.rows, 1)
            if row and call in calls_of(row.self_window, calls)
        ]
        outside = [r for r in range(len(self.rows) + 1) if r not in inside]
        return Mix(self._rows(outside), source_rows=self._rows(inside)) if inside else None

    def _rows(self, rows: list[int]) -> Rows:
        """A slice where it can be: it copies nothing."""
        if rows == list(range(rows[0], rows[-1] + 1)):
            return slice(rows[0], rows[-1] + 1 if rows[-1] < len(self.rows) else None)
        return torch.tensor(rows, device=self.device)


def _token(prompt: Prompt, i: int) -> str:
    if 0 < i < prompt.end:
        return prompt.text[slice(*prompt.spans[i - 1])]
    return "<begin>" if i == 0 else "<end>"


def _calls(value: Window, calls: int) -> str:
    inside = calls_of(value, calls)
    return f"{inside[0] + 1} to {inside[-1] + 1} of {calls}" if inside else f"none of {calls}"


@dataclass(frozen=True)
class _Call(Edit):
    """What one UNet call needs of a PromptToPrompt."""

    cross: Mix | None
    self_: Mix | None
    reads: tuple  # of the blends, at coarse cross-attention
    coarse: tuple[int, int]
    blends: Sequence[_Blend]

    def wants(self, site: Site) -> bool:
        return self.mix(site) is not None

    def __call__(self, probs: Tensor, site: Site) -> Tensor:
        mix = self.mix(site)
        return probs if mix is None else mix(probs)

    def mix(self, site: Site) -> Mix | None:
        if not site.is_cross:
            small = site.height * site.width <= self.coarse[0] * self.coarse[1]
            return self.self_ if small else None
        if self.reads and (site.height, site.width) == self.coarse:
            return replace(self.cross or Mix(), reads=self.reads)
        return self.cross

    def blend(self, latents: Tensor) -> Tensor:
        for blend in self.blends:
            latents = blend(latents)
        return latents


class _Blend:
    """A LocalBlend of row `r` of a run: the sums of its words' maps, and the mask they make."""

    def __init__(
        self,
        source: Prompt,
        row: Row,
        r: int,
        b: int,
        latent_size: tuple[int, int],
        coarse: tuple[int, int],
        device: torch.device | str,
    ):
        assert row.blend
        self.blend, self.r, self.latent_size, self.coarse = row.blend, r, latent_size, coarse
        self.mask: Tensor | None = None  # h w, bool: a mask of the user's own
        self.columns: Tensor | None = None  # b k 2
        self.maps: Tensor | None = None  # b q 2, summed over layers and calls
        if row.blend.mask is not None:
            self.mask = _own_mask(row.blend.mask, latent_size).to(device)
            return
        # Column 0: the tokens of `words` in rows 0 and r. Column 1: those of `subtract`.
        self.columns = torch.zeros(b, LENGTH, 2, device=device)
        for column, words in enumerate((row.blend.words, row.blend.subtract)):
            for word in words:
                at_source, at_target = row.alignment.carry(word, source, row.prompt)
                self.columns[0, at_source, column] = self.columns[r, at_target, column] = 1
        if not self.columns[..., 0].any():
            raise ValueError(
                f"None of the blend's words, {', '.join(row.blend.words)}, is in "
                f"{row.prompt.text!r}, which has: {', '.join(row.prompt.words)}."
            )

    def add(self, maps: Tensor) -> None:
        """maps: b q 2, of one layer at one UNet call."""
        self.maps = maps if self.maps is None else self.maps + maps

    def __call__(self, latents: Tensor) -> Tensor:
        """x_e ← x_source + mask (x_e - x_source)"""
        mask = self._word_mask() if self.mask is None else self.mask  # h w
        latents = latents.clone()
        latents[self.r] = torch.where(mask, latents[self.r], latents[0])
        return latents

    def _word_mask(self) -> Tensor:
        assert self.maps is not None
        words, subtract = self.maps[[0, self.r]].mT.unflatten(2, self.coarse).unbind(dim=1)  # 2 h w
        words = F.max_pool2d(words[:, None], 3, stride=1, padding=1)[:, 0]
        return self._above(words) & ~self._above(subtract)

    def _above(self, maps: Tensor) -> Tensor:
        """Where either map, source's or edit's, exceeds the threshold of its own maximum."""
        maps = F.interpolate(maps[:, None], size=self.latent_size, mode="nearest")[:, 0]
        highest = maps.amax(dim=(1, 2), keepdim=True)
        return (maps > self.blend.threshold * highest).any(dim=0)


def _own_mask(mask: Any, latent_size: tuple[int, int]) -> Tensor:
    """A user's mask, of the latents' size or a whole multiple of it → bool h w"""
    h, w = latent_size
    if hasattr(mask, "convert"):  # a PIL image
        mask = np.asarray(mask.convert("L"))
    try:
        mask = torch.as_tensor(mask)
        mask = mask.float() / (255 if mask.dtype == torch.uint8 else 1)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"A blend's mask is a PIL image, an array or a tensor, not {describe(mask)}."
        ) from None
    if (
        mask.ndim != 2
        or not mask.numel()
        or mask.shape[0] % h
        or mask.shape[1] % w
        or mask.shape[0] * w != mask.shape[1] * h
    ):
        raise ValueError(
            f"A blend's mask must be {h} x {w} (height x width), as the latents, or a multiple "
            f"of it, as the picture, not {' x '.join(map(str, mask.shape))}."
        )
    return F.adaptive_avg_pool2d(mask[None], latent_size)[0] > 0.5
