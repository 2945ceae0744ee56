"""A given picture as the source: its inversion, its edits, and what does not fit it."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import models
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import minip2p
from minip2p import Inversion, LocalBlend, Refine, Reweight, WordSwap, invert
from minip2p.sweep.measure import measure
from world.scenes import Scene, draw

BIRD, LION = "a photo of a bird", "a photo of a lion"
EDITS = {
    "swap": WordSwap(),
    "everything": WordSwap(1.0, 1.0),
    "nothing": None,
    "windows of words": WordSwap({"default_": 0.8, "lion": (0.2, 0.5)}, 0.3),
    "refine": Refine(local_blend=LocalBlend("lion", threshold=0.6)),
    "blend": WordSwap(local_blend=LocalBlend("bird", start=0.3)),
    "reweight": Reweight({"lion": -2.0}),
    "louder": Reweight({"lion": 3.0}, WordSwap(local_blend=LocalBlend("lion"))),
}


def error(ours: Tensor, truth: Tensor) -> float:
    """‖ours - truth‖ / ‖truth‖"""
    ours, truth = ours.double().cpu(), truth.double().cpu()
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.fixture(scope="module")
def model() -> minip2p.StableDiffusion:
    return minip2p.load(device="cpu")


@pytest.fixture(scope="module")
def bird(model):
    """A render of a scene; no model has seen this layout."""
    pixels = model.sample_size[0] * model.vae.f
    return draw(Scene("bird", style="photo", layout=1_200_003), pixels).image


@pytest.fixture(scope="module")
def found(model, bird) -> Inversion:
    return invert(model, bird, BIRD, num_inference_steps=4)


@pytest.fixture(scope="module")
def friendly(model, bird) -> Inversion:
    settings = {"num_inference_steps": 4, "guidance_scale": 3}
    return invert(model, bird, BIRD, method="edit-friendly", **settings)


def test_the_callback_sees_every_call(model, bird):
    """And an exception that it raises ends the inversion."""
    seen = []
    invert(model, bird, BIRD, num_inference_steps=2, method="ddim", refinements=1,
           callback=lambda call, calls, x: seen.append((call, calls, tuple(x.shape))))  # fmt: skip
    assert seen == [(n, 4, (1, 4, 16, 16)) for n in range(4)]
    with pytest.raises(KeyError):
        invert(model, bird, BIRD, num_inference_steps=2, callback=lambda call, *_: {}[call])


@contextmanager
def counted(model) -> Iterator[list[int]]:
    """The number of rows of each UNet call."""
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


# ---- The inversion -------------------------------------------------------------------------------


def test_every_level_is_that_of_diffusers(tmp_path):
    """SD's own settings, the same weights; diffusers' UNet, VAE and DDIMInverseScheduler.

    The timesteps agree because the scheduler's config says steps_offset 1 and set_alpha_to_one
    False, as SD's do. By its own defaults it visits 0, 20, ... 980 instead of 1, 21, ... 981, from
    a latent without any noise, and clips: google's notebook has those timesteps."""
    tokenizer = models.EMOJI_TOKENIZER
    truth = models.make_truth(len(json.loads((tokenizer / "vocab.json").read_text())))
    ours = minip2p.load(models.save_diffusers(tmp_path / "m", truth, tokenizer), device="cpu")
    for part in (ours.unet, ours.text_encoder, truth.unet, truth.text_encoder):
        part.double()  # or else 50 steps add up what other kernels round: to 1.06e-5
    image = draw(Scene("cat", layout=5), 64).image
    steps = 50
    found = invert(ours, image, BIRD, num_inference_steps=steps)

    config = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = diffusers.DDIMInverseScheduler(**betas, **config)
    theirs.set_timesteps(steps)
    assert theirs.timesteps[:3].tolist() == [1, 21, 41]
    by_default = diffusers.DDIMInverseScheduler(**betas)
    by_default.set_timesteps(steps)
    assert by_default.timesteps[:3].tolist() == [0, 20, 40]
    assert by_default.initial_alpha_cumprod == 1 != theirs.initial_alpha_cumprod

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        x = truth.vae.encode(pixels).latent_dist.mode() * truth.vae.config.scaling_factor
        ids = torch.tensor([minip2p.text.tokenize(ours.tokenizer, BIRD).ids])
        context = truth.text_encoder(ids).last_hidden_state
        levels = [x]
        for t in theirs.timesteps:
            eps = truth.unet(levels[-1].double(), t, context).sample.float()
            levels.append(theirs.step(eps, t, levels[-1]).prev_sample)
    assert len(found.trajectory) == len(levels) == steps + 1
    for level, (mine, right) in enumerate(zip(found.trajectory.flip(0), levels, strict=True)):
        assert error(mine, right[0]) < 1e-5, level


