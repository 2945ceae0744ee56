"""The Prompt-to-Prompt edits: word swap, refinement and re-weighting.

What a user writes (WordSwap, Refine, Reweight) is bound to the prompts once a run. The result, a
PromptToPrompt, is the hook that gives each attention layer its linear map at every UNet call:

    M̂_e = (M_source S + M_e diag(o)) diag(w)

    cross-attention              S = mapper diag(a α)    o = 1 - a α    w = the words' weights
    self-attention, if coarse    S = α identity          o = 1 - α      w = 1

with α_j = 1 while token j is in its window, else 0, and a_j = 1 where the source has token j too
(`exists`).

Shapes:  b prompts, row 0 the source · k 77 tokens · h w height and width of the latents
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

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
from .attention import Device, Hook, Layer, Size
from .blend import Blend, LocalBlend
from .errors import check, describe, is_number
from .linear_edit import LinearEdit, map_rows

# --- what a user writes --------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptEdit:
    """Act as WordSwap or as Refine, whichever fits the prompts; it is what "auto" means.

    cross_replace_steps: the window in which cross-attention is replaced: a fraction of the UNet
    calls, a (start, end) pair, or a dict from words to either, with "default_" for all others.
    self_replace_steps: the window in which coarse self-attention, which holds the layout, is the
    source's. None takes the windows that the model recommends, SD's are 0.8 and 0.4.
    For an alignment of your own, override `align`.
    """

    cross_replace_steps: Windows | None = None
    self_replace_steps: Window | None = None
    local_blend: LocalBlend | None = None

    def __post_init__(self) -> None:
        check(
            isinstance(self.local_blend, LocalBlend | None),
            f"local_blend is a LocalBlend, not {describe(self.local_blend)}.",
        )

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        """Align as WordSwap where both prompts have as many words, else as Refine."""
        is_swap = len(source.text.split()) == len(target.text.split())
        return (replacement if is_swap else refinement)(source, target)

    def named_words(self) -> list[tuple[str, str]]:
        """List the words that the edit names, each after the setting that names it."""
        windows, blend = self.cross_replace_steps, self.local_blend
        named = []
        if isinstance(windows, Mapping):
            named += [("cross_replace_steps", word) for word in windows if word != DEFAULT]
        if blend:
            named += [("local_blend", word) for word in blend.words]
            named += [("subtract", word) for word in blend.subtract]
        return named


@dataclass(frozen=True)
class WordSwap(PromptEdit):
    """Exchange words: the edited picture looks at its words where the source looked at theirs.

    Both prompts need the same number of words (Hertz et al. 2022, section 3.2, "word swap").
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
        for word, weight in self.weights.items():
            check(
                is_number(weight),
                f"The weight of {word!r} must be one finite number, not {weight!r}.",
            )
        check(
            isinstance(self.edit, PromptEdit),
            f"A Reweight comes on top of a WordSwap or Refine, not of {describe(self.edit)}.",
        )

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        """Align the prompts as the edit beneath does."""
        return self.edit.align(source, target)

    def named_words(self) -> list[tuple[str, str]]:
        """List the words that the edit names, each after the setting that names it."""
        return [*(("weights", word) for word in self.weights), *self.edit.named_words()]


def base(edit: PromptEdit | Reweight) -> PromptEdit:
    """Return the edit without weights on top of it."""
    return edit.edit if isinstance(edit, Reweight) else edit


# What `generate` takes as `edit`; a list has one for each edited prompt, None to leave it alone.
EditOfPrompt = PromptEdit | Reweight | None
Edits = EditOfPrompt | Literal["auto"] | Sequence[EditOfPrompt]


# --- the hook they become ------------------------------------------------------------------------


