"""The bugs of other Prompt-to-Prompt implementations, B1 to B23, and that they are not ours.

Sixteen public implementations were compared; each test's docstring says what went wrong there.
B1 to B3 and B15 are worked out in full in test_align.py, B4 in test_mistakes.py.

Not applicable: B23 (background metrics that depend on the size of the mask), for the package has no
metrics.
"""

import ast
import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import minip2p
from minip2p import AttentionStore, Layer, LocalBlend, Refine, Reweight, WordSwap
from minip2p.align import LENGTH, calls_of, refinement, replacement, token_weights, token_windows
from minip2p.edit import bind
from minip2p.text import encode, tokenize
from minip2p.vae import to_images

SQUIRREL = "a photo of a squirrel eating a burger"
LION = "a photo of a lion eating a burger"
SNOW = "a photo of a squirrel eating a burger in the snow"
SWAP = WordSwap(0.8, 0.4)

CROSS = Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "up", True, 16, 16)
SELF = Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "up", False, 16, 16)


@pytest.fixture(scope="session")
def model() -> minip2p.StableDiffusion:
    return minip2p.load()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The model is so small that a second thread makes it slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generate(model, prompts=(SQUIRREL, LION), **settings) -> minip2p.Result:
    settings = {"num_inference_steps": 4, "scheduler": "ddim"} | settings
    return minip2p.generate(model, list(prompts), **settings)


def latents(model, prompts=(SQUIRREL, LION), **settings) -> Tensor:
    return generate(model, prompts, **settings).latents


@pytest.fixture(scope="module")
def plain(model) -> Tensor:
    """Without an edit."""
    return latents(model)


@pytest.fixture(scope="module")
def swapped(model) -> Tensor:
    return latents(model, edit=SWAP)


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return ((a - b).norm() / b.norm()).item()


def maps(b: int = 2, queries: int = 256, keys: int = LENGTH) -> Tensor:
    """Attention maps of two heads: b 2 q k."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(b, 2, queries, keys, generator=generator).softmax(dim=-1)


def bound(tokenizer, edit, *texts: str):
    """An edit, tied to prompts at SD's size."""
    prompts = [tokenize(tokenizer, text) for text in texts]
    return bind(edit, prompts, latent_size=(64, 64), coarse=(16, 16))


class Watch(minip2p.Hook):
    """A user's edit that sees all and changes nothing."""

    def __init__(self):
        self.calls, self.rows, self.dtypes, self.layers = [], set(), set(), set()

    def at(self, call, calls, timestep):
        self.calls.append((call, calls))
        return self

    def __call__(self, probs, layer):
        self.rows.add(len(probs))
        self.dtypes.add(probs.dtype)
        self.layers.add(layer)
        return probs


def test_b01_tokens_after_a_longer_word_move_along(clip_tokenizer):
    """burger to lasagne: the target's end got the source's padding, the end itself was lost."""
    source, target = (
        tokenize(clip_tokenizer, text)
        for text in ("a squirrel eating a burger now", "a squirrel eating a lasagne now")
    )
    mapper = replacement(source, target).mapper
    assert [source.find("now"), target.find("now")] == [[6], [7]]
    assert mapper[:, 7].nonzero().tolist() == [[6]]
    assert mapper[7].nonzero().tolist() == [[8]]  # the end token
    assert mapper[:, 8].nonzero().tolist() == [[7]]
    assert torch.equal(mapper.sum(dim=1), torch.ones(LENGTH))

    mapper = replacement(target, source).mapper  # and back
    assert mapper[:, 6].nonzero().tolist() == [[7]]
    assert mapper[:, 7].nonzero().tolist() == [[8]]
    assert torch.equal(mapper.sum(dim=1), torch.ones(LENGTH))