def test_what_an_inversion_holds(model, bird, found):
    assert found.trajectory.shape == (5, 4, *model.sample_size)
    assert found.trajectory.dtype == torch.float32 and found.trajectory.device.type == "cpu"
    assert found.noises is None and found.picture.image.tobytes() == bird.tobytes()
    pixels = found.picture.tensor()
    with torch.no_grad():
        clean = model.vae.encode(pixels)
        drawn = minip2p.vae.to_images(model.vae.decode(clean))[0]
    assert torch.equal(found.trajectory[-1:], clean)
    assert found.reconstruction.tobytes() == drawn.tobytes()
    assert 0.4 < found.trajectory[0].std() < 1.3  # nearly noise: its wall is flat


def test_more_refinements_lead_back_more_closely(model, bird):
    """Without guidance and without putting back, x_T leads back to the picture the more exactly
    the better each step's equation is solved."""
    errors = []
    for refinements in (0, 1, 3):
        settings = {"num_inference_steps": 10, "method": "ddim", "refinements": refinements}
        source = invert(model, bird, BIRD, **settings)
        with counted(model) as rows:
            back = minip2p.generate(model, BIRD, source=source, guidance_scale=1).latents
        assert sum(rows) == 10
        errors.append(error(back[0], source.trajectory[-1]))
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1], errors


def test_guidance_breaks_a_plain_inversion(model, bird):
    """The reason for all the rest; if this were not so, direct would be for nothing."""
    source = invert(model, bird, BIRD, num_inference_steps=10, method="ddim")
    errors = [
        error(
            minip2p.generate(model, BIRD, source=source, guidance_scale=g).latents[0],
            source.trajectory[-1],
        )
        for g in (1, 7.5)
    ]
    assert errors[1] > 4 * errors[0], errors


# ---- Row 0 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1, 7.5])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", ["direct", "edit-friendly"])
def test_row_0_is_the_reconstruction_to_the_bit(model, found, friendly, method, edit, guidance):
    source = found if method == "direct" else friendly
    prompts = [BIRD, LION]
    edits = [EDITS[edit]]
    if edit == "blend":
        prompts, edits = [BIRD, LION, "a photo of a penguin"], [*edits, WordSwap(0.1, 0.9)]
    out = minip2p.generate(
        model, prompts, edit=edits, source=source, guidance_scale=guidance, store=edit == "swap"
    )
    assert torch.equal(out.latents[0], source.trajectory[-1])
    assert out.images[0].tobytes() == source.reconstruction.tobytes()
    assert not torch.equal(out.latents[1], out.latents[0])


def test_row_0_with_hooks_and_alone(model, found):
    class Wild(minip2p.Hook):
        def __call__(self, probs, layer):
            return probs.roll(1, dims=-1)

        def after_step(self, latents):
            return latents + 0.1 * latents.flip(-1)

    for prompts, edit in (
        ([BIRD], None),
        ([BIRD, LION], None),
        ([BIRD, LION], "auto"),
        ([BIRD, LION], WordSwap(local_blend=LocalBlend("lion"))),
    ):
        out = minip2p.generate(model, prompts, edit=edit, source=found, store=True)
        assert torch.equal(out.latents[0], found.trajectory[-1])
        assert out.attention.word("bird").shape == out.attention.size
    wild = minip2p.generate(model, [BIRD, LION], edit=Wild(), source=found)  # it may: it is last
    assert not torch.equal(wild.latents[0], found.trajectory[-1])


