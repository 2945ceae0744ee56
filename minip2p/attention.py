"""Attention, and the one line where Prompt-to-Prompt reaches into it.

    probs = softmax(q kᵀ / √d)      who looks at what: the attention map
    probs = edit(probs, site)       Prompt-to-Prompt (Hertz et al. 2022, algorithm 1)
    out   = probs v

An edit is a hook that sees every prompt's map, row 0 the source's, and returns the maps to use
instead. It travels as an argument, unet(x, t, context, edit), so nothing is registered and nothing
is undone.

Shapes:  b batch, one row a prompt · i heads · d width · q query pixels, h·w ·
         k keys, 77 tokens or again pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from .align import LENGTH, Prompt, check_words

PLACES = "down", "mid", "up"


@dataclass(frozen=True)
class Site:
    """The address of one attention layer, and the size of the feature map passing through."""

    name: str  # "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    place: str  # "down", "mid" or "up"
    is_cross: bool  # True: pixels look at words (attn2). False: pixels look at pixels (attn1).
    height: int = 0  # of the feature map; 0 as long as none has come
    width: int = 0


def coarse_size(height: int, width: int, levels: int) -> tuple[int, int]:
    """Size of the coarse feature maps, those of the layout, for latents of height x width.

    The coarsest of the `levels` at which the UNet attends whose shorter side is at least 16: 16 x
    16 for a 512 x 512 picture of SD 1.x, 24 x 24 at 768 x 768.
    """
    for _ in range(levels - 1):
        half = (height + 1) // 2, (width + 1) // 2
        if min(half) < 16:
            break
        height, width = half
    return height, width


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
        return probs

    def mix(self, site: Site) -> Mix | None:
        """The same edit as a linear map, for which no map is written down; None: it has none."""
        return None

    def blend(self, latents: Tensor) -> Tensor:
        """latents: b 4 h w, after the scheduler's step → the latents to go on with."""
        return latents


Rows = slice | Tensor  # which rows of a batch: a range, or row numbers


@dataclass(frozen=True)
class Mix:
    """An edit as a linear map on the source's map M_0 and a row's own map M_r, for each row r.

        M̂_r = M_0 S_r + M_r diag(o_r)

    A row that is not in `own_rows` has o = 0, one not in `source_rows` has S = 0. The source is in
    `own_rows`, with o = 1.
    """

    own_rows: Rows = field(default_factory=lambda: slice(0, None))  # n rows, ascending
    own: Tensor | None = None  # n k: o of each of those rows; None: all ones
    source_rows: Rows | None = None  # m rows; None: no row
    source: Tensor | None = None  # m k k: S of each of those rows; None: the identity
    first: int = 0  # the source's row
    # (columns: b k n, add) pairs: add(M̂ @ columns: b q n, mean over heads) is called each time.
    reads: tuple[tuple[Tensor, Callable[[Tensor], None]], ...] = ()

    @property
    def only_reads(self) -> bool:
        """Whether every row keeps its own map."""
        return self.own is None and self.source_rows is None

    def __call__(self, probs: Tensor) -> Tensor:
        """The definition, on maps that are written down. probs: b i q k → b i q k"""
        own, source = probs[self.own_rows], probs[self.first : self.first + 1]
        edited = torch.zeros_like(probs)
        edited[self.own_rows] = own if self.own is None else own * self.own[:, None, None]
        if self.source_rows is not None:
            edited[self.source_rows] += (
                source if self.source is None else source @ self.source[:, None].to(source.dtype)
            )
        for columns, add in self.reads:
            add(edited.mean(dim=1) @ columns.to(edited.dtype))
        return edited

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """self(maps of q and k) @ v, without the maps. q, k: the rows of `own_rows`; v: all rows.

        Attention is linear in its values, so
            (M_0 S + M_r diag(o)) V = attend(q_0, k_0, S V) + attend(q_r, k_r, diag(o) V)
        """
        own_v = v[self.own_rows]
        if self.own is not None:
            own_v = (self.own[:, None, :, None] * own_v).to(v.dtype)
        own = scaled_dot_product_attention(q, k, own_v)  # n i q d
        if self.source_rows is None:
            return own

        source_v = v[self.source_rows]
        if self.source is not None:  # in float32, for the fractions in S
            source_v = (self.source[:, None].to(precise(v).dtype) @ precise(source_v)).to(v.dtype)
        q_0, k_0 = (t[self.first, None].expand(len(source_v), -1, -1, -1) for t in (q, k))
        source = scaled_dot_product_attention(q_0, k_0, source_v)  # m i q d

        if len(own) == len(v):
            out = own
        elif self.source_rows == slice(len(own), None):  # then `own` has the rows before
            return torch.cat([own, source])
        else:
            out = own.new_zeros(len(v), *own.shape[1:])
            out[self.own_rows] = own
        out[self.source_rows] += source
        return out


