"""A scheduler's config is honoured to the bit of diffusers, refused, or without effect.

The truth is diffusers' scheduler after its Stable Diffusion pipeline has corrected it.
"""

import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import difference, noise
from models import edit_json
from torch import Tensor

import minip2p
from minip2p.scheduler import SPACINGS
from minip2p.weights import WeightsError, load, schedule
from minip2p.weights.files import Config

CONFIG = Path("scheduler_config.json")
OURS = {"DDIMScheduler": minip2p.DDIM, "PNDMScheduler": minip2p.PNDM}
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}


@pytest.fixture(scope="module")
def pipeline(layouts) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(layouts["diffusers"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_config(**fields: Any) -> tuple[str, dict[str, Any]]:
    """Read SD's config with these fields; those that are ... are left out. → sampler, levels"""
    config = {"_class_name": "PNDMScheduler"} | SD | fields
    config = Config(CONFIG, {name: value for name, value in config.items() if value is not ...})
    levels = schedule.noise_levels(config)
    return schedule.sampler(config), levels


def read_quietly(**fields: Any) -> tuple[str, dict[str, Any]]:
    """Read a config that gives no reason to a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_config(**fields)


def corrected(pipeline: diffusers.StableDiffusionPipeline, kind: str, config: Any) -> Any:
    """Make diffusers' scheduler of a config, and let its pipeline correct it."""
    scheduler = getattr(diffusers, kind).from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it corrects the config
        return diffusers.StableDiffusionPipeline(
            **(pipeline.components | {"scheduler": scheduler}), requires_safety_checker=False
        ).scheduler


def trajectory(scheduler: Any, steps: int | None = None) -> tuple[list[int], Tensor]:
    """Return timesteps and latents of a run in which every prediction is noise of one seed."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    predictions = torch.Generator().manual_seed(2)
    x, latents = noise(4, 4, seed=1), []
    timesteps = [int(t) for t in scheduler.timesteps]
    for t in timesteps:
        x = scheduler.step(torch.randn(x.shape, generator=predictions), t, x)
        x = x if isinstance(x, Tensor) else x.prev_sample
        latents.append(x)
    return timesteps, torch.cat(latents)


def assert_same_run(ours: Any, theirs: Any, steps: int) -> None:
    (timesteps, latents), (true_timesteps, truth) = trajectory(ours), trajectory(theirs, steps)
    assert timesteps == true_timesteps
    assert torch.equal(latents, truth)


# --- spacings -------------------------------------------------------------------------------------


def test_spacings_worked_out_by_hand():
    def of(spacing, steps, kind=minip2p.DDIM, **settings):
        return kind(steps, timestep_spacing=spacing, **settings).timesteps

    assert of("leading", 4) == [751, 501, 251, 1]
    assert of("trailing", 4) == [999, 749, 499, 249]
    assert of("linspace", 4) == [999, 666, 333, 0]
    assert of("trailing", 4, minip2p.PNDM) == [999, 749, 749, 499, 249]
    assert of("linspace", 4, minip2p.PNDM) == [999, 666, 666, 333, 0]
    # 1 step: the whole noise in one stride, but for linspace, which begins and ends at 0.
    assert [of(s, 1) for s in SPACINGS] == [[1], [999], [0]]
    # 500 lies in the middle: halves go to the even side, 499.5 to 500.
    assert of("linspace", 3) == [999, 500, 0]
    # The offset is of leading alone.
    assert [of(s, 2, steps_offset=0) for s in SPACINGS] == [[500, 0], [999, 499], [999, 0]]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_are_diffusers_to_the_bit(spacing, kind, pipeline):
    theirs = corrected(pipeline, kind, SD | {"timestep_spacing": spacing})
    for steps in (1, 2, 3, 4, 7, 20, 30, 31, 47, 50):
        assert_same_run(OURS[kind](steps, timestep_spacing=spacing), theirs, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_with_new_noise(spacing, pipeline):
    theirs = corrected(pipeline, "DDIMScheduler", SD | {"timestep_spacing": spacing})
    for steps in (1, 5, 31):
        theirs.set_timesteps(steps)
        noises = [torch.Generator().manual_seed(5) for _ in range(2)]
        ours = minip2p.DDIM(steps, eta=0.6, generator=noises[0], timestep_spacing=spacing)
        x = y = noise(4, 4, seed=1)
        for t in ours.timesteps:
            x = theirs.step(x.cos(), t, x, eta=0.6, generator=noises[1]).prev_sample
            y = ours.step(y.cos(), t, y)
            assert torch.equal(x, y), (steps, t)


def test_every_number_of_steps_stays_within_training():
    """diffusers' trailing goes on to timestep -1 at 61 steps, as numpy's ranges may."""
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1
    assert minip2p.DDIM(61, timestep_spacing="trailing").timesteps == theirs.timesteps[:-1].tolist()
    for spacing in SPACINGS:
        for steps in range(1, 1000):
            timesteps = minip2p.DDIM(steps, timestep_spacing=spacing).timesteps
            assert len(timesteps) == len(set(timesteps)) == steps
            assert timesteps == sorted(timesteps, reverse=True)
            assert timesteps[-1] >= 0 and timesteps[0] <= 999


@pytest.mark.parametrize("kind", OURS)
def test_a_config_changes_the_whole_run_as_in_diffusers(layouts, tmp_path, pipeline, kind):
    """4 steps of "trailing" once differed from diffusers' by 0.71."""
    folder = shutil.copytree(layouts["diffusers"], tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    edit_json(file, **SD, _class_name=kind, timestep_spacing="trailing")
    model = load(folder, device="cpu")
    assert model.schedule["timestep_spacing"] == "trailing"
    settings = dict(num_inference_steps=4, height=64, width=64, guidance_scale=7.5)
    ours = minip2p.generate(model, "a photo of a cat", seed=7, decode=False, **settings).latents
    scheduler = corrected(pipeline, kind, json.loads(file.read_text()))
    theirs = diffusers.StableDiffusionPipeline(
        **(pipeline.components | {"scheduler": scheduler}), requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    latents = noise(8, 8, seed=7)
    truth = theirs("a photo of a cat", latents=latents, output_type="latent", **settings).images
    assert difference(ours, truth) < 1e-4


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"timestep_spacing": "karras"}, "leading, trailing, linspace, not 'karras'"),
        ({"timestep_spacing": None}, "leading, trailing, linspace, not None"),
        ({"steps_offset": 20}, "steps_offset 20 the run would leave timesteps 0 to 999"),
        ({"steps_offset": -1}, "steps_offset -1 the run would leave"),
    ],
)
def test_mistakes_of_a_scheduler(arguments, says):
    with pytest.raises(ValueError, match=says):
        minip2p.DDIM(50, **arguments)
    assert minip2p.DDIM(50, steps_offset=19).timesteps[0] == 999  # the largest that fits


