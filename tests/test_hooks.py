"""Hooks beside edits, alignments by subclassing, and rows that no matrix touches."""

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import LION, SNOW, SQUIRREL, difference, noise
from torch import Tensor

import minip2p
from minip2p import AttentionStore, LocalBlend, PromptEdit, Reweight, WordSwap
from minip2p.align import replacement
from minip2p.attention import Attention
from minip2p.linear_edit import LinearEdit, SourceMaps
from minip2p.text import encode, tokenize

STEPS = 4


def generate(model: minip2p.StableDiffusion, *hooks: minip2p.Hook, edit: Any = None, **settings):
    defaults = {"prompts": [SQUIRREL, LION], "num_inference_steps": STEPS, "decode": False}
    return minip2p.generate(model, edit=edit, hooks=hooks, **(defaults | settings))


@pytest.fixture(scope="module")
def plain(model) -> Tensor:
    """Return the latents of both prompts without an edit."""
    return generate(model).latents


class Louder(minip2p.Hook):
    """Token 8, the burger, twice as loud in the edited prompts, at cross-attention."""

    def applies_to(self, layer: minip2p.Layer) -> bool:
        return layer.is_cross

    def __call__(self, probs: Tensor, layer: minip2p.Layer) -> Tensor:
        probs[1:, ..., 8] *= 2
        return probs


# --- hooks beside an edit ------------------------------------------------------------------------


@pytest.mark.parametrize("guidance, blend", [(1.0, LocalBlend("lion", start=0.25)), (4.0, None)])
def test_an_edit_and_a_hook_are_the_edit_that_does_both(model, guidance, blend):
    """Louder after a swap is what Reweight does, which never sees a hook."""
    swap = WordSwap({"default_": 0.6, "lion": 0.4}, 0.4, blend)
    expected = Reweight({"burger": 2.0}, swap)
    hooked, expected, plain = (
        generate(model, *hooks, edit=edit, guidance_scale=guidance).latents
        for hooks, edit in (([Louder()], swap), ([], expected), ([], swap))
    )
    assert difference(hooked, expected) < 1e-5
    assert difference(plain[1], expected[1]) > 1e-3
    assert difference(hooked[0], plain[0]) < 1e-5


def test_each_hook_sees_what_the_one_before_it_returned(model):
    """Doubling is no matter of order, and adding to what was doubled is."""

    class Add(minip2p.Hook):
        def __call__(self, probs, layer):
            return probs + 0.01

    louder_first = generate(model, Louder(), Add(), edit=WordSwap(1.0, 0)).latents
    louder_last = generate(model, Add(), Louder(), edit=WordSwap(1.0, 0)).latents
    swap = generate(model, edit=WordSwap(1.0, 0)).latents
    assert difference(louder_first[1], swap[1]) > 1e-3
    assert difference(louder_first[1], louder_last[1]) > 1e-3


@pytest.mark.parametrize("words", [None, ["burger", "lion"]], ids=["tokens", "words"])
def test_a_store_beside_a_hook_sees_the_edited_maps(model, words):
    swap = WordSwap(0.8, 0.4)
    kept, expected, plain = (
        generate(model, *hooks, edit=edit, store=AttentionStore(words=words)).attention
        for hooks, edit in (([Louder()], swap), ([], Reweight({"burger": 2.0}, swap)), ([], swap))
    )
    for word in ("burger", "lion"):
        assert difference(kept.word(word, 1), expected.word(word, 1)) < 1e-5
    assert difference(plain.word("burger", 1), expected.word("burger", 1)) > 0.3


# --- an alignment by a subclass ------------------------------------------------------------------


class LionOnly(PromptEdit):
    """Nothing is taken over but the lion's map."""

    def align(self, source: minip2p.align.Prompt, target: minip2p.align.Prompt):
        exists = torch.zeros(77)
        exists[target.find("lion")] = 1
        return minip2p.Alignment(replacement(source, target).mapper, exists)


def test_a_subclass_may_align(model):
    subclass = generate(model, edit=LionOnly(0.8, 0.4)).latents
    expected = generate(model, edit=WordSwap({"default_": 0, "lion": 0.8}, 0.4)).latents
    assert difference(subclass, expected) < 1e-6
    assert difference(expected[1], generate(model, edit=WordSwap(0.8, 0.4)).latents[1]) > 1e-3


