"""Prompt-to-Prompt on the bundled trained model: against a written-out reference, and its meaning.

Random weights attend almost uniformly, and a wrong edit hides in them. So everything here runs on
the model that comes with the package; `test_the_comparison_sees` shows what such a comparison sees.

The reference takes seconds a case, so its latents are kept in data/reference.safetensors, each
under a hash of its case, the model and reference.py. `pytest -m slow` on this file runs the
reference again on some of them and on those that are new, and renews the file.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from helpers import EMOJI, LION, SNOW, SQUIRREL, difference, noise
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import minip2p
from minip2p import LocalBlend, Refine, Reweight, WordSwap
from minip2p.attention import Attention, Chain, PromptRows
from minip2p.edit import bind
from minip2p.text import encode, tokenize

STEPS, FEW = 5, 3  # against the reference, and where a run has to end
REFERENCE = Path(__file__).parent / "data" / "reference.safetensors"

# Words of two, three and four tokens of the bundled vocabulary.
TWO, TWO_TOO, THREE, FOUR = "motorcycle", "skateboard", "dogs", "muffin"


def test_the_words_have_as_many_tokens(model):
    tokens = [len(model.tokenizer.encode(word)[0]) for word in (TWO, TWO_TOO, THREE, FOUR)]
    assert tokens == [2, 2, 3, 4]


@pytest.fixture(scope="session")
def theirs() -> ref.Model:
    return ref.load(EMOJI)


# --- against the reference -----------------------------------------------------------------------


@dataclass
class Case:
    """One run: its prompts, and the edit of each, for minip2p and for the reference."""

    prompts: list[str]
    ours: Any
    settings: dict[str, Any] = field(default_factory=dict)  # of both
    only_ours: dict[str, Any] = field(default_factory=dict)
    coarse: tuple[int, int] = (16, 16)
    theirs: list[ref.Edit | None] = field(default_factory=list)  # empty: translated from `ours`

    def __post_init__(self) -> None:
        edits = self.ours if isinstance(self.ours, list) else [self.ours] * len(self.prompts[1:])
        pairs = zip(edits, self.prompts[1:], strict=True)
        self.theirs = self.theirs or [translate(edit, self.prompts[0], row) for edit, row in pairs]

    def hash(self) -> str:
        """Return a hash of everything that the reference's latents depend on."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else value.__name__

        case = asdict(replace(self, ours=None, only_ours={}))
        return hashlib.sha256((json.dumps(case, default=plain) + model_hash()).encode()).hexdigest()