# --- every field of a config ----------------------------------------------------------------------

HONOURED = {  # field: another value
    "num_train_timesteps": 500,
    "beta_start": 0.001,
    "beta_end": 0.02,
    "set_alpha_to_one": True,
    "timestep_spacing": "linspace",
}
REFUSED: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": [0.1] * 1000,
    "prediction_type": "sample",
    "thresholding": True,
    "rescale_betas_zero_snr": True,
}
WITHOUT_EFFECT = {
    "steps_offset": 0,
    "clip_sample": True,
    "clip_sample_range": 0.1,
    "dynamic_thresholding_ratio": 0.5,
    "sample_max_value": 0.1,
}
SAID = {"skip_prk_steps": False}  # runs, with a warning


def fields_of(kind: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, kind)).parameters)


def test_every_field_of_ddim_and_pndm_has_its_place():
    places = [set(HONOURED), set(REFUSED), set(WITHOUT_EFFECT), set(SAID)]
    assert set().union(*places) >= fields_of("DDIMScheduler") | fields_of("PNDMScheduler")
    assert sum(map(len, places)) == len(set().union(*places))
    assert set(schedule.WITHOUT_EFFECT) == set(WITHOUT_EFFECT)
    assert set(schedule.REFUSED) == set(REFUSED) | {"use_flow_sigmas"}


ACTING = [
    (kind, name) for kind in OURS for name in (HONOURED | WITHOUT_EFFECT) if name in fields_of(kind)
]