class Guided(Edit):
    """Leave the first `blank` rows alone, those of the negative prompt; `edit` sees the rest."""

    def __init__(self, edit: Edit, blank: int):
        self.edit, self.blank = edit, blank

    def wants(self, site: Site) -> bool:
        return self.edit.wants(site)

    def __call__(self, probs: Tensor, site: Site) -> Tensor:
        return torch.cat([probs[: self.blank], self.edit(probs[self.blank :], site)])

    def mix(self, site: Site) -> Mix | None:
        mix, n = self.edit.mix(site), self.blank
        if mix is None:
            return None
        own_rows = _shift(mix.own_rows, n)
        return Mix(
            slice(0, own_rows.stop)
            if isinstance(own_rows, slice)
            else torch.cat([torch.arange(n, device=own_rows.device), own_rows]),
            None
            if mix.own is None
            else torch.cat([mix.own.new_ones(n, mix.own.shape[-1]), mix.own]),
            None if mix.source_rows is None else _shift(mix.source_rows, n),
            mix.source,
            mix.first + n,
            tuple(
                (pad(columns, (0, 0, 0, 0, n, 0)), partial(_add_from, n, add))
                for columns, add in mix.reads
            ),
        )


def _shift(rows: Rows, n: int) -> Rows:
    if isinstance(rows, slice):
        return slice((rows.start or 0) + n, None if rows.stop is None else rows.stop + n)
    return rows + n


def _add_from(n: int, add: Callable[[Tensor], None], maps: Tensor) -> None:
    add(maps[n:])


class Chain(Edit):
    """Several edits as one: each sees the maps that the one before it returned."""

    def __init__(self, edits: Iterable[Edit]):
        self.edits = list(edits)

    def at(self, call: int, calls: int) -> Edit | None:
        edits = [now for edit in self.edits if (now := edit.at(call, calls)) is not None]
        return Chain(edits) if edits else None

    def wants(self, site: Site) -> bool:
        return any(edit.wants(site) for edit in self.edits)

    def __call__(self, probs: Tensor, site: Site) -> Tensor:
        for edit in self.edits:
            if edit.wants(site):
                probs = edit(probs, site)
        return probs

    def mix(self, site: Site) -> Mix | None:
        """One edit that is a linear map, and any number of readers after it."""
        mixes = [edit.mix(site) for edit in self.edits if edit.wants(site)]
        first, *readers = mixes
        if first is None or not all(mix and mix.only_reads for mix in readers):
            return None
        return replace(first, reads=sum((mix.reads for mix in mixes if mix), ()))

    def blend(self, latents: Tensor) -> Tensor:
        for edit in self.edits:
            latents = edit.blend(latents)
        return latents


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
        seen = pixels if context is None else context

        site = replace(self.site, height=x.shape[1], width=x.shape[2])
        if edit is None or not edit.wants(site):
            q, (k, v) = self.queries(pixels), self.keys_values(seen)
            out = scaled_dot_product_attention(q, k, v)  # the map is never written down
        elif (mix := edit.mix(site)) is not None:
            out = self.mixed(pixels, seen, mix)  # edited, and still never written down
        else:
            q, (k, v) = self.queries(pixels), self.keys_values(seen)
            probs = (precise(q) * q.shape[-1] ** -0.5 @ precise(k).mT).softmax(dim=-1)  # b i q k
            probs = edit(probs, site)
            out = (probs @ precise(v)).to(v.dtype)

        return self.to_out(out.transpose(1, 2).flatten(2)).view(x.shape)

    def mixed(self, pixels: Tensor, seen: Tensor | Words, mix: Mix) -> Tensor:
        """Attend through `mix`; rows whose own look is not used get no queries and no keys."""
        q, (k, v) = self.queries(pixels[mix.own_rows]), self.keys_values(seen, mix.own_rows)
        for columns, add in mix.reads:
            # The sum of some columns of a map is the map times their indicator: one more value to
            # attend to. As wide as q, with padding, which the fast kernels ask for.
            maps = []
            for some in columns.split(q.shape[-1], dim=-1):  # b k n
                values = pad(some, (0, q.shape[-1] - some.shape[-1]))[:, None]
                values = values.expand(-1, self.heads, -1, -1).to(precise(q).dtype)
                out = mix.attend(precise(q), precise(k), values)
                maps.append(out[..., : some.shape[-1]].mean(dim=1))
            add(torch.cat(maps, dim=-1))
        return mix.attend(q, k, v)

    def queries(self, pixels: Tensor) -> Tensor:
        """b q i·d → b i q d"""
        return self.to_q(pixels).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(
        self, seen: Tensor | Words, key_rows: Rows = slice(0, None)
    ) -> tuple[Tensor, Tensor]:
        """The keys of some rows and the values of all: n i k d and b i k d"""
        if isinstance(seen, Words):
            k, v = seen.keys_values(self)
            return k[key_rows], v
        k, v = self.to_k(seen[key_rows]), self.to_v(seen)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (k, v))
        return k, v