@functools.cache
def model_hash() -> str:
    """Return a hash of the bundled model and of the reference's code."""
    digest = hashlib.sha256(Path(ref.__file__).read_bytes())
    for name in sorted(map(str, EMOJI.rglob("*.safetensors"))):
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def translate(edit: Any, source: str, target: str) -> ref.Edit | None:
    """Write an edit down for the reference, which names the words of the edited prompt alone."""
    if edit is None:
        return None
    weights, everywhere = {}, True
    if isinstance(edit, Reweight):
        weights, everywhere, edit = edit.weights, edit.everywhere, edit.edit
    is_swap = isinstance(edit, WordSwap)
    old, new = source.split(), target.split()
    to_new = dict(zip(old, new, strict=True)) if is_swap else {}
    to_old = dict(zip(new, old, strict=True)) if is_swap else {}

    def pair(window: Any) -> tuple[float, float]:
        start, end = window if isinstance(window, tuple) else (0, window)
        return float(start), float(end)

    def words(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Return the words of the source and of the target that these names stand for."""
        sources = [to_old.get(name, name) for name in names if name in to_old or name in old]
        return sources, [to_new.get(name, name) for name in names]

    windows = edit.cross_replace_steps
    windows = dict(windows) if isinstance(windows, dict) else {"default_": windows}
    cross = pair(windows.pop("default_", 1))
    blend = edit.local_blend
    if blend is not None:
        mask = MASKS.get(id(blend.mask), blend.mask)
        places = (*words(blend.words), *words(blend.subtract))
        blend = ref.Blend(*places, threshold=blend.threshold, start=blend.start, mask=mask)
    return ref.Edit(
        ref.replace if is_swap else ref.refine,
        cross,
        pair(edit.self_replace_steps),
        {to_new.get(word, word): pair(window) for word, window in windows.items()},
        {word: float(weight) for word, weight in weights.items()},
        blend,
        everywhere,
    )


SWAP, REFINE = WordSwap(0.7, 0.4), Refine(0.7, 0.4)

A_MASK = torch.zeros(16, 16, dtype=torch.bool)
A_MASK[3:11, 2:9] = True
ODD_MASK = torch.zeros(15, 18, dtype=torch.bool)
ODD_MASK[:, 5:12] = True
ODD_MASK_IN_PIXELS = ODD_MASK.repeat_interleave(8, 0).repeat_interleave(8, 1).float().numpy()
MASKS = {id(ODD_MASK_IN_PIXELS): ODD_MASK}  # the reference's masks have the latents' size

TO_TWO = f"a photo of a squirrel eating a {TWO}"
TO_THREE = f"a photo of a squirrel eating a {THREE}"
LION_TO_TWO = f"a photo of a lion eating a {TWO}"
LION_TO_THREE = f"a photo of a lion eating a {THREE}"
TWO_AT_NIGHT = f"a painting of a dog riding a {TWO} at night"
IN_THE_SNOW = " in the snow" * 24

CASES = {
    # Word swap
    "swap_1_to_1": Case([SQUIRREL, LION], SWAP),
    "swap_1_to_2": Case([SQUIRREL, TO_TWO], SWAP),
    "swap_1_to_3": Case([SQUIRREL, f"a photo of a {THREE} eating a burger"], SWAP),
    "swap_2_to_1": Case([TWO_AT_NIGHT, TWO_AT_NIGHT.replace(TWO, "car")], SWAP),
    "swap_3_to_4": Case(
        [f"a {THREE} eating a cake in the snow", f"a {FOUR} eating a cake in the snow"], SWAP
    ),
    "swap_several_words_1_to_3_and_2_to_1": Case(
        [f"a cat riding a {TWO} on the beach", f"a {THREE} riding a car on the beach"], SWAP
    ),
    "several_edits": Case(
        [SQUIRREL, LION, TO_TWO, "a photo of a cat riding a car"], WordSwap(0.8, 0.4)
    ),
    "a_list_of_different_edits_one_of_them_none": Case(
        [SQUIRREL, LION, "a photo of a panda eating a cake", SNOW, SQUIRREL],
        [
            WordSwap((0.2, 0.7), 0.2),
            None,
            Refine({"default_": 0.8, "snow": 0.3, "burger": 0.5}, (0.0, 0.5)),
            Reweight({"burger": -1.0}, WordSwap(0.4, 0.7)),
        ],
    ),
    # Windows
    "windows_with_start_and_end": Case([SQUIRREL, LION], WordSwap((0.2, 0.7), (0.34, 0.67))),
    "windows_of_words": Case(
        [SQUIRREL, LION_TO_TWO], WordSwap({"default_": 0.7, "lion": 0.2, TWO: (0.5, 1.0)}, 0.4)
    ),
    "windows_of_the_source_s_words": Case(  # without "default_": 1
        [SQUIRREL, LION_TO_THREE], WordSwap({"squirrel": 0.2, "burger": 0.4}, 0.4)
    ),
    "windows_of_everything": Case([SQUIRREL, LION], WordSwap(1, 1)),
    # Refinement. An added word has its own attention, whatever its window.
    "refine_adds_words": Case([SQUIRREL, SNOW], REFINE),
    "refine_adds_a_word_of_two_tokens_in_the_middle": Case(
        [SQUIRREL, f"a photo of a {TWO} squirrel eating a {TWO_TOO} burger"],
        Refine({"default_": 0.8, "squirrel": 0.3}, 0.4),
    ),
    "refine_takes_words_away": Case([SNOW, SQUIRREL], REFINE),
    # Re-weighting
    "reweight_louder": Case([SNOW, SNOW], Reweight({"snow": 4.0}, SWAP)),
    "reweight_negative": Case([SNOW, SNOW], Reweight({"snow": -1.0}, WordSwap(1.0, 0.4))),
    "reweight_without_any_window": Case([SNOW, SNOW], Reweight({"squirrel": 2.0}, WordSwap(0, 0))),
    "reweight_several_words_on_a_swap": Case(
        [SNOW, f"{TO_THREE} in the snow"],
        Reweight(
            {THREE: 3.0, "snow": -0.5, "photo": 0.0}, WordSwap({"default_": 0.8, THREE: 0.3}, 0.4)
        ),
    ),
    # As in the original notebook: an added word's weight acts in its window, too.
    "reweight_within_the_windows_of_a_refinement": Case(
        [SQUIRREL, SNOW],
        Reweight(
            {"snow": 3.0, "burger": -1.0},
            Refine({"default_": 0.7, "burger": 0.4}, 0.4),
            everywhere=False,
        ),
    ),
    "reweight_on_a_refinement": Case(
        [SQUIRREL, SNOW], Reweight({"snow": 3.0, "burger": 0.5}, Refine((0.2, 0.8), 0.4))
    ),
    # Local blend
    "blend": Case([SQUIRREL, LION], WordSwap(0.7, 0.4, LocalBlend("lion"))),
    "blend_of_a_word_of_three_tokens_named_by_its_counterpart": Case(
        [SQUIRREL, TO_THREE],
        WordSwap({"default_": 1.0, THREE: 0.3}, 0.2, LocalBlend("burger", threshold=0.4)),
    ),
    "blend_starts_late_and_subtracts": Case(
        [SQUIRREL, LION],
        WordSwap(0.7, 0.0, LocalBlend("lion", 0.25, start=0.5, subtract="burger")),
    ),
    "blend_of_two_edits_of_three_on_refine_and_reweight": Case(
        [SQUIRREL, SNOW, LION, "a photo of a lion eating a burger in the snow"],
        [
            Reweight({"snow": 2.0}, Refine(0.7, 0.4, LocalBlend("snow", 0.5))),
            SWAP,
            Refine(0.7, 0.4, LocalBlend(["lion", "burger"], start=0.34)),
        ],
    ),
    "blend_where_a_silenced_word_is": Case(
        [SQUIRREL, SNOW, SNOW],
        [
            Reweight({"snow": 0.0}, Refine(0.7, 0.4, LocalBlend("snow", 0.5))),
            Reweight({"snow": -1.0}, Refine(0.7, 0.4, LocalBlend("burger", 0.5, subtract="snow"))),
        ],
    ),
    "blend_with_a_mask": Case(
        [SQUIRREL, LION], WordSwap(0.7, 0.4, LocalBlend(mask=A_MASK, start=0.34))
    ),
    # Schedulers, guidance, prompts
    "pndm": Case(  # 6 calls for 5 steps
        [SQUIRREL, LION],
        WordSwap({"default_": 0.8, "lion": 0.4}, (0.2, 0.7)),
        {"scheduler": "pndm"},
    ),
    # The second call starts from x_T again, and so undoes what the blend did after the first.
    "pndm_blend": Case(
        [SQUIRREL, LION], WordSwap(0.8, 0.4, LocalBlend("lion")), {"scheduler": "pndm"}
    ),
    "guidance_1": Case(
        [SQUIRREL, LION], WordSwap(0.7, 0.4, LocalBlend("lion")), {"guidance_scale": 1}
    ),
    "negative_prompt": Case(
        [SQUIRREL, SNOW],
        REFINE,
        {"negative_prompt": "a painting of a car at night", "guidance_scale": 7.5},
    ),
    "a_prompt_that_fills_all_77_tokens": Case(  # 76 and 77 with begin and end
        [f"a cake{IN_THE_SNOW}", f"a {TWO}{IN_THE_SNOW}"], SWAP
    ),
    # Sizes: the bundled UNet attends at the latents' size, 1/2, 1/4 and, in the middle, 1/8 of it
    "size_16x24": Case(  # one level is both the finest and the coarse one
        [SQUIRREL, TO_TWO],
        WordSwap(0.7, 0.4, LocalBlend("burger")),
        {"latents": noise(16, 24)},
        coarse=(16, 24),
    ),
    "size_15x18_from_pixels": Case(  # odd at every level: 15x18, 8x9, 4x5, 2x3
        [SQUIRREL, SNOW],
        Refine(0.7, 0.4, LocalBlend(mask=ODD_MASK_IN_PIXELS)),
        {"latents": noise(15, 18)},
        {"latents": None, "height": 120, "width": 144, "seed": 8888},
        coarse=(15, 18),
    ),
    "size_31x33": Case(  # self-attention is replaced, and the blend looks, at 16x17
        [SQUIRREL, LION_TO_TWO],
        WordSwap({"default_": 0.8, "lion": 0.4}, 0.6, LocalBlend("lion", start=0.34)),
        {"latents": noise(31, 33), "num_inference_steps": 3},
        coarse=(16, 17),
    ),
}


def trailing_tokens_stay(tokenizer, source, target):
    """The bug of the widely copied mapper: what follows an unequal swap is mapped j -> j."""
    mapper, takes_part = ref.replace(tokenizer, source, target)
    last = max(ref.positions(tokenizer, target, target.split()[-1:]))
    mapper[:, last + 1 :] = torch.eye(ref.LENGTH)[:, last + 1 :]
    return mapper, takes_part


def shared_by_the_mean(tokenizer, source, target):
    """n -> 1 takes the mean of the old word's tokens, and not their sum."""
    mapper, takes_part = ref.replace(tokenizer, source, target)
    return mapper / mapper.sum(dim=0).clamp(min=1), takes_part


WITHIN = "reweight_within_the_windows_of_a_refinement"
LATE = "blend_starts_late_and_subtracts"

# What is done to the reference of a case -> the latents move by more than 1e-3.
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "cross window one call short": ("swap_1_to_1", {"cross": (0, 0.5)}),
    "cross window one call late": ("swap_1_to_1", {"cross": (0.2, 0.7)}),
    "self window one call short": ("swap_1_to_1", {"self_": (0, 0.2)}),
    "self window one call long": ("swap_1_to_1", {"self_": (0, 0.6)}),
    "a word's window one call short": ("pndm", {"word_windows": {"lion": (0, 0.2)}}),
    "a word's window not seen": ("pndm", {"word_windows": {}}),
    "pndm's calls taken for its steps": ("pndm", {"self_": (0.2, 0.5)}),
    "trailing tokens stay": ("swap_1_to_2", {"align": trailing_tokens_stay}),
    "n to 1 by the mean": ("swap_2_to_1", {"align": shared_by_the_mean}),
    "weights a little off": ("reweight_louder", {"weights": {"snow": 3.8}}),
    "no weights outside of the windows": ("reweight_without_any_window", {"weights": {}}),
    "weights outside of the windows": (WITHIN, {"everywhere": True}),
    "blend one call late": (
        LATE,
        {"blend": ref.Blend(["squirrel"], ["lion"], ["burger"], ["burger"], 0.25, 0.67)},
    ),
    "nothing subtracted": (
        LATE,
        {"blend": ref.Blend(["squirrel"], ["lion"], threshold=0.25, start=0.5)},
    ),
    "blend by the edit's word alone": ("blend", {"blend": ref.Blend([], ["lion"])}),
}