def test_b02_several_tokens_for_one_are_added_up(clip_tokenizer):
    """matchstick to ball: some took the mean, and half of the attention was lost."""
    source, target = (
        tokenize(clip_tokenizer, text) for text in ("a matchstick burns", "a ball burns")
    )
    mapper = replacement(source, target).mapper
    assert mapper[:, 2].tolist() == [0, 0, 1, 1] + [0] * 73
    # The longer way round, the padding that finds no room is added to the last one.
    mapper = replacement(target, source).mapper
    assert mapper[2].tolist() == [0, 0, 0.5, 0.5] + [0] * 73
    assert mapper[:, 76].tolist() == [0] * 75 + [1, 1]
    # What is given away is what there was.
    probs = maps()
    edited = bound(clip_tokenizer, WordSwap(1.0, 0.0), "a matchstick burns", "a ball burns").at(
        0, 2
    )
    assert torch.allclose(edited(probs.clone(), CROSS)[1].sum(dim=-1), torch.ones(2, 256))


def test_b03_words_are_found_as_written_or_not(clip_tokenizer):
    """Commas, capitals, accents: not found. After a double space the next word was found."""
    prompt = tokenize(clip_tokenizer, "A  Fluffy cat,  a café 🐱 and a cat eating a Burger, (hot)")
    #                      1 A 2 Fluffy 3 cat 4 , 5 a 6 café 7 🐱 8 and 9 a 10 cat 11 eating 12 a
    #                      13 Burger 14 , 15 ( 16 hot 17 )
    assert prompt.find("burger") == [13]
    assert prompt.find("hot") == [16]
    assert prompt.find("CAFÉ") == [6]
    assert prompt.find("🐱") == [7]
    assert prompt.find("fluffy cat") == [2, 3]
    assert prompt.find("cat") == [3, 10]
    assert prompt.find("cat#2") == [10]
    assert prompt.find("eating") == [11]


@pytest.mark.parametrize(
    "settings",
    [
        {"edit": WordSwap({"default_": 0.8, "tiger": 0.4})},
        {"edit": WordSwap(local_blend=LocalBlend("tiger"))},
        {"edit": WordSwap(local_blend=LocalBlend("lion", subtract="tiger"))},
        {"edit": Reweight({"tiger": 2.0})},
        {"store": AttentionStore(words=["tiger"])},
    ],
    ids=["window", "blend", "subtract", "weight", "store"],
)
def test_b04_unknown_words_are_errors(model, settings):
    """A word that is not there was passed over; as a blend it gave the source back."""
    with pytest.raises(ValueError, match=r"no word 'tiger' .* squirrel, eating, burger, lion"):
        generate(model, **settings)


def test_b04_a_blend_does_not_revert_the_edit(model, plain):
    blended = latents(model, edit=WordSwap(0.2, 0.0, LocalBlend("lion")))
    assert difference(blended[0], plain[0]) < 1e-4
    changed = (blended[1] - blended[0]).abs().amax(dim=0) > 0
    assert 0.02 < changed.float().mean() < 0.9  # some of the picture, not all and not nothing


def test_b05_words_of_the_source_and_the_callers_dict(clip_tokenizer):
    """Words of the source were ignored, and the caller's dict got a key "default_"."""
    prompts = [tokenize(clip_tokenizer, text) for text in (SQUIRREL, LION)]
    alignment = replacement(*prompts)
    windows = {"squirrel": 0.4}
    of_source = token_windows(windows, *prompts, alignment)
    assert windows == {"squirrel": 0.4}
    assert of_source == token_windows({"lion": 0.4}, *prompts, alignment)
    assert of_source[5] == (0, 0.4)
    # Without "default_" the others are replaced throughout, as in the reference.
    assert of_source[:5] + of_source[6:] == [(0, 1)] * 76

    weights = {"squirrel": 2.0}
    assert token_weights(weights, *prompts, alignment)[5] == 2
    bound(clip_tokenizer, Reweight(weights, WordSwap(windows)), SQUIRREL, LION).at(0, 2, 0)
    assert (windows, weights) == ({"squirrel": 0.4}, {"squirrel": 2.0})


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        (1, range(0, 10)),
        (0, range(0, 0)),
        (np.float32(0.5), range(0, 5)),
        (np.float64(0.5), range(0, 5)),
        ((0, 1), range(0, 10)),
        ([0.5, 1], range(5, 10)),
    ],
)
def test_b06_whole_numbers_and_pairs(clip_tokenizer, value, calls):
    """A window of 1 or 0 was a TypeError, for the type had to be float."""
    assert calls_of(value, 10) == calls
    for edit in (WordSwap(value, 0.0), WordSwap({"default_": 0.0, "lion": value}, 0.0)):
        edit = bound(clip_tokenizer, edit, SQUIRREL, LION)
        assert [call for call in range(10) if edit.at(call, 10, 0).applies_to(CROSS)] == list(calls)
    edit = bound(clip_tokenizer, WordSwap(0, value), SQUIRREL, LION)
    assert [call for call in range(10) if edit.at(call, 10, 0).applies_to(SELF)] == list(calls)