def test_a_blend_reads_row_0_where_it_was_put(model, found):
    """Where a mask lets nothing through, the edit is the picture, to the bit."""
    mask = torch.zeros(found.trajectory.shape[-2:])
    mask[:, :8] = 1
    edit = WordSwap(local_blend=LocalBlend(mask=mask))
    out = minip2p.generate(model, [BIRD, LION], edit=edit, source=found, guidance_scale=5)
    assert torch.equal(out.latents[1, :, :, 8:], found.trajectory[-1, :, :, 8:])
    assert not torch.equal(out.latents[1, :, :, :8], found.trajectory[-1, :, :, :8])


def test_the_noises_alone_lead_to_the_picture(model, friendly):
    """With nothing put back, the same prompt and guidance: to 1e-5 through every step."""
    words, blank = (
        minip2p.text.encode(model.text_encoder, [minip2p.text.tokenize(model.tokenizer, prompt)])
        for prompt in (BIRD, "")
    )
    noise, scheduler = friendly.start(model)
    for n, x in enumerate(minip2p.denoise(model.unet, scheduler, noise, words, blank, 3), 1):
        assert error(x, friendly.trajectory[n, None]) < 1e-5, n


def test_edit_friendly_noises_are_not_small(friendly):
    """They have more than unit variance, and neighbours are anticorrelated (Huberman et al. 2024,
    figure 5): that is what keeps the picture in them."""
    z = friendly.noises.flatten(1)
    assert (z[:-1].std(dim=1) > 1).all()
    correlations = [torch.corrcoef(z[i : i + 2])[0, 1].item() for i in range(len(z) - 1)]
    assert correlations[0] < -0.2 and sum(correlations) < 0, (
        correlations
    )  # at the end there are few


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [3, 6])
def test_other_spacings_of_timesteps(model, bird, spacing, steps):
    """A step and its inverse belong to the same two levels, whatever lies between two timesteps."""
    other = replace(model, schedule={**model.schedule, "timestep_spacing": spacing})
    settings = {"num_inference_steps": steps}
    for method in ("direct", "edit-friendly"):
        source = invert(other, bird, BIRD, method=method, **settings)
        out = minip2p.generate(other, [BIRD, LION], edit="auto", source=source)
        assert torch.equal(out.latents[0], source.trajectory[-1]) and out.latents.isfinite().all()
    source = invert(other, bird, BIRD, method="ddim", refinements=8, **settings)
    back = minip2p.generate(other, BIRD, source=source, guidance_scale=1).latents[0]
    once = invert(other, bird, BIRD, method="ddim", **settings)
    plainly = minip2p.generate(other, BIRD, source=once, guidance_scale=1).latents[0]
    assert error(back, source.trajectory[-1]) < 0.3 * error(plainly, once.trajectory[-1])


# ---- Settings ------------------------------------------------------------------------------------


def test_an_edit_costs_no_more_than_of_a_generated_picture(model, found, friendly):
    """UNet rows: the source's needs no blank row beside it."""
    for source, at_most in ((None, 4), (found, 3), (friendly, 3)):
        with counted(model) as rows:
            steps = {} if source else {"num_inference_steps": 4}
            minip2p.generate(model, [BIRD, LION], edit="auto", source=source, **steps)
        assert rows == [at_most] * 4
    with counted(model) as rows:
        minip2p.generate(model, [BIRD, LION], edit="auto", source=found, guidance_scale=1)
    assert rows == [2] * 4


@pytest.mark.parametrize(
    "settings, rows",
    [
        ({}, [1] * 5),
        ({"refinements": 2}, [1] * 15),
        ({"method": "edit-friendly"}, [2] * 5),
        ({"method": "edit-friendly", "guidance_scale": 1}, [1] * 5),
        ({"guidance_scale": 2.5}, [2] * 5),
        ({"skip": 3}, [1] * 2),
    ],
)
def test_the_cost_of_inversions(model, bird, settings, rows):
    with counted(model) as counts:
        source = invert(model, bird, BIRD, num_inference_steps=5, **settings)
    assert counts == rows
    assert len(source.trajectory) == 6 - settings.get("skip", 0)