def wrong_case(how: str) -> Case:
    name, changes = WRONG[how]
    return replace(CASES[name], theirs=[replace(CASES[name].theirs[0], **changes)])


def run_ours(model: minip2p.StableDiffusion, case: Case, **settings: Any) -> minip2p.Result:
    usual = {"num_inference_steps": STEPS, "scheduler": "ddim", "latents": noise()}
    settings = usual | case.settings | case.only_ours | {"decode": False} | settings
    return minip2p.generate(model, case.prompts, edit=case.ours, **settings)


def run_theirs(theirs: ref.Model, case: Case) -> tuple[Tensor, ref.Run]:
    settings = dict(case.settings)
    return ref.prompt_to_prompt(
        theirs,
        case.prompts,
        case.theirs,
        settings.pop("latents", noise()),
        coarse=case.coarse,
        steps=settings.pop("num_inference_steps", STEPS),
        guidance=settings.pop("guidance_scale", 4.0),  # the bundled model's
        **settings,
    )


def kept_latents(name: str, case: Case) -> Tensor | None:
    """Return the reference's latents from the file, or None if they are of another case."""
    with safe_open(REFERENCE, "pt") as file:
        is_same = (file.metadata() or {}).get(name) == case.hash()
        return file.get_tensor(name) if is_same else None


