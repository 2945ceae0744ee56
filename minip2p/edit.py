"""The Prompt-to-Prompt edits: word swap, refinement and re-weighting.

What a user writes (WordSwap, Refine, Reweight) is bound to the prompts once a run. The result, a
PromptToPrompt, says at every UNet call which linear map each attention layer applies:

    M̂_e = (M_source S + M_e diag(o)) diag(w)

    cross-attention              S = mapper diag(a α)    o = 1 - a α    w = the words' weights
    self-attention, if coarse    S = α identity          o = 1 - α      w = 1

with α 1 in its window and 0 outside, and a 1 for each token that the source has, too (`exists`).

Shapes:  b prompts, row 0 the source · k 77 tokens · h w height and width of the latents
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .align import (
    DEFAULT,
    LENGTH,
    Alignment,
    Prompt,
    Window,
    Windows,
    bounds,
    calls_of,
    check_words,
    refinement,
    replacement,
    token_weights,
    token_windows,
    window,
)
from .attention import Device, Edit, Mix, Site, Size, Taken
from .blend import Blend, LocalBlend
from .check import check, describe, is_number

# --- what a user writes --------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptEdit:
    """What WordSwap and Refine share. By itself, "auto": whichever of the two fits the prompts.

    cross_replace_steps: the window in which cross-attention is replaced: a fraction of the UNet
    calls, a (start, end) pair, or a dict from words to either, with "default_" for all others.
    self_replace_steps: the window in which coarse self-attention, the layout, is the source's.
    None takes the model's own recommendation, else 0.8 and 0.4.
    For an alignment of your own, override `align`.
    """

    cross_replace_steps: Windows | None = None
    self_replace_steps: Window | None = None
    local_blend: LocalBlend | None = None

    def __post_init__(self) -> None:
        blend, is_one = self.local_blend, isinstance(self.local_blend, LocalBlend | None)
        check(is_one, f"local_blend is a LocalBlend, not {describe(blend)}.")

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        """WordSwap where both prompts have as many words, Refine where not."""
        as_many = len(source.text.split()) == len(target.text.split())
        return (replacement if as_many else refinement)(source, target)


@dataclass(frozen=True)
class WordSwap(PromptEdit):
    """Exchange words: the edited picture looks at its words where the source looked at theirs.

    Needs as many words in both prompts (Hertz et al. 2022, section 3.2, "word swap").
    """

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        return replacement(source, target)


@dataclass(frozen=True)
class Refine(PromptEdit):
    """Add or remove words: tokens that both prompts share are looked at where the source's were.

    (Hertz et al. 2022, section 3.2, "adding a new phrase").
    """

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        return refinement(source, target)


@dataclass(frozen=True)
class Reweight:
    """Turn words up or down: each one's column of the attention map is multiplied by its weight.

    weights: from words to factors; 0 silences a word, a negative one pushes away from it. Maps are
    not renormalised (Hertz et al. 2022, section 3.2, "attention re-weighting", and their code).
    edit: the edit it comes on top of. To weigh a prompt against itself, give the same prompt twice.
    everywhere: the weights act at every UNet call; with False only while the word is in its window
    of `cross_replace_steps`, as in the paper's code.
    """

    weights: Mapping[str, float]
    edit: PromptEdit = PromptEdit()
    everywhere: bool = True

    def __post_init__(self) -> None:
        check(
            isinstance(self.weights, Mapping) and self.weights,
            f'Reweight takes a dict from words to weights, {{"word": 2.0}}, not {self.weights!r}.',
        )
        for word, one in self.weights.items():
            check(is_number(one), f"The weight of {word!r} must be one finite number, not {one!r}.")
        check(
            isinstance(self.edit, PromptEdit),
            f"A Reweight comes on top of a WordSwap or Refine, not of {describe(self.edit)}.",
        )


# What `generate` takes as `edit`; a list has one for each edited prompt, None to leave it alone.
OfPrompt = PromptEdit | Reweight | None
Edits = Edit | OfPrompt | Literal["auto"] | Sequence[OfPrompt]


# --- what a run is given -------------------------------------------------------------------------


class PromptToPrompt(Edit):
    """The edits of one run. Row r of its tensors is prompt r: what it takes over, and when.

    A row that nothing edits has zeros, and weights of one. Make a new one for each run.
    """

    def __init__(self, prompts: Sequence[Prompt], coarse: Size, device: Device):
        b = len(prompts)
        self.prompts, self.coarse, self.device = prompts, coarse, device
        self.mapper, self.exists = torch.zeros(b, LENGTH, LENGTH), torch.zeros(b, LENGTH)
        self.windows = torch.zeros(b, LENGTH, 2, dtype=torch.float64)  # of each token
        self.layout_windows = torch.zeros(b, 2, dtype=torch.float64)
        self.weights = torch.ones(b, LENGTH)
        self.everywhere = torch.zeros(b, 1, dtype=torch.bool)  # weights outside of windows, too
        self.blends: list[Blend] = []
        self.made: dict[bytes, tuple[Mix | None, Mix | None]] = {}
        self.cross: Mix | None = None  # this and what follows: of a call, in a copy that at() makes
        self.layout: Mix | None = None
        self.call, self.calls = 0, 0

    def at(self, call: int, calls: int) -> Edit:
        """A copy of it that knows this call, and its linear maps."""

        def inside(windows: Tensor) -> Tensor:
            first, end = bounds(windows, calls).unbind(-1)
            return (first <= call) & (call < end)

        alpha, layout = inside(self.windows), inside(self.layout_windows)  # b k, b
        state = torch.cat([alpha, layout[:, None]], dim=1).numpy().tobytes()
        if state not in self.made:  # a window has opened or closed
            taken = alpha * self.exists  # a α
            weights = self.weights.where(alpha | self.everywhere, 1)
            cross = as_mix(self.mapper * taken[:, None], 1 - taken, weights, self.device)
            self.made[state] = cross, Mix(looks(layout, self.device)) if layout.any() else None
        now = copy.copy(self)
        now.cross, now.layout = self.made[state]
        now.call, now.calls = call, calls
        return now

    def wants(self, site: Site) -> bool:
        return self.mix(site) is not None

    def mix(self, site: Site) -> Mix | None:
        if not site.is_cross:
            small = site.height * site.width <= self.coarse[0] * self.coarse[1]
            return self.layout if small else None
        if (site.height, site.width) != self.coarse:
            return self.cross
        reads = tuple((b.columns, b.add) for b in self.blends if b.columns is not None)
        return replace(self.cross or Mix(), reads=reads) if reads else self.cross

    def blend(self, latents: Tensor) -> Tensor:
        for blend in self.blends:
            if self.call in calls_of((blend.spec.start, 1.0), self.calls):
                latents = blend(latents, is_last=self.call == self.calls - 1)
        return latents


def as_mix(source: Tensor, own: Tensor, weights: Tensor, device: Device) -> Mix | None:
    """M̂_r = (M_0 source_r + M_r diag(own_r)) diag(weights_r) of every row; None: all as they are.

    source: b k k. own, weights: b k. Maps that are used as they are, as the source's own, get no
    matrix: it costs time, and TF32 would round a product with an identity.
    """
    takes, keeps = source.flatten(1).any(dim=1), own.any(dim=1)
    only, same = takes & ~keeps, (source == torch.eye(own.shape[1])).flatten(1).all(dim=1)
    own = own.where(~only[:, None], 1)

    def taken(rows: Tensor) -> Taken | None:
        numbers = rows.nonzero()[:, 0].tolist()
        return Taken(numbers, source[rows].to(device)) if numbers else None

    def factors(numbers: Tensor) -> Tensor | None:  # blank rows' are ones
        both = torch.cat([numbers, torch.ones_like(numbers)])
        return None if (both == 1).all() else both.to(device)

    mix = Mix(
        looks(only, device) if only.any() else None,
        taken(only & ~same),
        factors(own),
        taken(takes & keeps),
        factors(weights),
    )
    return None if mix == Mix() else mix


def looks(at_source: Tensor, device: Device) -> Tensor:
    """Whose map rows look through, and as many blank ones after them. at_source: b, bool → 2·b"""
    rows = torch.arange(2 * len(at_source))
    rows[: len(at_source)][at_source] = 0
    return rows.to(device)


# --- from the one to the other -------------------------------------------------------------------


def bind(
    edit: Edits,
    prompts: Sequence[Prompt],
    *,
    latent_size: Size,
    coarse: Size,
    device: Device = "cpu",
    defaults: dict[str, Any] | None = None,
) -> Edit | None:
    """Tie an edit to the prompts of a run. Every word is found, and every mistake, here.

    latent_size: h w of the latents. coarse: h w of the largest feature maps whose self-attention is
    replaced, where LocalBlend looks too. defaults: the model's recommended windows.
    Raises ValueError where the edit does not fit the prompts.
    """
    if edit is None or isinstance(edit, Edit):
        return edit
    source, *targets = prompts
    check(targets, "An edit needs an edited prompt after the source prompt, and there is none.")
    edits = one_each(edit, len(targets))
    bound = PromptToPrompt(prompts, coarse, device)
    for r, one in enumerate(edits, 1):
        if one is None:
            continue
        # An edit that several prompts share may name words of any of them.
        shared = [source, *(t for t, other in zip(targets, edits, strict=True) if other is one)]
        alignment = fill_row(bound, r, one, shared, defaults or {})
        blend = (one.edit if isinstance(one, Reweight) else one).local_blend
        if blend:
            check_words([*blend.words, *blend.subtract], shared)
            bound.blends.append(Blend(blend, r, prompts, alignment, latent_size, coarse, device))
    return bound


def one_each(edit: Any, n: int) -> Sequence[OfPrompt]:
    """The edits of n prompts. Raises ValueError unless `edit` is one for all of them or n."""
    edit = PromptEdit() if isinstance(edit, str) and edit == "auto" else edit
    edits = [edit] * n if isinstance(edit, PromptEdit | Reweight) else edit
    check(
        isinstance(edits, list | tuple),
        'edit is "auto", a WordSwap, Refine or Reweight, a list with one for each edited '
        f"prompt, or an object of a subclass of minip2p.Edit, not {describe(edit)}.",
    )
    for one in edits:
        hook = ", which goes beside an edit in minip2p.Chain([edit, hook])"
        check(
            isinstance(one, OfPrompt),
            "An edited prompt's edit is a WordSwap, Refine, Reweight or None, "
            f"not {describe(one)}{hook if isinstance(one, Edit) else ''}.",
        )
    as_many = len(edits) == n
    check(as_many, f"A list of edits has one for each edited prompt: {n}, not {len(edits)}.")
    return edits


def fill_row(
    bound: PromptToPrompt, r: int, edit: PromptEdit | Reweight, shared: list[Prompt], defaults: dict
) -> Alignment:
    """Write the edit of prompt r into its row. shared: the source and all prompts it is for."""
    weights: Mapping[str, float] = {}
    if isinstance(edit, Reweight):
        bound.everywhere[r] = edit.everywhere
        weights, edit = edit.weights, edit.edit
    cross, layout = edit.cross_replace_steps, edit.self_replace_steps
    cross = defaults.get("cross_replace_steps", 0.8) if cross is None else cross
    layout = defaults.get("self_replace_steps", 0.4) if layout is None else layout

    source, target = bound.prompts[0], bound.prompts[r]
    of_windows = [w for w in cross if w != DEFAULT] if isinstance(cross, Mapping) else []
    named = [*of_windows, *weights]
    check_words(named, shared)
    for word in named:
        check(
            any(edit.align(source, t).carry(word, source, t)[1] for t in shared[1:]),
            f"The word {word!r} is in the source prompt alone and nothing takes its place: "
            f"name a word of {target.text!r}.",
        )
    alignment = edit.align(source, target)
    windows = token_windows(cross, source, target, alignment)
    bound.mapper[r], bound.exists[r] = alignment.mapper, alignment.exists
    bound.windows[r] = torch.tensor(windows, dtype=torch.float64)
    bound.layout_windows[r] = torch.tensor(window(layout), dtype=torch.float64)
    bound.weights[r] = token_weights(weights, source, target, alignment)
    return alignment
