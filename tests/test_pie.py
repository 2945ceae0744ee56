"""The PIE-Bench harness on a small set of its shape, and its metrics against scikit-image's."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks")]

import pie  # noqa: E402
import pie_check  # noqa: E402

import minip2p  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pie")
    pie.make_set(folder, n=2, pixels=128)
    return folder


@pytest.fixture
def run(toy_folder, capsys):
    """Return a function that runs the harness with a toy and returns what it printed."""

    def run(data: Path, out: Path, *options: str) -> str:
        capsys.readouterr()
        settings = ["--model", str(toy_folder), "--steps", "3", "--device", "cpu"]
        pie.main([str(data), "--out", str(out), *settings, *options])
        return capsys.readouterr().out

    return run


def noisy_pair(seed: int, h: int = 96, w: int = 128) -> tuple[Image.Image, Image.Image]:
    """A picture with smooth and busy places, and another that is more or less like it."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 6, w), np.linspace(0, 4, h))
    a = 127 + 80 * np.sin(np.stack([x + y, x * y, x - 2 * y], -1)) + rng.normal(0, 15, (h, w, 3))
    b = a + rng.normal(0, 5 + 10 * seed, a.shape) + np.linspace(-20, 20, w)[:, None]
    return tuple(Image.fromarray(v.clip(0, 255).round().astype(np.uint8)) for v in (a, b))


# ---- Metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_metrics_are_those_of_scikit_image(seed, share):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = noisy_pair(seed)
    mask = torch.zeros(a.height, a.width, dtype=torch.bool)
    mask[: round(share * a.height), 7:] = True
    computed = pie.compared(a, b, mask)
    keep = ~mask.numpy()[..., None]
    x, y = (np.asarray(image) / 255 * keep for image in (a, b))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    whole, each = metrics.structural_similarity(
        x, y, channel_axis=-1, data_range=1.0, full=True, **settings
    )
    expected = {
        "psnr": metrics.peak_signal_noise_ratio(x, y, data_range=1.0),
        "mse": metrics.mean_squared_error(x, y),
        "ssim": whole,
        "valid mse": metrics.mean_squared_error(x[keep[..., 0]], y[keep[..., 0]]),
        "valid psnr": metrics.peak_signal_noise_ratio(
            x[keep[..., 0]], y[keep[..., 0]], data_range=1.0
        ),
        "valid ssim": each[5:-5, 5:-5][keep[5:-5, 5:-5, 0]].mean(),
    }
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_metrics_worked_out_by_hand():
    """Half of the picture masked, the other half off by 0.2: an error of 0.04 there, 0.02 over all
    pixels, as published."""
    a = Image.new("RGB", (40, 40), (51, 51, 51))
    b = Image.new("RGB", (40, 40), (102, 102, 102))
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:, :20] = True
    figures = pie.compared(a, b, mask)
    assert figures["mse"] == pytest.approx(0.02) and figures["valid mse"] == pytest.approx(0.04)
    assert figures["psnr"] == pytest.approx(16.9897, abs=1e-4)
    assert figures["valid psnr"] == pytest.approx(13.9794, abs=1e-4)
    assert pie.compared(a, b, torch.ones(40, 40, dtype=torch.bool)) == {}
    assert pie.compared(a, a, mask)["psnr"] == float("inf")


def test_masks():
    """Pairs of start and length, row by row; the border is always in the mask."""
    mask = pie.decoded([9, 2, 14, 1, 31, 100], 6, 7)
    inside = mask[1:-1, 1:-1].int().tolist()
    assert inside == [[0, 1, 1, 0, 0], [0] * 5, [0] * 5, [0, 0, 1, 1, 1]]
    assert mask[[0, -1]].all() and mask[:, [0, -1]].all()
    rng = torch.Generator().manual_seed(0)
    for share in (0, 0.1, 0.5, 1):
        mask = torch.rand(6, 7, generator=rng) < share
        mask[[0, -1]] = mask[:, [0, -1]] = True
        runs = pie.encoded(mask)
        assert torch.equal(pie.decoded(runs, 6, 7), mask)
        assert all(start >= 0 and length > 0 for start, length in zip(runs[::2], runs[1::2]))  # noqa: B905
    assert not pie.encoded(torch.zeros(6, 7))