@pytest.mark.parametrize("value", [1.01, -0.1, (0.8, 0.1), math.nan])
def test_b06_windows_out_of_range(clip_tokenizer, value):
    for edit in (WordSwap(value), WordSwap(0.8, value), WordSwap({"lion": value})):
        with pytest.raises(ValueError, match="from 0 to 1"):
            bound(clip_tokenizer, edit, SQUIRREL, LION)


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", 4), ("pndm", 5)])
def test_b07_windows_count_unet_calls(model, scheduler, calls):
    """Cross windows counted n + 1 steps and self windows n, whatever the scheduler called."""
    watch = Watch()
    generate(model, edit=watch, scheduler=scheduler)
    assert watch.calls == [(call, calls) for call in range(calls)]


def test_b07_a_window_of_one_includes_the_last_call(clip_tokenizer):
    edit = bound(clip_tokenizer, WordSwap(1.0, 1.0), SQUIRREL, LION)
    for calls in (1, 50, 51):  # 50 steps of DDIM and of PNDM
        assert all(
            edit.at(call, calls, 0).applies_to(layer)
            for call in range(calls)
            for layer in (CROSS, SELF)
        )
    edit = bound(clip_tokenizer, WordSwap(0.59, 0.59), SQUIRREL, LION)  # 30.09 and 29.5
    for layer, calls, inside in itertools.product((CROSS, SELF), (50, 51), range(51)):
        assert edit.at(inside, calls, 0).applies_to(layer) == (inside < (30 if calls == 51 else 29))


def test_b08_nothing_is_counted_in_the_model(model, swapped):
    """The step was counted in the layers, so that a run cut short shifted the next one."""

    class Stop(minip2p.Hook):
        seen = 0

        def __call__(self, probs, layer):
            self.seen += 1
            if self.seen == 20:  # in the middle of a UNet call
                raise RuntimeError("stop")
            return probs

    before = {name: id(module) for name, module in model.unet.named_modules()}
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, edit=Stop())
    assert {name: id(module) for name, module in model.unet.named_modules()} == before
    edit = copy.deepcopy(SWAP)
    assert torch.equal(latents(model, edit=edit), swapped)
    assert torch.equal(latents(model, edit=edit), swapped)  # and an edit may be used again


def test_b08_a_scheduler_may_be_used_again(model):
    """A run that was cut short left its predictions in PNDM."""
    scheduler = minip2p.PNDM(3)
    settings = {"scheduler": scheduler, "num_inference_steps": None}
    first = latents(model, **settings)
    assert torch.equal(latents(model, **settings), first)


def test_b08_every_layer_is_reached(model):
    """With a newer library the layers were not found, and the edit did nothing."""
    watch = Watch()
    generate(model, edit=watch, num_inference_steps=1)
    layers = {name for name, _ in model.unet.named_modules() if name.endswith(("attn1", "attn2"))}
    assert {layer.name for layer in watch.layers} == layers
    assert len(layers) >= 2
    assert all(layer.is_cross == layer.name.endswith("attn2") for layer in watch.layers)
    assert all(layer.height and layer.width for layer in watch.layers)


def test_b09_all_prompts_start_from_the_same_noise(model):
    """With one generator each prompt got its own noise."""
    same = latents(model, [LION, LION, LION])
    assert difference(same[1], same[0]) < 1e-5
    assert difference(same[2], same[0]) < 1e-5
    assert difference(same[0], latents(model, [LION])[0]) < 1e-4  # alone or in a batch


