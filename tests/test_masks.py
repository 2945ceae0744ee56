"""Masks: those of the user in every form, and those that words make, whatever their weights."""

import io
import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import minip2p
from minip2p import Hook, Layer, LocalBlend, Refine, Reweight
from minip2p.edit import bind
from minip2p.mask import read_mask
from minip2p.text import tokenize
from minip2p.weights.model import SD_DEFAULTS

WHERE = np.zeros((64, 64), dtype=bool)  # what is to be edited, in latents
WHERE[10:40, 5:30] = True
GREY = WHERE.astype(np.uint8) * 255


@pytest.fixture(autouse=True)
def no_warnings():
    """Let no library's warning pass for a right input."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- of the user ---------------------------------------------------------------------------------


def mode_p(indices: np.ndarray, *colours: int) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(list(colours))
    return image


def as_png(image: Image.Image, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(file)


def rgba(colour: np.ndarray | int, alpha: np.ndarray | int) -> Image.Image:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = colour, alpha
    return Image.fromarray(pixels)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


NUMPY = ("uint8", "int8", "uint16", ">u2", "int16", "int32", "uint32", "int64", "uint64", "float16")
NUMPY += ("float32", ">f4", "float64", "longdouble", "bool")
TORCH = (torch.uint8, torch.int8, torch.int16, torch.int64, torch.bool)
TORCH += (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BRUSH = np.where(WHERE[..., None], np.uint8([255, 0, 0]), np.uint8([0, 0, 0]))
MASKS = {
    **{f"0 and 1 in numpy {kind}": WHERE.astype(kind) for kind in NUMPY},
    **{f"0 and 1 in {kind}": torch.from_numpy(WHERE).to(kind) for kind in TORCH},
    **{f"0 and 255 in numpy {k}": GREY.astype(k) for k in ("uint8", "int64", "uint16", "float32")},
    "a list": WHERE.tolist(),
    "read-only": read_only(GREY),
    "columns first": np.asfortranarray(GREY),
    "with a gradient": torch.from_numpy(WHERE).float().requires_grad_(),
    "a little over, as resizing leaves it": WHERE * 1.06 - 0.03,
    "L of 0 and 255": Image.fromarray(GREY),
    "1 of a file": as_png(Image.fromarray(WHERE)),
    "RGB": Image.fromarray(np.repeat(GREY[..., None], 3, 2)),
    "CMYK": Image.fromarray(np.repeat(GREY[..., None], 3, 2)).convert("CMYK"),
    "palette, black and white": mode_p(WHERE, 0, 0, 0, 255, 255, 255),
    "palette of a file": as_png(mode_p(WHERE, 0, 0, 0, 255, 255, 255)),
    "palette with opacities": as_png(mode_p(WHERE, 9, 9, 9, 9, 9, 9), transparency=b"\0\xff"),
    "palette with one transparent": as_png(mode_p(WHERE, 0, 0, 0, 9, 9, 9), transparency=0),
    "16 bits": Image.fromarray(WHERE.astype(np.uint16) * np.uint16(65535)),
    "F of 0 to 255": Image.fromarray(GREY.astype(np.float32)),
    "white, in the alpha": rgba(255, GREY),
    "black, in the alpha": rgba(0, GREY),
    "a red brush on nothing": rgba(BRUSH, GREY),
    "opaque": rgba(GREY[..., None], 255),
    "transparent, but coloured": rgba(GREY[..., None], 0),
    "LA, in the alpha": Image.merge("LA", [Image.new("L", (64, 64)), Image.fromarray(GREY)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_form_of_a_mask_selects_the_same(name):
    assert np.array_equal(read_mask(MASKS[name], (64, 64)).numpy(), WHERE)


@pytest.mark.parametrize(
    ("name", "mask", "numbers"),
    [
        ("zeros in uint8", np.zeros((64, 64), np.uint8), "from 0 to 0"),
        ("a black picture", Image.new("RGB", (64, 64)), "from 0 to 0"),
        ("labels", WHERE.astype(np.uint8) * 3, "from 0 to 3"),
        ("dark grey", Image.fromarray(GREY // 4), "from 0 to 63"),
        ("below a half", WHERE * 0.5, "from 0 to 0.5"),
        ("below nothing", -WHERE.astype(int), "from -1 to 0"),
        ("nan", np.full((64, 64), np.nan), "from nan to nan"),
        ("of no scale", WHERE * 1e6, r"from 0 to 1e\+06"),
        ("too small to fill a latent pixel", np.eye(512), "from 0 to 1, .* 0.5 .* 8 x 8 pixels"),
    ],
)
def test_a_mask_that_selects_nothing_says_what_it_holds(name, mask, numbers):
    with pytest.raises(ValueError, match=f"^A blend's mask .* {numbers}.*0 and 1, or 0 and 255"):
        read_mask(mask, (64, 64))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (WHERE.astype(complex), "real numbers, not an object of type ndarray"),
        (torch.ones(64, 64, dtype=torch.complex64), "not an object of type Tensor"),
        (np.array([["a"]]), "real numbers, not an object of type ndarray"),
        (None, "not None"),
        (1, "not a number"),
        (Image.new("La", (64, 64)), "mode 'La', can't be read"),
    ],
)
def test_what_is_no_mask(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_mask(mask, (64, 64))


@pytest.mark.parametrize("mask", [Image.fromarray(GREY), GREY[..., None] / 255.0])
def test_a_mask_is_what_diffusers_takes_it_for(mask):
    """Compare with the processor of its inpainting pipelines, for masks that fill blocks."""
    if isinstance(mask, Image.Image):
        mask = big = mask.resize((512, 512), Image.Resampling.NEAREST)
    else:
        big = np.repeat(np.repeat(mask, 8, 0), 8, 1)
        mask = big[..., 0]
    processor = VaeImageProcessor(
        8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    theirs = F.interpolate(processor.preprocess(big).float(), (64, 64))[0, 0] > 0.5
    assert torch.equal(read_mask(mask, (64, 64)), theirs)
    assert np.array_equal(theirs.numpy(), WHERE)


# --- of words, beside weights --------------------------------------------------------------------

SQUIRREL = "a painting of a squirrel"
RED = "a painting of a red squirrel"
CROSS = Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "up", True, 16, 16)
WEIGHTS = [0, -1, 3]


def bound(tokenizer, edit, *texts: str):
    prompts = [tokenize(tokenizer, text) for text in texts]
    return bind(edit, prompts, latent_size=(64, 64), coarse=(16, 16), defaults=SD_DEFAULTS)


def generate(model, edit, prompts=(SQUIRREL, RED), **settings) -> minip2p.Result:
    settings = {"num_inference_steps": 4, "scheduler": "ddim", "decode": False, **settings}
    return minip2p.generate(model, list(prompts), edit=edit, **settings)


def summed(edit: Hook, fused: bool) -> Tensor:
    """Sum what a blend reads at two calls of four, one of them in the window. → b q 2"""
    generator = torch.Generator().manual_seed(0)
    for call in (0, 3):
        hook = edit.at(call, 4, 0)
        q, k = (torch.randn(2, 2, n, 64, generator=generator) for n in (256, 77))
        if fused:
            hook.linear(CROSS).read(q, k)
        else:
            hook((q @ k.mT / 8).softmax(dim=-1), CROSS)
    return edit.blends[0].maps


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("w", WEIGHTS)
def test_a_blend_reads_maps_before_weights(clip_tokenizer, w, everywhere, fused):
    refine = Refine(0.5, 0.4, LocalBlend("red", subtract="painting"))
    weighted = Reweight({"red": w, "painting": w}, refine, everywhere)
    read = summed(bound(clip_tokenizer, weighted, SQUIRREL, RED), fused)
    assert torch.equal(read, summed(bound(clip_tokenizer, refine, SQUIRREL, RED), fused))
    assert read[1].min() > 0


# --- of words, empty -----------------------------------------------------------------------------

NOTHING = LocalBlend("red", threshold=0.0, subtract="painting")  # everything looks a little at it


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_a_mask_that_becomes_empty_says_so_once(model, scheduler):
    with pytest.warns(UserWarning) as warned:
        latents = generate(model, Refine(0.8, 0.4, NOTHING), scheduler=scheduler).latents
    assert torch.equal(latents[0], latents[1])
    (warning,) = warned
    assert str(warning.message) == (
        "The blend's mask is empty, so the edit 'a painting of a red squirrel' is the source's "
        "picture: try another threshold, or other words to blend or to subtract."
    )


@pytest.mark.parametrize(
    ("edit", "prompts", "named"),
    [
        (Reweight({"red": 2}, Refine(0.8, 0.4, NOTHING)), [RED], [RED]),
        ([Refine(0.8, 0.4), Refine(0.8, 0.4, NOTHING)], [RED, RED + " on a beach"],
         [RED + " on a beach"]),
        (Refine(0.8, 0.4, NOTHING), [RED, RED + " on a beach"], [RED, RED + " on a beach"]),
        (Refine(local_blend=LocalBlend("red", 0.0, 1.0, "painting")), [RED], []),  # never begins
        (Refine(local_blend=LocalBlend("red", 0.0, 0.5, "painting")), [RED], [RED]),
        (Refine(0.8, 0.4, LocalBlend("red")), [RED], []),
        (Refine(0.8, 0.4, LocalBlend(mask=WHERE[::4, ::4])), [RED], []),
    ],
)  # fmt: skip
def test_the_warning_names_the_edits_whose_mask_is_empty(model, edit, prompts, named):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        generate(model, edit, [SQUIRREL, *prompts])
    assert len(warned) == len(named)
    assert all(repr(text) in str(w.message) for w, text in zip(warned, named, strict=True))


def test_the_mask_is_asked_at_the_last_call_alone(clip_tokenizer):
    """On a GPU each question waits until all is computed."""

    class Questions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    edit = bound(clip_tokenizer, Refine(0.5, 0.4, LocalBlend("red")), SQUIRREL, RED)
    probs = torch.rand(2, 2, 256, 77, generator=torch.Generator().manual_seed(0))
    counts = []
    for call in range(5):
        hook = edit.at(call, 5, 0)
        hook(probs.clone(), CROSS)
        with Questions() as questions:
            hook.after_step(torch.zeros(2, 4, 64, 64))
        counts.append(questions.count)
    assert counts == [0, 0, 0, 0, 1]