@pytest.fixture(scope="module")
def ours(model) -> Callable[[str], Tensor]:
    """Name of a case → minip2p's latents; each is made once."""
    return functools.cache(lambda name: run_ours(model, CASES[name]).latents)


@pytest.fixture
def reference_latents(request) -> Callable[[str, Case], Tensor]:
    """Return the reference's latents: those in the file, or else those of a run."""

    def latents(name: str, case: Case) -> Tensor:
        kept = kept_latents(name, case)
        return run_theirs(request.getfixturevalue("theirs"), case)[0] if kept is None else kept

    return latents


@pytest.mark.parametrize("name", CASES)
def test_the_reference_ends_at_the_same_latents(model, ours, reference_latents, name):
    case, latents = CASES[name], ours(name)
    assert model.unet.coarse_size(*latents.shape[2:]) == case.coarse
    expected = reference_latents(name, case)
    each = [difference(a, b) for a, b in zip(latents, expected, strict=True)]
    print(f"{name}: {max(each):.1e}")
    assert max(each) < 1e-4


@pytest.mark.parametrize("how", WRONG)
def test_the_comparison_sees(ours, reference_latents, how):
    latents = ours(WRONG[how][0])
    wrong = reference_latents(how, wrong_case(how))
    print(f"{how}: {difference(wrong[1], latents[1]):.1e}")
    assert difference(wrong[1], latents[1]) > 1e-3
    assert difference(wrong[0], latents[0]) < 1e-4  # the source never depends on it


