"""The parts of EmojiBench, each a function of the bench that returns what was seen of its items.

Shapes:  h w pixels of a picture
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import minip2p
from minip2p import LocalBlend, Refine, Reweight, WordSwap, show
from minip2p.metrics import frechet, iou

from . import photos
from .bench import TIMESTEPS, Bench, batches, judge, localised, missing, outside
from .detector import to_tensor
from .figures import Facts, Figure, together
from .scenes import CANVAS, Scene, draw

SWEEP = (  # windows of cross- and self-attention
    *((cross, 0.4) for cross in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
    *((0.8, self_) for self_ in (0.0, 0.2, 0.6, 0.8, 1.0)),
    *((0.6, self_) for self_ in (0.6, 0.8, 1.0)),
)
RENDERS = (1_000_000, 1000)  # first seed, and number, of those for the Fréchet distance
PAGE = 48  # pictures


def captions(bench: Bench) -> Facts:
    facts, sheet = Facts(), []
    by_chance, rng = defaultdict(list), np.random.default_rng(0)
    for kind, held_out in (("trained pairs", False), ("held-out pairs", True)):
        scenes = bench.scenes("captions", bench.items("captions") // 2, held_out=held_out)
        images = [image for batch in batches(scenes, 16) for image in bench.pictures(batch)]
        seen = bench.detector.see(images)
        for i, scene in enumerate(scenes):
            shown = judge(seen, i, scene)
            for name, right in shown.items():
                facts[name][kind].append(right)
            facts["all of these"][kind].append(all(shown.values()))
            spurious = [noun for noun in seen.shown(i) if noun not in scene.nouns]
            facts["other nouns a picture"][kind].append(float(len(spurious)))
            wrong = missing(shown) + [f"also {n}" for n in spurious]
            sheet.append((images[i], scene.caption, wrong))
        for _ in range(20):  # the same pictures under each other's captions
            for i, other in enumerate(rng.permutation(len(scenes))):
                shown = judge(seen, i, scenes[other])
                for name, right in shown.items():
                    by_chance[name].append(right)
                by_chance["all of these"].append(all(shown.values()))
    for name, rights in by_chance.items():
        facts[name]["chance"] = [float(np.mean(rights))]
    bench.save("captions", list(batches(sheet, 8)))
    return facts


def sharpness(bench: Bench) -> Facts:
    """Compare generated pictures, renders of the same scenes drawn by the VAE, and the renders.

    Columns: gradient energy as a share of the second row's, at the model's size; as a share of
    the renders', at 128 px; and the Fréchet distance to 1,000 other renders in the detector's
    features, which for renders is what the number of pictures alone makes it.
    """
    scenes = bench.scenes("sharpness", bench.items("sharpness"), held_out=None)
    pixels = bench.model.sample_size[0] * bench.model.vae.f
    renders = [draw(scene).image for scene in scenes]
    sets = {
        "generated": [image for batch in batches(scenes, 16) for image in bench.pictures(batch)],
        "as the VAE draws them": bench.redrawn(renders),
        "renders": renders,
    }
    others = bench.scenes("sharpness", RENDERS[1], held_out=None, first=RENDERS[0])
    likened = bench.detector.features([draw(scene).image for scene in others])

    def share_of(base: str, size: int, images: Sequence[Image.Image]) -> Figure:
        x, y = (gradient_energy(to_tensor(part, size)) for part in (images, sets[base]))
        return together(lambda a, b: float(a.mean() / b.mean()), x, y, unit="%")

    facts = Facts()
    for name, images in sets.items():
        facts[name]["of the VAE's"] = [share_of("as the VAE draws them", pixels, images)]
        facts[name]["of renders' at 128"] = [share_of("renders", CANVAS, images)]
        features = bench.detector.features(images)
        facts[name]["Fréchet"] = [together(lambda drawn: frechet(drawn, likened), features)]
    columns: list[Any] = [[(image, name, []) for image in images] for name, images in sets.items()]
    bench.save("sharpness", list(zip(*columns, strict=True)))
    return facts


def gradient_energy(x: Tensor) -> Tensor:
    """Compute the mean squared difference of neighbouring pixels. x: b 3 h w → b"""
    across, down = x.diff(dim=3).square(), x.diff(dim=2).square()
    return across.mean(dim=(1, 2, 3)) + down.mean(dim=(1, 2, 3))


def swap(bench: Bench) -> Facts:
    """Exchange a noun with the windows that the model recommends."""
    return exchange(
        bench,
        "swap",
        lambda word: {
            "windows": WordSwap(),
            "windows + LocalBlend": WordSwap(local_blend=LocalBlend(word)),
            "LocalBlend alone": WordSwap(0.0, 0.0, LocalBlend(word)),
        },
    )


def sweep(bench: Bench) -> Facts:
    edits = {f"cross {c}, self {s}": WordSwap(c, s) for c, s in SWEEP}
    return exchange(bench, "sweep", lambda word: edits)


def exchange(bench: Bench, part: str, edits_of: Callable[[str], dict[str, WordSwap]]) -> Facts:
    """Exchange a noun of each scene, in every way that `edits_of` the noun names."""
    facts, rows, right_sources = Facts(), [], []
    scenes = bench.scenes(part, bench.items(part), bench.swaps)
    for scene in tqdm(scenes, desc=part):
        options = bench.swaps(scene)
        target, old, new = options[scene.layout % len(options)]
        others = [noun for noun in scene.nouns if noun != old]
        edits = {"no control": None, **edits_of(old)}
        images, seen = bench.generate(scene, [target.caption] * len(edits), [*edits.values()])
        absent = [f"no {noun}" for noun in scene.nouns if not seen.shows(0, noun)]
        right_sources.append(not absent)
        row: list[Any] = [(images[0], scene.caption, absent)]
        for i, name in enumerate(edits, 1):
            note = facts[name]
            note["new there"].append(seen.shows(i, new))
            note["old gone"].append(not seen.shows(i, old))
            note["other kept"].extend(seen.shows(i, noun) for noun in others)
            was, is_now = seen.mask(0, old), seen.mask(i, new)
            psnr, similarity = outside(images[0], images[i], was | is_now)
            note["PSNR"].append(psnr)
            note["gain"].append(psnr - facts["no control"]["PSNR"][-1])
            note["SSIM"].append(similarity)
            note["IoU"].append(iou(was, is_now))
            wrong = [f"no {noun}" for noun in (new, *others) if not seen.shows(i, noun)]
            wrong += [f"still {old}"] if seen.shows(i, old) else []
            row.append((images[i], f"{new}, {name}, {psnr:.1f} dB", wrong))
        rows.append(row)
    facts["the source"]["its nouns there"] = right_sources
    bench.save(part, rows)
    return facts


def refine(bench: Bench) -> Facts:
    facts, rows = Facts(), []
    for kind, scene in bench.halves("refine", bench.added, ("place", "colour")):
        options = bench.added(scene, kind)
        target = options[scene.layout % len(options)]
        edits: dict[str, Refine | None] = {"no control": None, "windows": Refine()}
        if kind == "colour":
            edits["windows + LocalBlend"] = Refine(local_blend=LocalBlend(scene.object))
        images, seen = bench.generate(scene, [target.caption] * len(edits), [*edits.values()])
        row: list[Any] = [(images[0], scene.caption, [])]
        for i, name in enumerate(edits, 1):
            shown, note = judge(seen, i, target), facts[f"{kind}, {name}"]
            note["added shown"].append(shown[kind])
            note["nouns kept"].append(shown["subject"] and shown.get("object", True))
            note["nouns' IoU"].append(iou(*(seen.masks(j, scene.nouns) for j in (0, i))))
            if kind == "colour":
                thing = seen.mask(0, scene.object) | seen.mask(i, scene.object)
                psnr, similarity = outside(images[0], images[i], thing)
                note["PSNR"].append(psnr)
                note["SSIM"].append(similarity)
            row.append((images[i], f"{target.caption}, {name}", missing(shown)))
        rows.append(row)
    bench.save("refine", rows)
    return facts


def reweight(bench: Bench) -> Facts:
    facts, rows = Facts(), []

    def named(scene: Scene, kind: str) -> str:
        return scene.place if kind == "place" else scene.object

    for kind, scene in bench.halves("reweight", named, ("place", "noun")):
        word, part = named(scene, kind).split()[-1], "place" if kind == "place" else "object"
        edits = [Reweight({word: weight}) for weight in (0, 2)]
        images, seen = bench.generate(scene, [scene.caption] * 2, edits)
        row = []
        for i, weight in enumerate((1, 0, 2)):
            shown, note = judge(seen, i, scene), facts[f"{kind} × {weight}"]
            note["shown"].append(shown[part])
            others = [noun for noun in scene.nouns if noun != word]
            note["other nouns kept"].append(all(seen.shows(i, noun) for noun in others))
            if weight:
                wrong = missing(shown)
            else:  # of which it is to be gone
                wrong = missing({k: v for k, v in shown.items() if k != part})
                wrong += [f"still {word}"] if shown[part] else []
            row.append((images[i], f"{scene.caption}, {word} x {weight}", wrong))
        rows.append(row)
    bench.save("reweight", rows)
    return facts


def maps(bench: Bench) -> Facts:
    """Measure word maps of renders; rows are the map's size and the timestep, or their mean."""
    facts, rows = Facts(), []
    for scenes in batches(bench.scenes("maps", bench.items("maps")), 16):
        drawings = [draw(scene, bench.model.sample_size[0] * bench.model.vae.f) for scene in scenes]
        store = bench.look(scenes, [drawn.image for drawn in drawings])
        sizes = {(layer.height, layer.width) for layer in store.maps}
        calls = {f"t = {t}": call for call, t in enumerate(TIMESTEPS)}
        for i, (scene, drawn) in enumerate(zip(scenes, drawings, strict=True)):
            row: list[Any] = [(drawn.image, scene.caption, [])]
            for noun in scene.nouns:
                for size in sorted(sizes, reverse=True):
                    # Every timestep at the coarse size, their mean at all.
                    whens = {"mean": None} | (calls if size == store.size else {})
                    for when, call in whens.items():
                        heat = store.word(noun, i, size=size, call=call).cpu()
                        fit = localised(heat, drawn, noun)
                        for name, value in fit.items():
                            facts[f"{size[0]} x {size[1]}, {when}"][name].append(value)
                        if when == "mean" and size == store.size:
                            wrong = [] if fit["peak in box"] else ["peak outside"]
                            row.append((show.overlay(drawn.image, heat), noun, wrong))
            rows.append(row)
    bench.save("maps", rows)
    return facts


def page(bench: Bench, file: Path) -> None:
    """Draw 48 captions in order, with seeds 0 to 47, and choose none."""
    images, texts = [], []
    for seed, scene in enumerate(bench.scenes("captions", PAGE, held_out=None)):
        out = minip2p.generate(
            bench.model, scene.caption, seed=seed, num_inference_steps=bench.steps
        )
        images += out.images
        texts.append(scene.caption)
    show.row(images, texts, columns=8).save(file, quality=88)
    print(file)


PARTS: dict[str, Callable[[Bench], Facts]] = {
    "captions": captions,
    "sharpness": sharpness,
    "swap": swap,
    "sweep": sweep,
    "refine": refine,
    "reweight": reweight,
    "maps": maps,
    "photos": photos.measure,
}