# --- rows that no matrix touches, and rows that are not guided -----------------------------------


def test_rows_that_keep_their_map_are_in_no_product(model):
    """TF32 would round a product with an identity: so nothing of these rows is multiplied."""
    rows, k = 4, 77
    mappers, keep, ones = torch.zeros(rows, k, k), torch.ones(rows, k), torch.ones(rows, k)
    mappers[1], keep[1, :5] = torch.eye(k), 0  # row 1 is edited, between rows that are not
    edit = LinearEdit.from_dense(mappers, keep, ones, "cpu")
    assert edit is not None and edit.blended is not None and edit.replaced is None
    nans = torch.full_like(edit.blended.mappers, torch.nan)
    ruined = replace(edit, blended=edit.blended._replace(mappers=nans))
    q, v = torch.randn(rows + 2, 2, 16, 8), torch.randn(rows + 2, 2, k, 8)
    keys = torch.randn(rows + 2, 2, k, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(q, keys, v)
    untouched = [0, 2, 3, 4, 5]
    assert torch.equal(ruined.attend(q, keys, v)[untouched], plain[untouched])
    assert ruined.attend(q, keys, v)[1].isnan().all()
    probs = torch.rand(rows, 2, 16, k)
    assert torch.equal(ruined(probs.clone())[untouched[:3]], probs[untouched[:3]])


def test_fewer_unconditional_rows_leave_the_first_prompts_unguided(model):
    prompts = [tokenize(model.tokenizer, text) for text in (SQUIRREL, LION, SNOW)]
    cond = encode(model.text_encoder, prompts)
    uncond = encode(model.text_encoder, [tokenize(model.tokenizer, "")]).expand_as(cond)
    x = noise().expand(3, -1, -1, -1)

    def last(rows: slice, n: int) -> Tensor:
        steps = minip2p.denoise(model.unet, minip2p.DDIM(5), x[rows], cond[rows], uncond[:n], 4.0)
        return list(steps)[-1]

    mixed = last(slice(0, 3), 2)
    assert difference(mixed[1:], last(slice(1, 3), 2)) < 1e-5
    assert difference(mixed[:1], last(slice(0, 1), 0)) < 1e-5
    assert difference(mixed[:1], last(slice(0, 1), 1)) > 1e-2


# --- what a hook sees and may do -----------------------------------------------------------------


def test_the_example_of_the_docstring(model, plain):
    """The hook doubles a word's attention in the edited prompts in the first half of a run."""
    lines = inspect.cleandoc(minip2p.Hook.__doc__).splitlines()
    names = {"minip2p": minip2p}
    exec("\n".join(line[4:] for line in lines if line.startswith("    ")), names)

    store = AttentionStore(by_call=True)
    before = AttentionStore(by_call=True, before_edit=True)
    loud = generate(model, names["Louder"](), store=store).latents
    generate(model, names["Louder"](), store=before)
    assert difference(loud[0], plain[0]) < 1e-5
    assert difference(loud[1], plain[1]) > 1e-2
    for call in range(STEPS):
        factor = torch.ones(2, 1, 1, 77)
        factor[1, ..., 5] = 2 if call < STEPS / 2 else 1
        expected = before.average(call=call) * factor
        assert difference(store.average(call=call), expected) < 1e-5


def test_a_hook_sees_each_layer_once_a_call_and_every_prompt_s_row(model):
    seen = []

    class Look(minip2p.Hook):
        def at(self, call, calls, timestep):
            seen.append((call, calls))
            return self if call in (0, 3) else None

        def applies_to(self, layer):
            return layer.place == "up"

        def __call__(self, probs, layer):
            seen.append(layer)
            assert probs.dtype == torch.float32
            keys = 77 if layer.is_cross else layer.height * layer.width
            assert probs.shape == (3, 4, layer.height * layer.width, keys)
            return probs

    prompts = [SQUIRREL, LION, SNOW]
    generate(model, Look(), prompts=prompts, scheduler="pndm", height=128, width=192)
    names = [n for n, m in model.unet.named_modules() if isinstance(m, Attention) and n[0] == "u"]
    assert len(names) == 18  # up alone
    starts = [i for i, item in enumerate(seen) if isinstance(item, tuple)]
    assert [seen[i] for i in starts] == [(call, STEPS + 1) for call in range(STEPS + 1)]
    for call, (start, stop) in enumerate(pairwise([*starts, len(seen)])):
        layers = seen[start + 1 : stop]
        assert [layer.name for layer in layers] == (names if call in (0, 3) else [])
        assert {(s.height, s.width) for s in layers} <= {(16, 24), (8, 12), (4, 6)}
        assert all(layer.is_cross == layer.name.endswith("attn2") for layer in layers)


def test_a_hook_that_returns_new_maps_is_word_swap(model):
    """The definition of word swap at a full window, in a hook's own words."""

    class Swap(minip2p.Hook):
        def __call__(self, probs, layer):
            return probs[:1].expand_as(probs)

    expected = generate(model, edit=WordSwap(1.0, 1.0)).latents
    assert difference(generate(model, Swap()).latents, expected) < 1e-5


def test_a_hook_s_blend_sees_the_latents_after_each_call(model, plain):
    class Copy(minip2p.Hook):
        def applies_to(self, layer):
            return False

        def after_step(self, latents):
            return latents[:1].expand_as(latents)

    source, edited = generate(model, Copy()).latents
    assert torch.equal(source, edited)
    assert torch.equal(source, plain[0])


def test_an_exception_in_a_hook_leaves_nothing_behind(model):
    class Broken(minip2p.Hook):
        def at(self, call, calls, timestep):
            return self if call == 2 else None

        def __call__(self, probs, layer):
            probs.zero_()
            if layer.place == "mid":
                raise RuntimeError("broken")
            return probs

    edit, store = WordSwap(0.8, 0.4, LocalBlend("lion", subtract="burger")), AttentionStore()
    expected = generate(model, edit=edit, store=store).latents
    maps = store.average()
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, Broken(), store=store)
    assert torch.equal(generate(model, edit=edit, store=store).latents, expected)
    assert torch.equal(store.average(), maps)