@pytest.mark.slow
def test_the_kept_latents_are_the_reference_s(theirs):
    """Run the reference on new cases and on every fifth of the others.

    Where the kept latents differ it renews the file, and fails.
    """
    cases = CASES | {how: wrong_case(how) for how in WRONG}
    latents, outdated = {}, []
    for n, (name, case) in enumerate(cases.items()):
        kept = kept_latents(name, case)
        if kept is not None and n % 5:
            latents[name] = kept
            continue
        latents[name], run = run_theirs(theirs, case)
        if kept is None or difference(kept, latents[name]) > 1e-5:
            outdated.append(name)
        if name in CASES:
            assert run.margin > 1e-5, f"{name}: rounding decides about a pixel, change a threshold"
    if outdated:
        hashes = {name: case.hash() for name, case in cases.items()}
        save_file({name: x.contiguous() for name, x in latents.items()}, REFERENCE, hashes)
    assert not outdated, f"{REFERENCE} was renewed: look at the change and commit it"


# --- every layer: fused equals written out -------------------------------------------------------


class WrittenOut(minip2p.Hook):
    """The same edit, but on maps that are written down, at every layer."""

    def __init__(self, edit: minip2p.Hook):
        self.edit = edit

    def __call__(self, probs: Tensor, layer: minip2p.Layer) -> Tensor:
        return self.edit(probs, layer) if self.edit.applies_to(layer) else probs


WINDOWS = {"default_": 0.8, "squirrel": 0.3, "snow": (0.6, 0.9)}  # at call 5 of 10: out, in, out

