"""Inversion of a picture, edits that start from it, and everything that does not fit it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import diffusers
import models
import numpy as np
import pytest
import torch
from helpers import difference
from safetensors.torch import load_file, save_file
from torch import Tensor

import minip2p
from minip2p import Inversion, LocalBlend, Refine, Reweight, WordSwap, invert
from minip2p.errors import UserError
from minip2p.fast import prepare
from minip2p.sweep.measure import measure
from world.scenes import Scene, draw

BIRD, LION = "a photo of a bird", "a photo of a lion"
ALONE = {"guidance_scale": 1, "decode": False}
EDITS = {
    "swap": WordSwap(),
    "nothing": None,
    "windows of words": WordSwap({"default_": 0.8, "lion": (0.2, 0.5)}, 0.3),
    "refine": Refine(local_blend=LocalBlend("lion", threshold=0.6)),
    "blend": WordSwap(local_blend=LocalBlend("bird", start=0.3)),
    "reweight": Reweight({"lion": -2.0}, WordSwap(local_blend=LocalBlend("lion"))),
}


@pytest.fixture(scope="module")
def bird(model):
    """Draw a scene; no model has seen this layout."""
    pixels = model.sample_size[0] * model.vae.f
    return draw(Scene("bird", style="photo", layout=1_200_003), pixels).image


@pytest.fixture(scope="module")
def source(model, bird) -> Inversion:
    return invert(model, bird, BIRD, num_inference_steps=4)


@pytest.fixture(scope="module")
def friendly(model, bird) -> Inversion:
    settings = {"num_inference_steps": 4, "guidance_scale": 3}
    return invert(model, bird, BIRD, method="edit-friendly", **settings)


@pytest.fixture(scope="module")
def toy_source(toy, bird) -> Inversion:
    """Invert with random weights: for tests of everything around the numbers."""
    return invert(toy, bird, BIRD, num_inference_steps=3, skip=1, method="edit-friendly")


@contextmanager
def counted(model) -> Iterator[list[int]]:
    """List the number of rows of each UNet call."""
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


# ---- The inversion -------------------------------------------------------------------------------


def test_every_level_is_that_of_diffusers(tmp_path):
    """Compare with diffusers' UNet, VAE and DDIMInverseScheduler on the same weights.

    The timesteps agree because the scheduler's config has steps_offset 1 and set_alpha_to_one
    False, as SD's. By its own defaults it visits 0, 20, ... 980, as google's notebook does.
    """
    tokenizer = models.EMOJI_TOKENIZER
    truth = models.make_truth(len(json.loads((tokenizer / "vocab.json").read_text())))
    ours = minip2p.load(models.save_diffusers(tmp_path / "m", truth, tokenizer), device="cpu")
    for part in (ours.unet, ours.text_encoder, truth.unet):
        part.double()  # or else the steps add up what other kernels round
    image = draw(Scene("cat", layout=5), 64).image
    steps = 12
    source = invert(ours, image, BIRD, num_inference_steps=steps)

    config = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = diffusers.DDIMInverseScheduler(**betas, **config)
    theirs.set_timesteps(steps)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        x = truth.vae.encode(pixels).latent_dist.mode() * truth.vae.config.scaling_factor
        ids = torch.tensor([minip2p.text.tokenize(ours.tokenizer, BIRD).ids])
        context = truth.text_encoder(ids).last_hidden_state.double()
        levels = [x]
        for t in theirs.timesteps:
            eps = truth.unet(levels[-1].double(), t, context).sample.float()
            levels.append(theirs.step(eps, t, levels[-1]).prev_sample)
    assert len(source.trajectory) == len(levels) == steps + 1
    for level, (mine, right) in enumerate(zip(source.trajectory.flip(0), levels, strict=True)):
        assert difference(mine, right[0]) < 1e-5, level


def test_what_an_inversion_holds(model, bird, source):
    assert source.trajectory.shape == (5, 4, *model.sample_size)
    assert source.trajectory.dtype == torch.float32 and source.trajectory.device.type == "cpu"
    assert source.noises is None and source.picture.image.tobytes() == bird.tobytes()
    with torch.no_grad():
        clean = model.vae.encode(source.picture.tensor())
        drawn = minip2p.vae.to_images(model.vae.decode(clean))[0]
    assert torch.equal(source.trajectory[-1:], clean)
    assert source.reconstruction.tobytes() == drawn.tobytes()
    assert 0.4 < source.trajectory[0].std() < 1.3  # nearly noise: its wall is flat


def test_refinements_lead_back_and_guidance_leads_away(model, bird):
    """Without guidance, x_T leads back the more exactly the better each step is solved.

    With guidance a plain inversion leads elsewhere: this is the reason for "direct".
    """
    errors = []
    for refinements, guidance in (0, 1), (2, 1), (0, 7.5):
        settings = {"num_inference_steps": 8, "method": "ddim", "refinements": refinements}
        source = invert(model, bird, BIRD, **settings)
        settings = {"guidance_scale": guidance, "decode": False}
        back = minip2p.generate(model, BIRD, source=source, **settings).latents
        errors.append(difference(back[0], source.trajectory[-1]))
    assert errors[1] < 0.6 * errors[0] and errors[2] > 3 * errors[0], errors


# ---- Row 0 ---------------------------------------------------------------------------------------


ROWS = [("direct", edit, 7.5) for edit in EDITS]
ROWS += [("edit-friendly", edit, 1) for edit in ("swap", "nothing", "blend")]


@pytest.mark.parametrize("method, edit, guidance", ROWS)
def test_row_0_is_the_reconstruction_to_the_bit(model, source, friendly, method, edit, guidance):
    source = source if method == "direct" else friendly
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


def test_row_0_with_hooks_and_alone(model, source):
    class Wild(minip2p.Hook):
        def __call__(self, probs, layer):
            return probs.roll(1, dims=-1)

        def after_step(self, latents):
            return latents + 0.1 * latents.flip(-1)

    for prompts, edit in (
        ([BIRD], None),
        ([BIRD, LION], "auto"),
        ([BIRD, LION], WordSwap(local_blend=LocalBlend("lion"))),
    ):
        settings = {"edit": edit, "store": True, "decode": False}
        out = minip2p.generate(model, prompts, source=source, **settings)
        assert torch.equal(out.latents[0], source.trajectory[-1])
        assert out.attention.word("bird").shape == out.attention.size
    # A hook acts last.
    wild = minip2p.generate(model, [BIRD, LION], hooks=[Wild()], source=source, decode=False)
    assert not torch.equal(wild.latents[0], source.trajectory[-1])


def test_a_blend_reads_row_0_where_it_was_put(model, source):
    """Outside of the mask the edit is the picture, to the bit."""
    mask = torch.zeros(source.trajectory.shape[-2:])
    mask[:, :8] = 1
    edit = WordSwap(local_blend=LocalBlend(mask=mask))
    out = minip2p.generate(model, [BIRD, LION], edit=edit, source=source, guidance_scale=5)
    assert torch.equal(out.latents[1, :, :, 8:], source.trajectory[-1, :, :, 8:])
    assert not torch.equal(out.latents[1, :, :, :8], source.trajectory[-1, :, :, :8])


def test_the_noises_alone_lead_to_the_picture(model, friendly):
    """With the same prompt and guidance, nothing has to be put back."""
    cond, uncond = (
        minip2p.text.encode(model.text_encoder, [minip2p.text.tokenize(model.tokenizer, prompt)])
        for prompt in (BIRD, "")
    )
    noise, scheduler = friendly.start(model)
    for n, x in enumerate(minip2p.denoise(model.unet, scheduler, noise, cond, uncond, 3), 1):
        assert difference(x, friendly.trajectory[n, None]) < 1e-5, n


def test_edit_friendly_noises_are_not_small(friendly):
    """They keep the picture: their variance exceeds 1, and neighbours are anticorrelated.

    (Huberman-Spiegelglas et al. 2024, figure 5)
    """
    z = friendly.noises.flatten(1)
    assert (z[:-1].std(dim=1) > 1).all()
    correlations = [torch.corrcoef(z[i : i + 2])[0, 1].item() for i in range(len(z) - 1)]
    assert correlations[0] < -0.2 and sum(correlations) < 0, correlations


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_other_spacings_of_timesteps(model, bird, spacing):
    """A step and its inverse belong to the same two levels at any distance of timesteps."""
    other = replace(model, schedule=model.schedule | {"timestep_spacing": spacing})
    for method in ("direct", "edit-friendly"):
        source = invert(other, bird, BIRD, method=method, num_inference_steps=3)
        out = minip2p.generate(other, [BIRD, LION], edit="auto", source=source, decode=False)
        assert torch.equal(out.latents[0], source.trajectory[-1]) and out.latents.isfinite().all()
    errors = []
    for refinements in (0, 4):
        settings = {"num_inference_steps": 3, "method": "ddim", "refinements": refinements}
        source = invert(other, bird, BIRD, **settings)
        back = minip2p.generate(other, BIRD, source=source, **ALONE).latents[0]
        errors.append(difference(back, source.trajectory[-1]))
    assert errors[1] < 0.3 * errors[0], errors


# ---- Settings ------------------------------------------------------------------------------------


def test_an_edit_costs_no_more_than_of_a_generated_picture(model, source, friendly):
    """The source's row needs no unconditional row."""
    for inversion, at_most in ((None, 4), (source, 3), (friendly, 3)):
        with counted(model) as rows:
            settings = {"decode": False} | ({} if inversion else {"num_inference_steps": 4})
            minip2p.generate(model, [BIRD, LION], edit="auto", source=inversion, **settings)
        assert rows == [at_most] * 4
    with counted(model) as rows:
        minip2p.generate(model, [BIRD, LION], edit="auto", source=source, **ALONE)
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
def test_the_cost_of_inversions(toy, bird, settings, rows):
    with counted(toy) as counts:
        source = invert(toy, bird, BIRD, num_inference_steps=5, **settings)
    assert counts == rows
    assert len(source.trajectory) == 6 - settings.get("skip", 0)