def test_a_hook_may_be_an_empty_list(model):
    class Names(minip2p.Hook, list):
        def __call__(self, probs, layer):
            self.append(layer.name)
            return probs

    names = Names()
    generate(model, names, num_inference_steps=1)
    assert len(names) == 32


@pytest.mark.parametrize("is_cross", [True, False])
def test_a_hook_may_be_linear_with_guidance(model, plain, is_cross):
    class Same(minip2p.Hook):
        def applies_to(self, layer):
            return layer.is_cross == is_cross

        def linear(self, layer):
            keys = 77 if is_cross else layer.height * layer.width
            rows = torch.arange(4)  # two prompts, two unconditional rows
            replaced = SourceMaps([1], torch.eye(keys)[None]) if is_cross else None
            return LinearEdit(rows, replaced)

    assert difference(generate(model, Same()).latents, plain) < 1e-5


def test_a_hook_may_do_the_attention_itself(model, plain):
    """Also of the unconditional rows, where it says so; here both do what the layer does anyway."""
    rows = []

    class Fused(minip2p.Hook):
        def attend(self, q, k, v, layer):
            rows.append(len(q))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    class AllRows(minip2p.Hook):
        def attend_all_rows(self, q, k, v, layer, prompts):
            rows.append((len(q), prompts))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert difference(generate(model, Fused()).latents, plain) < 1e-5
    assert set(rows) == {2}
    rows.clear()
    assert difference(generate(model, AllRows()).latents, plain) < 1e-5
    assert set(rows) == {(4, 2)}


def test_gradients_reach_the_latents_through_a_hook(model):
    """As Attend-and-Excite needs them: nothing but `generate` runs without a graph."""
    maps = []

    class Keep(minip2p.Hook):
        def __call__(self, probs, layer):
            maps.append(probs)
            return probs

    cond = encode(model.text_encoder, [tokenize(model.tokenizer, SQUIRREL)])
    x = noise().requires_grad_()
    next(minip2p.denoise(model.unet, minip2p.DDIM(5), x, cond, cond[:0], 1.0, Keep()))
    sum(probs[..., 5].amax() for probs in maps if probs.shape[-1] == 77).backward()
    assert x.grad is not None and x.grad.norm() > 0