# Each is what WordSwap and Refine do to the two edited prompts at call 5 of 10.
MIXES: dict[str, Any] = {
    "all from the source": [WordSwap(1.0, 1.0), WordSwap(1.0, 1.0)],
    "one from the source": [None, WordSwap(1.0, 1.0)],
    "the other from the source": [WordSwap(1.0, 1.0), None],
    "some tokens": [WordSwap(WINDOWS, 0.0), Refine(1.0, (0.2, 0.6))],
    "own maps": [WordSwap(0.0, 0.0), Refine(0.0, 0.0)],
    "own maps, weighted": [Reweight({"snow": -2.0}, WordSwap(0, 0)), None],
    "weighted on all": [Reweight({"lion": 3.0, "snow": 0.0}, WordSwap(1, 1)), WordSwap(1, 1)],
    "weighted on some": [
        Reweight({"snow": 3.0, "lion": -1.0}, WordSwap(WINDOWS, 0.5)),
        Reweight({"night": 2.0}, Refine(1.0, 1.0)),
    ],
    "weighted within the windows": [
        Reweight({"snow": 3.0, "lion": -1.0}, WordSwap(WINDOWS, 0.5), everywhere=False),
        Reweight({"night": 2.0}, Refine({"default_": 1, "night": 0.3}), everywhere=False),
    ],
}


@pytest.mark.parametrize("name", MIXES)
def test_every_layer_with_guidance_and_a_store_of_words(model, name):
    """Both forms are compared at every layer of UNet call 5 of 10, each time on the same input.

    The unconditional rows are left alone, and what a fused edit reads is the map.
    """
    texts = [SNOW, f"a photo of a lion eating a {TWO} in the snow"]
    texts.append("a photo of a squirrel riding a car at the night")  # as many words in each
    prompts = [tokenize(model.tokenizer, text) for text in texts]
    sizes = {"latent_size": (16, 16), "coarse": (16, 16)}
    edit = bind(MIXES[name], prompts, **sizes, defaults=model.defaults).at(5, 10, 0)
    cond = encode(model.text_encoder, prompts)
    x = noise().expand(len(prompts), -1, -1, -1)
    x = next(minip2p.denoise(model.unet, minip2p.DDIM(2), x, cond, cond, 1.0))  # halfway

    stores = [minip2p.AttentionStore(words=["snow", "lion", TWO]) for _ in range(2)]
    for store in stores:
        store.begin(prompts, (16, 16))
        store.at(0, 1, 0)
    fused, written = (Chain([edit, store]) for store in stores)
    written = PromptRows(WrittenOut(written), len(prompts))
    errors = []

    def compare(module: Attention, args: tuple, out: Tensor) -> None:
        errors.append(difference(out, module.forward(*args[:2], written)))

    layers = [m for m in model.unet.modules() if isinstance(m, Attention)]
    handles = [layer.register_forward_hook(compare) for layer in layers]
    with torch.inference_mode():
        context = torch.cat([cond, cond.flip(0)])
        model.unet(torch.cat([x, x]), 501, context, PromptRows(fused, len(prompts)))
    for handle in handles:
        handle.remove()
    assert len(errors) == len(layers)
    read = [difference(*(store.average((n, n)) for store in stores)) for n in (16, 8, 4, 2)]
    print(f"{name}: {max(errors):.1e}, maps of words {max(read):.1e}")
    assert max(*errors, *read) < 2e-6


# --- what it means -------------------------------------------------------------------------------


def generate(model: minip2p.StableDiffusion, prompts: Any, edit: Any = None, **settings: Any):
    settings = {"num_inference_steps": FEW, "scheduler": "ddim", "decode": False} | settings
    return minip2p.generate(model, prompts, edit=edit, **settings)


@pytest.fixture(scope="module")
def plain(model) -> minip2p.Result:
    return generate(model, [SQUIRREL, LION])


EDITS: dict[str, tuple[str, Any]] = {  # an edited prompt, and an edit that changes much
    "swap": (LION, WordSwap(1.0, 1.0)),
    "refine": (SNOW, Refine({"default_": 0.8, "burger": 0.2}, 0.4)),
    "reweight": (LION, Reweight({"lion": 3.0, "burger": -2.0}, WordSwap((0.2, 0.8), 0.4))),
    "blend": (LION, WordSwap(0.8, 0.4, LocalBlend("lion", subtract="burger"))),
}


@pytest.mark.parametrize("name", EDITS)
def test_the_source_is_as_if_generated_alone(model, plain, name):
    target, edit = EDITS[name]
    source, edited = generate(model, [SQUIRREL, target], edit).latents
    print(f"{name}: {difference(source, plain.latents[0]):.1e}")
    assert difference(source, plain.latents[0]) < 1e-4
    assert difference(edited, plain.latents[0]) > 1e-2


