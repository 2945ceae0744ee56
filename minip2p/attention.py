"""Attention, and the line where Prompt-to-Prompt reaches into it.

    probs = softmax(q kᵀ / √d)      the attention map: which token each pixel looks at
    probs = hook(probs, layer)      Prompt-to-Prompt (Hertz et al. 2022, algorithm 1)
    out   = probs v

A hook travels as an argument, unet(x, t, context, hook), so nothing is registered and nothing has
to be undone. It sees the maps of all prompts and returns the maps to use. A hook that is linear in
the maps can say so, with a LinearEdit (linear_edit.py): then no map is written down.

Shapes:  b batch, one row a prompt · i heads · d width of a head · q query pixels, h·w ·
         k keys, 77 tokens or again pixels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .errors import UserError

if TYPE_CHECKING:
    from .align import Prompt
    from .linear_edit import LinearEdit

Size = tuple[int, int]  # height, width
Device = torch.device | str


@dataclass(frozen=True)
class Layer:
    """The address of one attention layer, and the size of the feature map that it gets."""

    name: str  # "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    place: str  # "down", "mid" or "up"
    is_cross: bool  # True: pixels look at tokens (attn2). False: pixels look at pixels (attn1).
    height: int = 0  # of the feature map; 0 until one has come
    width: int = 0


class Hook:
    """Change attention during a run. Subclass it and override what you need.

    The example doubles the attention that token 5 gets during the first half of the run:

        class Louder(minip2p.Hook):
            def at(self, call, calls, timestep):
                return self if call < calls / 2 else None

            def __call__(self, probs, layer):
                if layer.is_cross:
                    probs[1:, ..., 5] *= 2
                return probs

    Rows: a hook sees one row for each prompt, row 0 the source's. The unconditional rows of the
    guidance follow the prompts' rows in the UNet's batch, and only `attend_all_rows` gets them.
    Gradients: nothing here or in the model detaches. A hook may call the UNet itself under
    `torch.enable_grad()` and change the latents, in `before_step` or `after_step`.
    """

    def begin(self, prompts: Sequence[Prompt], coarse: Size, device: torch.device) -> None:
        """Prepare for a run. prompts: tokenized, row 0 the source. coarse: see UNet.coarse_size."""

    def at(self, call: int, calls: int, timestep: int) -> Hook | None:
        """Return the hook for UNet call `call` of `calls`, counted from 0; None: no hook.

        A call is not a step: PNDM makes n + 1 calls for n steps.
        """
        return self

    def applies_to(self, layer: Layer) -> bool:
        """Tell whether the hook acts at this layer. Where it does not, the layer stays fused."""
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Tensor:
        """Compute attention with an edited map. Override it to change more than the map.

        q: b i q d. k, v: b i k d → b i q d
        """
        linear = self.linear(layer)
        if linear is not None:
            return linear.attend(q, k, v)  # the same result, and no map is written down
        probs = attention_map(q, k)  # b i q k
        if probs.requires_grad:
            probs = probs.clone()  # the hook may write to its map, and softmax's gradient reads it
        probs = self(probs, layer)
        return (probs @ at_least_float32(v)).to(v.dtype)

    def attend_all_rows(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, prompts: int
    ) -> Tensor:
        """Compute attention of all rows: first the `prompts` rows, then the unconditional ones.

        The unconditional rows keep their own attention. Override it to change them too; shapes are
        those of `attend`, with more rows.
        """
        linear = self.linear(layer)
        if linear is not None:
            return linear.attend(q, k, v)  # leaves the unconditional rows alone by itself
        if len(q) == prompts:  # without guidance
            return self.attend(q, k, v, layer)
        edited = self.attend(q[:prompts], k[:prompts], v[:prompts], layer)
        plain = scaled_dot_product_attention(q[prompts:], k[prompts:], v[prompts:])
        return torch.cat([edited, plain])

    def __call__(self, probs: Tensor, layer: Layer) -> Tensor:
        """Edit the map. probs: b i q k in float32, which the hook may write to → the map to use."""
        linear = self.linear(layer)
        return probs if linear is None else linear(probs)

    def linear(self, layer: Layer) -> LinearEdit | None:
        """Return the same edit as a linear map of the attention maps; None: it is not linear."""
        return None

    def before_step(self, latents: Tensor) -> Tensor:
        """Return the latents that the UNet gets at this call. latents: b 4 h w → as latents"""
        return latents

    def edit_context(self, context: Tensor, prompts: int) -> Tensor:
        """Return the context that the UNet gets at this call.

        context: b 77 d_context, the `prompts` rows and the unconditional ones after them → as it
        """
        return context

    def after_step(self, latents: Tensor) -> Tensor:
        """Return the latents to go on with after the scheduler's step. latents: b 4 h w → as it"""
        return latents


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Compute softmax(q kᵀ / √d) in at least float32. q: b i q d, k: b i k d → b i q k"""
    return (at_least_float32(q) * q.shape[-1] ** -0.5 @ at_least_float32(k).mT).softmax(dim=-1)


def at_least_float32(t: Tensor) -> Tensor:
    """Widen half precision, which loses digits of a softmax and of a mixture of maps."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Chain(Hook):
    """Act as several hooks in turn: each sees the map that the one before it returned."""

    def __init__(self, hooks: Iterable[Hook]):
        self.hooks = list(hooks)

    def at(self, call: int, calls: int, timestep: int) -> Hook | None:
        at_call = (hook.at(call, calls, timestep) for hook in self.hooks)
        active = [hook for hook in at_call if hook is not None]
        return Chain(active) if active else None

    def applies_to(self, layer: Layer) -> bool:
        return any(hook.applies_to(layer) for hook in self.hooks)

    def attend_all_rows(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, prompts: int
    ) -> Tensor:
        active = self.at_layer(layer)
        if len(active) == 1:
            return active[0].attend_all_rows(q, k, v, layer, prompts)
        return super().attend_all_rows(q, k, v, layer, prompts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Tensor:
        active = self.at_layer(layer)
        if len(active) == 1:
            return active[0].attend(q, k, v, layer)
        return super().attend(q, k, v, layer)

    def __call__(self, probs: Tensor, layer: Layer) -> Tensor:
        for hook in self.at_layer(layer):
            probs = hook(probs, layer)
        return probs

    def linear(self, layer: Layer) -> LinearEdit | None:
        """Join one linear edit and any number of hooks after it that only read the map."""
        first, *readers = [hook.linear(layer) for hook in self.at_layer(layer)]
        if first is None or any(reader is None or not reader.only_reads for reader in readers):
            return None
        return first.then_read([probe for reader in readers if reader for probe in reader.probes])

    def at_layer(self, layer: Layer) -> list[Hook]:
        """List the hooks that act at this layer. Raises UserError if they can't act together."""
        active = [hook for hook in self.hooks if hook.applies_to(layer)]
        for hook in active if len(active) > 1 else ():
            cls = type(hook)
            if (cls.attend, cls.attend_all_rows) != (Hook.attend, Hook.attend_all_rows):
                raise UserError(
                    f"{cls.__name__} computes the attention of {layer.name} by itself, so nothing "
                    "else can act there: let its applies_to, or that of the other hooks, leave "
                    "this layer out."
                )
        return active

    def before_step(self, latents: Tensor) -> Tensor:
        for hook in self.hooks:
            latents = hook.before_step(latents)
        return latents

    def edit_context(self, context: Tensor, prompts: int) -> Tensor:
        for hook in self.hooks:
            context = hook.edit_context(context, prompts)
        return context

    def after_step(self, latents: Tensor) -> Tensor:
        for hook in self.hooks:
            latents = hook.after_step(latents)
        return latents


class PromptRows(Hook):
    """Tell `hook` how many of the batch's rows are prompts; unconditional rows follow them."""

    def __init__(self, hook: Hook, prompts: int):
        self.hook, self.prompts = hook, prompts

    def applies_to(self, layer: Layer) -> bool:
        return self.hook.applies_to(layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Tensor:
        return self.hook.attend_all_rows(q, k, v, layer, self.prompts)


class CachedContext:
    """A run's context, whose keys and values each layer computes once for all UNet calls."""

    def __init__(self, context: Tensor):
        self.context = context  # b 77 d_context
        self.projected: dict[Attention, tuple[Tensor, Tensor]] = {}

    def keys_values(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values of the context, twice b i k d."""
        if attention not in self.projected:
            self.projected[attention] = attention.keys_values(self.context)
        return self.projected[attention]


class Attention(nn.Module):
    """Multi-head attention: self-attention without a context, cross-attention with one."""

    def __init__(self, d: int, d_context: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(d, d, bias=bias)
        self.to_k = nn.Linear(d_context, d, bias=bias)
        self.to_v = nn.Linear(d_context, d, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(d, d))  # Sequential, so that the key is to_out.0
        self.layer = Layer("", "", False)  # UNet.__init__ gives each of its layers a real one

    def forward(
        self, x: Tensor, context: Tensor | CachedContext | None = None, hook: Hook | None = None
    ) -> Tensor:
        """Let pixels look at the context, or without one at each other.

        x: b h w i·d, context: b 77 d_context → as x
        """
        pixels = x.flatten(1, 2)  # b q i·d
        q = self.split_heads(self.to_q(pixels))
        if isinstance(context, CachedContext):
            k, v = context.keys_values(self)
        else:
            k, v = self.keys_values(pixels if context is None else context)

        layer = replace(self.layer, height=x.shape[1], width=x.shape[2])
        if hook is None or not hook.applies_to(layer):
            out = scaled_dot_product_attention(q, k, v)  # fused: the map is never written down
        else:
            out = hook.attend(q, k, v, layer)

        return self.to_out(out.transpose(1, 2).flatten(2)).view(x.shape)

    def split_heads(self, t: Tensor) -> Tensor:
        """Give each head its share of the width. t: b q i·d → b i q d"""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Project what is looked at. context: b k d_context → twice b i k d"""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))
