"""The sides of a comparison: one guided UNet call by diffusers and by minip2p, in several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from written_out import Controller, control

from minip2p import AttentionStore, LocalBlend, WordSwap
from minip2p.attention import CachedContext, Chain, Hook, PromptRows
from minip2p.pipeline import bind_edit

ANIMALS = ("squirrel", "lion", "cat", "dog", "panda", "rabbit")
FOODS = ("burger", "pizza", "cake", "apple")
TIMESTEP = 501
EDITS = ("word swap", "swap and blend", "swap, blend, a word's maps", "swap, blend, every map")

Sides = dict[str, Callable[[], Tensor]]


def prompts_of(edits: int) -> list[str]:
    """Return a source prompt and as many edited prompts."""
    prompts = [f"a {animal} eating a {food}" for food in FOODS for animal in ANIMALS]
    return prompts[: edits + 1]


def call_inputs(unet: Any, prompts: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timestep and a random context, unconditional rows first, for a UNet call.

    → 2·prompts 4 size size, a scalar, 2·prompts 77 d
    """
    parameters = dict(unet.named_parameters())
    width = next(p.shape[1] for name, p in parameters.items() if name.endswith("attn2.to_k.weight"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, size, size, generator=generator).expand(2 * prompts, -1, -1, -1)
    context = torch.randn(2 * prompts, 77, width, generator=generator)
    weight = next(iter(parameters.values()))
    return x.to(weight), torch.tensor(TIMESTEP, device=weight.device), context.to(weight)


def diffusers_sides(unet: Any, mapper: Tensor, size: int) -> Sides:
    """Return diffusers' UNet call as it comes, and with a word swap on maps that are written out.

    mapper: e 77 77, of each edited prompt
    """
    prompts = len(mapper) + 1
    x, t, context = call_inputs(unet, prompts, size)
    processors = dict(unet.attn_processors)
    controller = Controller(mapper.to(x.device), prompts)

    def plain() -> Tensor:
        unet.set_attn_processor(dict(processors))
        return unet(x, t, context).sample

    def written_out() -> Tensor:
        control(unet, controller)
        eps = unet(x, t, context).sample
        controller.end_call()
        return eps

    return {"diffusers": plain, "diffusers, written-out edit": written_out}


def minip2p_call(unet: Any, hook: Hook | None, prompts: int, size: int) -> Callable[[], Tensor]:
    """Return a call of minip2p's UNet, whose output has the unconditional rows first.

    The words' keys and values are computed by its first call only, as in a run.
    """
    x, t, context = call_inputs(unet, prompts, size)
    cached = CachedContext(context.roll(prompts, 0))  # here the prompts come first

    def call() -> Tensor:
        step_hook = None if hook is None else hook.at(0, 50, TIMESTEP)
        unet_hook = None if step_hook is None else PromptRows(step_hook, prompts)
        return unet(x, t, cached, unet_hook).roll(prompts, 0)

    return call


def hook_of(model: Any, edit: str, edits: int, size: int) -> Any:
    """Return one of EDITS, bound to a source prompt and its edits, inside both of its windows."""
    prompts, shape = prompts_of(edits), (size, size)
    blend = None if edit == "word swap" else LocalBlend(["squirrel"])
    tokens, hook = bind_edit(model, prompts, WordSwap(1.0, 1.0, blend), shape)
    if edit in ("word swap", "swap and blend"):
        return hook
    store = AttentionStore(words=["squirrel"] if edit == "swap, blend, a word's maps" else None)
    store.begin(tokens, model.unet.coarse_size(size, size), model.device)
    assert hook is not None
    return Chain([hook, store])


def call_sides(
    unet: Any, model: Any, prepared: Any, edits: int, size: int
) -> tuple[Sides, dict[str, str]]:
    """Return every side, and whose output the output of a side should be.

    unet: diffusers', model: minip2p's, prepared: minip2p's after fast.prepare; None leaves it out.
    """
    sides: Sides = {}
    same_as: dict[str, str] = {}
    if unet:
        mapper = torch.eye(77).expand(edits, -1, -1)
        if model or prepared:
            mapper = hook_of(model or prepared, "word swap", edits, size).mapper[1:]
        sides = diffusers_sides(unet, mapper, size)
        sides["diffusers, memory kept"] = sides["diffusers"]
    for name, edited_model in (("minip2p", model), ("minip2p, prepared", prepared)):
        if edited_model:
            swap = hook_of(edited_model, "word swap", edits, size)
            for side, hook in ((name, None), (f"{name}, word swap", swap)):
                sides[side] = minip2p_call(edited_model.unet, hook, edits + 1, size)
            same_as[name] = "diffusers"
            same_as[f"{name}, word swap"] = "diffusers, written-out edit"
    if model:
        for name in EDITS[1:]:
            hook = hook_of(model, name, edits, size)
            sides[f"minip2p, {name}"] = minip2p_call(model.unet, hook, edits + 1, size)
    return sides, same_as if unet else {}