@pytest.mark.parametrize(
    "edit",
    [
        WordSwap(0.8, 0.4),
        Refine({"default_": (0.3, 0.6), "burger": 0.2}, (0.5, 1.0)),
        Reweight({"burger": 1.0}, WordSwap(1.0, 1.0)),
        WordSwap(0.4, 0.4, LocalBlend("burger", start=0.5)),
        "auto",
    ],
    ids=repr,
)
def test_an_edit_to_the_same_prompt_changes_nothing(model, plain, edit):
    source, edited = generate(model, [SQUIRREL, SQUIRREL], edit).latents
    print(f"{difference(edited, source):.1e}, {difference(edited, plain.latents[0]):.1e}")
    assert difference(edited, source) < 1e-5
    assert difference(edited, plain.latents[0]) < 1e-5


@pytest.mark.parametrize(
    "edit",
    [
        WordSwap(0, 0),
        Refine(0.0, 0.0),
        WordSwap({"default_": 0.0, "lion": (0.5, 0.5)}, (1.0, 1.0)),
        Reweight({"lion": 1}, WordSwap(0, 0)),
        [None],
    ],
    ids=repr,
)
def test_windows_of_0_are_no_edit(model, plain, edit):
    assert torch.equal(generate(model, [SQUIRREL, LION], edit).latents, plain.latents)


def test_auto_takes_the_edit_that_fits(model):
    prompts = [SQUIRREL, f"a photo of a squirrel eating a {TWO}", SNOW]
    auto = generate(model, prompts, "auto").latents
    assert torch.equal(auto, generate(model, prompts, [WordSwap(), Refine()]).latents)


def test_a_blend_keeps_the_source_outside_of_its_mask(model):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    source, edited = generate(
        model, [SQUIRREL, LION], WordSwap(0.8, 0.4, LocalBlend(mask=mask))
    ).latents
    assert torch.equal(source[:, ~mask], edited[:, ~mask])
    assert difference(edited[:, mask], source[:, mask]) > 0.1


# --- the store -----------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [None, WordSwap(0.6, 0.4, LocalBlend("lion"))], ids=repr)
def test_a_store_changes_nothing(model, edit):
    """To the bit where no map is written down; else by the rounding of another order of sums."""

    def run(store):
        return generate(model, [SQUIRREL, LION], edit, store=store).latents

    expected = run(False)
    assert torch.equal(run(minip2p.AttentionStore(words=["lion", "burger"])), expected)
    whole = run(minip2p.AttentionStore(self_attention=True, by_call=True))
    before = run(minip2p.AttentionStore(before_edit=True))
    print(f"{difference(whole, expected):.1e}, {difference(before, expected):.1e}")
    assert difference(whole, expected) < 1e-5
    assert difference(before, expected) < 1e-5


@pytest.mark.parametrize("before_edit", [False, True])
def test_rows_of_stored_maps_sum_to_1(model, before_edit):
    """Also of an edited map, if all tokens have one window: every row of the mapper sums to 1."""
    store = minip2p.AttentionStore(self_attention=True, before_edit=before_edit)
    prompts = [SQUIRREL, f"a photo of a lion eating a {THREE}"]
    generate(model, prompts, WordSwap(0.6, 0.4), store=store)
    for n in (16, 8, 4, 2):
        for is_cross in (True, False):
            maps = store.average((n, n), is_cross=is_cross)
            assert maps.shape == (2, n, n, 77 if is_cross else n * n)
            assert maps.min() >= 0
            torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, n, n), rtol=0, atol=1e-5)


def test_stored_maps_are_the_reference_s(model, theirs):
    case = Case(
        [SQUIRREL, LION_TO_TWO],
        Reweight({"lion": 2.0}, WordSwap(0.6, 0.4)),
        {"scheduler": "pndm", "num_inference_steps": 2},
    )
    _, run = run_theirs(theirs, case)
    for before_edit, sums in ((False, run.after), (True, run.before)):
        store = minip2p.AttentionStore(before_edit=before_edit)
        run_ours(model, case, store=store)
        expected = (sums / run.layers).float().view(2, 16, 16, 77)
        print(f"{difference(store.average(), expected):.1e}")
        assert difference(store.average(), expected) < 1e-5


