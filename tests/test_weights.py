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
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import hypothesis
import pytest
import torch
from helpers import difference
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import strategies
from models import (
    EMOJI_TOKENIZER,
    WEIGHTS,
    Truth,
    edit_json,
    make_truth,
    sd15_keys,
)
from safetensors.torch import load_file, save_file

from minip2p import generate, scheduler, weights
from minip2p.text import TextEncoder, encode, tokenize
from minip2p.unet import UNet
from minip2p.vae import VAE
from minip2p.weights import StableDiffusion, WeightsError, build, load, schedule
from minip2p.weights.files import Config, Source
from minip2p.weights.folder import check_defaults

UNET, VAE_, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1}
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return make_truth(len(json.loads((EMOJI_TOKENIZER / "vocab.json").read_text())))


@pytest.fixture
def folder(layouts, tmp_path) -> Path:
    """Copy the folder in today's layout. Its weights are linked: replace them, never edit."""
    return Path(shutil.copytree(layouts["diffusers"], tmp_path / "folder", copy_function=link))


def link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)


def load_on_cpu(path: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    return load(path, tokenizer=EMOJI_TOKENIZER, device="cpu", dtype=dtype)


def parameters(model: StableDiffusion) -> dict[str, dict[str, torch.Tensor]]:
    return {part: getattr(model, part).state_dict() for part in WEIGHTS}


def refusal(source: str | Path, **options: Any) -> str:
    """Return the message of the WeightsError that load() raises: one plain sentence."""
    options = {"tokenizer": EMOJI_TOKENIZER, "device": "cpu"} | options
    with pytest.raises(WeightsError) as caught:
        load(source, **options)
    return plain(caught)


def plain(caught: pytest.ExceptionInfo[WeightsError]) -> str:
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 700, message
    return message


# --- headers --------------------------------------------------------------------------------------


def read_json_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def write_header(path: Path, header: dict[str, Any], data: int) -> Path:
    """Write a file with this header and `data` bytes of zeros."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    return path


def write_sparse(path: Path, shapes: Shapes, dtype: str = "F16", **metadata: str) -> Path:
    """Write a valid file of zeros with tensors of these shapes. A name may end in :DTYPE."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        name, _, other = name.partition(":")
        begin, end = end, end + torch.Size(shape).numel() * BYTES[other or dtype]
        header[name] = {"dtype": other or dtype, "shape": shape, "data_offsets": [begin, end]}
    return write_header(path, header, end)


def shapes_of(path: Path) -> Shapes:
    header = read_json_header(path)
    shapes = {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
    return {k + ":I64" * k.endswith("position_ids"): shape for k, shape in shapes.items()}


# --- what is loaded -------------------------------------------------------------------------------

LAYOUTS = ["diffusers", "diffusers_old", "fp16_variant", "flat_text", "conv_vae"]
LAYOUTS += ["single", "single_fp16", "single_ema", "single_novelai"]


@pytest.mark.filterwarnings("ignore:.* has two UNets")
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
@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16], ids=str)
def test_half_precision_keeps_the_vae_in_float32(layouts, truth, name, dtype):
    model = load_on_cpu(layouts[name], dtype)
    dtype = torch.float16 if dtype == "float16" else dtype
    assert model.dtype == dtype and model.device == torch.device("cpu")
    assert {p.dtype for p in model.text_encoder.parameters()} == {dtype}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    key = "conv_in.weight"
    expected = truth.states()["unet"][key]
    expected = expected.half() if name == "fp16_variant" else expected
    assert torch.equal(parameters(model)["unet"][key], expected.to(dtype))


@pytest.mark.parametrize("dtype", ["half", "int8", torch.int32, torch.float8_e4m3fn, 16, "load"])
def test_other_dtypes_are_refused(dtype):
    message = refusal("emoji", dtype=dtype)
    assert "must be one of float32, float16, bfloat16" in message and repr(dtype) in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_single_files_of_other_dtypes(layouts, tmp_path, dtype):
    state = load_file(layouts["single"])
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    save_file(state, tmp_path / "other.safetensors")
    weight = load_on_cpu(tmp_path / "other.safetensors").unet.conv_in.weight
    assert torch.equal(weight, state[UNET + "input_blocks.0.0.weight"].float())


