"""Settings of `generate` beside Python's own numbers and strings, previews and progress."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minip2p import WordSwap, generate, progress, show

CAT, DOG = "a photo of a cat", "a photo of a dog"


# --- values of other libraries -------------------------------------------------------------------


def test_prompts_in_any_sequence(toy):
    expected = generate(toy, [CAT, DOG], num_inference_steps=1)
    for prompts in ((CAT, DOG), np.array([CAT, DOG]), np.array([CAT, DOG], dtype=object)):
        result = generate(toy, prompts, num_inference_steps=1)
        assert result.latents.equal(expected.latents) and result.run == expected.run
        assert [type(prompt) for prompt in result.run["prompts"]] == [str, str]
    assert generate(toy, np.array(CAT), num_inference_steps=1).run["prompts"] == [CAT]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_latents_of_numpy(toy, dtype):
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(dtype)
    noise.flags.writeable = False  # torch warns of that
    tensor = torch.tensor(noise.astype(np.float32))
    before = tensor.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = generate(toy, CAT, latents=noise, num_inference_steps=1)
    assert result.latents.equal(generate(toy, CAT, latents=tensor, num_inference_steps=1).latents)
    assert tensor.equal(before)


def test_numbers_of_numpy(toy):
    numbers = {"num_inference_steps": 2, "guidance_scale": 3.5, "seed": 7, "eta": 0.5}
    numbers |= {"height": 64, "width": 32}
    of_numpy = {
        name: (np.float32 if isinstance(value, float) else np.int64)(value)
        for name, value in numbers.items()
    }
    expected = generate(toy, CAT, scheduler="ddim", **numbers)
    result = generate(toy, CAT, scheduler="ddim", **of_numpy)
    assert result.latents.equal(expected.latents)
    assert repr(result.run) == repr(expected.run) and "np." not in repr(result.run)
    assert {name: result.run[name] for name in numbers} == numbers


# --- callback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler, calls", [("ddim", 3), ("pndm", 4)])
def test_callback_sees_every_call(toy, scheduler, calls):
    seen = []

    def callback(call: int, calls: int, latents: torch.Tensor) -> None:
        seen.append((call, calls, latents.clone(), latents.is_inference()))
        latents.zero_()  # a copy: the run goes on with its own

    run = {"edit": "auto", "num_inference_steps": 3, "scheduler": scheduler}
    expected = generate(toy, [CAT, DOG], **run)
    result = generate(toy, [CAT, DOG], callback=callback, **run)
    assert [arguments[:2] for arguments in seen] == [(n, calls) for n in range(calls)]
    assert all(latents.shape == (2, 4, 16, 16) for _, _, latents, _ in seen)
    assert seen[-1][2].equal(expected.latents) and result.latents.equal(expected.latents)
    assert not seen[-1][3]  # a usual tensor, to do anything with


class TooLate(BaseException):
    pass


@pytest.mark.parametrize("error", [TooLate, KeyboardInterrupt, ValueError, StopIteration])
def test_an_error_in_a_callback_ends_the_run(toy, error):
    run = {"edit": WordSwap(), "num_inference_steps": 2}
    expected = generate(toy, [CAT, DOG], **run)
    raised, calls = error("enough"), []

    def callback(call: int, *_: object) -> None:
        calls.append(call)
        raise raised

    with pytest.raises(error) as caught:
        generate(toy, [CAT, DOG], callback=callback, **run)
    assert caught.value is raised and calls == [0]
    assert generate(toy, [CAT, DOG], **run).latents.equal(expected.latents)  # nothing to undo


# --- previews ------------------------------------------------------------------------------------


def colours(model, latents: torch.Tensor) -> torch.Tensor:
    """Return what a preview should show: the mean of f x f pixels, in 0 to 1."""
    with torch.inference_mode():
        pixels = model.vae.decode(latents).clamp(-1, 1) / 2 + 0.5
    return F.avg_pool2d(pixels, model.vae.f).permute(0, 2, 3, 1)


def explained(wanted: torch.Tensor, previews: list[Image.Image]) -> float:
    """Return the share of the colours' variance that previews explain."""
    colours = torch.stack([torch.tensor(np.asarray(preview)) for preview in previews]) / 255
    spread = wanted - wanted.mean(dim=(0, 1, 2))
    return 1 - float((colours - wanted).square().sum() / spread.square().sum())


def test_preview_shows_what_pictures_become(model):
    prompts = ["a squirrel eating a burger at night", "a sketch of a dog", "a red car"]
    latents = generate(model, prompts, num_inference_steps=8, decode=False).latents
    wanted = colours(model, latents)
    assert explained(wanted, show.preview(model, latents)) > 0.85
    assert explained(wanted, show.preview(model, latents.roll(1, 1))) < 0  # channels mean something
    assert explained(wanted, show.preview(model, latents.flip(3))) < 0.8  # and so do places


def test_preview_changes_nothing_and_fits_once(model, monkeypatch):
    latents = torch.randn(2, 4, 10, 14)
    state, before = torch.get_rng_state(), latents.clone()
    first = show.preview(model, latents)
    monkeypatch.setattr(type(model.vae), "decode", None)  # is not needed a second time
    again = show.preview(model, latents.double())
    assert [image.size for image in first] == [(14, 10)] * 2
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first]
    assert state.equal(torch.get_rng_state()) and latents.equal(before)
    show.preview(model, torch.full((1, 4, 2, 2), torch.nan))  # draws something


# --- progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock of progress bars by one that only a test moves, in seconds."""
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    return seconds


def test_the_time_left_is_said_from_the_first_call(model, capsys, monkeypatch, clock):
    """Calls and decoding are slow, as SD's are on a CPU."""

    def slow(method, seconds):
        def call(*args, **settings):
            clock[0] += seconds
            return method(*args, **settings)

        return call

    monkeypatch.setattr(type(model.unet), "forward", slow(type(model.unet).forward, 0.3))
    monkeypatch.setattr(type(model.vae), "decode", slow(type(model.vae).decode, 1.1))
    generate(model, [CAT, DOG], num_inference_steps=3, progress=True)
    shown = capsys.readouterr().err.split("\r")
    first = next(line for line in shown if " 1/3 [" in line)
    assert "<00:0" in first and "<?" not in first  # elapsed<left
    assert any(line.startswith("decoding: ") and " 1/2 [" in line for line in shown)


def test_what_is_quick_shows_one_bar_and_what_is_silent_none(model, capsys, clock):
    generate(model, [CAT, DOG], num_inference_steps=1, progress=True)
    assert "decoding" not in capsys.readouterr().err
    generate(model, [CAT, DOG], num_inference_steps=1)
    assert capsys.readouterr().err == ""


def test_a_notebook_without_widgets_gets_no_warning():
    """In a kernel of Jupyter's, with ipywidgets missing; in a process of its own."""
    code = """
import runpy, sys, types, warnings
kernel = types.ModuleType("IPython")
kernel.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules |= {"IPython": kernel, "ipykernel.zmqshell": kernel, "ipywidgets": None}
warnings.simplefilter("error")
runpy.run_path(sys.argv[1])
for name in [name for name in sys.modules if name.startswith("tqdm.a")]:
    del sys.modules[name]
warnings.simplefilter("always")
import tqdm.auto
"""
    command = [sys.executable, "-c", code, progress.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "IProgress not found" in done.stderr, done.stderr