@pytest.mark.parametrize("method", ["direct", "edit-friendly"])
def test_skip_stays_closer_to_the_picture(model, bird, method):
    distances = []
    for skip in (0, 3, 5):
        source = invert(model, bird, BIRD, num_inference_steps=6, method=method, skip=skip)
        out = minip2p.generate(model, [BIRD, LION], edit="auto", source=source)
        assert torch.equal(out.latents[0], source.trajectory[-1])
        distances.append(error(out.latents[1], out.latents[0]))
    assert 0 < distances[2] < min(distances[:2]), distances


def test_seeds_and_repeats(model, bird, friendly):
    again = {"num_inference_steps": 4, "guidance_scale": 3, "method": "edit-friendly"}
    assert torch.equal(invert(model, bird, BIRD, **again).noises, friendly.noises)
    other = invert(model, bird, BIRD, seed=1, **again)
    assert not torch.equal(other.trajectory[0], friendly.trajectory[0])
    assert torch.equal(other.trajectory[-1], friendly.trajectory[-1])


def test_what_a_run_says_of_itself(model, bird):
    source = invert(model, bird, BIRD, num_inference_steps=4, skip=1)
    settings = minip2p.generate(model, [BIRD, LION], edit="auto", source=source).run
    names = "method", "skip", "fit", "refinements", "guidance_scale"
    assert settings["scheduler"] == "ddim"
    assert settings["source"] == {"image": None} | {name: source.settings[name] for name in names}
    asked = {name: source.settings[name] for name in ("num_inference_steps", "height", "width")}
    again = minip2p.generate(model, [BIRD, LION], edit="auto", source=source, **asked)
    assert again.run == settings
    json.dumps(settings)


def test_other_sizes(model):
    whole = draw(Scene("cat", "riding", "car", layout=9)).image.resize((150, 100))
    f = model.vae.f
    source = invert(model, whole, BIRD, num_inference_steps=2, height=16 * f, width=24 * f)
    assert source.trajectory.shape == (3, 4, 16, 24)
    out = minip2p.generate(model, [BIRD, LION], edit="auto", source=source)
    assert out.images[0].tobytes() == source.reconstruction.tobytes()
    assert source.picture.put_back(out.images[1]).size == (150, 100)


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["found", "friendly"])
def test_save_and_load(model, name, request, tmp_path):
    source, file = request.getfixturevalue(name), tmp_path / "bird.safetensors"
    source.save(file)
    source.save(str(file))  # over it
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again = Inversion.load(file)
    for part in ("trajectory", "noises", "model"):
        ours, theirs = getattr(source, part), getattr(again, part)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert again.settings == source.settings
    assert again.reconstruction.tobytes() == source.reconstruction.tobytes()
    assert again.picture.image.tobytes() == source.picture.image.tobytes()
    edit = WordSwap(local_blend=LocalBlend("bird"))
    out = [minip2p.generate(model, [BIRD, LION], edit=edit, source=s) for s in (source, again)]
    assert torch.equal(out[0].latents, out[1].latents)


def test_settings_in_numpys_numbers(model, bird, tmp_path):
    numbers = {"num_inference_steps": np.int64(2), "seed": np.int32(5), "skip": np.uint8(1)}
    numbers |= {"guidance_scale": np.float32(3), "method": "edit-friendly"}
    invert(model, bird, BIRD, **numbers).save(tmp_path / "a.safetensors")
    again = Inversion.load(tmp_path / "a.safetensors")
    assert {name: again.settings[name] for name in numbers} == numbers
    minip2p.generate(model, [BIRD, LION], source=again, num_inference_steps=np.int64(2))


