"""The world of scenes, the detector that judges pictures of it, and EmojiBench's fixed items."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import minip2p
from world import bench, detector, figures, parts, scenes, shared
from world.__main__ import run
from world.glyphs import CELL, GLYPHS, glyph
from world.scenes import FULL, SMALL, WORLDS, Scene, draw, sample

# What the bundled model must reach on EmojiBench's fixed items: part, row, column → at least. One
# or two items of 10 or 12 below what was seen with torch 2.13, 1 dB or 0.1 below other figures.
THRESHOLDS = {
    ("captions", "subject", "trained pairs"): 0.8,
    ("captions", "object", "trained pairs"): 0.85,
    ("captions", "place", "trained pairs"): 0.85,
    ("captions", "style", "trained pairs"): 0.85,
    ("captions", "subject", "held-out pairs"): 0.9,
    ("captions", "object", "held-out pairs"): 0.9,
    ("swap", "windows", "new there"): 0.7,
    ("swap", "windows", "old gone"): 0.9,
    ("swap", "windows", "other kept"): 0.85,
    ("swap", "windows", "gain"): 8.1,  # dB above the same seed without control
    ("swap", "windows + LocalBlend", "PSNR"): 34.8,  # dB
    ("refine", "place, windows", "added shown"): 0.5,
    ("refine", "place, windows", "nouns kept"): 0.75,
    ("refine", "colour, windows", "added shown"): 0.75,
    ("maps", "16 x 16, mean", "peak in box"): 0.95,
    ("maps", "8 x 8, mean", "peak in box"): 0.95,
    ("maps", "16 x 16, mean", "IoU"): 0.67,
    ("photos", "direct, 20, 3, + LocalBlend", "row 0"): 59.9,  # dB: exact
    ("photos", "direct, 20, 3, + LocalBlend", "new there"): 0.75,
    ("photos", "direct, 20, 3, + LocalBlend", "old gone"): 0.75,
    ("photos", "direct, 20, 3, + LocalBlend", "background"): 33.0,
    ("photos", "edit-friendly, 20, 3, windows", "background"): 28.5,
}
# And at most: a weight of 0 takes a place and an object away; without control old nouns go as well,
# but the background does not stay.
CEILINGS = {
    ("reweight", "place × 0", "shown"): 0.75,
    ("reweight", "noun × 0", "shown"): 0.5,
    ("swap", "no control", "PSNR"): 20.3,
    ("maps", "16 x 16, mean", "chance"): 0.3,
    ("photos", "the input", "new there"): 0.25,
    ("photos", "the input", "to truth"): 20.5,  # dB: edits are nearer
}
STEPS = 10  # half of what bench.py takes: it is enough to see what a picture shows
DETECTOR_ACCURACY = 0.97
COLOUR_ACCURACY = 0.92  # a bicycle is so thin that its colour is hard to see
ROOT = Path(__file__).parents[1]

worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


# ---- Glyphs --------------------------------------------------------------------------------------


def test_the_sheet_has_every_glyph_once():
    pictures = {name: glyph(name) for name in GLYPHS}
    assert all(max(p.size) in range(CELL - 4, CELL + 1) for p in pictures.values())
    assert all(np.asarray(p.getchannel("A")).mean() > 40 for p in pictures.values())
    assert len({p.tobytes() for p in pictures.values()}) == len(GLYPHS)


# ---- Scenes --------------------------------------------------------------------------------------

DIGEST = """
import hashlib
from world.scenes import FULL, draw, sample
digest = hashlib.sha256()
for seed in range(24):
    drawn = draw(sample(FULL, seed), 64)
    digest.update(sample(FULL, seed).caption.encode() + drawn.image.tobytes())
    for noun, mask in drawn.masks.items():
        digest.update(noun.encode() + mask.tobytes())