def test_the_fp16_variant_is_chosen_for_half_precision_alone(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    marked = {k: torch.ones_like(t).half() for k, t in load_file(file).items()}
    save_file(marked, file.with_suffix(".fp16.safetensors"))
    assert not load_on_cpu(folder).unet.conv_in.weight.eq(1).all()
    for dtype in (torch.float16, torch.bfloat16):
        model = load_on_cpu(folder, dtype)
        assert model.unet.conv_in.weight.eq(1).all()
        assert not model.vae.decoder.conv_in.weight.eq(1).all()  # has no fp16 file: the other


def test_the_prefix_of_compiled_modules_is_ignored(layouts, truth, tmp_path):
    """torch.compile puts _orig_mod. before the names of a module, DataParallel module."""
    file = tmp_path / "compiled.safetensors"
    state = load_file(layouts["single"])
    state = {name.replace(UNET, UNET + "_orig_mod."): tensor for name, tensor in state.items()}
    save_file(state, file)
    weight = load_on_cpu(file).unet.conv_in.weight
    assert torch.equal(weight, truth.states()["unet"]["conv_in.weight"])
    folder = Path(shutil.copytree(layouts["diffusers"], tmp_path / "parallel"))
    unet = folder / "unet" / f"{WEIGHTS['unet']}.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in load_file(unet).items()}, unet)
    assert torch.equal(load_on_cpu(folder).unet.conv_in.weight, weight)
    state["_orig_mod." + next(iter(state))] = torch.zeros(1)
    save_file(state, file)
    assert "under a second name" in refusal(file)


# --- two UNets in one file ------------------------------------------------------------------------

CONV_IN, MIDDLE = UNET + "input_blocks.0.0.weight", UNET + "middle_block.1."


@pytest.fixture(scope="module")
def unets(layouts) -> dict[str, dict[str, torch.Tensor]]:
    """Return a model's UNet, that of another model, and others made of them, by their names."""
    a = {name: t for name, t in load_file(layouts["single"]).items() if name.startswith(UNET)}
    rng = torch.Generator().manual_seed(9)
    b = {
        k: t.mean() + t.std(correction=0) * torch.randn(t.shape, generator=rng)
        for k, t in a.items()
    }
    states = {"a": a, "b": b, "a rounded": {k: t.half() for k, t in a.items()}}
    for percent in (5, 33, 50):  # as checkpoint mergers do
        states[f"{percent} % b"] = {k: torch.lerp(t, b[k], percent / 100) for k, t in a.items()}
    states["some blocks of b"] = a | {k: t for k, t in b.items() if "output_blocks" in k}
    states["0"] = {k: torch.zeros_like(t) for k, t in a.items()}
    states["one nan"] = a | {CONV_IN: a[CONV_IN] * torch.nan}
    states["other shapes"] = {k: t[:, :1] if t.ndim > 1 else t for k, t in a.items()}
    return states


MERGED = {"sd_merge_recipe": "{}"}
TWO_UNETS = [  # the model's own, its average, metadata, whether the average is taken, the warning
    ("a", "a", {}, True, ""),
    ("a rounded", "a", {}, True, "average over training"),
    ("5 % b", "a", {}, True, "average over training"),
    ("33 % b", "a", {}, False, "not near to it"),
    ("b", "a", {}, False, r"correlate by -?0.0"),
    ("some blocks of b", "a", {}, False, "not near to it"),
    ("a", "0", {}, False, "not near to it"),
    ("a", "one nan", {}, False, "not near to it"),
    ("a", "other shapes", {}, False, "other shapes"),
    ("5 % b", "a", MERGED, False, "one of the models that it was mixed of"),
]


def with_average(file: Path, rest: dict, unet: dict, average: dict, metadata: dict) -> Path:
    """Save a single file with a UNet and an average of it."""
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in unet}
    averages = {names[name]: t.contiguous().clone() for name, t in average.items()}
    save_file(rest | unet | averages, file, metadata)
    return file


@pytest.mark.parametrize("plain, average, metadata, average_is_taken, message", TWO_UNETS)
def test_which_of_two_unets(
    layouts, unets, tmp_path, plain, average, metadata, average_is_taken, message
):
    rest = load_file(layouts["single"])
    file = tmp_path / "two.safetensors"
    with_average(file, rest, unets[plain], unets[average], metadata)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_on_cpu(file)
    expected = unets[average if average_is_taken else plain][CONV_IN].float()
    assert torch.equal(model.unet.conv_in.weight.nan_to_num(), expected.nan_to_num())
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == bool(message)
    assert not message or re.search(f"has two UNets, .*{message}.*takes the other", messages[0])


@pytest.mark.parametrize("ema", [True, False])
def test_the_unet_that_is_asked_for_is_the_one_that_diffusers_extracts(
    layouts, unets, tmp_path, ema
):
    rest = load_file(layouts["single"])
    file = with_average(tmp_path / "two.safetensors", rest, unets["b"], unets["a"], MERGED)
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(file), config=str(layouts["diffusers"]), subfolder="unet", extract_ema=ema
    ).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(file, tokenizer=EMOJI_TOKENIZER, device="cpu", ema=ema)
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_unet_that_is_not_there(layouts, tmp_path, hub):
    assert "has no averaged UNet" in refusal(layouts["single"], ema=True)
    load(layouts["single"], tokenizer=EMOJI_TOKENIZER, device="cpu", ema=False)
    state = load_file(layouts["single_ema"])
    del state["model_ema.diffusion_modeltime_embed0weight"]
    save_file(state, tmp_path / "partial.safetensors")
    weight = load_on_cpu(tmp_path / "partial.safetensors").unet.conv_in.weight
    assert torch.equal(weight, state[CONV_IN])
    message = refusal(tmp_path / "partial.safetensors", ema=True)
    assert "such as model_ema.diffusion_modeltime_embed0weight" in message
    for source in (layouts["diffusers"], "emoji", REPO):
        for ema in (True, False):
            assert f"{source} is no single file" in refusal(source, ema=ema)
    assert not hub.requests
    assert "There is no" in refusal("missing.safetensors", ema=True)


def test_an_unpadded_header_is_no_harm(layouts, tmp_path):
    """Files of 2022 begin their data at any byte, where no float32 may lie."""
    header = read_json_header(layouts["single"])
    data = layouts["single"].read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    for padding in (0, 1):
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
    merged = copy.deepcopy(model)
    before = merged.identity()
    merged.unet.conv_out.weight.data += 1  # as LoRAs are merged: no version tells
    assert merged.identity() != before
    longer = replace(model, schedule=model.schedule | {"beta_end": 0.02})
    assert not torch.equal(longer.alpha_bars(), noise_levels)
    models = model, changed, longer, load(device="cpu", dtype=torch.float16)
    assert len({each.identity() for each in models}) == 4
    assert replace(model, unet=changed.unet).identity() == changed.identity()


