"""The bugs B1 to B23 of other Prompt-to-Prompt implementations, and that they are not in this one.

Sixteen public implementations were compared. Most bugs are covered by the tests of their subject,
which TESTED_ELSEWHERE names; the others are tested here. B23 (background metrics that depend on the
size of the mask) does not apply.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import LION, SQUIRREL, difference, noise
from torch import Tensor

import minip2p
from minip2p import AttentionStore, LocalBlend, Reweight, WordSwap
from minip2p.align import replacement, token_windows
from minip2p.edit import bind
from minip2p.text import encode, tokenize
from minip2p.vae import to_images

SWAP = WordSwap(0.8, 0.4)

# Bug, what went wrong, and the test that would see it.
TESTED_ELSEWHERE = """
B1   tokens after a longer word were not moved along        test_align.test_word_swap
B1   the end token took over padding                        test_align.test_a_random_swap_loses_no_attention
B2   several tokens for one took the mean, not the sum      test_prompt_to_prompt.test_the_comparison_sees
B3   words with commas, capitals, accents were not found    test_align.test_find
B4   words that no prompt has were passed over              test_mistakes.test_mistake
B4   a blend gave the source back                           test_prompt_to_prompt.test_the_reference_ends_at_the_same_latents
B6   a window of 1 or 0 was a TypeError                     test_align.test_calls_of
B7   windows counted steps, not UNet calls                  test_prompt_to_prompt.test_the_comparison_sees
B7   a window of 1 left the last call out                   test_align.test_calls_of
B8   steps were counted in the layers                       test_hooks.test_an_exception_in_a_hook_leaves_nothing_behind
B8   some layers were not reached                           test_hooks.test_a_hook_sees_each_layer_once_a_call_and_every_prompt_s_row
B9   a guidance of 1 cut the prompts in halves              test_prompt_to_prompt.test_the_reference_ends_at_the_same_latents
B9   unconditional rows were edited                         test_hooks.test_a_hook_sees_each_layer_once_a_call_and_every_prompt_s_row
B10  stored maps were views that the edit changed           test_prompt_to_prompt.test_no_later_edit_reaches_a_stored_map
B10  maps before and after the edit were mixed up           test_prompt_to_prompt.test_stored_maps_are_the_reference_s
B11  blends read 16 x 16 maps at every size                 test_prompt_to_prompt.test_the_reference_ends_at_the_same_latents
B13  only one word could be weighted                        test_prompt_to_prompt.test_the_reference_ends_at_the_same_latents
B14  weights did not act outside of the windows             test_prompt_to_prompt.test_the_comparison_sees
B15  padding of a shorter prompt took over words            test_align.test_refinement
B16  prompts of more than 77 tokens were an IndexError      test_align.test_both_are_too_long
B18  releases of the patched library broke it               test_package.test_imports
B20  the source's maps came from the edited picture         test_prompt_to_prompt.test_the_reference_ends_at_the_same_latents
B21  the source's picture changed beside an edit            test_prompt_to_prompt.test_the_source_is_as_if_generated_alone
B22  an edit did nothing and nobody could see it            test_explain.test_explain
"""  # noqa: E501


def generate(model, prompts=(SQUIRREL, LION), **settings) -> minip2p.Result:
    settings = {"num_inference_steps": 4, "scheduler": "ddim", "decode": False} | settings
    return minip2p.generate(model, list(prompts), **settings)


def latents(model, prompts=(SQUIRREL, LION), **settings) -> Tensor:
    return generate(model, prompts, **settings).latents


@pytest.fixture(scope="module")
def plain(model) -> Tensor:
    """Return the latents without an edit."""
    return latents(model)


def test_every_bug_has_a_test():
    here = Path(__file__)
    rows = [re.split(r"  +", line) for line in TESTED_ELSEWHERE.strip().splitlines()]
    for _, _, test in rows:
        module, name = test.split(".")
        assert f"def {name}(" in (here.parent / f"{module}.py").read_text(), test
    bugs = {int(bug[1:]) for bug, _, _ in rows}
    bugs |= {int(number) for number in re.findall(r"def test_b(\d+)_", here.read_text())}
    assert bugs == set(range(1, 23))


def test_b05_the_callers_dict_is_not_changed(clip_tokenizer):
    """The dict got a key "default_", and words of the source were ignored."""
    prompts = [tokenize(clip_tokenizer, text) for text in (SQUIRREL, LION)]
    windows, weights = {"squirrel": 0.4}, {"squirrel": 2.0}
    of_source = token_windows(windows, *prompts, replacement(*prompts))
    assert of_source == token_windows({"lion": 0.4}, *prompts, replacement(*prompts))
    edit = Reweight(weights, WordSwap(windows, 0.4))
    bind(edit, prompts, latent_size=(64, 64), coarse=(16, 16), defaults={}).at(0, 2, 0)
    assert (windows, weights) == ({"squirrel": 0.4}, {"squirrel": 2.0})


def test_b08_a_scheduler_and_an_edit_may_be_used_again(model):
    """A run that was cut short left its predictions in PNDM."""
    scheduler, uncond = minip2p.PNDM(3), torch.empty(0, 77, 128)
    cond = encode(model.text_encoder, [tokenize(model.tokenizer, LION)])
    next(minip2p.denoise(model.unet, scheduler, noise(), cond, uncond, 1.0))
    again, fresh = (
        latents(model, scheduler=pndm, num_inference_steps=None, edit=SWAP)
        for pndm in (scheduler, minip2p.PNDM(3))
    )
    assert torch.equal(again, fresh)


def test_b09_all_prompts_start_from_the_same_noise(model):
    """With one generator each prompt got its own noise."""
    same = latents(model, [LION, LION, LION])
    assert difference(same[1], same[0]) < 1e-5
    assert difference(same[2], same[0]) < 1e-5


def test_b10_only_what_was_asked_for_is_kept(model):
    """Twice the memory was held, nine tenths of it self-attention that nobody looked at."""
    store = generate(model, store=AttentionStore(max_pixels=64), num_inference_steps=1).attention
    assert all(layer.is_cross for layer in store.maps)
    assert max(layer.height * layer.width for layer in store.maps) == 64
    store = AttentionStore(words=["lion", "burger"], places=["up"])
    edit = WordSwap(0.8, 0.4, LocalBlend("lion"))  # reads the same maps
    store = generate(model, store=store, edit=edit, num_inference_steps=1).attention
    assert {layer.place for layer in store.maps} == {"up"}
    for layer, kept in store.maps.items():
        assert [tuple(t.shape) for t in kept] == [(2, layer.height * layer.width, 2)]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)  # no view of more


def test_b12_runs_do_not_disturb_each_other(model, plain):
    """Blends and controllers read the notebook's global variables."""

    def start(edit):
        prompts = [tokenize(model.tokenizer, text) for text in (SQUIRREL, LION)]
        cond = encode(model.text_encoder, prompts)
        uncond = encode(model.text_encoder, [tokenize(model.tokenizer, "")]).expand_as(cond)
        hook = bind(edit, prompts, latent_size=(16, 16), coarse=(16, 16), defaults={})
        x = noise().expand(2, -1, -1, -1)
        return minip2p.denoise(model.unet, minip2p.DDIM(4), x, cond, uncond, 4.0, hook)

    *_, (a, b) = zip(start(SWAP), start(None), strict=True)  # call by call in turns
    assert difference(a, latents(model, edit=SWAP)) < 1e-5
    assert difference(b, plain) < 1e-5