print(digest.hexdigest())
"""


def test_a_seed_is_the_same_scene_to_the_byte_in_every_process():
    def run(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGEST]
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout

    assert run("1") == run("2") != ""
    assert len({sample(FULL, seed) for seed in range(100)}) == 100


THING = r"(?:an [aeio]\w+|a [^aeio\s]\w+|(?:big |small )?spaghetti)"
CAPTION = re.compile(
    rf"(?:a (?:photo|painting|sketch|watercolour) of )?{THING}"
    rf"(?: (?:eating|riding|sitting on|next to) {THING}(?: \w+)?)?"
    r"(?: (?:at night|(?:in|on) the \w+))?"
)


@worlds
def test_captions_are_grammatical_and_of_the_worlds_words(world):
    captions = {sample(world, seed, held_out=None).caption for seed in range(1000)}
    for caption in captions:
        assert CAPTION.fullmatch(caption), caption
        assert not re.search(r"\ba (\w+ )?spaghetti", caption)
    words = {word for caption in captions for word in caption.split()}
    assert words == set(world.words)


def test_the_prompts_of_the_homework_can_be_said():
    scene = Scene("squirrel", "eating", "burger", style="painting")
    assert scene.caption == "a painting of a squirrel eating a burger"
    assert replace(scene, subject="lion", style="").caption == "a lion eating a burger"
    assert replace(scene, object="apple", adjective="big").caption.endswith("eating a big apple")
    other = replace(scene, subject="deer", object="pretzel")
    assert other.caption == "a painting of a deer eating a pretzel"
    assert set(SMALL.words) >= {*scene.caption.split(), *other.caption.split(), "lion"}


@pytest.mark.parametrize("style", ["", "painting"])
@pytest.mark.parametrize("noun", ["bicycle", "car", "motorcycle", "sofa"])
def test_a_colour_that_is_asked_for_is_that_of_the_thing(noun, style):
    """The channel is the strongest in all that is seen of the thing, tyres and all."""
    relation = "sitting on" if noun == "sofa" else "riding"
    for layout in range(6):
        for channel, adjective in enumerate(("red", "green", "blue")):
            scene = Scene("lion", relation, noun, adjective, style=style, layout=layout)
            drawn = draw(scene)
            color = np.asarray(drawn.image)[drawn.masks[noun] > 0.5].mean(axis=0)
            assert color[channel] > np.delete(color, channel).max() + 15, (scene, color)


@worlds
def test_masks_and_boxes_are_within_the_picture(world):
    for seed in range(60):
        scene = sample(world, seed, held_out=None)
        drawn = draw(scene, 64)
        assert list(drawn.masks.keys() - set(scene.nouns)) == [] and drawn.image.size == (64, 64)
        for noun in scene.nouns:
            mask = drawn.masks[noun]
            assert mask.shape == (64, 64) and mask.min() >= 0 and mask.max() <= 1
            left, top, right, bottom = drawn.box(noun)
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            inside = mask[top:bottom, left:right] > 0.5
            assert inside.sum() == (mask > 0.5).sum() >= 20
            assert inside[[0, -1]].any(axis=1).all() and inside[:, [0, -1]].any(axis=0).all()


def test_masks_are_where_the_picture_shows_the_thing():
    """With another subject on the same layout, the picture changes there and nowhere else."""
    for seed in range(60):
        scene = sample(FULL, seed)
        other = replace(scene, subject="owl" if scene.subject != "owl" else "lion")
        a, b = draw(scene), draw(other)
        change = np.abs(np.asarray(a.image, float) - np.asarray(b.image, float)).mean(axis=2)
        masks = a.masks[scene.subject] + b.masks[other.subject]
        # Shadows and filters reach a little farther.
        covered = torch.tensor(masks > 0.01).float()[None]
        near = F.max_pool2d(covered, 33, stride=1, padding=16)[0].numpy() > 0
        assert change[masks > 0.9].mean() > 4 * change[~near].mean() + 4


def test_a_layout_is_free_of_its_caption():
    """The same caption looks different each time: place, size, side and background."""
    scenes = [Scene("lion", "eating", "cake", layout=layout) for layout in range(100)]
    drawings = [draw(scene, 64) for scene in scenes]
    boxes = np.array([drawn.box("lion") for drawn in drawings], float)
    middles, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2] - boxes[:, 0]
    assert middles[:, 0].std() > 8 and middles[:, 1].std() > 2 and sizes.std() > 1.5
    left_of = [drawn.box("cake")[0] < drawn.box("lion")[0] for drawn in drawings]
    assert 0.3 < np.mean(left_of) < 0.7
    pictures = [np.asarray(drawn.image, float) / 255 for drawn in drawings]
    errors = [((a - b) ** 2).mean() for a, b in pairwise(pictures)]
    assert -10 * np.log10(np.mean(errors)) < 14  # dB; an edit that keeps a scene has 30


@worlds
def test_held_out_pairs_are_never_sampled_for_training(world):
    trained = [sample(world, seed) for seed in range(1500)]
    held_out = [sample(world, seed, held_out=True) for seed in range(400)]
    assert not any(scene.held_out for scene in trained) and all(s.held_out for s in held_out)
    pairs, others = ({(s.subject, s.object) for s in group} for group in (trained, held_out))
    assert not pairs & others and len(others) > len(pairs) / 20
    # Every noun is learned beside others all the same.
    assert {s.object for s in trained} - {""} >= set(world.objects)
    assert {s.subject for s in trained if s.object} == set(world.animals)


# ---- The detector --------------------------------------------------------------------------------


def test_melting_moves_by_about_so_many_pixels():
    """Pictures that hold their own coordinates show where each pixel came from."""
    ys, xs = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    places = torch.stack([ys, xs])[None]
    rng = torch.Generator().manual_seed(0)
    assert torch.allclose(detector.melted(places, 0.0, rng), places, atol=1e-3)
    moved = (detector.melted(places, 3.0, rng) - places)[..., 16:-16, 16:-16]
    assert 2 < moved.std() < 3.5 and abs(moved.mean()) < 0.6
    assert moved.diff(dim=2).std() < moved.std() / 2  # neighbours go together


def test_things_that_are_spoilt_are_no_longer_told():
    judge = detector.Detector(SMALL)
    renders = detector.render(judge, range(450_000, 450_012))
    x, nouns = renders.pictures / 127.5 - 1, renders.nouns.float()
    spoilt, labels = detector.spoil(x, nouns, torch.Generator().manual_seed(0))
    before, after = nouns.amax(dim=(2, 3)).sum(dim=1), labels.amax(dim=(2, 3)).sum(dim=1)
    assert (after[:6] == 0).all() and (after[6:] == before[6:] - 1).all()
    lost = F.interpolate((nouns - labels).amax(dim=1, keepdim=True), (128, 128))
    far = F.max_pool2d(lost, 65, stride=1, padding=32) == 0
    change = (spoilt - x).abs().mean(dim=1, keepdim=True)
    assert change[6:][far[6:]].max() == 0 and change[6:][lost[6:] > 0].mean() > 0.05
    assert change[:6].flatten(1).mean(dim=1).min() > 0.005  # of some, everything


def test_an_earlier_world_is_one_of_another_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a checkout"):
        detector.earlier(tmp_path)
    drawing = detector.earlier(ROOT)
    assert drawing.draw is not draw  # a module of its own, which draws the same here
    renders, others = (
        detector.render(detector.Detector(SMALL), range(2), where) for where in (drawing, scenes)
    )
    pairs = detector.both(renders, others)
    assert torch.equal(pairs.pictures[:2], pairs.pictures[2:]) and len(pairs.scenes) == 4


@pytest.mark.slow
def test_the_detector_is_right_about_fresh_renders():
    judge = detector.load()
    figures = detector.check(judge, detector.render(judge, range(450_000, 450_200)))
    mush = {name: figures.pop(name) for name in ("smeared thing seen", "blurred thing seen")}
    assert mush["blurred thing seen"] <= 0.05 and mush["smeared thing seen"] <= 0.5, mush
    wrong = {"false positive", "blob taken for a thing"}
    right = {what: value for what, value in figures.items() if what not in wrong}
    assert right.pop("colour") >= COLOUR_ACCURACY, figures
    assert right.pop("present") >= 0.95, figures  # as strict as that
    assert min(right.values()) >= DETECTOR_ACCURACY, figures
    assert figures["false positive"] <= 0.01 and figures["blob taken for a thing"] <= 0.05, figures


def test_the_detector_file_is_small():
    assert detector.FILE.stat().st_size < 1_000_000


# ---- EmojiBench ----------------------------------------------------------------------------------


def test_intervals():
    assert figures.share([True] * 8 + [False] * 2)[:3] == pytest.approx(
        (0.8, 0.490, 0.943), abs=1e-3
    )
    assert figures.share([True] * 5)[1:3] == pytest.approx((0.566, 1), abs=1e-3)
    low, high = figures.mean(list(np.arange(100.0)))[1:3]
    # 29.01 the standard deviation of 0 to 99, 1.96 that of a 95 % interval
    assert (low, high) == pytest.approx((49.5 - 1.96 * 2.901, 49.5 + 1.96 * 2.901), abs=0.5)


def test_what_is_outside_of_a_region_is_compared_alone():
    image = draw(Scene("lion", layout=1), 64).image
    changed, region = image.copy(), torch.zeros(16, 16, dtype=torch.bool)
    changed.paste((255, 0, 0), (20, 20, 28, 28))
    region[5:7, 5:7] = True  # and the cells next to it: pixels 16 to 32
    psnr, similarity = bench.outside(image, changed, region)
    assert psnr == pytest.approx(60) and similarity > 0.99
    assert bench.outside(image, changed, torch.zeros_like(region))[0] < 30
    assert all(np.isnan(bench.outside(image, changed, torch.ones_like(region))))


def test_gradient_energy_is_the_squared_slope():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 4
    assert parts.gradient_energy(ramp).tolist() == pytest.approx([1 / 16])
    assert parts.gradient_energy(ramp + 2 * ramp.mT).tolist() == pytest.approx([5 / 16])
    steps = ramp.round()
    assert parts.gradient_energy(detector.blurred(steps, 2.0)) < parts.gradient_energy(steps) / 4


def test_a_figure_of_all_items_has_an_interval():
    values = torch.arange(100.0)
    figure = figures.together(lambda v: float(v.mean()), values)
    assert figure.value == 49.5 and figure.high - 49.5 == pytest.approx(1.96 * 2.89, rel=0.2)
    assert figures.figure("any", [figure]) is figure


def test_the_page_shows_seeds_in_order_as_they_come(tmp_path, monkeypatch):
    drawn = []

    def generate(model, caption, seed, num_inference_steps):
        drawn.append((caption, seed))
        return SimpleNamespace(images=[Image.new("RGB", (128, 128))])

    monkeypatch.setattr(minip2p, "generate", generate)
    model = minip2p.load(device="cpu")
    judged = bench.Bench(model, detector.Detector(SMALL))
    parts.page(judged, tmp_path / "page.jpg")
    captions, seeds = zip(*drawn, strict=True)
    assert seeds == tuple(range(48)) and len(set(captions)) > 40
    assert all(set(caption.split()) <= set(model.vocabulary) for caption in captions)
    assert (tmp_path / "page.jpg").exists()


def test_a_word_of_weight_0_is_wrong_where_it_is_left(monkeypatch):
    """The sheet's red frames: what a caption names is to be there, what is silenced is not."""
    sheets = []
    shown = {"subject": True, "object": False, "place": True}, {"object": True, "place": False}
    monkeypatch.setitem(bench.ITEMS, "reweight", (800_000, 2, 2))
    monkeypatch.setattr(parts, "judge", lambda seen, i, scene: shown[i == 1])
    monkeypatch.setattr(bench.Bench, "save", lambda self, part, rows: sheets.extend(rows))
    judged = bench.Bench(minip2p.load(device="cpu"), detector.Detector(SMALL), steps=1)
    parts.reweight(judged)
    (place, noun), object_ = sheets, sheets[1][0][1].split()[-3]
    assert [wrong for _, _, wrong in place] == [["no object"], [], ["no object"]]
    wrong = [["no object"], ["no place", f"still {object_}"], ["no object"]]
    assert [wrong for _, _, wrong in noun] == wrong