@pytest.mark.parametrize("method", ["direct", "edit-friendly"])
def test_skip_stays_closer_to_the_picture(model, bird, method):
    distances = []
    for skip in (0, 3):
        source = invert(model, bird, BIRD, num_inference_steps=4, method=method, skip=skip)
        out = minip2p.generate(model, [BIRD, LION], edit="auto", source=source, decode=False)
        assert torch.equal(out.latents[0], source.trajectory[-1])
        distances.append(difference(out.latents[1], out.latents[0]))
    assert 0 < distances[1] < distances[0], distances


def test_seeds_and_repeats(model, bird, friendly):
    again = {"num_inference_steps": 4, "guidance_scale": 3, "method": "edit-friendly"}
    assert torch.equal(invert(model, bird, BIRD, **again).noises, friendly.noises)
    other = invert(model, bird, BIRD, seed=1, **again)
    assert not torch.equal(other.trajectory[0], friendly.trajectory[0])
    assert torch.equal(other.trajectory[-1], friendly.trajectory[-1])


def test_what_a_source_decides_may_be_said_again(toy, toy_source):
    settings = {"edit": "auto", "source": toy_source}
    record = minip2p.generate(toy, [BIRD, LION], **settings).run
    same = {name: toy_source.settings[name] for name in ("num_inference_steps", "height", "width")}
    assert minip2p.generate(toy, [BIRD, LION], **settings, **same).run == record