def test_structure_distance_and_clip_score(tmp_path):
    """With small random networks: the formulas, written down once more."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    dino, clip = str(tmp_path / "dino"), str(tmp_path / "clip")
    pie_check.save_networks(tmp_path / "dino", tmp_path / "clip", config, pixels=30)
    a, b = noisy_pair(1, 32, 32)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:20] = True

    net = transformers.ViTModel.from_pretrained(dino).eval()
    last = (net.layers if hasattr(net, "layers") else net.encoder.layer)[-1]
    to_keys = dict(last.named_modules()).get("attention.k_proj")
    to_keys = to_keys or last.attention.attention.key  # before transformers 5
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def similarities(image: Image.Image, highest: int) -> torch.Tensor:
        x = (np.asarray(image) / 255 * highest - mean) / std
        x = torch.tensor(x).float().permute(2, 0, 1)[None]
        states = net(x, output_hidden_states=True).hidden_states
        k = to_keys(last.layernorm_before(states[-2]))[0]
        return (k @ k.T) / (k.norm(dim=1)[:, None] * k.norm(dim=1)[None])

    with torch.no_grad():
        for protocol, highest in (("plain", 1), ("published", 255)):
            measure = pie.structure_of(dino, Namespace(device="cpu", protocol=protocol))
            expected = similarities(a, highest) - similarities(b, highest)
            distance = measure(a, b, mask, "")["structure"]
            assert distance == pytest.approx(float(expected.square().mean()), rel=1e-4) != 0
            assert measure(a, a, mask, "")["structure"] == 0

    measure, scores = pie.clip_of(clip, Namespace(device="cpu")), set()
    net = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    black = Image.fromarray(np.asarray(b) * mask.numpy()[..., None])
    with torch.no_grad():
        for prompt in ("a photo of a cat", "a lion", "pizza", "in the snow", "a red car"):
            figures = measure(a, b, mask, prompt)
            for name, image in (("clip", b), ("clip edited", black)):
                out = net(**processor(text=[prompt], images=[image], return_tensors="pt"))
                cosine = float(out.logits_per_image / net.logit_scale.exp())
                assert figures[name] == pytest.approx(max(0, 100 * cosine), rel=1e-4, abs=1e-4)
                scores.add(round(figures[name], 3))
    assert len(scores - {0}) >= 2


# ---- The run -------------------------------------------------------------------------------------


def test_the_set_has_the_published_shape(data):
    items = pie.read_set(data)
    assert len(items) == 2
    for item in items.values():
        old, new = item["blended_word"].split(" ")
        assert f"[{old}]" in item["original_prompt"] and f"[{new}]" in item["editing_prompt"]
        picture, true = (
            Image.open(data / kind / item["image_path"]).convert("RGB")
            for kind in ("annotation_images", "true_images")
        )
        assert picture.size == (128, 128)
        mask = pie.decoded(item["mask"], 128, 128)
        assert pie.compared(picture, true, mask)["valid psnr"] > 25
        assert 0.02 < mask.float().mean() < 0.7


def test_a_run_and_its_table(data, tmp_path, run, capsys):
    printed = run(data, tmp_path)
    assert "direct, published, 2 pictures" in printed and "27.22" in printed
    _, *lines = (tmp_path / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    for result in results:
        item = pie.read_set(data)[result["id"]]
        picture, edit = (
            Image.open(folder / "annotation_images" / item["image_path"]).convert("RGB")
            for folder in (data, tmp_path)
        )
        again = pie.compared(picture, edit, pie.decoded(item["mask"], 128, 128))
        assert {name: result[name] for name in again} == pytest.approx(again)
    mean = np.mean([result["psnr"] for result in results])
    assert f"{mean:.2f}" in printed.splitlines()[-1]
    # A run with other settings is not mixed in.
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--method", "ddim")
    assert "is of a run with" in capsys.readouterr().err


def test_metrics_without_their_network_are_left_out():
    reasons = dict(pie.model_metrics(Namespace(device="cpu", dino=None, clip=None)))
    assert reasons["structure distance"] == "give --dino FOLDER"
    assert reasons["CLIP scores"] == "give --clip FOLDER"


def test_an_interrupted_run_goes_on(data, tmp_path, run, monkeypatch):
    whole = run(data, tmp_path / "a")
    calls, edited = [], pie.edited

    def interrupted(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return edited(*args)

    monkeypatch.setattr(pie, "edited", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "b")
    file = tmp_path / "b" / "results.jsonl"
    file.write_text(file.read_text() + '{"id": "0000')  # and a line cut short
    assert run(data, tmp_path / "b") == whole
    assert len(calls) == 3  # one, the interrupted one, and the one that was left
    assert run(data, tmp_path / "b") == whole and len(calls) == 3
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        ('{"1": {}}', "no im"),
        ("[]", "must be an object"),
        ('{"1": []}', "must be an object"),
    ],
)
def test_folders_that_are_no_pie_bench(tmp_path, content, message):
    if content:
        (tmp_path / "mapping_file.json").write_text(content)
    with pytest.raises(minip2p.UserError, match=message):
        pie.read_set(tmp_path)


def test_words_that_the_prompts_do_not_have(toy):
    """An annotation that does not fit is edited without blend and weight, and named."""
    item = {"blended_word": "submarine zeppelin"}
    hook, note = pie.plain_edit(toy, PAIR, item, (16, 16))
    assert "no word" in note and not hook.blends and (hook.weights == 1).all()
    row = {"psnr": 20.0, "note": note}
    printed = pie.table({"7": row}, "direct", "plain")
    assert "1 without blend and weight" in printed and f"7: {note}" in printed


def test_the_plain_edit(data):
    item = next(iter(pie.read_set(data).values()))
    old, new = item["blended_word"].split(" ")
    edit = pie.edit_of(item)
    assert edit.weights == {new: 2.0} and not edit.everywhere
    assert isinstance(edit.edit, minip2p.Refine)
    assert (edit.edit.cross_replace_steps, edit.edit.self_replace_steps) == (0.4, 0.6)
    blend = edit.edit.local_blend
    assert (blend.words, blend.threshold, blend.start) == ((old, new), 0.3, 0.2)
    assert pie.edit_of(item | {"blended_word": ""}) == minip2p.Refine(0.4, 0.6)
    assert pie.STEPS == 50 and pie.GUIDANCE == 7.5


PAIR = ["a photo of a cat in the snow", "a photo of a dog"]
SNOW = {"blended_word": "cat dog"}


def test_the_published_edit(toy):
    """Self-attention up to twice the coarse size, maps after the weights, words of own prompts."""
    hook, note = pie.published_edit(toy, PAIR, SNOW, (64, 64))
    assert not note
    h, w = hook.edit.coarse
    first, later = hook.at(0, 50, 0), hook.at(30, 50, 0)
    for scale, replaced in ((1, True), (2, True), (4, False)):
        layer = minip2p.Layer("x", "up", False, scale * h, scale * w)
        assert (first.linear(layer) is not None) == replaced
        assert later.linear(layer) is None
    edit = first.linear(minip2p.Layer("x", "up", True, h, w))
    source, target = hook.edit.prompts
    ((columns, _),) = edit.probes
    expected = torch.zeros(2, 77, 2)
    expected[0, source.find("cat"), 0] = 1
    expected[1, target.find("dog"), 0] = 2  # its weight
    assert torch.equal(columns.cpu(), expected)


def test_published_padding_reads_the_text_of_a_longer_source(toy):
    source, target = (minip2p.text.tokenize(toy.tokenizer, prompt) for prompt in PAIR)
    alignment = pie.PublishedRefine().align(source, target)
    usual = minip2p.Refine().align(source, target)
    text = slice(0, target.end + 1)
    assert torch.equal(alignment.mapper[:, text], usual.mapper[:, text])
    assert torch.equal(alignment.exists[text], usual.exists[text])
    padding = range(target.end + 1, 77)
    assert alignment.exists[padding].all() and not usual.exists[target.end + 1]
    assert torch.equal(alignment.mapper[:, padding], torch.eye(77)[:, padding])


@pytest.mark.parametrize(
    "words, known, weight", [("cat zebra", ["cat"], 1), ("zebra dog", ["dog"], 2)]
)
def test_a_published_blend_goes_by_the_word_that_there_is(toy, words, known, weight):
    hook, note = pie.published_edit(toy, PAIR, {"blended_word": words}, (16, 16))
    (blend,) = hook.edit.blends
    assert not note and list(blend.spec.words) == known and hook.edit.weights.max() == weight
    assert blend.columns.flatten(1).any(dim=1).tolist() == [known == ["cat"], known == ["dog"]]
    hook, note = pie.published_edit(toy, PAIR, {"blended_word": "zebra zoo"}, (16, 16))
    assert not hook.edit.blends and "zebra" in note


def test_published_edit_friendly_runs(toy):
    """50 steps, 12 skipped: 20 of 38 calls are int(0.4 * 50)."""
    for prompts in (PAIR, ["a cat", "a dog"]):
        bound = pie.edit_friendly_edit(toy, prompts, 50, 12, (16, 16))
        is_open = [bound.at(call, 38, 0).cross is not None for call in range(38)]
        assert sum(is_open) == 20 and is_open[:20] == [True] * 20
        assert sum(bound.at(call, 38, 0).self_attn is not None for call in range(38)) == 30
        assert not bound.blends and (bound.weights == 1).all()


def test_the_published_figures_are_of_a_jpeg():
    a, b = noisy_pair(0)
    mask = torch.zeros(a.height, a.width, dtype=torch.bool)
    as_png, as_jpeg = (pie.stored(b, published)[0] for published in (False, True))
    assert pie.compared(b, as_png, mask)["mse"] == 0
    assert pie.compared(a, as_jpeg, mask)["ssim"] < pie.compared(a, as_png, mask)["ssim"]


def test_wrong_annotations_and_damaged_pictures_do_not_end_a_run(data, tmp_path, run):
    """Each is a sentence in its picture's row, and is tried again by the next run."""
    item = next(iter(pie.read_set(data).values()))
    picture = data / "annotation_images" / item["image_path"]
    item = item | {"image_path": str(picture.with_suffix(".jpg"))}
    (tmp_path / "damaged.png").write_bytes(picture.read_bytes()[:500])
    faults = {
        "one word": ({"blended_word": "cat"}, "an old and a new word, not 'cat'"),
        "list": ({"blended_word": ["cat", "dog"]}, "an old and a new word"),
        "odd": ({"mask": [1, 2, 3]}, "has 3 numbers"),
        "missing": ({"image_path": "none.png"}, "none.png"),
        "damaged": ({"image_path": str(tmp_path / "damaged.png")}, ""),
        "prompt": ({"editing_prompt": None}, "A prompt must be a text, not None"),
    }
    items = {name: item | fault for name, (fault, _) in faults.items()}
    (tmp_path / "mapping_file.json").write_text(json.dumps(items))
    printed = run(tmp_path, tmp_path / "out")
    assert "direct, published, 0 pictures" in printed and "6 with an error" in printed
    settings, *rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    for row in rows:
        assert faults[row["id"]][1] in row["error"] and "psnr" not in row
    assert pie.finished(tmp_path / "out" / "results.jsonl", settings) == {}


def test_lpips_of_a_picture_without_background_is_left_out(monkeypatch):
    class Net:
        def __init__(self, **_):
            pass

        def to(self, device):
            return self

        def eval(self):
            return lambda x, y: torch.zeros(1)

    monkeypatch.setitem(sys.modules, "lpips", Namespace(LPIPS=Net))
    measure = pie.lpips_of(Namespace(device="cpu"))
    a, b = noisy_pair(0)
    mask = torch.ones(a.height, a.width, dtype=torch.bool)
    assert measure(a, b, mask, "") == {} and measure(a, b, ~mask, "") == {"lpips": 0.0}