def test_what_the_folder_says_is_kept(folder):
    config = folder / "scheduler" / "scheduler_config.json"
    edit_json(config, _class_name="DDIMScheduler", set_alpha_to_one=True, steps_offset=0)
    edit_json(folder / "unet" / "config.json", sample_size=[8, 12], attention_head_dim=[8] * 4)
    edit_json(folder / "vae" / "config.json", scaling_factor=0.5)
    config.write_text("\ufeff" + config.read_text("utf-8"), "utf-8")  # some editors add a BOM
    edit_json(folder / "minip2p.json", guidance_scale=4.0)
    model = load_on_cpu(folder)
    assert model.scheduler == "ddim" and model.schedule["set_alpha_to_one"] is True
    assert model.schedule["steps_offset"] == 1  # as diffusers' pipeline corrects it
    assert model.sample_size == (8, 12) and model.vae.scaling_factor == 0.5
    assert model.defaults["guidance_scale"] == 4.0
    config.unlink()
    assert load_on_cpu(folder).scheduler == "pndm"


# --- the full size --------------------------------------------------------------------------------


def published_shapes(part: str) -> Shapes:
    return {row[2]: tuple(map(int, row[4].split("x"))) for row in sd15_keys() if row[1] == part}


def write_full_folder(folder: Path, tokenizer: Path) -> int:
    """Write SD 1.5 in float32, of zeros. → bytes of its weights"""
    total = 0
    for part, stem in WEIGHTS.items():
        shapes = published_shapes(part)
        file = write_sparse(folder / part / f"{stem}.safetensors", shapes, "F32")
        (folder / part / "config.json").write_text("{}")
        total += file.stat().st_size
    shutil.copytree(tokenizer, folder / "tokenizer")
    return total


def test_the_full_size_single_file(tmp_path, clip_tokenizer_dir):
    """Every one of its tensors goes to its place: shown for names and shapes, on zeros."""
    shapes = {row[0]: tuple(map(int, row[3].split("x"))) for row in sd15_keys()}
    shapes |= {TEXT + "text_model.embeddings.position_ids:I64": (1, 77), "betas": (1000,)}
    file = write_sparse(tmp_path / "v1-5.safetensors", shapes, "F32")
    source = weights.from_single_file(file)
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
    with torch.device("meta"):  # of this size by default
        modules = {"unet": UNet(), "vae": VAE(), "text_encoder": TextEncoder()}
    for part, state in parameters(model).items():
        shapes = {k.removeprefix("text_model."): s for k, s in published_shapes(part).items()}
        for tensors in (state, modules[part].state_dict()):
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert [len(published_shapes(part)) for part in WEIGHTS] == [686, 248, 196]