def test_b09_unknown_settings_are_errors(model):
    """The documented cross_replace_steps was not read, for the code wanted n_cross_replace."""
    for wrong in ({"cross_replace_steps": 0.9}, {"n_cross_replace": 0.9}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            generate(model, edit=SWAP, **wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        WordSwap(n_cross_replace=0.9)


def test_b09_without_guidance(model):
    """A guidance of 1 was a TypeError, or cut the prompts in halves."""
    plain = latents(model, guidance_scale=1)
    edited = latents(model, guidance_scale=1, edit=SWAP)
    assert difference(edited[0], plain[0]) < 1e-4
    assert difference(edited[1], plain[1]) > 1e-2


@pytest.mark.parametrize("guidance_scale", [1, 4])
def test_b09_an_edit_sees_the_prompts_alone(model, guidance_scale):
    """The half of the batch that belongs to the negative prompt was edited or miscounted."""
    watch = Watch()
    generate(model, [SQUIRREL, LION, LION], edit=watch, guidance_scale=guidance_scale)
    assert watch.rows == {3}


class Silence(minip2p.Hook):
    """A user's edit that changes the maps in place."""

    def __call__(self, probs, layer):
        probs[1:] = 0
        return probs


class AfterSilence(Silence):
    """The same in company of a store, which the user's edit hands the maps first."""

    def __init__(self, store):
        self.store = store

    def at(self, call, calls, timestep):
        self.store.at(call, calls, timestep)
        return self

    def __call__(self, probs, layer):
        if self.store.applies_to(layer):
            self.store(probs, layer)
        return super().__call__(probs, layer)


def test_b10_what_is_stored_stays(model):
    """Stored maps were views, so that the edit changed them afterwards."""
    store = AttentionStore()
    store.begin([tokenize(model.tokenizer, text) for text in (SQUIRREL, LION)], (16, 16))
    generate(model, edit=AfterSilence(store))
    rows = store.average().sum(dim=-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def test_b10_before_or_after_the_edit_as_asked(model):
    after = generate(model, edit=Silence(), store=AttentionStore()).attention.average()
    before = generate(model, edit=Silence(), store=AttentionStore(before_edit=True))
    before = before.attention.average()
    ones = torch.ones(16, 16)
    assert torch.equal(after[1], torch.zeros_like(after[1]))
    assert torch.allclose(before[1].sum(dim=-1), ones, atol=1e-5)
    assert torch.allclose(after[0].sum(dim=-1), ones, atol=1e-5)


def test_b10_only_what_was_asked_for_is_kept(model):
    """Twice the memory was held, nine tenths of it self-attention that nobody looked at."""
    everything = generate(model, store=True, num_inference_steps=1).attention
    assert all(layer.is_cross for layer in everything.maps)
    store = AttentionStore(words=["lion", "burger"], places=["up"], max_pixels=64)
    store = generate(model, store=store, edit=SWAP).attention
    assert {layer.place for layer in store.maps} == {"up"}
    assert max(layer.height * layer.width for layer in store.maps) == 64
    for layer, kept in store.maps.items():
        assert [tuple(t.shape) for t in kept] == [(2, layer.height * layer.width, 2)]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)  # no view of more


@pytest.mark.parametrize(
    ("height", "width", "coarse"),
    [
        (128, 128, (16, 16)),
        (128, 192, (16, 24)),
        (256, 128, (32, 16)),
        (192, 192, (24, 24)),
        (256, 256, (16, 16)),
        (200, 144, (25, 18)),
    ],
)
def test_b11_blends_at_other_sizes(model, height, width, coarse):
    """The maps were read as 16 x 16 whatever the picture's size: garbage, and no error."""
    h, w = height // model.vae.f, width // model.vae.f
    assert model.unet.coarse_size(h, w) == coarse
    edit = WordSwap(0.2, 0.0, LocalBlend("lion", threshold=0.4))
    store = AttentionStore(max_pixels=coarse[0] * coarse[1])
    result = generate(
        model, edit=edit, store=store, height=height, width=width, num_inference_steps=2
    )
    assert result.latents.shape == (2, 4, h, w)

    # What the blend should have read: every token's map at that size, with nothing left out.
    words = torch.stack(
        [store.word("squirrel", 0, size=coarse), store.word("lion", 1, size=coarse)]
    )
    words = F.max_pool2d(words[:, None], 3, stride=1, padding=1)
    words = F.interpolate(words, size=(h, w), mode="nearest")[:, 0]
    mask = (words > 0.4 * words.amax(dim=(1, 2), keepdim=True)).any(dim=0)
    changed = (result.latents[1] != result.latents[0]).any(dim=0)
    assert 0.02 < mask.float().mean() < 0.98
    assert (changed != mask).float().mean() < 0.005  # a pixel at the threshold may go either way


def test_b12_runs_do_not_disturb_each_other(model, plain, swapped):
    """Blends and controllers read the notebook's global variables."""

    def start(edit):
        prompts = [tokenize(model.tokenizer, text) for text in (SQUIRREL, LION)]
        words = encode(model.text_encoder, prompts)
        blank = encode(model.text_encoder, [tokenize(model.tokenizer, "")]).expand_as(words)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8888))
        edit = bind(edit, prompts, latent_size=(16, 16), coarse=(16, 16))
        scheduler = minip2p.DDIM(4)
        return minip2p.denoise(
            model.unet, scheduler, x.expand(2, -1, -1, -1), words, blank, 4.0, edit
        )

    *_, (a, b) = zip(start(SWAP), start(None), strict=True)  # call by call in turns
    assert difference(a, swapped) < 1e-5
    assert difference(b, plain) < 1e-5