def test_metadata_of_a_photograph_gets_nowhere(model, bird, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    exif[0x010E] = "SECRET"
    bird.save(tmp_path / "in.jpg", exif=exif, comment=b"SECRET")
    source = invert(model, tmp_path / "in.jpg", BIRD, num_inference_steps=1)
    source.save(tmp_path / "out.safetensors")
    out = minip2p.generate(model, [BIRD, LION], edit="auto", source=source)
    source.picture.put_back(out.images[1]).save(tmp_path / "out.jpg")
    out.images[1].save(tmp_path / "out.png")
    for name in ("out.safetensors", "out.jpg", "out.png"):
        content = (tmp_path / name).read_bytes()
        assert b"SECRET" not in content and b"Exif" not in content and b"in.jpg" not in content


# ---- Mistakes ------------------------------------------------------------------------------------

INVERT = {
    "method": ({"method": "null-text"}, "direct, edit-friendly, ddim", "'null-text'"),
    "no prompt": ({"prompt": None}, "one string", "None"),
    "prompts": ({"prompt": [BIRD]}, "one string"),
    "steps": ({"num_inference_steps": 0}, "1 to 999", "0"),
    "half a step": ({"num_inference_steps": 2.5}, "2.5"),
    "skip": ({"num_inference_steps": 4, "skip": 4}, "0 to 3", "4"),
    "negative skip": ({"skip": -1}, "-1"),
    "true skip": ({"skip": True}, "True"),
    "refinements": ({"refinements": 1.5}, "refinements", "1.5"),
    "many refinements": ({"refinements": 100}, "0 to 99", "100"),
    "refined noises": ({"method": "edit-friendly", "refinements": 1}, "leave them out"),
    "seed": ({"seed": -1}, "seed", "-1"),
    "guidance": ({"guidance_scale": "3"}, "finite number", "'3'"),
    "nan": ({"guidance_scale": float("nan")}, "finite number", "nan"),
    "height": ({"height": 63}, "multiple of", "63"),
    "width": ({"width": "64"}, "'64'"),
    "fit": ({"fit": "squeeze"}, "crop, pad, stretch", "'squeeze'"),
    "picture": ({"image": "no-such.png"}, "no-such.png"),
    "no picture": ({"image": None}, "not None"),
}


@pytest.mark.parametrize("name", INVERT)
def test_mistakes_of_inverting(model, bird, name):
    settings, *says = INVERT[name]
    settings = {"image": bird, "prompt": BIRD} | settings
    with counted(model) as rows, pytest.raises(ValueError) as caught:
        invert(model, settings.pop("image"), settings.pop("prompt"), **settings)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and not rows
    for part in says:
        assert part in sentence


SOURCE = {
    "other prompt": ([LION, BIRD], {}, repr(BIRD), repr(LION)),
    "other steps": ([BIRD], {"num_inference_steps": 20}, "num_inference_steps 4", "20"),
    "other height": ([BIRD], {"height": 192}, "with height", "192"),
    "other width": ([BIRD], {"width": 192}, "with width", "192"),
    "latents": ([BIRD], {"latents": torch.zeros(1, 4, 16, 16)}, "latents", "leave it out"),
    "scheduler": ([BIRD], {"scheduler": "pndm"}, "scheduler", "leave it out"),
    "own scheduler": ([BIRD], {"scheduler": minip2p.DDIM(4)}, "scheduler", "leave it out"),
    "eta": ([BIRD], {"eta": 1.0}, "eta", "leave it out"),
    "a file": ([BIRD], {"source": "bird.safetensors"}, "minip2p.invert", "'bird.safetensors'"),
    "a picture": ([BIRD], {"source": np.zeros((8, 8, 3))}, "minip2p.invert", "ndarray"),
    "the class": ([BIRD], {"source": Inversion}, "class Inversion"),
}


@pytest.mark.parametrize("name", SOURCE)
def test_mistakes_of_editing(model, found, name):
    prompts, settings, *says = SOURCE[name]
    settings = {"source": found} | settings
    with counted(model) as rows, pytest.raises(ValueError) as caught:
        minip2p.generate(model, prompts, **settings)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and not rows
    for part in says:
        assert part in sentence


def test_another_model_is_refused_and_another_precision_is_not(model, bird, found):
    from copy import deepcopy

    for part in ("unet", "vae", "text_encoder"):
        other = replace(model, **{part: deepcopy(getattr(model, part))})
        biases = [p for n, p in getattr(other, part).named_parameters() if n.endswith("bias")]
        biases[-1].requires_grad_(False)[0] += 0.05 + biases[-1][0].abs()
        with pytest.raises(ValueError, match="another model"):
            minip2p.generate(other, BIRD, source=found)
    for dtype in (torch.float16, torch.bfloat16):
        half = minip2p.load(dtype=dtype, device="cpu")
        assert torch.equal(minip2p.generate(half, BIRD, source=found).latents[0],
                           found.trajectory[-1])  # fmt: skip
    prepared = replace(model, unet=minip2p.fast.prepare(deepcopy(model.unet)))
    assert minip2p.generate(prepared, BIRD, source=found)


@pytest.mark.parametrize(
    "content, says",
    {
        "missing": (None, "There is no file"),
        "empty": (b"", "is damaged or no safetensors file"),
        "text": (b"a photo of a bird", "is damaged or no safetensors file"),
        "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is damaged or no safetensors file"),
        "weights": ({"w": torch.zeros(3)}, "is no minip2p inversion"),
        "short": ("short", "is damaged or no safetensors file"),
        "folder": ("folder", "There is no file"),
    }.values(),
)
def test_files_that_are_none(found, content, says, tmp_path):
    file = tmp_path / "a.safetensors"
    if isinstance(content, dict):
        save_file(content, file)
    elif content == "short":
        found.save(file)
        file.write_bytes(file.read_bytes()[:-100])
    elif content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        Inversion.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_where_no_file_can_be(found):
    with pytest.raises(ValueError, match="can't be written"):
        found.save(Path(__file__) / "a.safetensors")
    with pytest.raises(ValueError, match="can't be written"):
        found.save("/no/such/folder/a.safetensors")