@pytest.mark.parametrize("kind, name", ACTING)
def test_fields_act_as_in_diffusers(pipeline, kind, name):
    """Honoured ones change the run, those without effect do not; diffusers' run is the same."""
    fields = {"_class_name": kind, name: (HONOURED | WITHOUT_EFFECT)[name]}
    ours = OURS[kind](9, **read_quietly(**fields)[1])
    assert_same_run(ours, corrected(pipeline, kind, SD | fields), 9)
    changes = not torch.equal(trajectory(ours)[1], trajectory(OURS[kind](9))[1])
    assert changes == (name in HONOURED)


@pytest.mark.parametrize("kind", [*OURS, "EulerDiscreteScheduler"])
@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_refused(kind, name):
    message = rf"scheduler_config.json has {name} = .* has .*: load"
    with pytest.raises(WeightsError, match=message):
        read_config(_class_name=kind, **{name: REFUSED[name]})


def test_absent_fields_are_those_of_sd(pipeline):
    absent = dict.fromkeys(["_class_name", *SD], ...)
    sampler, levels = read_quietly(**absent)
    assert sampler == "pndm"
    assert_same_run(minip2p.PNDM(9, **levels), corrected(pipeline, "PNDMScheduler", SD), 9)


@pytest.mark.parametrize("spacing", ["karras", 5, ["leading"]], ids=str)
def test_spacings_that_are_refused(spacing):
    with pytest.raises(WeightsError, match=r"timestep_spacing = .*leading or trailing or linspace"):
        read_config(timestep_spacing=spacing)


# --- every class ----------------------------------------------------------------------------------

AS_DDIM = {
    *("DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
}
FEW_STEPS = {"LCMScheduler", "TCDScheduler"}
OTHERS = ["EulerDiscreteSchedulerOfMine", "DPMSolver3Scheduler"]  # newer ones of the family
REFUSED_CLASSES: list[Any] = [
    *("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "VQDiffusionScheduler"),
    *("MyFlowScheduler", "EulerEDM and more", 7, ["DDIMScheduler"]),
]


@pytest.mark.parametrize("name", [*OURS, *sorted(AS_DDIM | FEW_STEPS), *OTHERS])
def test_classes_that_run(name):
    """As itself, or as DDIM with one line that says so."""
    assert hasattr(diffusers, name) == (name not in OTHERS)
    if name in OURS:
        assert read_quietly(_class_name=name)[0] == name[:4].lower()
        return
    with pytest.warns(UserWarning) as warned:
        assert read_config(_class_name=name)[0] == "ddim"
    (line,) = (str(warning.message) for warning in warned)
    assert line.startswith(f"{CONFIG} asks for {name}: DDIM takes its place")
    assert ("--steps 8 --guidance 1" in line) == (name in FEW_STEPS)


@pytest.mark.parametrize("name", REFUSED_CLASSES, ids=str)
def test_classes_that_are_refused(name):
    with pytest.raises(WeightsError, match=r"_class_name = .*, where Stable Diffusion 1.x has"):
        read_config(_class_name=name)


def test_a_flow_in_the_clothes_of_another_class_is_refused():
    message = "use_flow_sigmas = True, where Stable Diffusion 1.x has False"
    with pytest.raises(WeightsError, match=message):
        read_config(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True)


@pytest.mark.parametrize("name", sorted(FEW_STEPS))
def test_distilled_models_begin_where_their_own_scheduler_does(name):
    """Leading would begin at 876, where training had less noise than a run begins with."""
    theirs = getattr(diffusers, name).from_config(SD | {"timestep_spacing": "leading"})
    theirs.set_timesteps(8)
    with pytest.warns(UserWarning):
        _, levels = read_config(_class_name=name, timestep_spacing="leading")
    ours = minip2p.DDIM(8, **levels).timesteps
    assert ours[0] == theirs.timesteps[0] == 999
    for mine, other in zip(ours, theirs.timesteps.tolist(), strict=True):
        assert abs(mine - other) <= 20  # LCM's come from a grid of 50 steps


def test_runge_kutta_steps_are_said_to_be_left_out():
    with pytest.warns(UserWarning, match=f"{CONFIG} asks for skip_prk_steps = False: PNDM runs"):
        assert read_config(skip_prk_steps=False)[0] == "pndm"
    # Only PNDM has such steps.
    assert read_quietly(_class_name="DDIMScheduler", skip_prk_steps=False)[0] == "ddim"


def test_the_bundled_model_is_loaded_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(device="cpu")