def test_a_map_is_localised_by_its_peak_and_its_half():
    drawn = draw(Scene("lion", layout=1), 64)
    mask = torch.from_numpy(drawn.masks["lion"]).unflatten(0, (16, 4)).unflatten(2, (16, 4))
    heat = mask.mean(dim=(1, 3))
    figure = bench.localised(heat, drawn, "lion")
    assert figure["peak in box"] and figure["IoU"] == 1 and 0.05 < figure["chance"] < 0.6
    figure = bench.localised(1 - heat, drawn, "lion")
    assert not figure["peak in box"] and figure["IoU"] < 0.1


@pytest.mark.slow
def test_shares_of_a_part_are_the_whole_of_it():
    """As they are made by several workers: the same items with the same figures, each once."""
    judge = shared.Judge("emoji", True, 1, None)
    alone = parts.sweep(judge.bench)
    notes = {}
    for i in (1, 0):
        [(row, _)] = judge.run([shared.Share({"part": "sweep", "i": i, "n": 2})])
        notes[i] = row["facts"]
    assert shared.joined(notes) == alone
    [(row, _)] = judge.run([shared.Share({"part": "swaps", "i": 0, "n": 1})])
    assert "error" in row


@pytest.mark.slow
def test_sharpness_is_a_share_of_the_renders(model, monkeypatch):
    """Few pictures of one step, whose figures mean nothing; those of the renders are known."""
    monkeypatch.setitem(bench.ITEMS, "sharpness", (500_000, 200, 4))
    monkeypatch.setattr(parts, "RENDERS", (1_000_000, 20))
    quick = bench.Bench(model, detector.load(), quick=True, steps=1)
    table = parts.sharpness(quick).table()
    assert table["renders"]["of renders' at 128"].value == pytest.approx(1)
    assert table["as the VAE draws them"]["of the VAE's"].value == pytest.approx(1)
    assert table["generated"]["Fréchet"].value > table["renders"]["Fréchet"].value > 0


@pytest.mark.slow
def test_the_bundled_model_on_emojibench(model):
    names = list(dict.fromkeys(part for part, _, _ in [*THRESHOLDS, *CEILINGS]))
    tables = run(bench.Bench(model, detector.load(), quick=True, steps=STEPS), names)

    def figure(part: str, row: str, column: str) -> float:
        return tables[part][row][column].value

    low = {k: figure(*k) for k, least in THRESHOLDS.items() if not figure(*k) >= least}
    high = {k: figure(*k) for k, most in CEILINGS.items() if not figure(*k) <= most}
    assert not low and not high