MEASURE = """
import re, sys
import torch
from transformers import CLIPTokenizerFast
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
BAD_BYTES = {  # what the file begins with → a part of the message
    b"PK\x03\x04" + b"\x14\x00" * 40: "pickle",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 40: "pickle",
    b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00}": "pickle",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 42\n": "git lfs pull",
    b"<!DOCTYPE html><html><body>Not found</body></html>": "damaged",
    b"": "damaged",
    (100_000_001).to_bytes(8, "little") + b"{}": "damaged",
}
BAD_HEADERS: dict[str, tuple[Any, int]] = {  # header, bytes of data; more are made at the end
    "truncated": ({"a": ONE}, 7),
    "no tensors": ({}, 0),
    "unknown dtype": ({"a": ONE | {"dtype": "F4"}}, 8),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": ONE}, 8),
}


@pytest.mark.parametrize("content, part", BAD_BYTES.items(), ids=lambda value: repr(value)[:24])
def test_files_that_are_no_safetensors_files(tmp_path, content, part):
    for suffix in (".safetensors", ".ckpt"):
        (tmp_path / f"model{suffix}").write_bytes(content)
        assert part in refusal(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("header, data", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_damaged_headers(tmp_path, header, data):
    message = refusal(write_header(tmp_path / "model.safetensors", header, data))
    assert "is damaged" in message and "download it or save it again" in message


def test_a_file_that_may_not_be_read(layouts, monkeypatch):
    def forbidden(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    for source in (layouts["single"], layouts["diffusers"]):
        assert "can't be read (Permission denied)" in refusal(source)


# --- what is refused: single files ----------------------------------------------------------------

EMBEDDING = TEXT + "text_model.embeddings.token_embedding.weight"
POSITION = TEXT + "text_model.embeddings.position_embedding.weight"
LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
OPTIMIZER = {f"optimizer.state.{i}.exp_avg{end}": (8,) for i in range(9) for end in ("", "_sq")}
ALL = ""  # what every name begins with
# (beginning of the names that are left out, or None; tensors that are added; part of the message)
REFUSED_FILES: list[tuple[str | None, Shapes, str]] = [
    # other models
    (None, {CONV_IN: (32, 9, 3, 3)}, "in_channels = 9, as inpainting models have"),
    (None, {CONV_IN: (32, 8, 3, 3)}, "in_channels = 8, as instruct-pix2pix models have"),
    (None, {CONV_IN: (32, 5, 3, 3)}, "in_channels = 5, as depth models have"),
    (None, {CONV_IN: (32, 7, 3, 3)}, "in_channels = 7, where"),
    (TEXT, {"cond_stage_model.model.ln_final.weight": (1024,)}, "is Stable Diffusion 2.x"),
    (None, {MIDDLE + "proj_in.weight": (96, 96)}, "True, as Stable Diffusion 2.x have"),
    (
        None,
        {MIDDLE + "transformer_blocks.0.attn2.to_k.weight": (96, 1024)},
        "cross_attention_dim = 1024, as Stable Diffusion 2.x have.*width, 128",
    ),
    (None, {"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "is Stable Diffusion XL"),
    (None, {UNET + "label_emb.0.0.weight": (1, 2)}, "is Stable Diffusion XL"),
    (ALL, {UNET + "joint_blocks.0.x_block.mlp.fc1.weight": (8, 8)}, "is Stable Diffusion 3"),
    (ALL, {"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "is a Flux model"),
    (None, {UNET + "time_embed.cond_proj.weight": (32, 256)}, r"few steps \(LCM\)"),
    (None, {"v_pred": (0,)}, "v_prediction, as v-prediction models have"),
    # additions to a model
    (ALL, {"control_model.input_blocks.0.0.weight": (8,)}, "a ControlNet, not a model"),
    (ALL, {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet, not a model"),
    (ALL, {LORA: (4, 320)}, "a LoRA, not a model"),
    (ALL, {"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 320)}, "a LoRA, not a model"),
    (ALL, {"down_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 320)}, "a LoRA, not a"),
    (ALL, {"x_attn1_to_q.hada_w1_a": (4, 320)}, "a LoRA, not a model"),
    (ALL, {"x_attn1_to_q.lokr_w1": (4, 320)}, "a LoRA, not a model"),
    (ALL, {"down_blocks.0.motion_modules.0.norm.weight": (320,)}, "AnimateDiff"),
    (ALL, {"image_proj.norm.weight": (768,)}, "an IP-Adapter, not a model"),
    (ALL, OPTIMIZER, "an optimizer's state, not a model"),
    # parts of a model
    (ALL, {"<cat-toy>": (768,)}, "no UNet and no VAE and no text encoder.* here there is '<cat"),
    (ALL, {"conv_in.weight": (320, 4, 3, 3)}, "names .* begin with model.diffusion_model., "),
    (ALL, {"state_dict." + CONV_IN: (32, 4, 3, 3)}, "here there is 'state_dict.model.diff"),
    (ALL, {CONV_IN: (32, 4, 3, 3)}, "no VAE and no text encoder"),
    (UNET, {}, "has no UNet: "),
    (VAE_, {}, "has no VAE: "),
    (TEXT, {}, "has no text encoder: "),
    # tensors that are missing, unknown or of another shape
    (CONV_IN, {}, "lacks 1 .* conv_in.weight"),
    (MIDDLE, {}, "lacks 26 .* mid_block.attentions.0.norm"),
    (VAE_ + "quant_conv.bias", {}, "lacks 1 .* quant_conv"),
    (TEXT + "text_model.final_layer_norm.bias", {}, "lacks 1 .* final_layer_norm.bias"),
    (EMBEDDING, {}, "cross_attention_dim = 128.* width, 768"),
    (POSITION, {}, "lacks 1 .*position_emb"),
    (TEXT + "text_model.encoder.layers.0.", {}, "lacks|asks for"),
    (None, {UNET + "extra.weight": (3,)}, "beyond those of Stable Diffusion 1.x, 1 .*extra.weight"),
    (None, {VAE_ + "extra.weight": (3,)}, "extra.weight: load"),
    (None, {TEXT + "extra.weight": (3,)}, "extra.weight: load"),
    (None, {UNET + "input_blocks.1.1.proj_in.lora.down.weight": (4, 32)}, "beyond.*lora.down"),
    (None, {UNET + "out.2.weight": (4, 32, 1, 1)}, r"shape \(4, 32, 1, 1\) .* \(4, 32, 3, 3\)"),
    (None, {VAE_ + "quant_conv.bias": (7,)}, r"\(7,\).*\(8,\)"),
    (None, {TEXT + "text_model.final_layer_norm.bias": (7,)}, r"\(7,\).*\(128,\)"),
    (CONV_IN, {CONV_IN + ":I8": (32, 4, 3, 3)}, "in I8 and not in floating point"),
    (None, {EMBEDDING.replace("text_model.", ""): (1050, 128)}, "under a second name"),
    (None, {UNET + "conv_in.weight": (32, 4, 3, 3)}, "under a second name"),
    (None, {EMBEDDING: (700, 128)}, "1050 tokens.* 700"),
    (None, {POSITION: (75, 128)}, "max_position_embeddings = 75"),
]


def ids(row: tuple[str | None, Shapes, str]) -> str:
    left_out = "" if row[0] is None else f"without {row[0]}" if row[0] else "alone"
    return f"{left_out} {' '.join(list(row[1])[:1])} {row[2]}"[:80]


@pytest.mark.parametrize("row", REFUSED_FILES, ids=ids)
def test_single_files_that_are_refused(layouts, tmp_path, row):
    left_out, added, part = row
    shapes = shapes_of(layouts["single"])
    if left_out is not None:
        shapes = {name: s for name, s in shapes.items() if not name.startswith(left_out)}
    message = refusal(write_sparse(tmp_path / "model.safetensors", shapes | added))
    assert re.search(part, message) and str(tmp_path) in message, message


def test_what_a_single_file_may_hold_besides(layouts, tmp_path):
    names = f"{VAE_}loss.logvar", f"{VAE_}model_ema.decay", "cond_stage_model.logit_scale"
    names += TEXT + "text_model.logit_scale", "global_step:I64"
    shapes = shapes_of(layouts["single"]) | dict.fromkeys(names, ())
    load_on_cpu(write_sparse(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize("added, kind", [({LORA: (4, 320)}, "a LoRA"), (OPTIMIZER, "an optim")])
def test_what_is_left_out_beside_a_whole_model_is_said(layouts, truth, tmp_path, added, kind):
    """A stray tensor does not make a LoRA of a model."""
    file = tmp_path / "model.safetensors"
    save_file(load_file(layouts["single"]) | {k: torch.ones(s) for k, s in added.items()}, file)
    with pytest.warns(UserWarning, match=f"{file} has {kind}.* beside the model: it is left out"):
        model = load_on_cpu(file)
    assert torch.equal(model.unet.conv_in.weight, truth.states()["unet"]["conv_in.weight"])


def test_v_prediction_is_known_by_metadata_and_by_the_sidecar(layouts, tmp_path):
    shapes = shapes_of(layouts["single"])
    file = tmp_path / "model.safetensors"
    write_sparse(file, shapes, **{"modelspec.prediction_type": "v"})
    assert "prediction_type = v_prediction, as v-prediction models have" in refusal(file)
    write_sparse(file, shapes, **{"modelspec.prediction_type": "epsilon"})
    sidecar = tmp_path / "model.yaml"
    sidecar.write_text('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n')
    assert "v-prediction" in refusal(file)
    sidecar.write_text("model:\n  params:\n    parameterization: eps\n")
    load_on_cpu(file)


# --- what is refused: configs ---------------------------------------------------------------------

# (part, field, value, part of the message; the default is "field = value")
REFUSED_CONFIGS: list[tuple[str, str, Any, str]] = [
    ("unet", "in_channels", 9, "in_channels = 9, as inpainting"),
    ("unet", "use_linear_projection", True, "as Stable Diffusion 2.x have"),
    ("unet", "attention_head_dim", [5, 10, 20, 20], "as Stable Diffusion 2.x have"),
    ("unet", "attention_head_dim", 7, "attention_head_dim = 7, where"),
    ("unet", "cross_attention_dim", 1024, "as Stable Diffusion 2.x have.*width, 128"),
    ("unet", "addition_embed_type", "text_time", "as Stable Diffusion XL have"),
    ("unet", "time_cond_proj_dim", 256, r"few steps \(LCM\)"),
    ("unet", "mid_block_type", None, "BK-SDM"),
    ("unet", "class_embed_type", "timestep", ""),
    ("unet", "norm_num_groups", 7, "don't go together"),
    ("unet", "block_out_channels", [], r"block_out_channels = \[\]"),
    ("unet", "block_out_channels", [32, 64, 96], "beyond those|lacks"),
    ("unet", "block_out_channels", [32, 64, 128, 128], "of shape .* ask for"),
    ("unet", "block_out_channels", [32] * 5000, "asks for 10000 layers"),
    ("unet", "time_embedding_act_fn", "silu", ""),
    ("unet", "resnet_out_scale_factor", 2.0, ""),
    ("unet", "only_cross_attention", [False, True], "only_cross_attention"),
    ("unet", "layers_per_block", 3, "lacks"),
    ("unet", "layers_per_block", [1, 2, 2, 2], r"layers_per_block = \[1, 2"),
    ("unet", "layers_per_block", 2**16, "asks for 262144 layers, and .* has"),
    ("unet", "sample_size", "large", ""),
    ("unet", "sample_size", [64, 64, 3], r"sample_size = \[64, 64, 3\]"),
    ("vae", "latent_channels", 16, ""),
    ("vae", "shift_factor", 0.1, ""),
    ("vae", "scaling_factor", 0, ""),
    ("vae", "block_out_channels", [32, 64, 64], "beyond those|lacks"),
    ("vae", "layers_per_block", 2000, "asks for 8000 layers"),
    ("text_encoder", "model_type", "bert", "model_type = bert, where .* has clip_text_model"),
    ("text_encoder", "hidden_act", "gelu", "as Stable Diffusion 2.x have"),
    ("text_encoder", "layer_norm_eps", 1e-6, "layer_norm_eps = 1e-06"),
    ("text_encoder", "hidden_size", 64, "cross_attention_dim = 128.*width, 64"),
    ("text_encoder", "intermediate_size", 512, r"shape \(256,\) where .* \(512,\)"),
    ("text_encoder", "num_hidden_layers", 3, "lacks 16"),
    ("text_encoder", "num_hidden_layers", 65536, "asks for 65536 layers"),
    ("text_encoder", "num_attention_heads", 3, ""),
    ("text_encoder", "max_position_embeddings", 248, ""),
    ("text_encoder", "vocab_size", 700, r"shape \(1050, 128\) where .* \(700, 128\)"),
    ("scheduler", "prediction_type", "v_prediction", "as v-prediction models have"),
    ("scheduler", "beta_schedule", "linear", ""),
    ("scheduler", "trained_betas", [0.1], "trained_betas"),
    ("scheduler", "rescale_betas_zero_snr", True, ""),
    ("scheduler", "beta_start", "small", ""),
    ("scheduler", "beta_start", 1e300, r"beta_start = 1e\+300"),
    ("scheduler", "set_alpha_to_one", "no", ""),
    ("scheduler", "num_train_timesteps", 0, ""),
    ("defaults", "words", [1, 2], r"words = \[1, 2\]"),
    ("defaults", "scheduler", ["ddim"], "scheduler = "),
    ("defaults", "scheduler", "euler", ""),
    ("defaults", "num_inference_steps", 0, ""),
    ("defaults", "guidance_scale", "high", ""),
    ("defaults", "cross_replace_steps", 1.5, ""),
    ("defaults", "self_replace_steps", [0.5], r"self_replace_steps = \[0.5\]"),
    ("defaults", "guidance", 7.5, "guidance = 7.5, which generate"),
]


@pytest.fixture(scope="module")
def source(layouts) -> Source:
    return weights.from_folder(layouts["diffusers"], half=False)


@pytest.mark.parametrize("part, field, value, message", REFUSED_CONFIGS)
def test_configs_that_are_refused(source, part, field, value, message):
    """As `load` checks them; the first of each kind is loaded from a folder below."""
    configs = {name: Config(config.path, config) for name, config in source.configs.items()}
    configs[part][field] = value
    with pytest.raises(WeightsError) as caught:
        check_defaults(configs["defaults"])
        schedule.noise_levels(configs["scheduler"])
        build.sample_size(configs["unet"])
        build.meta_modules(configs, copy.deepcopy(source.tensors))
    assert re.search(message or f"{field} = {value}", plain(caught)), str(caught.value)
    assert str(configs[part].path.parents[1]) in str(caught.value)


# Fields with which diffusers loads a folder as well: (part, fields)
LEVELS = {"only_cross_attention": [False] * 4, "layers_per_block": [2] * 4}
LEVELS |= {"transformer_layers_per_block": [1] * 4, "attention_head_dim": [8] * 4}
ACCEPTED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip skip": ("text_encoder", {"num_hidden_layers": 1}),
    "no layer at all": ("text_encoder", {"num_hidden_layers": 0}),
    "fields for each level": ("unet", LEVELS | {"upcast_attention": True, "dropout": 0.5}),
}


@pytest.mark.parametrize("part, fields", ACCEPTED_CONFIGS.values(), ids=ACCEPTED_CONFIGS)
def test_folders_are_loaded_as_diffusers_loads_them(folder, part, fields):
    prompt, settings = "a photo of a cat", dict(num_inference_steps=2, height=64, width=64)
    whole = generate(load(folder, device="cpu"), prompt, seed=7, **settings).latents
    edit_json(folder / part / "config.json", **fields)
    model = load(folder, device="cpu")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = encode(model.text_encoder, [tokenize(model.tokenizer, prompt)])
    assert difference(context, pipe.text_encoder(ids).last_hidden_state) < 1e-6
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    truth = pipe(prompt, latents=noise, output_type="latent", **settings).images
    ours = generate(model, prompt, seed=7, **settings).latents
    assert difference(ours, truth) < 1e-4
    assert (difference(ours, whole) > 1e-3) == ("num_hidden_layers" in fields)


# --- what is refused: folders ---------------------------------------------------------------------

U = "unet/diffusion_pytorch_model.safetensors"
# (file, what becomes of it: a new name, None for nothing, bytes, or with these fields; message)
REFUSED_FOLDERS: list[tuple[str, str | bytes | dict[str, Any] | None, str]] = [
    ("unet/config.json", {"in_channels": 9}, "in_channels = 9, as inpainting"),
    ("text_encoder/config.json", {"num_hidden_layers": 65536}, "asks for 65536 layers"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "type = sample"),
    ("minip2p.json", {"words": 5}, "words = 5, which"),
    ("model_index.json", {"text_encoder_2": [None, "CLIPTextModel"]}, "Diffusion XL or 3"),
    ("tokenizer/tokenizer_config.json", {"bos_token": 5}, "bos_token = 5 where"),
    (U, "unet/diffusion_pytorch_model.bin", "pickles.*version"),
    (U, "unet/diffusion_pytorch_model.non_ema.safetensors", "a diffusers folder has"),
    (U, "model.safetensors", "one of the single files"),
    (U, None, "has no unet/diffusion_pytorch_model.safetensors"),
    ("vae/config.json", None, "has no vae/config.json"),
    ("tokenizer", None, "holds no tokenizer"),
    ("unet/config.json", b"{", "it is not JSON"),
    ("unet/config.json", b"[" * 100_000, "not JSON"),
    ("unet/config.json", b"[]", "not a table"),
    (U, b"version https://git-lfs.github.com/spec", "git lfs pull"),
]


@pytest.mark.parametrize("file, change, part", REFUSED_FOLDERS)
def test_folders_that_are_refused(folder, monkeypatch, file, change, part):
    monkeypatch.setattr(weights, "read", None)  # no weight is read
    path = folder / file
    if isinstance(change, str):
        path.rename(folder / change)
    elif isinstance(change, dict):
        edit_json(path, **change)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if change is not None:
            path.write_bytes(change)
    message = refusal(folder, tokenizer=None)
    assert re.search(part, message) and str(folder) in message, message


def test_the_weights_of_another_part_and_the_part_of_a_folder(layouts, folder):
    (folder / U).unlink()
    (folder / U).hardlink_to(folder / "vae/diffusion_pytorch_model.safetensors")
    assert "lacks" in refusal(folder)
    assert "has no unet/" in refusal(layouts["diffusers"] / "unet")
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").mkdir()
    assert "can't be read" in refusal(folder)


SOURCES = ["no/such/folder", "/no/such/file.safetensors", "missing.safetensors", "a\0b", "../owner"]
SOURCES += ["models/missing.safetensors", "squirrel", "", "~nobody/x/y", "owner/na me", "x" * 5000]


@pytest.mark.parametrize("source", SOURCES, ids=lambda value: repr(value)[:24])
def test_sources_that_are_not_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"There is no {source[:300]!r}" in refusal(source)


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
    "v1-5-pruned.safetensors": 7_703_324_286,
    "README.md": 14_461,
}
VOCABULARY = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
SMALL = {f"tokenizer/{name}" for name in VOCABULARY} | {f"{part}/config.json" for part in WEIGHTS}
SMALL |= {"scheduler/scheduler_config.json", "model_index.json"}
PLAIN = {f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()}
FP16 = {name.replace(".safetensors", ".fp16.safetensors") for name in PLAIN}


class Hub:
    """Stand in for the hub's client: one repository, a cache folder, and a record of requests."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        self.cache, self.requests = cache, list[set[str]]()
        self.sizes = SIZES | dict.fromkeys(SMALL | {"safety_checker/config.json"}, 500)
        self.down: Exception | None = None  # every attempt to reach the hub raises it
        self.broken: Exception | None = None  # every download raises it
        self.content: Path | None = None  # a download returns it
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

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list) -> str:
        if self.down or self.broken:
            raise self.down or self.broken
        assert revision == ("c0ffee" if repo == REPO else None)  # the one that was looked at
        self.requests.append(set(allow_patterns))
        assert self.content
        target = self.cache / f"download-{len(self.requests)}"  # only what was asked for
        files = [str(f.relative_to(self.content)) for f in self.content.rglob("*") if f.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.content / name, target / name)
        return str(target)

    def serve(self, repository: Path) -> None:
        files = [file for file in repository.rglob("*") if file.is_file()]
        self.sizes = {str(file.relative_to(repository)): file.stat().st_size for file in files}
        self.content = repository

    def fill_cache(self, repo: str, folder: Path, *patterns: str) -> Path:
        """Fill the cache, as huggingface_hub lays it out, with the files that match."""
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


