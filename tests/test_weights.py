"""Every layout gives the same weights; all else is refused in a sentence, before a tensor is read.

Most files here are sparse: a header, and the zeros it promises, which take no room on the disk.
"""

import copy
import functools
import json
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from models import (
    EMOJI_TOKENIZER,
    Truth,
    edit_json,
    ldm_unet_name,
    ldm_vae_name,
    make_layouts,
    make_truth,
    sd15_keys,
)
from safetensors.torch import load_file, save_file

from minip2p import generate, scheduler, weights
from minip2p.text import encode, tokenize
from minip2p.unet import UNet
from minip2p.vae import VAE
from minip2p.weights import StableDiffusion, WeightsError, load

UNET, VAE_, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1}
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def truth() -> Truth:
    return make_truth(len(json.loads((EMOJI_TOKENIZER / "vocab.json").read_text())))


def load_on_cpu(path: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    return load(path, tokenizer=EMOJI_TOKENIZER, device="cpu", dtype=dtype)


def parameters(model: StableDiffusion) -> dict[str, dict[str, torch.Tensor]]:
    text = model.text_encoder.state_dict().items()
    return {
        "unet": model.unet.state_dict(),
        "vae": model.vae.state_dict(),
        "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in text},
    }


# --- what a header can be made to say -------------------------------------------------------------


def read_json_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def write_header(path: Path, header: dict[str, Any] | bytes, data: int) -> Path:
    """A file with this header and `data` bytes of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) * isinstance(header, dict)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    return path


def write_sparse(path: Path, shapes: Shapes, dtype: str = "F16", **metadata: str) -> Path:
    """A valid file of zeros with tensors of these shapes. A name may end in :DTYPE."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        name, _, own = name.partition(":")
        begin, end = end, end + torch.Size(shape).numel() * BYTES[own or dtype]
        header[name] = {"dtype": own or dtype, "shape": shape, "data_offsets": [begin, end]}
    return write_header(path, header, end)


def shapes_of(path: Path) -> Shapes:
    header = read_json_header(path)
    return {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}


def refusal(source: str | Path, **options: Any) -> str:
    """The message of the WeightsError that load() raises: one plain sentence."""
    options = {"tokenizer": EMOJI_TOKENIZER, "device": "cpu"} | options
    with pytest.raises(WeightsError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 700, message
    return message


# --- what is loaded -------------------------------------------------------------------------------

LAYOUTS = ["diffusers", "diffusers_old", "fp16_variant", "flat_text", "conv_vae"]
LAYOUTS += ["single", "single_fp16", "single_ema", "single_novelai"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_holds_the_same_weights(layouts, truth, name):
    model = load_on_cpu(layouts[name])
    states = truth.states()
    for part, ours in parameters(model).items():
        assert ours.keys() == states[part].keys()
        for key, tensor in ours.items():
            expected = states[part][key]
            expected = expected.half().float() if "16" in name else expected
            assert torch.equal(tensor, expected), (part, key)
    for module in (model.unet, model.vae, model.text_encoder):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
    assert set(layouts) == set(LAYOUTS)


@pytest.mark.parametrize("name", ["diffusers", "fp16_variant", "single"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_vae_in_float32(layouts, truth, name, dtype):
    model = load_on_cpu(layouts[name], dtype)
    assert model.dtype == dtype and model.device == torch.device("cpu")
    assert {p.dtype for p in model.text_encoder.parameters()} == {dtype}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    key = "conv_in.weight"
    expected = truth.states()["unet"][key]
    expected = expected.half() if name == "fp16_variant" else expected
    assert torch.equal(parameters(model)["unet"][key], expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_single_files_of_other_dtypes(layouts, tmp_path, dtype):
    state = load_file(layouts["single"])
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    save_file(state, tmp_path / "other.safetensors")
    weight = load_on_cpu(tmp_path / "other.safetensors").unet.conv_in.weight
    assert torch.equal(weight, state[UNET + "input_blocks.0.0.weight"].float())


def test_the_fp16_variant_is_chosen_for_half_precision_alone(layouts, tmp_path):
    folder = Path(shutil.copytree(layouts["diffusers"], tmp_path / "both"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    marked = {k: torch.ones_like(t).half() for k, t in load_file(file).items()}
    save_file(marked, file.with_suffix(".fp16.safetensors"))
    assert not load_on_cpu(folder).unet.conv_in.weight.eq(1).all()
    for dtype in (torch.float16, torch.bfloat16):
        model = load_on_cpu(folder, dtype)
        assert model.unet.conv_in.weight.eq(1).all()
        assert not model.vae.decoder.conv_in.weight.eq(1).all()  # has no fp16 file: the other


def test_a_partial_ema_set_is_left_alone(layouts, tmp_path):
    state = load_file(layouts["single_ema"])
    del state["model_ema.diffusion_modeltime_embed0weight"]
    save_file(state, tmp_path / "partial.safetensors")
    weight = load_on_cpu(tmp_path / "partial.safetensors").unet.conv_in.weight
    assert torch.equal(weight, state[UNET + "input_blocks.0.0.weight"])


def random_like(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another model: every tensor with the same mean and deviation."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: t.mean() + t.std(correction=0) * torch.randn(t.shape, generator=generator)
        for name, t in state.items()
    }


def mixed(a: Any, b: Any, share: float) -> dict[str, torch.Tensor]:
    """As checkpoint mergers do: `share` of b."""
    return {name: torch.lerp(a[name], b[name], share) for name in a}


def filled(state: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in state.items()}


def save_with_average(file: Path, rest: Any, own: Any, average: Any, **metadata: str) -> Path:
    """A single file with two UNets."""
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in own}
    average = {names[name]: tensor.clone() for name, tensor in average.items()}
    save_file(rest | own | average, file, metadata)
    return file


NAN, INFINITE = float("nan"), float("inf")
# name: (the model's own and its average from one model and another, metadata, whether the average
# is taken, what is said)
TWO_UNETS: dict[str, tuple[Callable[[Any, Any], tuple[Any, Any]], dict[str, str], bool, str]] = {
    "equal": (lambda a, b: (a, a), {}, True, ""),
    "rounded": (lambda a, b: ({k: t.half() for k, t in a.items()}, a), {}, True, "average over tr"),
    "near": (lambda a, b: (mixed(a, b, 0.05), a), {}, True, "average over training"),
    "mixed half and half": (lambda a, b: (mixed(a, b, 0.5), a), {}, False, "correlate by 0.7"),
    "mixed with a third": (lambda a, b: (mixed(a, b, 0.33), a), {}, False, "not near to it"),
    "of another model": (lambda a, b: (b, a), {}, False, r"correlate by -?0.0"),
    "mixed in some blocks": (
        lambda a, b: (a | {k: t for k, t in b.items() if "output_blocks" in k}, a),
        {},
        False,
        "not near to it",
    ),
    "average zero": (lambda a, b: (a, filled(a, 0)), {}, False, "zero or not a number"),
    "average nan": (lambda a, b: (a, filled(a, NAN)), {}, False, "zero or not a number"),
    "average infinite": (lambda a, b: (a, filled(a, INFINITE)), {}, False, "not a number"),
    "average of one nan": (
        lambda a, b: (a, a | {CONV_IN: torch.full_like(a[CONV_IN], NAN)}),
        {},
        False,
        "zero or not a number",
    ),
    "average constant": (lambda a, b: (a, filled(a, 1)), {}, False, "not near to it"),
    "average of other shapes": (
        lambda a, b: (a, {k: t[:, :1].contiguous() if t.ndim > 1 else t for k, t in a.items()}),
        {},
        False,
        "other shapes",
    ),
    "own zero": (lambda a, b: (filled(a, 0), a), {}, True, "average over training"),
    "own nan": (lambda a, b: (filled(a, NAN), a), {}, True, "average over training"),
    "mixed, as its metadata says": (
        lambda a, b: (mixed(a, b, 0.05), a),
        {"sd_merge_recipe": "{}"},
        False,
        "one of the models that it was mixed of",
    ),
    "mixed, as its modelspec says": (
        lambda a, b: (mixed(a, b, 0.05), a),
        {"modelspec.merged_from": "a, b"},
        False,
        "one of the models that it was mixed of",
    ),
}


@pytest.mark.parametrize(
    "make, metadata, average_is_taken, says", TWO_UNETS.values(), ids=TWO_UNETS
)
def test_which_of_two_unets(layouts, tmp_path, make, metadata, average_is_taken, says):
    rest = load_file(layouts["single"])
    unet = {name: tensor for name, tensor in rest.items() if name.startswith(UNET)}
    own, average = make(unet, random_like(unet))
    file = save_with_average(tmp_path / "two.safetensors", rest, own, average, **metadata)

    def weight(**options: Any) -> tuple[torch.Tensor, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = load(file, tokenizer=EMOJI_TOKENIZER, device="cpu", **options)
        return model.unet.conv_in.weight, [str(warning.message) for warning in caught]

    expected = (average if average_is_taken else own)[CONV_IN].float()
    found, said = weight()
    assert torch.equal(found, expected)
    assert len(said) == bool(says)
    assert not says or re.search(f"has two UNets, .*{says}.*takes the other", said[0])
    found, said = weight(ema=False)
    assert torch.equal(found.nan_to_num(), own[CONV_IN].float().nan_to_num()) and not said
    if "other shapes" not in says:
        found, said = weight(ema=True)
        assert torch.equal(found.nan_to_num(), average[CONV_IN].nan_to_num()) and not said


@pytest.mark.parametrize("ema", [True, False])
def test_both_unets_are_those_that_diffusers_extracts(layouts, ema):
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(layouts["single_ema"]),
        config=str(layouts["diffusers"]),
        subfolder="unet",
        extract_ema=ema,
    ).state_dict()
    model = load(layouts["single_ema"], tokenizer=EMOJI_TOKENIZER, device="cpu", ema=ema)
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_asking_for_a_unet_that_is_not_there(layouts, tmp_path, hub):
    assert "has no averaged UNet" in refusal(layouts["single"], ema=True)
    load(layouts["single"], tokenizer=EMOJI_TOKENIZER, device="cpu", ema=False)
    state = load_file(layouts["single_ema"])
    del state["model_ema.diffusion_modeltime_embed0weight"]
    save_file(state, tmp_path / "partial.safetensors")
    message = refusal(tmp_path / "partial.safetensors", ema=True)
    assert "such as model_ema.diffusion_modeltime_embed0weight" in message
    for source in (layouts["diffusers"], "emoji", REPO):
        for ema in (True, False):
            assert f"{source} is no single file" in refusal(source, ema=ema)
    assert not hub.asked
    assert "There is no" in refusal("missing.safetensors", ema=True)


def test_weights_are_views_of_the_file(layouts):
    """No copy: the parameters lie where the operating system has mapped the file."""
    model = load_on_cpu(layouts["diffusers"])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    spans = []
    for line in maps.read_text().splitlines():
        if str(layouts["diffusers"]) in line:
            spans.append([int(address, 16) for address in line.split()[0].split("-")])
    for module in (model.unet, model.vae, model.text_encoder):
        for parameter in module.parameters():
            at = parameter.data_ptr()
            assert any(begin <= at < end for begin, end in spans)


def test_an_unpadded_header_is_no_harm(layouts, tmp_path):
    """Files of 2022 begin their data at any byte, where no float32 may lie."""
    header = read_json_header(layouts["single"])
    data = layouts["single"].read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    for padding in (0, 1, 2, 3):
        text = json.dumps(header).encode() + b" " * padding
        (tmp_path / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        weight = load_on_cpu(tmp_path / "odd.safetensors").unet.conv_in.weight
        assert weight.data_ptr() % 4 == 0
        begin = header[UNET + "input_blocks.0.0.weight"]["data_offsets"][0]
        assert weight.flatten()[0] == torch.frombuffer(
            bytearray(data[begin : begin + 4]), dtype=torch.float32
        )


def test_the_bundled_model_is_the_default():
    model = load(device="cpu")
    assert (model.scheduler, model.sample_size) == ("pndm", (16, 16))
    assert len(model.vocabulary) == 42 and "words" not in model.defaults
    assert model.vae.f == 8 and model.defaults["scheduler"] == "ddim"
    assert model.schedule == {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }


def test_identity_is_that_of_studies_made_before_and_follows_every_change():
    model = load(device="cpu")
    assert model.identity() == "5becb96fc4059aff"
    noise_levels = scheduler.alpha_bars(1000, 0.00085, 0.012)
    assert torch.equal(model.alpha_bars(), noise_levels)
    changed = copy.deepcopy(model)
    assert changed.identity() == model.identity()
    with torch.no_grad():
        changed.unet.conv_in.weight[0] += 1
    longer = replace(model, schedule=model.schedule | {"beta_end": 0.02})
    assert not torch.equal(longer.alpha_bars(), noise_levels)
    models = model, changed, longer, load(device="cpu", dtype=torch.float16)
    assert len({each.identity() for each in models}) == 4
    assert replace(model, unet=changed.unet).identity() == changed.identity()


def test_what_the_folder_says_is_kept(layouts, tmp_path):
    folder = Path(shutil.copytree(layouts["diffusers"], tmp_path / "edited"))
    config = folder / "scheduler" / "scheduler_config.json"
    edit_json(config, _class_name="DDIMScheduler", set_alpha_to_one=True, steps_offset=0)
    edit_json(folder / "unet" / "config.json", sample_size=[8, 12], attention_head_dim=[8] * 4)
    edit_json(folder / "vae" / "config.json", scaling_factor=0.5)
    edit_json(folder / "minip2p.json", guidance_scale=4.0)
    model = load_on_cpu(folder)
    assert model.scheduler == "ddim" and model.schedule["set_alpha_to_one"] is True
    assert model.schedule["steps_offset"] == 1  # as diffusers' pipeline corrects it
    assert model.sample_size == (8, 12) and model.vae.scaling_factor == 0.5
    assert model.defaults["guidance_scale"] == 4.0
    edit_json(config, _class_name="EulerDiscreteScheduler", beta_end=...)
    assert (
        load_on_cpu(folder).scheduler == "ddim"
        and load_on_cpu(folder).schedule["beta_end"] == 0.012
    )
    config.unlink()
    assert load_on_cpu(folder).scheduler == "pndm"


# --- the full size --------------------------------------------------------------------------------


def published_shapes(part: str) -> Shapes:
    return {row[2]: tuple(map(int, row[4].split("x"))) for row in sd15_keys() if row[1] == part}


def single_file_shapes() -> Shapes:
    """All 1145 tensors of v1-5-pruned-emaonly.safetensors."""
    shapes = {row[0]: tuple(map(int, row[3].split("x"))) for row in sd15_keys()}
    shapes[TEXT + "text_model.embeddings.position_ids:I64"] = (1, 77)
    cumulative = ("alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod")
    roots = ("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod")
    inverse = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    posterior = ("variance", "log_variance_clipped", "mean_coef1", "mean_coef2")
    for name in ("betas", *cumulative, *roots, *inverse, *(f"posterior_{p}" for p in posterior)):
        shapes[name] = (1000,)
    return shapes | {"model_ema.decay": (), "model_ema.num_updates": ()}


def write_full_folder(folder: Path, tokenizer: Path) -> int:
    """SD 1.5 in float32, of zeros. → bytes of its weights"""
    total = 0
    for part, stem in PARTS.items():
        shapes = published_shapes(part)
        file = write_sparse(folder / part / f"{stem}.safetensors", shapes, "F32")
        (folder / part / "config.json").write_text("{}")
        total += file.stat().st_size
    shutil.copytree(tokenizer, folder / "tokenizer")
    return total


def test_names_and_shapes_of_the_full_size():
    with torch.device("meta"):
        modules = {"unet": UNet(), "vae": VAE()}
    for part, module in modules.items():
        ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        assert ours == published_shapes(part)
    assert [len(published_shapes(part)) for part in PARTS] == [686, 248, 196]
    for ldm, part, published, _, _ in sd15_keys():  # the tests' own rules hold as well
        if part != "text_encoder":
            assert ldm == {"unet": ldm_unet_name, "vae": ldm_vae_name}[part](published)


def test_the_full_size_single_file(tmp_path, clip_tokenizer_dir):
    """Every one of its tensors goes to its place: shown for names and shapes, on zeros."""
    file = write_sparse(tmp_path / "v1-5.safetensors", single_file_shapes(), "F32")
    source = weights.from_single_file(file)
    assert len(single_file_shapes()) == 1145
    places = {
        stored.key: (part, name)
        for part, tensors in source.tensors.items()
        for name, stored in tensors.items()
    }
    expected = {
        ldm: (part, name.removeprefix("text_model.")) for ldm, part, name, _, _ in sd15_keys()
    }
    assert places == expected
    model = load(file, tokenizer=clip_tokenizer_dir, device="cpu")
    for part, state in parameters(model).items():
        shapes = published_shapes(part)
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes


MEASURE = """
import re, sys
import torch, transformers
from transformers import CLIPTextModel, CLIPTokenizerFast
import minip2p
torch.set_num_threads(1)
def peak():
    # Not ru_maxrss: there a new process inherits the peak of the one that started it.
    return int(re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = minip2p.load(sys.argv[1], device="cpu")
loaded = peak()
for module in (model.unet, model.vae, model.text_encoder):
    for parameter in module.parameters():
        parameter.flatten()[::512].sum()  # touches every page
print(loaded - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_of_loading_the_full_size(tmp_path, clip_tokenizer_dir):
    """Loading alone needs next to nothing; using every weight needs them once.

    The resident size counts the pages of a mapped file as soon as they are used: nothing is hidden.
    """
    size = write_full_folder(tmp_path / "sd15", clip_tokenizer_dir)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "sd15")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loaded, used = (int(n) / size for n in out.split())
    print(f"peak over {size / 1e9:.2f} GB of weights: {loaded:.3f} loaded, {used:.3f} used")
    assert loaded < 0.1
    assert 0.9 < used < 1.1


# --- what is refused: bytes -----------------------------------------------------------------------

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
BAD_BYTES = {  # what the file begins with → a part of the message
    b"PK\x03\x04" + b"\x14\x00" * 40: "pickle",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 40: "pickle",
    b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00}": "pickle",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 42\n": "git lfs pull",
    b"<!DOCTYPE html><html><body>Not found</body></html>": "web page",
    b"\n\n  <html>": "web page",
    b"GGUF\x03\x00\x00\x00" + b"\0" * 40: "GGUF",
    b"": "damaged",
    b"\x10\x00\x00": "damaged",
    b"just some text that is no model at all": "damaged",
    (100_000_001).to_bytes(8, "little") + b"{}": "damaged",
    (2**63).to_bytes(8, "little") + b'{"a": 1}': "damaged",
    (1).to_bytes(8, "little") + b"{": "damaged",
    (500).to_bytes(8, "little") + b'{"a": 1}': "ends after 16 bytes",
}
BAD_HEADERS: list[tuple[str, Any, int, str]] = [  # name, header, bytes of data, part of the message
    ("truncated", {"a": ONE, "b": TWO}, 9, "promises"),
    ("too long", {"a": ONE, "b": TWO}, 17, "promises"),
    ("no tensors", {}, 0, "damaged"),
    ("not JSON", b"{a: 1}", 8, "header is wrong"),
    ("JSON and more", b'{"a": 1}]', 8, "header is wrong"),
    ("not UTF-8", b'{"\xff\xfe": 1}', 8, "header is wrong"),
    ("a number too long", b'{"a": ' + b"9" * 5000 + b"}", 8, "header is wrong"),
    ("nested deeply", b'{"a": ' + b"[" * 100_000, 8, "header is wrong"),
    ("a name twice", b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), 8, "twice"),
    ("overlap", {"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, 12, "header is wrong"),
    ("same place", {"a": ONE, "b": ONE}, 8, "header is wrong"),
    ("gap", {"a": ONE, "b": TWO | {"data_offsets": [12, 20]}}, 20, "header is wrong"),
    ("begins late", {"b": TWO}, 16, "header is wrong"),
    ("backwards", {"a": ONE | {"data_offsets": [8, 0]}}, 8, "header is wrong"),
    ("negative", {"a": ONE | {"data_offsets": [-8, 0]}}, 8, "header is wrong"),
    ("three offsets", {"a": ONE | {"data_offsets": [0, 8, 16]}}, 8, "header is wrong"),
    ("fraction", {"a": ONE | {"data_offsets": [0, 8.0]}}, 8, "header is wrong"),
    ("unknown dtype", {"a": ONE | {"dtype": "F4"}}, 8, "header is wrong"),
    ("dtype is a list", {"a": ONE | {"dtype": ["F32"]}}, 8, "header is wrong"),
    ("shape too small", {"a": ONE | {"shape": [1]}}, 8, "header is wrong"),
    ("shape is true", {"a": ONE | {"shape": [2, True]}}, 8, "header is wrong"),
    ("shape is huge", {"a": ONE | {"shape": [2**62, 2**62, 0]}}, 8, "header is wrong"),
    ("shape is a text", {"a": ONE | {"shape": "2"}}, 8, "header is wrong"),
    ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "header is wrong"),
    ("entry is a list", {"a": [1, 2, 3]}, 8, "header is wrong"),
    ("entry is null", {"a": None}, 8, "header is wrong"),
    ("metadata is a list", {"__metadata__": ["pt"], "a": ONE}, 8, "header is wrong"),
    ("metadata of numbers", {"__metadata__": {"format": 1}, "a": ONE}, 8, "header is wrong"),
]


@pytest.mark.parametrize("content, part", BAD_BYTES.items(), ids=lambda value: repr(value)[:24])
def test_files_that_are_no_safetensors_files(tmp_path, content, part):
    for suffix in (".safetensors", ".ckpt"):
        (tmp_path / f"model{suffix}").write_bytes(content)
        assert part in refusal(tmp_path / f"model{suffix}")


@pytest.mark.parametrize(
    "header, data, part", [c[1:] for c in BAD_HEADERS], ids=[c[0] for c in BAD_HEADERS]
)
def test_damaged_headers(tmp_path, header, data, part):
    message = refusal(write_header(tmp_path / "model.safetensors", header, data))
    assert part in message and "download it or save it again" in message


def test_a_file_that_may_not_be_read(layouts, monkeypatch):
    def forbidden(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", forbidden)
        for source in (layouts["single"], layouts["diffusers"]):
            assert "can't be read (Permission denied)" in refusal(source)


# --- what is refused: models ----------------------------------------------------------------------


def without(shapes: Shapes, prefix: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}


def below(shapes: Shapes, prefix: str, new: str = "") -> Shapes:
    return {
        new + name.removeprefix(prefix): s for name, s in shapes.items() if name.startswith(prefix)
    }


def averaged(shapes: Shapes) -> Shapes:
    """The averaged UNet alone: its names have no dots."""
    unet = {n.replace(".", ""): s for n, s in below(shapes, UNET, "diffusion_model.").items()}
    return below(unet, "", "model_ema.")


OPTIMIZER = {f"optimizer.state.{i}.exp_avg{end}": (8,) for i in range(9) for end in ("", "_sq")}
CONV_IN, MIDDLE = UNET + "input_blocks.0.0.weight", UNET + "middle_block.1."
EMBEDDING = TEXT + "text_model.embeddings.token_embedding.weight"
ATTN_2 = "transformer_blocks.0.attn2.to_k."
LORA = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
# name: (tensors from those of the whole single file, part of the message)
REFUSED_FILES: dict[str, tuple[Callable[[Shapes], Shapes], str]] = {
    "inpainting": (lambda s: s | {CONV_IN: (32, 9, 3, 3)}, r"in_channels = 9, as inpainting"),
    "pix2pix": (lambda s: s | {CONV_IN: (32, 8, 3, 3)}, r"in_channels = 8.*pix2pix \(8\)"),
    "depth": (lambda s: s | {CONV_IN: (32, 5, 3, 3)}, r"in_channels = 5.*depth \(5\)"),
    "SD 2, OpenCLIP": (
        lambda s: without(s, TEXT) | {"cond_stage_model.model.ln_final.weight": (1024,)},
        "is Stable Diffusion 2.x",
    ),
    "SD 2, linear": (lambda s: s | {MIDDLE + "proj_in.weight": (96, 96)}, "Stable Diffusion 2.x"),
    "wide words": (lambda s: s | {MIDDLE + ATTN_2 + "weight": (96, 1024)}, "1024.*width, 128"),
    "SDXL": (
        lambda s: s | {"conditioner.embedders.1.model.ln_final.weight": (1280,)},
        "is Stable Diffusion XL",
    ),
    "SDXL refiner": (lambda s: s | {UNET + "label_emb.0.0.weight": (1, 2)}, "Diffusion XL"),
    "SD 3": (lambda s: {UNET + "joint_blocks.0.x_block.mlp.fc1.weight": (8, 8)}, "Diffusion 3"),
    "Flux": (lambda s: {"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
    "Flux, prefixed": (lambda s: {UNET + "double_blocks.0.img_mod.lin.bias": (8,)}, "Flux"),
    "LCM": (lambda s: s | {UNET + "time_embed.cond_proj.weight": (32, 256)}, r"few steps \(LCM\)"),
    "ControlNet": (lambda s: below(s, UNET, "control_model."), "ControlNet"),
    "ControlNet, bare": (lambda s: {"input_hint_block.0.weight": (16, 3, 3, 3)}, "ControlNet"),
    "ControlNet, diffusers": (
        lambda s: (
            {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.norm1.bias": (8,)}
            | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}
        ),
        "ControlNet",
    ),
    "LoRA": (lambda s: {f"lora_unet_{LORA}.lora_down.weight": (4, 320)}, "LoRA"),
    "LoRA, text": (lambda s: {"lora_te_text_model_encoder_layers_0.alpha": ()}, "LoRA"),
    "LoRA, PEFT": (lambda s: {"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 320)}, "LoRA"),
    "LoRA, diffusers": (
        lambda s: {"down_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 320)},
        "LoRA",
    ),
    "LoRA, dotted": (lambda s: {"unet.down_blocks.0.to_q.lora.up.weight": (4, 320)}, "LoRA"),
    "LoHa": (lambda s: {f"x_{LORA}.hada_w1_a": (4, 320)}, "LoRA"),
    "LoKr": (lambda s: {f"x_{LORA}.lokr_w1": (4, 320)}, "LoRA"),
    "textual inversion": (lambda s: {"emb_params": (2, 768)}, "textual inversion"),
    "textual inversion, XL": (lambda s: {"clip_l": (2, 768), "clip_g": (2, 1280)}, "inversion"),
    "textual inversion, diffusers": (lambda s: {"<cat-toy>": (768,)}, "textual inversion"),
    "UNet of a folder": (
        lambda s: {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.norm1.bias": (8,)},
        "the UNet of a diffusers folder, without the rest",
    ),
    "VAE of a folder": (lambda s: {"encoder.conv_in.weight": (128, 3, 3, 3)}, "a VAE, without"),
    "VAE, LDM": (lambda s: below(s, VAE_), "a VAE, without"),
    "VAE, LDM, prefixed": (lambda s: below(s, VAE_, VAE_), "a VAE, without"),
    "text encoder of a folder": (lambda s: below(s, TEXT), "a text encoder, without"),
    "text encoder, flat": (lambda s: below(s, TEXT + "text_model."), "a text encoder, without"),
    "text encoder, LDM": (lambda s: below(s, TEXT, TEXT), "a text encoder, without"),
    "training state": (
        lambda s: below(s, "", "state_dict."),
        "keeps the model below 'state_dict.', as training states do: save the tensors below it",
    ),
    "training state of several cards": (lambda s: below(s, "", "module."), "below 'module.'"),
    "training state, nested": (lambda s: below(s, "", "model.sd."), "below 'model.sd.'"),
    "training state with its optimizer": (
        lambda s: below(s, "", "state_dict.") | OPTIMIZER,
        "below 'state_dict.'",
    ),
    "training state of the VAE": (lambda s: below(s, VAE_, "state_dict." + VAE_), "'state_dict.'"),
    "optimizer": (lambda s: OPTIMIZER, "an optimizer's state, not a model"),
    "averaged weights": (averaged, r"is the averaged weights \(EMA\) of a UNet, without its own"),
    "averaged weights, with the rest": (
        lambda s: averaged(s) | without(s, UNET),
        r"is the averaged weights \(EMA\) of a UNet, without its own",
    ),
    "no VAE beside averaged weights": (lambda s: averaged(s) | without(s, VAE_), "no VAE"),
    "VAE and text encoder": (lambda s: without(s, UNET), r"no UNet \(model.diffusion_model"),
    "decoder": (lambda s: {"decoder.conv_in.weight": (512, 4, 3, 3)}, "a VAE, without"),
    "VAE, prefixed": (lambda s: {"vae.encoder.conv_in.weight": (128, 3, 3, 3)}, "a VAE, without"),
    "UNet, LDM": (lambda s: below(s, UNET), "a UNet, without the rest"),
    "UNet, LDM, prefixed": (lambda s: below(s, UNET, "diffusion_model."), "a UNet, without the"),
    "shard of a folder's UNet": (
        lambda s: {f"up_blocks.{i}.resnets.0.norm1.bias": (8,) for i in range(4)},
        "the UNet of a diffusers folder, without the rest",
    ),
    "folder in one file": (
        lambda s: (
            {"unet.conv_in.weight": (320, 4, 3, 3), "vae.encoder.conv_in.weight": (128, 3, 3, 3)}
            | {"text_encoder.text_model.embeddings.token_embedding.weight": (49408, 768)}
        ),
        "a diffusers folder put into one file",
    ),
    "text encoder, OpenCLIP": (lambda s: {"token_embedding.weight": (9, 8)}, "a text encoder, wi"),
    "CLIP": (
        lambda s: (
            {"vision_model.embeddings.class_embedding": (1024,), "logit_scale": ()}
            | {"text_model.embeddings.token_embedding.weight": (49408, 768)}
        ),
        "CLIP with its image encoder, without the rest",
    ),
    "safety checker": (
        lambda s: {"concept_embeds": (17, 768), "vision_model.vision_model.post.bias": (8,)},
        "a safety checker",
    ),
    "AnimateDiff": (
        lambda s: {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)},
        r"a motion module \(AnimateDiff\), not a model",
    ),
    "IP-Adapter": (lambda s: {"image_proj.norm.weight": (768,)}, "an IP-Adapter, not a model"),
    "two small tensors": (lambda s: {"weight": (8, 8), "bias": (8,)}, "no UNet"),
    "a LoRA's tensor in the UNet": (
        lambda s: s | {UNET + "input_blocks.1.1.proj_in.lora.down.weight": (4, 32)},
        "beyond those of Stable Diffusion 1.x, 1 tensor.*lora.down",
    ),
    "something else": (lambda s: {f"layers.{i}.weight": (8, 8) for i in range(9)}, "no UNet"),
    "no VAE": (lambda s: without(s, VAE_), "no VAE"),
    "no text encoder": (lambda s: without(s, TEXT), "no text encoder"),
    "only the UNet": (lambda s: below(s, UNET, UNET), "no VAE"),
    "v-prediction": (lambda s: s | {"v_pred": (0,)}, "v-prediction models"),
    "a tensor lost": (lambda s: without(s, UNET + "out.2.bias"), "lacks 1 .* conv_out.bias"),
    "first tensor lost": (lambda s: without(s, CONV_IN), "lacks 1 .* conv_in.weight"),
    "middle lost": (lambda s: without(s, MIDDLE), "lacks 26 .* mid_block.attentions.0.norm"),
    "block lost": (lambda s: without(s, UNET + "input_blocks.1."), "lacks"),
    "a VAE tensor lost": (lambda s: without(s, VAE_ + "quant_conv.bias"), "lacks 1 .* quant_conv"),
    "encoder lost": (lambda s: without(s, VAE_ + "encoder."), "lacks"),
    "a text tensor lost": (
        lambda s: without(s, TEXT + "text_model.final_layer_norm.bias"),
        "Missing key.*final_layer_norm.bias",
    ),
    "embedding lost": (lambda s: without(s, EMBEDDING), "text encoder"),
    "positions lost": (
        lambda s: without(s, EMBEDDING.replace("token", "position")),
        "position_emb",
    ),
    "one tensor more": (lambda s: s | {UNET + "extra.weight": (3,)}, "extra.weight: load"),
    "one more in the VAE": (lambda s: s | {VAE_ + "extra.weight": (3,)}, "extra.weight: load"),
    "one more in the text": (lambda s: s | {TEXT + "extra.weight": (3,)}, "extra.weight"),
    "wrong shape": (
        lambda s: s | {UNET + "out.2.weight": (4, 32, 1, 1)},
        r"out.2.weight of shape \(4, 32, 1, 1\) where its sizes ask for \(4, 32, 3, 3\)",
    ),
    "nine axes": (
        lambda s: s | {UNET + "out.2.weight": (4, 32, 3, 3, 1, 1, 1, 1, 1)},
        r"out.2.weight of shape \(4, 32, 3, 3, 1, 1, 1, 1, 1\) where",
    ),
    "wrong shape in the VAE": (lambda s: s | {VAE_ + "quant_conv.bias": (7,)}, r"\(7,\).*\(8,\)"),
    "wrong shape in the text": (
        lambda s: s | {TEXT + "text_model.final_layer_norm.bias": (7,)},
        "final_layer_norm.bias",
    ),
    "quantised": (
        lambda s: without(s, CONV_IN) | {CONV_IN + ":I8": (32, 4, 3, 3)},
        "in I8 and not in floating point",
    ),
    "text twice": (
        lambda s: s | {EMBEDDING.replace("text_model.", ""): (1050, 128)},
        "under a second name",
    ),
    "UNet twice": (lambda s: s | {UNET + "conv_in.weight": (32, 4, 3, 3)}, "under a second name"),
    "other vocabulary": (lambda s: s | {EMBEDDING: (700, 128)}, "1050 tokens.* 700"),
    "75 positions": (
        lambda s: s | {EMBEDDING.replace("token", "position"): (75, 128)},
        "max_position_embeddings = 75",
    ),
}


@pytest.mark.parametrize("edit, part", REFUSED_FILES.values(), ids=REFUSED_FILES.keys())
def test_single_files_that_are_refused(layouts, tmp_path, edit, part):
    shapes = edit(shapes_of(layouts["single"]))
    shapes = {k + ":I64" * k.endswith("position_ids"): shape for k, shape in shapes.items()}
    message = refusal(write_sparse(tmp_path / "model.safetensors", shapes))
    assert_says(message, part)
    assert str(tmp_path) in message


def assert_says(message: str, part: str) -> None:
    assert re.search(part, message), message


def test_what_a_single_file_may_hold_besides(layouts, tmp_path):
    more = {
        f"{VAE_}loss.logvar": (),
        f"{VAE_}model_ema.decay": (),
        "cond_stage_model.logit_scale": (),
    }
    more |= {TEXT + "text_model.logit_scale": (), "global_step:I64": ()}
    shapes = shapes_of(layouts["single"])
    shapes = {k + ":I64" * k.endswith("position_ids"): shape for k, shape in shapes.items()}
    load_on_cpu(write_sparse(tmp_path / "model.safetensors", shapes | more))


@pytest.mark.parametrize(
    "more, what",
    [
        ({"lora_te_text_model_encoder_layers_0.alpha": ()}, "a LoRA"),
        ({f"lora_unet_{LORA}.lora_down.weight": (4, 320)}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 320)}, "a LoRA"),
        ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
        (OPTIMIZER, "an optimizer's state"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_left_out_beside_a_whole_model_is_said(layouts, truth, tmp_path, more, what):
    """A stray tensor does not make a LoRA of a model."""
    file = tmp_path / "model.safetensors"
    save_file(load_file(layouts["single"]) | {k: torch.ones(s) for k, s in more.items()}, file)
    with pytest.warns(UserWarning, match=f"{file} has {what} beside the model: it is left out"):
        model = load_on_cpu(file)
    assert torch.equal(model.unet.conv_in.weight, truth.states()["unet"]["conv_in.weight"])


def test_v_prediction_is_known_by_metadata_and_by_the_sidecar(layouts, tmp_path):
    shapes = shapes_of(layouts["single"])
    file = tmp_path / "model.safetensors"
    write_sparse(file, shapes, **{"modelspec.prediction_type": "v"})
    assert "prediction_type = v_prediction, as v-prediction models have" in refusal(file)
    load_on_cpu(write_sparse(file, shapes, **{"modelspec.prediction_type": "epsilon"}))
    sidecar = tmp_path / "model.yaml"
    sidecar.write_text('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n')
    assert "v-prediction" in refusal(file)
    sidecar.write_text("model:\n  params:\n    parameterization: eps\n")
    load_on_cpu(file)


# --- what is refused: folders ---------------------------------------------------------------------

# name: (file, fields, part of the message)
REFUSED_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "inpainting": ("unet", {"in_channels": 9}, "in_channels = 9, as inpainting"),
    "SD 2": ("unet", {"use_linear_projection": True}, "Stable Diffusion 2.x"),
    "SD 2 heads": ("unet", {"attention_head_dim": [5, 10, 20, 20]}, "Stable Diffusion 2.x"),
    "SD 2 width": ("unet", {"cross_attention_dim": 1024}, "unet.*1024|128.*1024"),
    "SD 2 text": ("text_encoder", {"hidden_act": "gelu"}, "Stable Diffusion 2.x"),
    "SDXL": ("unet", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
    "LCM": ("unet", {"time_cond_proj_dim": 256}, r"few steps \(LCM\)"),
    "BK-SDM": ("unet", {"mid_block_type": None}, "BK-SDM"),
    "an upscaler": ("unet", {"class_embed_type": "timestep"}, "class_embed_type = timestep"),
    "no groups": ("unet", {"norm_num_groups": 7}, "don't go together"),
    "heads do not fit": ("unet", {"attention_head_dim": 7}, "attention_head_dim = 7"),
    "widths of text": ("unet", {"block_out_channels": "wide"}, "block_out_channels = wide"),
    "no widths": ("unet", {"block_out_channels": []}, r"block_out_channels = \[\]"),
    "negative width": ("unet", {"block_out_channels": [-32, 64]}, r"\[-32, 64\]"),
    "time embedding": ("unet", {"time_embedding_act_fn": "silu"}, "time_embedding_act_fn = silu"),
    "scaled residuals": ("unet", {"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor = 2"),
    "one level without": ("unet", {"only_cross_attention": [False, True]}, "only_cross_attention"),
    "text norms": ("text_encoder", {"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06"),
    "a level less": ("unet", {"block_out_channels": [32, 64, 96]}, "beyond those|lacks"),
    "layers": ("unet", {"layers_per_block": 3}, "lacks"),
    "layers differ": ("unet", {"layers_per_block": [1, 2, 2, 2]}, r"layers_per_block = \[1, 2"),
    "layers are true": ("unet", {"layers_per_block": True}, "layers_per_block = True"),
    "layers without end": ("unet", {"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
    "other widths": ("unet", {"block_out_channels": [32, 64, 128, 128]}, "of shape .* ask for"),
    "sample size": ("unet", {"sample_size": "large"}, "sample_size = large"),
    "VAE channels": ("vae", {"latent_channels": 16}, "latent_channels = 16"),
    "VAE shift": ("vae", {"shift_factor": 0.1}, "shift_factor = 0.1"),
    "VAE scale": ("vae", {"scaling_factor": 0}, "scaling_factor = 0"),
    "VAE levels": ("vae", {"block_out_channels": [32, 64, 64]}, "beyond those|lacks"),
    "text width": ("text_encoder", {"hidden_size": 64}, "cross_attention_dim = 128.*width, 64"),
    "text layers": ("text_encoder", {"num_hidden_layers": 3}, "text encoder .*Missing key"),
    "text of nonsense": (
        "text_encoder",
        {"num_attention_heads": "two"},
        "The text encoder of",
    ),
    "heads of nonsense": (
        "text_encoder",
        {"num_attention_heads": 3},
        "The text encoder of",
    ),
    "positions": (
        "text_encoder",
        {"max_position_embeddings": 248},
        "max_position_embeddings = 248",
    ),
    "vocabulary": ("text_encoder", {"vocab_size": 700}, "1050 tokens|Missing|size mismatch"),
    "v-prediction": ("scheduler", {"prediction_type": "v_prediction"}, "v-prediction models"),
    "x0": ("scheduler", {"prediction_type": "sample"}, "prediction_type = sample"),
    "linear betas": ("scheduler", {"beta_schedule": "linear"}, "beta_schedule = linear"),
    "trained betas": ("scheduler", {"trained_betas": [0.1]}, "trained_betas"),
    "zero SNR": ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    "betas of text": ("scheduler", {"beta_start": "small"}, "beta_start = small"),
    "no timesteps": ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps = 0"),
    "SDXL index": (".", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "Diffusion XL or 3"),
}


# Fields with which diffusers loads a folder as well: (part, fields)
ACCEPTED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip skip": ("text_encoder", {"num_hidden_layers": 1}),
    "no layer at all": ("text_encoder", {"num_hidden_layers": 0}),
    "upcast": ("unet", {"upcast_attention": True}),
    "upcast is null": ("unet", {"upcast_attention": None}),
    "fields for each level": (
        "unet",
        {
            **{"only_cross_attention": [False] * 4, "transformer_layers_per_block": [1] * 4},
            **{"layers_per_block": [2] * 4, "attention_head_dim": [8] * 4},
        },
    ),
    "fields of training": ("text_encoder", {"attention_dropout": 0.5, "projection_dim": 7}),
    "training's dropout": ("unet", {"dropout": 0.5}),
    "upcast of the VAE": ("vae", {"force_upcast": False}),
}


@pytest.mark.parametrize("part, fields", ACCEPTED_CONFIGS.values(), ids=ACCEPTED_CONFIGS)
def test_folders_are_loaded_as_diffusers_loads_them(folder, part, fields):
    prompt, settings = "a photo of a cat", dict(num_inference_steps=3, height=64, width=64)
    plain = generate(load(folder, device="cpu"), prompt, seed=7, **settings).latents
    edit_json(folder / part / "config.json", **fields)
    model = load(folder, device="cpu")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = encode(model.text_encoder, [tokenize(model.tokenizer, prompt)])
    assert distance(context, pipe.text_encoder(ids).last_hidden_state) < 1e-6
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    truth = pipe(prompt, latents=noise, output_type="latent", **settings).images
    ours = generate(model, prompt, seed=7, **settings).latents
    assert distance(ours, truth) < 1e-4
    assert (distance(ours, plain) > 1e-3) == ("num_hidden_layers" in fields)


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_upcast_attention_is_not_missed_in_half_precision(folder, dtype):
    """Ours without it is as near to float32 as diffusers' with it."""
    exact = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    edit_json(folder / "unet" / "config.json", upcast_attention=True)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    ours, errors = load_on_cpu(folder, dtype).unet, {"ours": 0.0, "theirs": 0.0}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in range(1, 1000, 111):
            x = torch.randn(2, 4, 16, 16, generator=generator)
            context = torch.randn(2, 77, 128, generator=generator)
            truth = exact(x, t, context).sample
            half = x.to(dtype), t, context.to(dtype)
            errors["ours"] += distance(ours(*half).float(), truth)
            errors["theirs"] += distance(theirs(*half).sample.float(), truth)
    assert errors["ours"] <= 1.1 * errors["theirs"]


def test_layers_that_are_left_out_are_counted_from_the_end(folder):
    """Tensors of no layer, and of a layer between, are missed as before."""
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    lost = next(name for name in state if "layers.0.mlp.fc1.weight" in name)
    file.unlink()
    save_file({name: tensor for name, tensor in state.items() if name != lost}, file)
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    assert "Missing key" in refusal(folder)
    file.unlink()
    save_file(state | {"extra.weight": torch.ones(1)}, file)
    assert "extra.weight" in refusal(folder)


@pytest.fixture
def folder(layouts, tmp_path) -> Path:
    """A copy of the folder in today's layout. Its weights are linked: replace them, never edit."""
    return Path(shutil.copytree(layouts["diffusers"], tmp_path / "folder", copy_function=link))


def link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)


@pytest.mark.parametrize("part, fields, says", REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS.keys())
def test_configs_that_are_refused(folder, part, fields, says):
    name = {"scheduler": "scheduler_config.json", ".": "model_index.json"}.get(part, "config.json")
    edit_json(folder / part / name, **fields)
    message = refusal(folder)
    assert_says(message, says)
    assert str(folder) in message


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def renamed(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


U = "unet/diffusion_pytorch_model.safetensors"
REFUSED_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickles": (lambda f: renamed(f / U, "diffusion_pytorch_model.bin"), "pickles.*version"),
    "shards": (
        lambda f: renamed(f / U, "diffusion_pytorch_model.safetensors.index.json"),
        "in shards",
    ),
    "no weights": (lambda f: (f / U).unlink(), "has no unet/diffusion_pytorch_model.safetensors"),
    "no EMA": (
        lambda f: renamed(f / U, "diffusion_pytorch_model.non_ema.safetensors"),
        "has no unet",
    ),
    "no config": (lambda f: (f / "vae/config.json").unlink(), "has no vae/config.json"),
    "no UNet": (lambda f: shutil.rmtree(f / "unet"), "has no unet/.*a diffusers folder has"),
    "empty": (
        lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()],
        "a diffusers folder",
    ),
    "single files in it": (
        lambda f: [(f / U).rename(f / "model.safetensors"), shutil.rmtree(f / "unet")],
        "one of the single files",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "holds no tokenizer"),
    "half a tokenizer": (
        lambda f: [p.unlink() for p in (f / "tokenizer").iterdir() if p.name != "vocab.json"],
        "holds no tokenizer",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"),
        "tokenizer.* can't be read",
    ),
    "config is no JSON": (lambda f: (f / "unet/config.json").write_text("{"), "it is not JSON"),
    "config is binary": (lambda f: (f / "unet/config.json").write_bytes(b"\xff\xff"), "not JSON"),
    "config is a list": (lambda f: (f / "unet/config.json").write_text("[]"), "not a table"),
    "config is a folder": (
        lambda f: [(f / "unet/config.json").unlink(), (f / "unet/config.json").mkdir()],
        "can't be read",
    ),
    "index is no JSON": (lambda f: (f / "model_index.json").write_text("<html>"), "not JSON"),
    "git-lfs": (
        lambda f: replaced(f / U, b"version https://git-lfs.github.com/spec"),
        "git lfs pull",
    ),
    "disguised pickle": (lambda f: replaced(f / U, b"PK\x03\x04" * 20), "pickle"),
    "cut short": (lambda f: replaced(f / U, (f / U).read_bytes()[:-1]), "promises"),
    "the wrong file": (
        lambda f: replaced(f / U, (f / "vae/diffusion_pytorch_model.safetensors").read_bytes()),
        "lacks",
    ),
}


@pytest.mark.parametrize("edit, part", REFUSED_FOLDERS.values(), ids=REFUSED_FOLDERS.keys())
def test_folders_that_are_refused(folder, edit, part):
    edit(folder)
    message = refusal(folder, tokenizer=None)
    assert_says(message, part)
    assert str(folder) in message


def test_the_part_of_a_folder_is_no_model(layouts):
    assert "has no unet/" in refusal(layouts["diffusers"] / "unet")


@pytest.mark.parametrize(
    "source, part",
    {
        "no/such/folder": "There is no 'no/such/folder'",
        "/no/such/file.safetensors": "There is no '/no/such/file.safetensors'",
        "missing.safetensors": "There is no 'missing.safetensors'",
        "models/missing.safetensors": "There is no 'models/missing.safetensors'",
        "squirrel": "There is no 'squirrel'",
        "": "There is no",
        "~nobody/x/y": "There is no",
        "owner/na me": "There is no",
        "a\0b": "There is no",
        "x" * 5000: "There is no",
        "../owner": "There is no",
    }.items(),
    ids=lambda value: repr(value)[:24],
)
def test_sources_that_are_not_there(source, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refusal(source)


def test_the_device_is_tried_before_anything_is_read(layouts):
    for device in ("toaster", "meta"):
        assert f"The device {device} can't be used" in refusal(layouts["single"], device=device)
    if not torch.cuda.is_available():
        assert "try cpu" in refusal(layouts["single"], device="cuda")


def test_a_tokenizer_of_another_model(layouts, clip_tokenizer_dir):
    for name in ("single", "diffusers"):
        message = refusal(layouts[name], tokenizer=clip_tokenizer_dir)
        assert "49408 tokens" in message and "1050" in message
        assert "holds no tokenizer" in refusal(layouts[name], tokenizer="no/such/folder")


# --- the hub --------------------------------------------------------------------------------------

REPO = "someone/a-model"
SIZES = {  # of stable-diffusion-v1-5/stable-diffusion-v1-5, in bytes
    "unet/diffusion_pytorch_model.safetensors": 3_438_167_540,
    "unet/diffusion_pytorch_model.fp16.safetensors": 1_719_125_304,
    "unet/diffusion_pytorch_model.non_ema.safetensors": 3_438_167_536,
    "unet/diffusion_pytorch_model.bin": 3_438_354_725,
    "vae/diffusion_pytorch_model.safetensors": 334_643_276,
    "vae/diffusion_pytorch_model.fp16.safetensors": 167_335_342,
    "text_encoder/model.safetensors": 492_265_874,
    "text_encoder/model.fp16.safetensors": 246_144_864,
    "safety_checker/model.safetensors": 1_215_981_830,
    "safety_checker/config.json": 4_723,
    "feature_extractor/preprocessor_config.json": 342,
    "v1-5-pruned-emaonly.safetensors": 4_265_146_304,
    "v1-5-pruned.safetensors": 7_703_324_286,
    "tokenizer/vocab.json": 1_059_962,
    "tokenizer/merges.txt": 524_619,
    "tokenizer/tokenizer_config.json": 806,
    "tokenizer/special_tokens_map.json": 472,
    "unet/config.json": 743,
    "vae/config.json": 547,
    "text_encoder/config.json": 617,
    "scheduler/scheduler_config.json": 308,
    "model_index.json": 541,
    "README.md": 14_461,
}
SMALL = {name for name in SIZES if name.endswith((".json", ".txt"))} - {
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
}
PLAIN = {f"{part}/{stem}.safetensors" for part, stem in PARTS.items()}
FP16 = {name.replace(".safetensors", ".fp16.safetensors") for name in PLAIN}


class Hub:
    """The hub's client without a network: one repository, a cache folder, and a record of calls."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        self.cache, self.sizes, self.asked = cache, dict(SIZES), list[set[str]]()
        self.down: Exception | None = None  # what every attempt to reach the hub raises
        self.broken: Exception | None = None  # what every download raises
        self.content: Path | None = None  # what a download gives
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        real = huggingface_hub.try_to_load_from_cache
        monkeypatch.setattr(
            huggingface_hub, "try_to_load_from_cache", functools.partial(real, cache_dir=cache)
        )

    def model_info(self, repo: str, files_metadata: bool = False) -> SimpleNamespace:
        if self.down:
            raise self.down
        assert files_metadata
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return SimpleNamespace(siblings=files, sha="c0ffee")

    def snapshot_download(self, repo: str, *, allow_patterns: list[str]) -> str:
        if self.down or self.broken:
            raise self.down or self.broken
        self.asked.append(set(allow_patterns))
        assert self.content
        return str(self.content)

    def fill_cache(self, repo: str, folder: Path, *patterns: str) -> Path:
        """The cache as huggingface_hub lays it out, with the files of a folder that match."""
        root = self.cache / ("models--" + repo.replace("/", "--"))
        snapshot = root / "snapshots" / "c0ffee"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("c0ffee")
        for pattern in patterns or ("**/*",):
            for file in folder.glob(pattern):
                if file.is_file():
                    target = snapshot / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(file)
        return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    return Hub(tmp_path / "cache", monkeypatch)


def hub_exception(kind: type[Exception]) -> Exception:
    """Its constructor differs from version to version."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error\n\nEntry not found\nfor url")
    return error


def test_the_smallest_snapshot_is_asked_for_and_announced(hub, layouts, capsys):
    hub.content = layouts["diffusers"]
    load(REPO, device="cpu")
    load(REPO, device="cpu", dtype=torch.float16)
    assert hub.asked == [SMALL | PLAIN, SMALL | FP16]
    first, second = capsys.readouterr().err.strip().split("\n")
    assert first == f"Downloading 4.27 GB of {REPO} to the Hugging Face cache"
    assert second == f"Downloading 2.13 GB of {REPO} to the Hugging Face cache"


def with_a_token(folder: Path) -> Path:
    """The model as of 2022 with a textual inversion: its token stands in a file of its own."""
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<cat-toy>": 1050}')
    edit_json(folder / "text_encoder" / "config.json", vocab_size=1051)
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "token_embedding" in name)
    state[name] = torch.cat([state[name], torch.full((1, 128), 0.5)])
    save_file(state, file)
    return folder


def serve(hub: Hub, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has this folder, and a download gives only what was asked for."""
    files = [file for file in repository.rglob("*") if file.is_file()]
    hub.sizes = {str(file.relative_to(repository)): file.stat().st_size for file in files}

    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        hub.asked.append(set(allow_patterns))
        target = hub.cache / "served"
        for name in filter_repo_objects(hub.sizes, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize("layout", ["diffusers", "diffusers_old", "added token", "both", "none"])
def test_a_hub_that_serves_what_is_asked_for_gives_the_local_model(
    hub, layouts, tmp_path, monkeypatch, layout
):
    """A token in added_tokens.json was not asked for, and the model refused."""
    source = layouts["diffusers" if layout == "diffusers" else "diffusers_old"]
    repository = Path(shutil.copytree(source, tmp_path / "repository"))
    if layout in ("added token", "both"):
        with_a_token(repository)
    if layout == "both":  # as a newer transformers saves it beside the files of before
        tokenizer = transformers.CLIPTokenizerFast.from_pretrained(repository / "tokenizer")
        tokenizer.save_pretrained(repository / "tokenizer")
    if layout == "none":  # the barest: no configs of the tokenizer's
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (repository / "tokenizer" / name).unlink()
    (repository / "tokenizer" / "vocab.bin").write_bytes(b"PK\x03\x04")  # nobody needs it
    serve(hub, repository, monkeypatch)
    local, remote = load(repository, device="cpu"), load(REPO, device="cpu")
    prompt = "a photo of <cat-toy> and a cat"
    ids = tokenize(remote.tokenizer, prompt).ids
    assert ids == tokenize(local.tokenizer, prompt).ids
    assert (1050 in ids) == (layout in ("added token", "both"))
    assert len(remote.tokenizer) == len(local.tokenizer)
    there = {f"tokenizer/{file.name}" for file in (repository / "tokenizer").iterdir()}
    (asked,) = hub.asked
    assert there - asked == {"tokenizer/vocab.bin"}


def test_fp16_is_chosen_part_by_part(hub, layouts):
    hub.content = layouts["diffusers"]
    for part in ("vae", "text_encoder"):
        del hub.sizes[f"{part}/{PARTS[part]}.fp16.safetensors"]
    load(REPO, device="cpu", dtype=torch.bfloat16)
    plain = {f"vae/{PARTS['vae']}.safetensors", "text_encoder/model.safetensors"}
    assert hub.asked.pop() & (PLAIN | FP16) == plain | {f"unet/{PARTS['unet']}.fp16.safetensors"}
    del hub.sizes[f"unet/{PARTS['unet']}.safetensors"]  # only fp16 there: better than nothing
    load(REPO, device="cpu")
    assert f"unet/{PARTS['unet']}.fp16.safetensors" in hub.asked.pop()


def test_what_is_in_the_cache_is_not_announced(hub, layouts, capsys):
    snapshot = hub.fill_cache(REPO, layouts["diffusers"])
    hub.content = snapshot
    hub.sizes = {str(f.relative_to(snapshot)): 10**6 for f in snapshot.glob("**/*") if f.is_file()}
    load(REPO, device="cpu")
    assert "Downloading" not in capsys.readouterr().err
    (snapshot / "unet" / "config.json").unlink()
    refusal(REPO)
    assert "Downloading 1.0 MB of" in capsys.readouterr().err


def test_an_incomplete_download_is_noticed(hub, layouts, folder):
    hub.content = folder
    (folder / "vae" / "config.json").unlink()
    assert "has no vae/config.json" in refusal(REPO)


def test_repositories_without_usable_weights_are_refused_before_a_download(hub):
    for kept, part in {
        "unet/diffusion_pytorch_model.bin": "pickles",
        "v1-5-pruned.safetensors": "one of the single files",
        "README.md": "a diffusers folder has unet/",
    }.items():
        hub.sizes = {kept: 1}
        message = refusal(REPO)
        assert part in message and message.startswith(REPO)
    assert not hub.asked


OFFLINE = [
    huggingface_hub.errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
    ConnectionError("Name or service not known"),
    RuntimeError("any other error of the client"),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_without_a_network_the_cache_serves(hub, layouts, error, tmp_path):
    hub.down = error
    message = refusal(REPO)
    assert f"{REPO} can't be loaded" in message and type(error).__name__ in message
    names = ["*.json", "*/*.json"]  # those of the tokenizer as well
    snapshot = hub.fill_cache(REPO, layouts["diffusers"], *names)
    assert "nor all of it in the cache" in refusal(REPO)  # no weights
    hub.fill_cache(REPO, layouts["fp16_variant"], "*/*.safetensors")
    load(REPO, device="cpu")  # whichever variant is there
    load(REPO, device="cpu", dtype=torch.float16)
    shutil.rmtree(snapshot / "tokenizer")
    assert "nor all of it in the cache" in refusal(REPO, tokenizer=None)


@pytest.mark.parametrize(
    "kind, part",
    [
        (errors.RepositoryNotFoundError, "no such public repository"),
        (errors.RevisionNotFoundError, "no such public repository"),
        (errors.GatedRepoError, "accept its terms on https://huggingface.co/someone/a-model"),
        (errors.LocalEntryNotFoundError, "the hub fails (LocalEntryNotFoundError"),
        (errors.HfHubHTTPError, "the hub fails (HfHubHTTPError: 404 Client Error Entry"),
        (OSError, "the hub fails (OSError"),
    ],
)
def test_errors_of_the_hub(hub, layouts, kind, part):
    hub.broken = hub_exception(kind)  # while downloading
    assert part in refusal(REPO)
    hub.down = hub_exception(kind)  # while asking
    assert part in refusal(REPO)
    hub.fill_cache(REPO, layouts["diffusers"])
    load(REPO, device="cpu")  # a repository may be gone and the cache still have it


def test_the_deleted_repository_of_sd15_is_known(hub):
    hub.down = hub_exception(errors.RepositoryNotFoundError)
    message = refusal("runwayml/stable-diffusion-v1-5")
    assert "take stable-diffusion-v1-5/stable-diffusion-v1-5" in message


def test_the_tokenizer_of_a_single_file(hub, layouts, capsys):
    hub.down = ConnectionError("no network")
    message = refusal(layouts["single"], tokenizer=None)
    assert "A single file has no tokenizer: pass" in message and "openai/clip-vit" in message

    hub.down, hub.content = None, EMOJI_TOKENIZER  # as if it were CLIP's
    load(layouts["single"], device="cpu")
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert hub.asked == [names] and "Downloading 1.6 MB of openai/clip" in capsys.readouterr().err

    hub.fill_cache("openai/clip-vit-large-patch14", EMOJI_TOKENIZER)
    hub.down = ConnectionError("no network")
    load(layouts["single"], device="cpu")


# --- the rooms ------------------------------------------------------------------------------------

ROOMS = (
    "files",
    "build",
    "schedule",
    "clip",
    "folder",
    "single_file",
    "hub",
)  # none imports a later one
APART = {
    "folder": {"files"},
    "ema": {"files"},
    "single_file": {"files", "ema"},
}  # whoever reads these needs no others


def test_rooms_import_one_way():
    """A reader of folder loading meets no name of LDM's and no hub."""
    for i, room in enumerate(ROOMS):
        text = (Path(weights.__file__).parent / f"{room}.py").read_text()
        imported = set(re.findall(r"^ *from \.(\w+) import", text, re.MULTILINE))
        assert imported <= APART.get(room, set(ROOMS[:i]) - {"ema", "single_file"}), room
        assert room in ("ema", "single_file", "hub") or not re.search(
            r"LDM|single_file|hub import", text
        )


# --- mutated headers ------------------------------------------------------------------------------


def small_file(path: Path, levels: int) -> Path:
    """A whole single file with one layer a block, small enough to be written 10,000 times."""
    with torch.device("meta"):
        unet = UNet((32,) * levels, 1, 64, heads=8)
        vae = VAE((32,) * levels, 1)
    shapes = {ldm_unet_name(k, n=1): tuple(t.shape) for k, t in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        is_1x1 = "attentions" in name and tensor.ndim == 2
        shapes[ldm_vae_name(name, levels)] = (*tensor.shape, 1, 1) if is_1x1 else (*tensor.shape,)
    text = {"embeddings.token_embedding.weight": (8, 64), "final_layer_norm.weight": (64,)}
    text |= {"embeddings.position_embedding.weight": (77, 64), "final_layer_norm.bias": (64,)}
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
        text |= {
            f"encoder.layers.0.{layer}.weight": (64, 64),
            f"encoder.layers.0.{layer}.bias": (64,),
        }
    for layer, d_in, d_out in (("fc1", 64, 96), ("fc2", 96, 64)):
        text[f"encoder.layers.0.mlp.{layer}.weight"] = (d_out, d_in)
        text[f"encoder.layers.0.mlp.{layer}.bias"] = (d_out,)
    for layer in ("layer_norm1", "layer_norm2"):
        text |= {f"encoder.layers.0.{layer}.weight": (64,), f"encoder.layers.0.{layer}.bias": (64,)}
    shapes |= {f"{TEXT}text_model.{name}": shape for name, shape in text.items()}
    return write_sparse(path, shapes, "F16", format="pt")


def mutate(rng: random.Random, header: bytes, size: int) -> tuple[bytes, bytes, int]:
    """A case: the eight bytes of the length, the header, and the size of the file."""
    prefix = len(header).to_bytes(8, "little")
    kind = rng.randrange(8)
    if kind == 0:  # some bytes flipped
        flipped = bytearray(header)
        for _ in range(rng.choice((1, 1, 2, 10, 1000))):
            flipped[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
        return prefix, bytes(flipped), size
    if kind == 1:  # another length
        length = rng.choice([0, 1, 2, len(header) - 1, len(header) + 8, 2**31, 2**63, 10**8 + 1])
        return (length + rng.randrange(3)).to_bytes(8, "little"), header, size
    if kind == 2:  # cut off, or longer
        return prefix, header, rng.choice((rng.randrange(size), size - 1, size + 1, size + 999))
    if kind == 3:  # a piece is missing, or there twice
        a, b = sorted(rng.randrange(len(header)) for _ in range(2))
        changed = header[:a] + header[b:] if rng.random() < 0.5 else header[:b] + header[a:]
        return len(changed).to_bytes(8, "little"), changed, size - len(header) + len(changed)
    table = json.loads(header)
    name = rng.choice(list(table))
    entry = table[name]
    if kind == 4:  # renamed
        new = rng.choice(list(table)) + rng.choice(["", ".x", "\ud800", "\0", "\n", "9" * 5000])
        pieces = name.split(".")
        pieces[rng.randrange(len(pieces))] = rng.choice(
            ["0", "1", "7", "999", "x", "op", "conv", ""]
        )
        table[rng.choice([new, ".".join(pieces)])] = table.pop(name)
    elif kind == 5:  # another value
        field = rng.choice(["dtype", "shape", "data_offsets"] * 3 + ["more"])
        old = entry.get(field, "F16")
        new_values = [
            None,
            0,
            -1,
            2**64,
            1.5,
            True,
            "F32",
            "I16",
            "BF16",
            [],
            {},
            [None],
            [[0]],
            [0, 0],
        ]
        if isinstance(old, list) and old:
            new_values += [old[::-1], old[1:], [*old, 1], [0, *old], [n * 2 for n in old]]
        entry[field] = rng.choice(new_values)
    elif kind == 6:  # lost, or two changed places
        other = rng.choice(list(table))
        if rng.random() < 0.8:
            del table[name]
        else:
            table[name], table[other] = table[other], table[name]
    else:  # something else altogether
        junk: list[Any] = [None, 1, [], {}, "text", {"dtype": "F16"}, {"format": "pt"}]
        table[rng.choice([name, "__metadata__", "v_pred", "", "lora_unet_x"])] = rng.choice(junk)
    changed = json.dumps(table).encode()
    return len(changed).to_bytes(8, "little"), changed, size - len(header) + len(changed)


def build_once(built: dict[str, torch.nn.Module], kind: type, **sizes: Any) -> torch.nn.Module:
    name = f"{kind} {sizes}"
    if name not in built:
        built[name] = kind(**sizes)
    return built[name]


def test_ten_thousand_mutated_headers(tmp_path, monkeypatch):
    """Each is loaded or refused with the package's own error, soon."""
    monkeypatch.setattr(weights.clip, "load_tokenizer", lambda folder: range(8))
    built: dict[str, torch.nn.Module] = {}
    for kind in (UNet, VAE):  # most of the time would go into building the same modules again
        monkeypatch.setattr(
            weights.build, kind.__name__, functools.partial(build_once, built, kind)
        )
    rng, outcomes, slowest = random.Random(0), Counter[str](), 0.0
    for levels, cases in ((1, 8000), (2, 2000)):
        file = small_file(tmp_path / f"{levels}.safetensors", levels)
        load(file, tokenizer=tmp_path, device="cpu")
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        for _ in range(cases):
            prefix, changed, new_size = mutate(rng, header, size)
            with file.open("r+b") as stream:
                stream.write(prefix + changed + bytes(64))  # zeros over the rest of a longer one
                stream.truncate(new_size)
            began = time.perf_counter()
            try:
                load(file, tokenizer=tmp_path, device="cpu")
                outcomes["loaded"] += 1
            except WeightsError as error:
                outcomes["damaged" if "is damaged" in str(error) else "refused"] += 1
            slowest = max(slowest, time.perf_counter() - began)
    print(dict(outcomes), f"slowest {slowest:.2f} s")
    assert outcomes.total() == 10_000 and min(outcomes.values()) > 100
    assert slowest < 20