class PromptToPrompt(Hook):
    """The edits of one run, bound to its prompts. Row r of the tensors describes prompt r.

    A row that nothing edits has zeros, and weights of one. It sums its blends' maps over the run,
    so `bind` makes a new one for each run.
    """

    def __init__(self, prompts: Sequence[Prompt], coarse: Size, device: Device):
        b = len(prompts)
        self.prompts, self.coarse, self.device = prompts, coarse, device
        with torch.device("cpu"):
            self.mapper = torch.zeros(b, LENGTH, LENGTH, dtype=torch.float32)
            self.exists = torch.zeros(b, LENGTH, dtype=torch.float32)
            self.windows = torch.zeros(b, LENGTH, 2, dtype=torch.float64)  # of each token
            self.self_windows = torch.zeros(b, 2, dtype=torch.float64)
            self.weights = torch.ones(b, LENGTH, dtype=torch.float32)
            self.everywhere = torch.zeros(b, 1, dtype=torch.bool)  # weights act outside windows
        self.blends: list[Blend] = []
        # Calls with the same windows open share their linear maps: cross- and self-attention's.
        self.cache: dict[bytes, tuple[LinearEdit | None, LinearEdit | None]] = {}
        # Those of one call, in the copy of this object that `at` makes.
        self.cross: LinearEdit | None = None
        self.self_attn: LinearEdit | None = None
        self.call, self.calls = 0, 0

    def begin(self, prompts: Sequence[Prompt], coarse: Size, device: Device) -> None:
        """Raise UserError unless the run has the prompts and the size of the edit."""
        check(
            list(prompts) == list(self.prompts) and coarse == self.coarse,
            "This edit is bound to other prompts or to another size: give generate the WordSwap, "
            "Refine or Reweight that it was made of.",
        )

    def at(self, call: int, calls: int, timestep: int) -> Hook:
        """Return a copy that knows this call and its linear maps."""

        def is_open(windows: Tensor) -> Tensor:
            first, end = bounds(windows, calls).unbind(-1)
            return (first <= call) & (call < end)

        alpha, self_open = is_open(self.windows), is_open(self.self_windows)  # b k, b
        key = torch.cat([alpha, self_open[:, None]], dim=1).numpy().tobytes()
        if key not in self.cache:  # a window has opened or closed
            share = alpha * self.exists  # a α
            weights = self.weights.where(alpha | self.everywhere, 1)
            source = self.mapper * share[:, None]
            cross = LinearEdit.from_dense(source, 1 - share, weights, self.device)
            self_attn = LinearEdit(map_row=map_rows(self_open, self.device))
            self.cache[key] = cross, self_attn if self_open.any() else None
        hook = copy.copy(self)
        hook.cross, hook.self_attn = self.cache[key]
        hook.call, hook.calls = call, calls
        return hook

    def applies_to(self, layer: Layer) -> bool:
        return self.linear(layer) is not None

    def linear(self, layer: Layer) -> LinearEdit | None:
        if not layer.is_cross:
            is_coarse = layer.height * layer.width <= self.coarse[0] * self.coarse[1]
            return self.self_attn if is_coarse else None
        if (layer.height, layer.width) != self.coarse:
            return self.cross
        probes = tuple((b.columns, b.add) for b in self.blends if b.columns is not None)
        return replace(self.cross or LinearEdit(), probes=probes) if probes else self.cross

    def after_step(self, latents: Tensor) -> Tensor:
        for blend in self.blends:
            if self.call in calls_of((blend.spec.start, 1.0), self.calls):
                latents = blend(latents, is_last=self.call == self.calls - 1)
        return latents


# --- from the edit to the hook ------------------------------------------------------------------


def bind(
    edit: Edits,
    prompts: Sequence[Prompt],
    *,
    latent_size: Size,
    coarse: Size,
    defaults: Mapping[str, Any],
    device: Device = "cpu",
) -> PromptToPrompt | None:
    """Bind an edit to the prompts of a run: align every pair of prompts, find every named word.

    latent_size: h w of the latents. coarse: h w of the largest feature maps whose self-attention is
    replaced, where LocalBlend looks too. defaults: the windows that the model recommends.
    Raises UserError where the edit does not fit the prompts.
    """
    if edit is None:
        return None
    check(prompts[1:], "An edit needs an edited prompt after the source prompt, and there is none.")
    rows = [
        Row(r, row_edit, row_edit.align(prompts[0], prompts[r]))
        for r, row_edit in enumerate(edit_of_each(edit, len(prompts) - 1), 1)
        if row_edit is not None
    ]
    check_named_words(rows, prompts)
    hook = PromptToPrompt(prompts, coarse, device)
    for row in rows:
        fill_row(hook, row, defaults)
        is_plain = type(row.edit) in (PromptEdit, WordSwap, Refine)
        if is_plain and prompts[row.r].ids == prompts[0].ids:
            warnings.warn(
                f"Edit {row.r} changes nothing: {prompts[row.r].text!r} is the source's prompt, "
                "and it has no weights. Give it another prompt, or a Reweight.",
                stacklevel=2,
            )
        spec = base(row.edit).local_blend
        if spec is not None:
            blend = Blend(spec, row.r, prompts, row.alignment, latent_size, coarse, device)
            hook.blends += [blend] if blend.acts else []
    return hook