@pytest.fixture
def both_precisions(layouts, tmp_path) -> Path:
    folder = Path(shutil.copytree(layouts["diffusers_old"], tmp_path / "both"))
    return Path(shutil.copytree(layouts["fp16_variant"], folder, dirs_exist_ok=True))


def hub_exception(kind: type[Exception]) -> Exception:
    """Make one of the client's errors; their constructors differ from version to version."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error\n\nEntry not found\nfor url")
    return error


def test_the_smallest_snapshot_is_asked_for_and_announced(hub, both_precisions, capsys):
    hub.content = both_precisions
    load(REPO, device="cpu")
    load(REPO, device="cpu", dtype=torch.float16)
    assert hub.requests == [SMALL | PLAIN, SMALL | FP16]
    first, second = capsys.readouterr().err.strip().split("\n")
    assert first == f"Downloading 4.27 GB of {REPO} to the Hugging Face cache"
    assert second == f"Downloading 2.13 GB of {REPO} to the Hugging Face cache"


def test_the_files_of_a_tokenizer_are_asked_for(hub, folder):
    """Added tokens have a file of their own; a repository may lack the tokenizer's configs."""
    tokenizer = folder / "tokenizer"
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copyfile(EMOJI_TOKENIZER / name, tokenizer / name)
    (tokenizer / "added_tokens.json").write_text("{}")  # of 2022
    (tokenizer / "vocab.bin").write_bytes(b"PK\x03\x04")  # nobody needs it
    hub.serve(folder)
    load(REPO, device="cpu")
    present = {f"tokenizer/{file.name}" for file in tokenizer.iterdir()}
    assert len(present) == 7 and present - hub.requests.pop() == {"tokenizer/vocab.bin"}
    for file in tokenizer.glob("*_*.json"):
        file.unlink()
    hub.serve(folder)
    load(REPO, device="cpu")