@pytest.mark.parametrize("before_edit", [False, True])
def test_words_are_columns_of_the_whole_maps(model, before_edit):
    new = THREE
    prompts = [SQUIRREL, f"a photo of a squirrel eating a {new}"]
    words = ["squirrel", new, "burger", "eating a"]
    whole, columns = (
        minip2p.AttentionStore(words=words, before_edit=before_edit) for words in (None, words)
    )
    for store in (whole, columns):
        generate(model, prompts, WordSwap({new: 0.4}, 0.4, LocalBlend(new)), store=store)
    assert columns.average().shape == (2, 16, 16, 4)
    pairs = [(w, p) for w in words for p in (0, 1) if w in prompts[p]]
    for size in ((16, 16), (8, 8)):
        for name, prompt in pairs:
            expected = whole.word(name, prompt, size=size)
            assert expected.shape == size
            assert difference(columns.word(name, prompt, size=size), expected) < 1e-5
            for place in ("down", "up"):
                a, b = (s.word(name, prompt, size=size, places=[place]) for s in (columns, whole))
                assert difference(a, b) < 1e-5
    at = tokenize(model.tokenizer, prompts[1]).find(new)
    torch.testing.assert_close(whole.word(new, 1), whole.average()[1][..., at].sum(dim=-1))


@pytest.mark.parametrize(
    "words, scheduler", [(None, "pndm"), (["squirrel", "burger"], "ddim")], ids=str
)
def test_maps_of_the_calls_sum_to_the_average(model, words, scheduler):
    def run(by_call):
        store = minip2p.AttentionStore(words=words, by_call=by_call)
        generate(model, [SQUIRREL, LION], WordSwap(0.6, 0.4), store=store, scheduler=scheduler)
        return store

    apart, summed = run(True), run(False)
    calls = FEW + (scheduler == "pndm")
    each = [apart.average(call=call) for call in range(calls)]
    assert difference(sum(each) / calls, summed.average()) < 1e-5
    assert difference(apart.average(), summed.average()) < 1e-5
    assert difference(each[0], each[-1]) > 1e-3
    with pytest.raises(ValueError, match=f"0 to {calls - 1}"):
        apart.average(call=calls)
    with pytest.raises(ValueError, match="by_call=True"):
        summed.average(call=0)


@pytest.mark.parametrize("by_call", [False, True])
def test_no_later_edit_reaches_a_stored_map(model, by_call):
    """The hook overwrites every map in place after the store has seen it."""
    seen: dict[minip2p.Layer, list[Tensor]] = {}

    class Overwrite(minip2p.Hook):
        def __call__(self, probs, layer):
            seen.setdefault(layer, []).append(probs.mean(dim=1).clone())
            return probs.fill_(0.01)

    store = minip2p.AttentionStore(self_attention=True, before_edit=True, by_call=by_call)
    generate(model, [SQUIRREL, LION], hooks=[Overwrite()], store=store)
    assert len(store.maps) == len(seen) == 32  # 6 + 6 down, 1 + 1 mid, 9 + 9 up, as in SD
    for layer, maps in seen.items():
        expected = maps if by_call else [sum(maps)]
        assert len(store.maps[layer]) == len(expected)
        for a, b in zip(store.maps[layer], expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_store_may_have_more_words_than_a_head_is_wide(model):
    words = [a + b for a in ("", "a ", "of a ", "photo of a ") for b in ("squirrel",)]
    words += ["eating", "eating a", "eating a burger", "squirrel eating", "squirrel eating a"]
    words += ["photo", "a photo", "photo of", "of", "of a", "a", "burger", "a burger", "lion"]
    stores = minip2p.AttentionStore(words=words), minip2p.AttentionStore()
    for store in stores:
        generate(model, [SQUIRREL, LION], store=store)
    for name in words[:-1]:
        assert difference(*(store.word(name) for store in stores)) < 1e-5