class AttentionStore(Edit):
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
        places: Sequence[str] = ("down", "mid", "up"),
        cross: bool = True,
        self_attention: bool = False,
        max_pixels: int | None = None,
        words: Sequence[str] | None = None,
        before_edit: bool = False,
        by_call: bool = False,
    ):
        self.places = (places,) if isinstance(places, str) else tuple(places)
        if unknown := [place for place in self.places if place not in PLACES]:
            raise ValueError(f"There is no place {unknown[0]!r}, only: {', '.join(PLACES)}.")
        self.max_pixels = max_pixels
        self.kinds = {True: cross, False: self_attention}
        self.words = [words] if isinstance(words, str) else None if words is None else list(words)
        self.before_edit, self.by_call = before_edit, by_call
        self.begin([], (0, 0))

    def begin(
        self, prompts: Sequence[Prompt], size: tuple[int, int], device: torch.device | None = None
    ) -> None:
        """Forget the last run. size: the feature map that average() and word() take by default.

        Raises ValueError if one of `words` is in no prompt.
        """
        self.prompts, self.size, self.calls = list(prompts), size, 0
        self.maps: dict[Site, list[Tensor]] = {}  # one sum, or with by_call one map for each call
        self.columns: Tensor | None = None  # b k n: which tokens each of `words` is
        if self.words is not None and prompts:
            check_words(self.words, prompts)
            self.columns = torch.zeros(len(prompts), LENGTH, len(self.words), device=device)
            for row, prompt in enumerate(prompts):
                for column, word in enumerate(self.words):
                    self.columns[row, prompt.find(word), column] = 1

    def at(self, call: int, calls: int) -> Edit:
        self.calls += 1
        return self

    def wants(self, site: Site) -> bool:
        coarse, most = self.size[0] * self.size[1], self.max_pixels
        return (
            self.kinds[site.is_cross]
            and site.place in self.places
            and site.height * site.width <= (max(32 * 32, coarse) if most is None else most)
        )

    def __call__(self, probs: Tensor, site: Site) -> Tensor:
        maps = probs.mean(dim=1)  # b q k
        if self.columns is not None and site.is_cross:
            maps = maps @ self.columns.to(maps.dtype)
        self.add(site, maps)
        return probs

    def mix(self, site: Site) -> Mix | None:
        if self.columns is None or not site.is_cross or self.before_edit:
            return None
        return Mix(reads=((self.columns, partial(self.add, site)),))

    def add(self, site: Site, maps: Tensor) -> None:
        """maps: b q n, of one UNet call."""
        kept = self.maps.setdefault(site, [])
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
        size, places = size or self.size, places or self.places
        places = (places,) if isinstance(places, str) else tuple(places)
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"A size is a pair (height, width), not {size!r}.")
        size = size[0], size[1]
        sites = [
            site
            for site in self.maps
            if (site.height, site.width) == size
            and site.place in places
            and site.is_cross == is_cross
        ]
        if not sites:
            kept = sorted({(s.place, s.height, s.width, s.is_cross) for s in self.maps})
            kinds = ", ".join(
                f"{place} {h}x{w} {'cross' if cross else 'self'}" for place, h, w, cross in kept
            )
            kind = f"{'cross' if is_cross else 'self'}-attention map of {size[0]}x{size[1]}"
            raise ValueError(
                f"No {kind} in {', '.join(places)} was kept, only: {kinds or 'nothing'}."
            )
        if call is None:
            maps = [torch.stack(self.maps[site]).sum(dim=0) / self.calls for site in sites]
        elif self.by_call and call in range(self.calls):
            maps = [self.maps[site][call] for site in sites]
        else:
            raise ValueError(
                f"The maps of call {call} were not kept apart: store with by_call=True and ask for "
                f"0 to {self.calls - 1}."
            )
        return torch.stack(maps).mean(dim=0).unflatten(1, size)

    def prompt(self, number: int) -> Prompt:
        """The prompt of that row. Raises ValueError if there is none."""
        if not isinstance(number, int) or not 0 <= number < len(self.prompts):
            raise ValueError(
                f"There is no prompt number {number!r}: the store has {len(self.prompts)}, "
                "counted from 0."
            )
        return self.prompts[number]

    def word(self, word: str, prompt: int = 0, **which: Any) -> Tensor:
        """How much each pixel looks at `word`, summed over its tokens; `which` as in average. → h w

        Raises ValueError if the prompt has no such word.
        """
        text = self.prompt(prompt)
        check_words([word], [text])
        if not which.get("is_cross", True):
            raise ValueError("A word has maps in cross-attention only: leave out is_cross=False.")
        maps = self.average(**which)[prompt]
        if self.words is None:
            return maps[..., text.find(word)].sum(dim=-1)
        if word not in self.words:
            raise ValueError(f"Only the words {', '.join(self.words)} were kept, not {word!r}.")
        return maps[..., self.words.index(word)]