class Row(NamedTuple):
    """The edit of prompt r, and how its tokens are aligned with the source's."""

    r: int
    edit: PromptEdit | Reweight
    alignment: Alignment


def edit_of_each(edit: Edits, n: int) -> Sequence[EditOfPrompt]:
    """Return the edits of n prompts. Raises UserError unless `edit` is one for all or n of them."""
    edit = PromptEdit() if isinstance(edit, str) and edit == "auto" else edit
    edits: list[Any] = list(edit) if isinstance(edit, list | tuple) else [edit] * n
    for row_edit in edits:
        check(
            not isinstance(row_edit, Hook),
            f"{describe(row_edit)} is a hook and not an edit of a prompt: give it as hooks=[...], "
            "or in place of a bound edit the WordSwap, Refine or Reweight that it was made of.",
        )
        check(
            isinstance(row_edit, EditOfPrompt),
            'edit is "auto", a WordSwap, Refine or Reweight, or a list with one of these or None '
            f"for each edited prompt, not {describe(row_edit)}.",
        )
    check(
        len(edits) == n,
        f"A list of edits has one for each edited prompt: {n}, not {len(edits)}.",
    )
    return edits


def check_named_words(rows: Sequence[Row], prompts: Sequence[Prompt]) -> None:
    """Check every word that the edits name; warn of prompts on which a word does not act.

    The edits of several prompts may name a word that only some of these prompts have. Raises
    UserError for a word that none of them has, or that acts on none.
    """
    source = prompts[0]
    rows_naming: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for setting_and_word in row.edit.named_words():
            rows_naming.setdefault(setting_and_word, []).append(row)
    for (setting, word), naming in rows_naming.items():
        check_words([word], [source, *(prompts[row.r] for row in naming)])
        lacking = []
        for row in naming:
            in_source, in_target = row.alignment.carry(word, source, prompts[row.r])
            # A blend masks by the source's words too.
            if not in_target and not (in_source and setting in ("local_blend", "subtract")):
                lacking.append(prompts[row.r].text)
        check(
            len(lacking) < len(naming),
            f"The word {word!r} is in the source prompt alone and nothing takes its place: "
            f"name a word of {prompts[naming[0].r].text!r}.",
        )
        for text in dict.fromkeys(lacking):
            message = f"{setting}: {word!r} does not act on {text!r}, which has no {word!r}."
            warnings.warn(message, stacklevel=2)


def fill_row(hook: PromptToPrompt, row: Row, defaults: Mapping[str, Any]) -> None:
    """Write the edit of one prompt into its row of the hook's tensors."""
    r, edit, alignment = row
    weights: Mapping[str, float] = {}
    if isinstance(edit, Reweight):
        hook.everywhere[r] = edit.everywhere
        weights = edit.weights
    cross, self_window = base(edit).cross_replace_steps, base(edit).self_replace_steps
    cross = defaults["cross_replace_steps"] if cross is None else cross
    self_window = defaults["self_replace_steps"] if self_window is None else self_window

    source, target = hook.prompts[0], hook.prompts[r]
    windows = token_windows(cross, source, target, alignment)
    hook.mapper[r], hook.exists[r] = alignment.mapper, alignment.exists
    hook.windows[r] = torch.tensor(windows, dtype=torch.float64, device="cpu")
    hook.self_windows[r] = torch.tensor(window(self_window), dtype=torch.float64, device="cpu")
    hook.weights[r] = token_weights(weights, source, target, alignment)