def test_windows_are_fractions_of_the_calls_that_are_left(toy, toy_source):
    sampler = toy_source.start(toy)[1]
    table = minip2p.explain(toy, [BIRD, LION], WordSwap(0.5, 1.0), scheduler=sampler)
    assert "1 to 1 of 2" in table and "1 to 2 of 2" in table
    assert "first 1 of the 3 steps are skipped" in table and "2 calls that are left" in table


def test_other_sizes(toy):
    whole = draw(Scene("cat", "riding", "car", layout=9)).image.resize((150, 100))
    f = toy.vae.f
    source = invert(toy, whole, BIRD, num_inference_steps=2, height=16 * f, width=24 * f)
    assert source.trajectory.shape == (3, 4, 16, 24)
    out = minip2p.generate(toy, [BIRD, LION], edit="auto", source=source)
    assert out.images[0].tobytes() == source.reconstruction.tobytes()
    assert source.picture.put_back(out.images[1]).size == (150, 100)


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["direct", "edit-friendly"])
def test_save_and_load(toy, bird, method, tmp_path):
    file, numbers = tmp_path / "bird.safetensors", {"num_inference_steps": np.int64(2)}
    numbers |= {"seed": np.int32(5), "skip": np.uint8(1), "guidance_scale": np.float32(3)}
    source = invert(toy, bird, BIRD, method=method, **numbers)
    source.save(file)
    source.save(str(file))  # over it
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again = Inversion.load(file)
    for ours, theirs in zip(
        (source.trajectory, source.noises), (again.trajectory, again.noises), strict=True
    ):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert again.settings == source.settings and again.model == toy.identity()
    assert {name: again.settings[name] for name in numbers} == numbers
    assert again.reconstruction.tobytes() == source.reconstruction.tobytes()
    assert again.picture.image.tobytes() == source.picture.image.tobytes()
    edit = WordSwap(local_blend=LocalBlend("bird"))
    out = [minip2p.generate(toy, [BIRD, LION], edit=edit, source=s) for s in (source, again)]
    assert torch.equal(out[0].latents, out[1].latents)