def test_b13_a_weight_for_each_word(clip_tokenizer):
    """Several weights: an error, or they were spread over the tokens of one word."""
    source, target = (
        tokenize(clip_tokenizer, text)
        for text in ("a lion eating a burger", "a lion eating a lasagne")
    )
    weights = {"lion": 3.0, "lasagne": -2.0, "eating": 0.0}
    found = token_weights(weights, source, target, replacement(source, target))
    assert found.tolist() == [1, 1, 3, 0, 1, -2, -2] + [1] * 70


@pytest.mark.parametrize("weight", [2.0, 0.0, -1.0])
def test_b14_weights_act_at_every_call_and_are_not_normalised(clip_tokenizer, weight):
    """Outside of the window nothing was scaled, or only outside. Rows need not sum to 1."""
    source, target = "a lion eating a cake", "a hippopotamus eating a cake"
    edit = bound(
        clip_tokenizer, Reweight({"hippopotamus": weight}, WordSwap(0.5, 0.0)), source, target
    )
    w = torch.tensor([1, 1, weight, weight, weight] + [1] * 72)
    probs = maps()
    mapper = replacement(*(tokenize(clip_tokenizer, text) for text in (source, target))).mapper
    for call, unweighted in (
        (0, probs[0] @ mapper),
        (4, probs[0] @ mapper),
        (5, probs[1]),
        (9, probs[1]),
    ):
        edited = edit.at(call, 10, 0)(probs.clone(), CROSS)
        assert torch.allclose(edited[1], unweighted * w, atol=1e-6)
        assert torch.equal(edited[0], probs[0])


def test_b15_padding_stays_padding(clip_tokenizer):
    """With a shorter target, its padding looked where the source's last words looked."""
    source = tokenize(clip_tokenizer, "a bowl of pea soup with croutons")  # ends at 10
    target = tokenize(clip_tokenizer, "a bowl of soup")  # ends at 5
    alignment = refinement(source, target)
    assert alignment.mapper[:, 5].nonzero().tolist() == [[10]]
    assert not alignment.mapper[1:10, 5:].any()
    assert alignment.exists[6:].tolist() == [0] * 5 + [1] * 66  # 6 to 10 have their own attention
    assert torch.equal(alignment.mapper[:, 11:], torch.eye(77)[:, 11:])


def test_b16_prompts_of_more_than_77_tokens(model):
    """The prompt was counted uncut: an IndexError."""
    tail = " and a cat" * 25
    with pytest.warns(UserWarning, match="will not see"):
        result = generate(model, [SQUIRREL + tail, LION + tail], edit=WordSwap({"lion": 0.5}))
    assert result.latents.isfinite().all()
    with (
        pytest.warns(UserWarning, match="'eating (burger|pizza)'"),
        pytest.raises(ValueError, match="'pizza' is beyond the 77 tokens"),
    ):
        long = " ".join(["cat"] * 75)
        generate(
            model, [f"{long} eating burger", f"{long} eating pizza"], edit=WordSwap({"pizza": 1})
        )