def test_right_uses_are_quiet(model, bird):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = invert(model, bird.convert("P"), BIRD, num_inference_steps=1)
        minip2p.generate(model, [BIRD, LION], edit="auto", source=source)


def test_a_model_that_overflows(model, bird, monkeypatch):
    """In half precision, say: no black picture, but a sentence."""
    monkeypatch.setattr(model.unet, "forward", lambda x, *_: torch.full_like(x, torch.inf))
    for method in ("direct", "edit-friendly"):
        with pytest.raises(ValueError, match=r"The inversion became .* in float32"):
            invert(model, bird, BIRD, num_inference_steps=2, method=method)


# ---- Defaults of torch ---------------------------------------------------------------------------


def test_the_callers_defaults_of_torch_change_nothing(model, bird):
    """Another default dtype or device is for the caller's own tensors."""

    def numbers(model: minip2p.StableDiffusion) -> list[Tensor]:
        edit = Reweight({"lion": 2.0}, WordSwap({"lion": 0.5}, local_blend=LocalBlend("lion")))
        size = {"height": 64, "width": 64, "num_inference_steps": 2}
        out = minip2p.generate(model, [BIRD, LION], edit=edit, eta=0.5, store=True, **size)
        pictures = [*out.images, *minip2p.show.preview(model, out.latents)]
        pictures.append(minip2p.show.word_maps(out.images[1], out.attention, 1))
        source = invert(model, bird, BIRD, method="edit-friendly", **size)
        edited = minip2p.generate(model, [BIRD, LION], edit=Refine(), source=source)
        words = ["bird"], ["lion"]
        measured = list(measure(*out.images, out.store, 1, words).values())
        return [
            out.latents,
            out.attention.average(),
            *(torch.from_numpy(np.array(image)) for image in pictures),
            source.trajectory,
            edited.latents,
            torch.tensor(measured, dtype=torch.float64, device="cpu"),
        ]

    expected = numbers(model)
    try:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert all(map(torch.equal, numbers(model), expected)), dtype
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        assert all(map(torch.equal, numbers(minip2p.load(device="cpu")), expected))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# ---- Half precision ------------------------------------------------------------------------------


@pytest.mark.gpu
def test_half_precision_on_a_gpu(bird):
    """Row 0 is exact in either; what a plain inversion without guidance leads back to is not."""
    errors = {}
    for dtype in (torch.float32, torch.float16):
        model = minip2p.load(device="cuda", dtype=dtype)
        exact = invert(model, bird, BIRD, num_inference_steps=20)
        out = minip2p.generate(model, [BIRD, LION], edit="auto", source=exact)
        assert torch.equal(out.latents[0].cpu(), exact.trajectory[-1])
        settings = {"num_inference_steps": 20, "method": "ddim", "refinements": 3}
        plain = invert(model, bird, BIRD, **settings)
        back = minip2p.generate(model, BIRD, source=plain, guidance_scale=1).latents[0]
        errors[dtype] = error(back, plain.trajectory[-1])
    print(errors)
    assert errors[torch.float16] < errors[torch.float32] + 0.02