def test_fp16_is_chosen_part_by_part(hub, both_precisions):
    hub.content = both_precisions
    for part in ("vae", "text_encoder"):
        del hub.sizes[f"{part}/{WEIGHTS[part]}.fp16.safetensors"]
    load(REPO, device="cpu", dtype=torch.bfloat16)
    unet = f"unet/{WEIGHTS['unet']}"
    plain_files = {f"vae/{WEIGHTS['vae']}.safetensors", "text_encoder/model.safetensors"}
    assert hub.requests.pop() & (PLAIN | FP16) == plain_files | {f"{unet}.fp16.safetensors"}
    del hub.sizes[f"{unet}.safetensors"]  # float16 is better than nothing
    load(REPO, device="cpu")
    assert f"{unet}.fp16.safetensors" in hub.requests.pop()


def test_the_cache_is_not_announced_and_an_incomplete_download_noticed(hub, layouts, capsys):
    snapshot = hub.fill_cache(REPO, layouts["diffusers"])
    hub.serve(snapshot)
    hub.sizes = dict.fromkeys(hub.sizes, 10**6)
    load(REPO, device="cpu")
    assert "Downloading" not in capsys.readouterr().err
    (snapshot / "unet" / "config.json").unlink()
    assert "has no unet/config.json" in refusal(REPO)
    assert "Downloading 1.0 MB of" in capsys.readouterr().err