def test_b17_half_precision(model):
    """Mappers in float32 met maps in float16: an error."""
    half = copy.copy(model)
    half.unet = copy.deepcopy(model.unet).bfloat16()
    half.text_encoder = copy.deepcopy(model.text_encoder).bfloat16()
    edit = Reweight(
        {"burger": 2}, WordSwap({"default_": 0.8, "lion": 0.5}, 0.4, LocalBlend("lion"))
    )
    settings = {"edit": edit, "num_inference_steps": 2, "seed": 1}
    result = generate(half, **settings, store=AttentionStore(words=["lion"]))
    assert result.latents.dtype == torch.float32
    # Only the blend's border may differ by much.
    assert difference(result.latents, latents(model, **settings)) < 0.2
    assert all(t.dtype == torch.float32 for kept in result.attention.maps.values() for t in kept)

    watch = Watch()
    generate(half, edit=watch, num_inference_steps=1)
    assert watch.dtypes == {torch.float32}  # softmax, edit and sum


def test_b18_no_other_diffusion_library():
    """Every release of the patched library broke something."""
    for path in Path(minip2p.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "diffusers" for name in names), path


def test_b19_noise_comes_from_the_cpu_in_float32(model, plain):
    """The noise was drawn on the device, so that a seed meant another picture on each."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator("cpu").manual_seed(8888))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(latents(model, latents=noise), plain)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own random numbers go on


def test_b19_pixels_are_rounded():
    """They were cut off: a quarter of a level darker on average, and black where they were 0.99."""
    levels = torch.tensor([0.0, 0.4, 0.6, 99.4, 99.6, 254.6, 255.0, 300.0, -9.0])
    pixels = (levels / 255 * 2 - 1).expand(1, 3, 1, -1)
    (image,) = to_images(pixels)
    assert [image.getpixel((x, 0))[0] for x in range(9)] == [0, 0, 1, 99, 100, 255, 255, 255, 0]


def test_b20_the_source_has_its_own_trajectory(model):
    """The source's maps were taken from the edited picture, so that there was nothing to keep."""
    runs = []
    for edit in (None, SWAP):
        seen = []

        class Look(minip2p.Hook):
            def at(self, call, calls, timestep, seen=seen):
                seen.append([])
                return self

            def __call__(self, probs, layer, seen=seen):
                seen[-1].append(probs[0].clone())
                return probs

        generate(model, edit=edit, hooks=[Look()])
        runs.append(seen)
    for alone, edited in zip(*runs, strict=True):
        for a, b in zip(alone, edited, strict=True):
            assert difference(b, a) < 1e-4


@pytest.mark.parametrize(
    ("target", "edit"),
    [
        (LION, SWAP),
        (LION, WordSwap({"default_": (0.2, 0.8), "lion": 0.3}, (0.1, 0.9))),
        (SNOW, Refine(0.8, 0.4)),
        (SQUIRREL, Reweight({"burger": -2.0})),
        (LION, WordSwap(local_blend=LocalBlend("lion"))),
        (LION, WordSwap(local_blend=LocalBlend(mask=torch.eye(16)))),
        ("a motorcycle", "auto"),
    ],
    ids=["swap", "windows", "refine", "reweight", "blend", "mask", "auto"],
)
def test_b21_the_source_stays_as_it_is_alone(model, target, edit):
    """The source's picture was another one as soon as a second prompt was there."""
    alone = latents(model, [SQUIRREL])[0]
    assert difference(latents(model, [SQUIRREL, target], edit=edit)[0], alone) < 1e-4


def test_b22_explain_shows_that_an_edit_does_something(model):
    """Users took the identity matrix of an equal swap for an edit that does nothing."""
    lines = minip2p.explain(model, [SQUIRREL, LION], SWAP).splitlines()
    (lion,) = [line.split() for line in lines if line.split()[:1] == ["lion"]]
    assert lion == ["lion", "squirrel", "1", "to", "40", "of", "50"]


def test_b22_an_edit_does_something(plain, swapped):
    assert difference(swapped[1], plain[1]) > 0.05
