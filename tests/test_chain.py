"""An edit beside a hook of one's own, one's own alignment, and rows that no matrix touches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import minip2p
from minip2p import AttentionStore, LocalBlend, PromptEdit, Refine, Reweight, WordSwap
from minip2p.align import replacement
from minip2p.linear_edit import LinearEdit
from minip2p.text import encode, tokenize

SQUIRREL = "a painting of a squirrel eating a burger"
LION = "a painting of a lion eating a burger"
SNOW = "a painting of a squirrel eating a burger in the snow"


@pytest.fixture(scope="module")
def model() -> minip2p.StableDiffusion:
    return minip2p.load(device="cpu")


def generate(
    model: minip2p.StableDiffusion, edit: Any, prompts: Any = (SQUIRREL, LION), **more: Any
):
    return minip2p.generate(model, list(prompts), edit=edit, num_inference_steps=5, **more)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


class Louder(minip2p.Hook):
    """Token 8, the burger, twice as loud in the edited prompts, at cross-attention."""

    def applies_to(self, layer: minip2p.Layer) -> bool:
        return layer.is_cross

    def __call__(self, probs: Tensor, layer: minip2p.Layer) -> Tensor:
        probs[1:, ..., 8] *= 2
        return probs


# --- Chain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("blend", [None, LocalBlend("lion", start=0.2)], ids=["", "blend"])
def test_an_edit_and_a_hook_are_the_edit_that_does_both(model, guidance, blend):
    """Louder after a swap is what Reweight does, which never sees a hook."""
    swap = WordSwap({"default_": 0.6, "lion": 0.4}, 0.4, blend)
    both = generate(model, swap, hooks=[Louder()], guidance_scale=guidance)
    known = generate(model, Reweight({"burger": 2.0}, swap), guidance_scale=guidance)
    assert apart(both.latents, known.latents) < 1e-5
    plain = generate(model, swap, guidance_scale=guidance)
    assert apart(plain.latents[1], known.latents[1]) > 1e-3
    assert apart(both.latents[0], plain.latents[0]) < 1e-5


def test_each_sees_what_the_one_before_it_returned(model):
    """All maps are the source's, and the hook after the edit makes them louder."""
    edited = WordSwap(1.0, 0)
    swap = generate(model, edited).latents
    after = generate(model, edited, hooks=[Louder()]).latents
    assert apart(after[1], swap[1]) > 1e-3


@pytest.mark.parametrize("words", [None, ["burger", "lion"]], ids=["tokens", "words"])
def test_a_store_beside_a_chain_sees_the_edited_maps(model, words):
    kept, known = (
        generate(model, edit, hooks=hooks, store=AttentionStore(words=words)).attention
        for edit, hooks in (
            (WordSwap(0.8, 0.4), [Louder()]),
            (Reweight({"burger": 2.0}, WordSwap(0.8, 0.4)), []),
        )
    )
    for word in ("burger", "lion"):
        assert apart(kept.word(word, 1), known.word(word, 1)) < 1e-5
    plain = generate(model, WordSwap(0.8, 0.4), store=AttentionStore(words=words)).attention
    assert apart(plain.word("burger", 1), known.word("burger", 1)) > 0.3


def test_a_chain_of_one_edit_for_each_prompt_and_auto(model):
    prompts = SQUIRREL, LION, SNOW
    edits = [WordSwap(0.6, 0.4), Refine(0.8, 0.2)]
    chain = generate(model, edits, prompts, hooks=[Louder()]).latents
    known = generate(model, [Reweight({"burger": 2.0}, edit) for edit in edits], prompts).latents
    assert apart(chain, known) < 1e-5


def test_a_hook_in_the_place_of_an_edit_is_told_its_own(model):
    for edit in (Louder(), [WordSwap(), Louder()]):
        with pytest.raises(minip2p.UserError, match=r"give it as hooks=\[hook\]"):
            generate(model, edit, (SQUIRREL, LION, SNOW))


# --- an alignment of one's own -------------------------------------------------------------------


class Only(PromptEdit):
    """Nothing is taken over but the lion's map."""

    def align(self, source: minip2p.align.Prompt, target: minip2p.align.Prompt):
        alignment = replacement(source, target)
        exists = torch.zeros(77)
        exists[target.find("lion")] = 1
        return minip2p.Alignment(alignment.mapper, exists)


def test_an_alignment_of_one_s_own_is_a_subclass(model):
    own = generate(model, Only(0.8, 0.4)).latents
    known = generate(model, WordSwap({"default_": 0, "lion": 0.8}, 0.4)).latents
    assert apart(own, known) < 1e-6
    assert apart(known[1], generate(model, WordSwap(0.8, 0.4)).latents[1]) > 1e-3


# --- rows that no matrix touches, and rows that are not guided -----------------------------------


def test_rows_that_keep_their_map_are_in_no_product(model):
    """TF32 would round a product with an identity: so nothing of these rows is multiplied."""
    rows, k = 4, 77
    source, own, ones = torch.zeros(rows, k, k), torch.ones(rows, k), torch.ones(rows, k)
    source[1], own[1, :5] = torch.eye(k), 0  # row 1 is edited, between rows that are not
    edit = LinearEdit.from_dense(source, own, ones, "cpu")
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


def test_fewer_blank_rows_leave_the_first_prompts_unguided(model):
    prompts = [tokenize(model.tokenizer, text) for text in (SQUIRREL, LION, SNOW)]
    words = encode(model.text_encoder, prompts)
    blank = encode(model.text_encoder, [tokenize(model.tokenizer, "")]).expand_as(words)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)

    def last(rows: slice, blanks: int) -> Tensor:
        steps = minip2p.denoise(
            model.unet, minip2p.DDIM(5), x[rows], words[rows], blank[:blanks], 4.0
        )
        return list(steps)[-1]

    mixed = last(slice(0, 3), 2)
    assert apart(mixed[1:], last(slice(1, 3), 2)) < 1e-5
    assert apart(mixed[:1], last(slice(0, 1), 0)) < 1e-5
    assert apart(mixed[:1], last(slice(0, 1), 1)) > 1e-2