def test_repositories_without_usable_weights_are_refused_before_a_download(hub):
    for name, part in {
        "unet/diffusion_pytorch_model.bin": "pickles",
        "v1-5-pruned.safetensors": "one of the single files",
        "README.md": "a diffusers folder has unet/",
    }.items():
        hub.sizes = {name: 1}
        message = refusal(REPO)
        assert part in message and message.startswith(REPO)
    assert not hub.requests


def test_without_a_network_the_cache_serves(hub, layouts):
    error = errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    hub.down = error
    message = refusal(REPO)
    assert f"{REPO} can't be loaded" in message and type(error).__name__ in message
    snapshot = hub.fill_cache(REPO, layouts["diffusers"], "*.json", "*/*.json")
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
        (errors.HfHubHTTPError, "the hub fails (HfHubHTTPError: 404 Client Error Entry"),
        (OSError, "the hub fails (OSError"),
    ],
)
def test_errors_of_the_hub(hub, layouts, kind, part):
    hub.broken = hub_exception(kind)  # while downloading
    assert part in refusal(REPO)
    hub.down = hub_exception(kind)  # while asking
    assert part in refusal(REPO)
    if kind is errors.RepositoryNotFoundError:  # and the cache still has it
        hub.fill_cache(REPO, layouts["diffusers"])
        load(REPO, device="cpu")
    hub.down = hub_exception(errors.RepositoryNotFoundError)
    message = refusal("runwayml/stable-diffusion-v1-5")
    assert "take stable-diffusion-v1-5/stable-diffusion-v1-5" in message