def rewrite(file: Path, changes: dict[str, object], tensors: dict[str, Tensor | None]) -> None:
    """Replace settings and tensors of a saved inversion; None removes one."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    content = json.loads(header["__metadata__"]["about"])
    for name, value in changes.items():
        table = content if name in content else content["settings"]
        table.pop(name, None)
        if value is not None:
            table[name] = value
    parts = {name: t for name, t in (load_file(file) | tensors).items() if t is not None}
    save_file(parts, file, header["__metadata__"] | {"about": json.dumps(content)})


def test_a_file_with_any_part_changed_is_damaged(toy_source, tmp_path):
    """One setting or one tensor is missing, or has another type, shape or value."""
    file = tmp_path / "bird.safetensors"
    toy_source.save(file)
    values = (None, [], {}, True, 10**400, float("inf"), float("nan"))
    settings = [(name, value) for name in ("model", *toy_source.settings) for value in values]
    settings += [("num_inference_steps", 4), ("skip", 0), ("method", "ddim"), ("height", 64)]
    settings += [("model", "x"), ("extra", 1), ("settings", [])]
    tensors = [("extra", torch.ones(1)), ("model", torch.ones(686))]  # as the second edition had
    for name, kept in load_file(file).items():
        shapes = kept[1:], kept[..., 1:], kept[None], kept[:0], kept[..., :0]
        types = (kept.to(t) for t in (torch.bool, torch.half, torch.double, torch.float8_e5m2))
        tensors += [(name, None), *((name, changed.clone()) for changed in (*shapes, *types))]
        if kept.is_floating_point():
            tensors += [(name, kept * x) for x in (torch.nan, torch.inf)]
    changes = [({n: v}, {}) for n, v in settings] + [({}, {n: v}) for n, v in tensors]
    for changed in changes:
        toy_source.save(file)
        rewrite(file, *changed)
        with pytest.raises(UserError, match=r"bird\.safetensors is damaged"):
            Inversion.load(file)
            pytest.fail(f"loaded with {changed}")


# ---- Mistakes ------------------------------------------------------------------------------------

INVERT = {
    "method": ({"method": "null-text"}, "direct, edit-friendly, ddim", "'null-text'"),
    "prompts": ({"prompt": [BIRD]}, "one string"),
    "steps": ({"num_inference_steps": 0}, "1 to 999", "0"),
    "skip": ({"num_inference_steps": 4, "skip": 4}, "0 to 3", "4"),
    "refinements": ({"refinements": 100}, "0 to 99", "100"),
    "refined noises": ({"method": "edit-friendly", "refinements": 1}, "leave them out"),
    "fit": ({"fit": "squeeze"}, "crop, pad, stretch", "'squeeze'"),
    "picture": ({"image": "no-such.png"}, "no-such.png"),
}


SOURCE = {
    "other prompt": ([LION, BIRD], {}, repr(BIRD), repr(LION)),
    "other steps": ([BIRD], {"num_inference_steps": 20}, "num_inference_steps 3", "20"),
    "latents": ([BIRD], {"latents": torch.zeros(1, 4, 16, 16)}, "latents", "leave it out"),
    "own scheduler": ([BIRD], {"scheduler": minip2p.DDIM(4)}, "scheduler", "leave it out"),
    "eta": ([BIRD], {"eta": 1.0}, "eta", "leave it out"),
    "a file": ([BIRD], {"source": "bird.safetensors"}, "minip2p.invert", "'bird.safetensors'"),
}


@pytest.mark.parametrize("name", [*INVERT, *SOURCE])
def test_mistakes(toy, bird, toy_source, name):
    """One sentence, before the UNet is called."""
    with counted(toy) as rows, pytest.raises(UserError) as caught:
        if name in INVERT:
            settings, *parts = INVERT[name]
            invert(toy, **({"image": bird, "prompt": BIRD} | settings))
        else:
            prompts, settings, *parts = SOURCE[name]
            minip2p.generate(toy, prompts, **({"source": toy_source} | settings))
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and not rows
    for part in parts:
        assert part in sentence


def test_an_inversion_belongs_to_one_model(toy, toy_source):
    """All that makes a model another one is in its identity: see test_weights.py."""
    other = replace(toy, schedule=toy.schedule | {"beta_end": 0.013})
    with counted(other) as rows, pytest.raises(UserError, match="another model"):
        minip2p.generate(other, BIRD, source=toy_source)
    assert not rows


def test_a_prepared_model_keeps_its_identity(toy, toy_source):
    same = deepcopy(toy)
    assert same.identity() == toy_source.model
    prepare(same.unet)
    assert minip2p.generate(same, BIRD, source=toy_source, decode=False)
    unknown = deepcopy(toy)
    prepare(unknown.unet)
    with pytest.raises(UserError, match=r"before fast\.prepare"):
        replace(unknown).identity()


def test_right_uses_are_quiet(toy, bird, recwarn):
    source = invert(toy, bird.convert("P"), BIRD, num_inference_steps=1)
    minip2p.generate(toy, [BIRD, LION], edit="auto", source=source)
    assert not recwarn.list


def test_a_model_that_overflows(toy, bird, monkeypatch):
    monkeypatch.setattr(toy.unet, "forward", lambda x, *_: torch.full_like(x, torch.inf))
    for method in ("direct", "edit-friendly"):
        with pytest.raises(ValueError, match=r"The inversion became .* in float32"):
            invert(toy, bird, BIRD, num_inference_steps=2, method=method)


# ---- Defaults of torch ---------------------------------------------------------------------------


def test_the_callers_defaults_of_torch_change_nothing(toy, toy_folder, bird):
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

    expected = numbers(toy)
    try:
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            assert all(map(torch.equal, numbers(toy), expected)), dtype
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert all(map(torch.equal, numbers(minip2p.load(toy_folder, device="cpu")), expected))


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
        back = minip2p.generate(model, BIRD, source=plain, guidance_scale=1).latents[0].cpu()
        errors[dtype] = difference(back, plain.trajectory[-1])
    print(errors)
    assert errors[torch.float16] < errors[torch.float32] + 0.02