def test_b17_half_precision(toy):
    """Mappers in float32 met maps in float16: an error."""
    half = copy.copy(toy)
    half.unet = copy.deepcopy(toy.unet).bfloat16()
    half.text_encoder = copy.deepcopy(toy.text_encoder).bfloat16()
    windows = {"default_": 0.8, "lion": 0.5}
    edit = Reweight({"burger": 2}, WordSwap(windows, 0.4, LocalBlend("lion")))
    settings = {"edit": edit, "num_inference_steps": 2, "seed": 1}
    result = generate(half, **settings, store=AttentionStore(words=["lion"]))
    assert result.latents.dtype == torch.float32
    assert difference(result.latents, latents(toy, **settings)) < 0.05
    assert all(t.dtype == torch.float32 for kept in result.attention.maps.values() for t in kept)

    class Watch(minip2p.Hook):
        def __call__(self, probs, layer):
            assert probs.dtype == torch.float32  # softmax, edit and sum
            return probs

    generate(half, hooks=[Watch()], num_inference_steps=1)


def test_b19_noise_comes_from_the_cpu_in_float32(model, plain):
    """The noise was drawn on the device, so that a seed meant another picture on each."""
    state = torch.get_rng_state()
    assert torch.equal(latents(model, latents=noise()), plain)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own random numbers go on


def test_b19_pixels_are_rounded():
    """They were cut off: a quarter of a level darker on average, and black where they were 0.99."""
    levels = torch.tensor([0.0, 0.4, 0.6, 99.4, 99.6, 254.6, 255.0, 300.0, -9.0])
    pixels = (levels / 255 * 2 - 1).expand(1, 3, 1, -1)
    (image,) = to_images(pixels)
    assert [image.getpixel((x, 0))[0] for x in range(9)] == [0, 0, 1, 99, 100, 255, 255, 255, 0]