def test_the_tokenizer_of_a_single_file(hub, layouts, capsys):
    hub.down = ConnectionError("no network")
    message = refusal(layouts["single"], tokenizer=None)
    assert "A single file has no tokenizer: pass" in message and "openai/clip-vit" in message

    hub.down, hub.content = None, EMOJI_TOKENIZER  # as if it were CLIP's
    load(layouts["single"], device="cpu")
    assert hub.requests == [VOCABULARY]
    assert "Downloading 1.6 MB of openai/clip" in capsys.readouterr().err

    hub.fill_cache("openai/clip-vit-large-patch14", EMOJI_TOKENIZER)
    hub.down = ConnectionError("no network")
    load(layouts["single"], device="cpu")


# --- mutated headers ------------------------------------------------------------------------------


VALUES = [None, 0, -1, 2**64, 1.5, True, "F32", "I16", "BF16", [], {}, [None], [[0]], [0, 0]]
ENTRIES = [None, 1, [], {}, "text", {"dtype": "F16"}, {"format": "pt"}]
LENGTHS = [0, 1, 2, 2**31, 2**63, 10**8 + 1]
NAMES = ["", ".x", "\ud800", "\0", "\n", "9" * 5000, "__metadata__", "v_pred", "lora_unet_x"]


def mutate(rng: random.Random, header: bytes, size: int) -> tuple[int, bytes, int]:
    """Return a length to write before the header, the header, and the size of the file."""
    kind = rng.choice(["bytes", "length", "size", "name", "value", "entry"])
    if kind == "bytes":
        flipped = bytearray(header)
        for _ in range(rng.choice((1, 1, 2, 10, 1000))):
            flipped[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
        return len(header), bytes(flipped), size
    if kind == "length":
        return rng.choice([*LENGTHS, len(header) - 1, len(header) + 8]), header, size
    if kind == "size":
        return len(header), header, rng.choice((rng.randrange(size), size - 1, size + 1))
    table = json.loads(header)
    name, other = rng.choice(list(table)), rng.choice(list(table))
    if kind == "name":
        table[rng.choice([other, name, ""]) + rng.choice(NAMES)] = table.pop(name)
    elif kind == "value":
        field = rng.choice(["dtype", "shape", "data_offsets"])
        table[name][field] = rng.choice([*VALUES, table[other].get(field)])
    else:
        table[rng.choice([name, *NAMES])] = rng.choice(ENTRIES)
    changed = json.dumps(table).encode()
    return len(changed), changed, size - len(header) + len(changed)


@pytest.mark.filterwarnings("ignore:.*it is left out")
@pytest.mark.parametrize("examples", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_header_is_loaded_or_refused(layouts, tmp_path, monkeypatch, examples):
    tokenizer = weights.clip.load_tokenizer(EMOJI_TOKENIZER)
    monkeypatch.setattr(weights.clip, "load_tokenizer", lambda folder: tokenizer)
    for kind in (UNet, VAE, TextEncoder):  # or else most of the time would go into building them
        once = functools.cache(kind)
        call = lambda once=once, **sizes: once(**{k: hashable(v) for k, v in sizes.items()})  # noqa: E731
        monkeypatch.setattr(build, kind.__name__, call)
    file = write_sparse(tmp_path / "model.safetensors", shapes_of(layouts["single"]), format="pt")
    load(file, tokenizer=tmp_path, device="cpu")
    size, outcomes = file.stat().st_size, Counter[str]()
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(strategies.integers(0, 2**32))
    def check(seed: int) -> None:
        length, changed, new_size = mutate(random.Random(seed), header, size)
        with file.open("r+b") as stream:
            # Zeros stand over the rest of a longer header.
            stream.write(length.to_bytes(8, "little") + changed + bytes(64))
            stream.truncate(new_size)
        try:
            load(file, tokenizer=tmp_path, device="cpu")
            outcomes["loaded"] += 1
        except WeightsError as error:
            outcomes["damaged" if "is damaged" in str(error) else "refused"] += 1

    check()
    assert set(outcomes) == {"loaded", "damaged", "refused"}, outcomes


def hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
