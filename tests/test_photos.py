"""Measures of edited photographs: regions, figures and costs. test_world has the thresholds."""

import numpy as np
import pytest
import torch
from PIL import Image

from world import figures, photos
from world.scenes import Drawn, Scene, draw


def test_psnr_worked_out_by_hand():
    a, b = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    b.paste((51, 51, 51), (0, 0, 4, 8))  # 0.2 off in the left half
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    assert photos.psnr(a, b) == pytest.approx(-10 * np.log10(0.02))
    assert photos.psnr(a, b, left) == pytest.approx(-10 * np.log10(0.04))
    assert photos.psnr(a, b, ~left) == photos.psnr(a, a) == pytest.approx(60)
    assert np.isnan(photos.psnr(a, b, left & ~left))


def test_what_changes_are_both_things_and_a_twentieth_of_the_width_around():
    old, new = np.zeros((16, 16), np.float32), np.zeros((16, 16), np.float32)
    old[5, 5], new[5, 6] = 0.01, 1
    image = Image.new("RGB", (16, 16))
    pair = photos.Pair(Drawn(image, {"cat": old}), Drawn(image, {"dog": new}), "cat", "dog")
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:7, 4:8] = True  # one pixel around both
    assert torch.equal(pair.changed, expected)


def test_the_truth_differs_from_the_input_where_the_thing_is_and_hardly_elsewhere():
    scene = {"relation": "eating", "object": "cake", "style": "photo", "layout": 1_300_000}
    photo, true = draw(Scene("bird", **scene), 64), draw(Scene("lion", **scene), 64)
    pair = photos.Pair(photo, true, "bird", "lion")
    assert 0.03 < pair.changed.float().mean() < 0.6
    inside = photos.psnr(photo.image, true.image, pair.changed)
    assert inside < 20 and photos.psnr(photo.image, true.image, ~pair.changed) > inside + 15


def test_no_scene_of_them_can_have_been_trained_on():
    """Training draws from seeds below 200,000; no other part of the bench uses these."""
    from world.bench import ITEMS

    first, n, _ = ITEMS["photos"]
    others = [(start, start + 50_000) for name, (start, *_) in ITEMS.items() if name != "photos"]
    assert first >= 1_100_000 and n >= 24 and all(end <= first for _, end in others)


def test_work_is_counted_in_rows(toy):
    facts = figures.Facts()
    pixels = toy.sample_size[0] * toy.vae.f
    drawn = [draw(Scene(noun, style="photo", layout=3), pixels) for noun in ("bird", "lion")]
    pair = photos.Pair(*drawn, "bird", "lion")
    words = "a photo of a bird", "a photo of a lion"
    for way, work in (
        (photos.Way("direct", 3, ["windows"], 2), 2 * (1 + 3)),
        (photos.Way("DDIM", 3, ["windows"], 2, photos.ddim()), 2 * (1 + 4)),
        (photos.Way("DDIM", 1, ["windows"], 2, photos.ddim(refinements=3)), 2 * (4 + 2)),
        (photos.Way("friendly", 3, ["windows"], 2, photos.friendly(3)), 2 * (2 + 3)),
    ):
        results = photos.edited(toy, way, pair, *words, facts)
        ((name, edit),) = results.items()
        assert facts[name]["work"] == [work] and edit.size == pair.photo.image.size
    assert facts["direct, 2, 3, windows"]["row 0"] == [60]
