"""EmojiBench: does a model draw what captions name, and do edits change that and nothing else?

    python -m world.bench                     everything, with the bundled model
    python -m world.bench swap maps --quick   two parts, on the few items that the tests use
    python -m world.bench page                48 pictures, seeds 0 to 47, as they come: page.jpg

captions   pictures of captions: is shown what they name?
sharpness  as crisp as the VAE can draw, and as like unseen renders as other renders are?
swap       one noun exchanged: the new one there, the old one gone, all else as it was? Without
           control, with the model's recommended windows, with LocalBlend
sweep      the same for other windows of cross-attention, and of self-attention
refine     a place or a colour added
reweight   a place or an object silenced, or twice as loud
maps       word maps on noised renders, whose things' places are known
photos     renders inverted, edited, and compared with the true edit; more in photos.py

What pictures show is judged by a detector (detector.py), never by eye: look at --pictures too.
Intervals are 95 %: Wilson's for shares, the bootstrap over items for means.

Shapes:  h w pixels of a picture · 16 16 the detector's cells
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import minip2p
from minip2p import AttentionStore, LocalBlend, Refine, Reweight, WordSwap, show, text
from minip2p.scheduler import make_scheduler
from minip2p.vae import to_images

from .detector import BY_NATURE, Detector, Seen, blurred, load, look_of, to_tensor
from .scenes import CANVAS, COLORS, Drawn, Scene, adjectives, average, draw, sample

# First seed, number of items, and with --quick. Models are trained on seeds below 200,000.
ITEMS = {
    "captions": (500_000, 200, 24),
    "sharpness": (500_000, 200, 24),
    "swap": (600_000, 60, 10),
    "sweep": (650_000, 60, 2),  # others than swap's: they choose its windows
    "refine": (700_000, 40, 8),
    "reweight": (800_000, 40, 8),
    "maps": (900_000, 200, 32),
    "photos": (1_100_000, 24, 4),
}
STEPS = 20
SWEEP = (  # windows of cross- and self-attention
    *((cross, 0.4) for cross in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
    *((0.8, self_) for self_ in (0.0, 0.2, 0.6, 0.8, 1.0)),
    *((0.6, self_) for self_ in (0.6, 0.8, 1.0)),
)
TIMESTEPS = (200, 400, 600, 800)  # of the word maps
RENDERS = (1_000_000, 1000)  # first seed and number of those that generated pictures are likened to
PAGE = 48  # pictures


# ---- Figures -------------------------------------------------------------------------------------


class Figure(NamedTuple):
    value: float
    low: float | None  # of the 95 % interval
    high: float | None
    n: int
    unit: str

    def __str__(self) -> str:
        factor, digits = (100, 1) if self.unit == "%" else (1, 1 if self.unit else 2)
        value, low, high = (f"{(x or 0) * factor:.{digits}f}" for x in self[:3])
        interval = "" if self.low is None else f" ({low}–{high})"
        return f"{value} {self.unit}".strip() + interval


Table = dict[str, dict[str, Figure]]  # row → column → figure


def share(values: Sequence[bool]) -> Figure:
    """How many are true, with Wilson's interval (1927)."""
    n, z = len(values), 1.96
    p = sum(values) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(p, max(0.0, middle - half), min(1.0, middle + half), n, "%")


def mean(values: Sequence[float], unit: str = "") -> Figure:
    """Their mean, with the percentile bootstrap's interval (Efron & Tibshirani 1993, 13.3)."""
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) == 1:
        return Figure(float(known[0]), None, None, 1, unit)
    rng = np.random.default_rng(0)
    means = known[rng.integers(len(known), size=(2000, len(known)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(known.mean()), float(low), float(high), len(known), unit)


def together(of: Callable[..., float], *values: Tensor, unit: str = "") -> Figure:
    """A figure of all items together, `of(*values)`, with the bootstrap's standard interval: 1.96
    deviations over resampled items (Efron & Tibshirani 1993, 12.5). values: n ... each"""
    n, rng = len(values[0]), torch.Generator().manual_seed(0)
    drawn = [torch.randint(n, (n,), generator=rng) for _ in range(200)]
    half = 1.96 * float(np.std([of(*(v[rows] for v in values)) for rows in drawn]))
    value = of(*values)
    return Figure(value, value - half, value + half, n, unit)


UNITS = {  # of numbers that have one
    **{"PSNR": "dB", "gain": "dB", "chance": "%"},
    **dict.fromkeys(("row 0", "background", "to truth", "in the thing"), "dB"),
}


class Facts(defaultdict[str, defaultdict[str, list]]):
    """What was noted of each item: row → column → bools or floats."""

    def __init__(self) -> None:
        super().__init__(lambda: defaultdict(list))

    def table(self) -> Table:
        return {
            row: {name: figure(name, v) for name, v in columns.items() if known(v)}
            for row, columns in self.items()
        }


def known(values: Sequence) -> bool:
    return isinstance(values[0], Figure) or not all(map(math.isnan, values))


def figure(name: str, values: Sequence) -> Figure:
    """Of what was noted of each item; what is a figure of all of them stays one."""
    if isinstance(values[0], Figure):
        return values[0]
    return share(values) if isinstance(values[0], bool) else mean(values, UNITS.get(name, ""))


def written(table: Table) -> str:
    names = list(dict.fromkeys(name for columns in table.values() for name in columns))
    lines = [["", "n", *names]]
    for row, columns in table.items():
        n = max(figure.n for figure in columns.values())
        lines.append([row, str(n), *(str(columns.get(name, "")) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def tell(part: str, table: Table, seconds: float) -> None:
    print(f"\n{part}, {seconds:.0f} s\n{written(table)}", flush=True)


# ---- Pictures compared ---------------------------------------------------------------------------


def outside(a: Image.Image, b: Image.Image, region: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of two pictures outside of a region and the cells next to it; nan if
    that is all. region: 16 16, bool"""
    region = F.max_pool2d(region[None, None].float(), 3, stride=1, padding=1)
    keep = F.interpolate(region, (a.height, a.width))[0, 0] == 0  # h w
    if not keep.any():
        return math.nan, math.nan
    x, y = (to_tensor([a, b], a.width) / 2 + 0.5).split(1)  # 1 3 h w in [0, 1]
    error = (x - y).square().mean(dim=1)[0][keep].mean()
    psnr = -10 * torch.log10(error.clamp(min=1e-6))  # at most 60 dB
    return float(psnr), float(ssim(x, y).mean(dim=1)[0][keep].mean())


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Wang et al. 2004, eq. 13, around each pixel. x, y: b 3 h w in [0, 1] → b 3 h w"""
    mean_x, mean_y, xx, yy, xy = (blurred(t, 1.5) for t in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )


def gradient_energy(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, of each picture. x: b 3 h w → b"""
    across, down = x.diff(dim=3).square(), x.diff(dim=2).square()
    return across.mean(dim=(1, 2, 3)) + down.mean(dim=(1, 2, 3))


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared distance of two normal distributions, those of two sets of features: n c, m c
    (Dowson & Landau 1982; as FID, Heusel et al. 2017, eq. 6)"""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # trace of the root of cov_a cov_b: the product's eigenvalues are real and not negative
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def iou(a: Tensor, b: Tensor) -> float:
    """nan where both are empty"""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else math.nan


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str, Sequence[str]]]]) -> Image.Image:
    """Pictures with their captions; those with something wrong have a red frame and say what."""
    images, texts = [], []
    for row in rows:
        images.append([ImageOps.expand(i, 2, "red" if wrong else "white") for i, _, wrong in row])
        texts.append([f"{t} - WRONG: {', '.join(w)}" if w else t for _, t, w in row])
    return show.grid(images, texts)


# ---- The parts -----------------------------------------------------------------------------------


class Bench:
    """A model, the detector that judges it, and how much is done.

    Everything that a caption does not say comes from its scene's `layout`: of a render the
    arrangement, of a generated picture the noise.
    """

    def __init__(
        self,
        model: minip2p.StableDiffusion,
        detector: Detector,
        quick: bool = False,
        steps: int = STEPS,
        folder: Path | None = None,
    ):
        self.model, self.detector, self.quick, self.steps = model, detector, quick, steps
        self.folder = folder
        self.shard = (0, 1)  # of the items: every n-th from the i-th, for work that is shared out
        self.words = set(model.vocabulary or detector.world.words)
        if not self.words & set(detector.world.nouns):
            raise ValueError(f"The model knows nothing of the world {detector.world.name!r}.")

    def run(self, parts: Sequence[str] = tuple(ITEMS)) -> dict[str, Table]:
        tables = {}
        for part in parts:
            start = time.time()
            tables[part] = getattr(self, part)().table()
            tell(part, tables[part], time.time() - start)
        return tables

    def items(self, part: str) -> int:
        return ITEMS[part][2 if self.quick else 1]

    def scenes(
        self,
        part: str,
        n: int,
        fits: Callable[[Scene], object] = lambda scene: True,
        held_out: bool | None = None,
        first: int | None = None,
    ) -> list[Scene]:
        """The part's first n scenes that fit and that the model has the words for."""
        first = ITEMS[part][0] if first is None else first
        every = (sample(self.detector.world, first + i, held_out) for i in range(50_000))
        chosen = list(islice((s for s in every if self.knows(s) and fits(s)), n))
        first, step = self.shard
        return chosen[first::step]

    def halves(
        self, part: str, fits: Callable[[Scene, str], object], kinds: Sequence[str]
    ) -> Iterator[tuple[str, Scene]]:
        """A part's items, as many of each kind, with a progress bar."""
        for kind in kinds:
            scenes = self.scenes(part, self.items(part) // 2, lambda s, kind=kind: fits(s, kind))
            yield from ((kind, scene) for scene in tqdm(scenes, desc=f"{part} {kind}"))

    def knows(self, scene: Scene) -> bool:
        return self.words >= set(scene.caption.split())

    def generate(
        self, scene: Scene, targets: Sequence[str], edits: Sequence
    ) -> tuple[list[Image.Image], Seen]:
        """The picture of a scene, then one for each target: the source is computed once."""
        out = minip2p.generate(
            self.model,
            [scene.caption, *targets],
            edit=list(edits),
            seed=scene.layout,
            num_inference_steps=self.steps,
        )
        return out.images, self.detector.see(out.images)

    def save(self, part: str, rows: Sequence[Sequence]) -> None:
        """Contact sheets of eight rows each."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            first, step = self.shard
            name = part if step == 1 else f"{part}_{first + 1}of{step}"
            for page, some in enumerate(_batches(rows, 8), 1):
                contact_sheet(some).save(self.folder / f"{name}_{page}.png")

    def captions(self) -> Facts:
        facts, sheet = Facts(), []
        by_chance, rng = defaultdict(list), np.random.default_rng(0)
        for kind, held_out in (("trained pairs", False), ("held-out pairs", True)):
            scenes = self.scenes("captions", self.items("captions") // 2, held_out=held_out)
            images = [image for some in _batches(scenes, 16) for image in self.pictures(some)]
            seen = self.detector.see(images)
            for i, scene in enumerate(scenes):
                shown = judge(seen, i, scene)
                for name, right in shown.items():
                    facts[name][kind].append(right)
                facts["all of these"][kind].append(all(shown.values()))
                spurious = [noun for noun in seen.shown(i) if noun not in scene.nouns]
                facts["other nouns a picture"][kind].append(float(len(spurious)))
                wrong = _missing(shown) + [f"also {n}" for n in spurious]
                sheet.append((images[i], scene.caption, wrong))
            for _ in range(20):  # the same pictures under each other's captions
                for i, other in enumerate(rng.permutation(len(scenes))):
                    shown = judge(seen, i, scenes[other])
                    for name, right in shown.items():
                        by_chance[name].append(right)
                    by_chance["all of these"].append(all(shown.values()))
        for name, rights in by_chance.items():
            facts[name]["chance"] = [float(np.mean(rights))]
        self.save("captions", list(_batches(sheet, 8)))
        return facts

    def pictures(self, scenes: Sequence[Scene]) -> list[Image.Image]:
        """A picture of each, each from its own noise."""
        noises = []
        for scene in scenes:
            rng = torch.Generator().manual_seed(scene.layout)
            noises.append(torch.randn(4, *self.model.sample_size, generator=rng))
        out = minip2p.generate(
            self.model,
            [scene.caption for scene in scenes],
            latents=torch.stack(noises),
            num_inference_steps=self.steps,
        )
        return out.images

    def sharpness(self) -> Facts:
        """Rows: generated pictures, renders of the same scenes as the VAE draws them, and renders.

        Columns: gradient energy as a share of the second row's, at the model's size; as a share of
        the renders', at 128 px; and the Fréchet distance to 1,000 other renders in the detector's
        features, which for renders is what the number of pictures alone makes it.
        """
        scenes = self.scenes("sharpness", self.items("sharpness"), held_out=None)
        pixels = self.model.sample_size[0] * self.model.vae.f
        renders = [draw(scene).image for scene in scenes]
        sets = {
            "generated": [image for some in _batches(scenes, 16) for image in self.pictures(some)],
            "as the VAE draws them": self.redrawn(renders),
            "renders": renders,
        }
        others = self.scenes("sharpness", RENDERS[1], held_out=None, first=RENDERS[0])
        likened = self.detector.features([draw(scene).image for scene in others])

        def share_of(base: str, size: int, images: Sequence[Image.Image]) -> Figure:
            x, y = (gradient_energy(to_tensor(some, size)) for some in (images, sets[base]))
            return together(lambda a, b: float(a.mean() / b.mean()), x, y, unit="%")

        facts = Facts()
        for name, images in sets.items():
            facts[name]["of the VAE's"] = [share_of("as the VAE draws them", pixels, images)]
            facts[name]["of renders' at 128"] = [share_of("renders", CANVAS, images)]
            features = self.detector.features(images)
            facts[name]["Fréchet"] = [together(lambda some: frechet(some, likened), features)]
        columns = [[(image, name, []) for image in images] for name, images in sets.items()]
        self.save("sharpness", list(zip(*columns, strict=True)))
        return facts

    @torch.inference_mode()
    def redrawn(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures, encoded and decoded at the model's size."""
        pixels, vae = self.model.sample_size[0] * self.model.vae.f, self.model.vae
        parts = [to_tensor(some, pixels).to(self.model.device) for some in _batches(images, 8)]
        return [image for x in parts for image in to_images(vae.decode(vae.encode(x)))]

    def page(self, file: Path) -> None:
        """48 captions in order, with seeds 0 to 47, as they come."""
        images, texts = [], []
        for seed, scene in enumerate(self.scenes("captions", PAGE, held_out=None)):
            out = minip2p.generate(
                self.model, scene.caption, seed=seed, num_inference_steps=self.steps
            )
            images += out.images
            texts.append(scene.caption)
        show.row(images, texts, columns=8).save(file, quality=88)
        print(file)

    def swap(self) -> Facts:
        """None of the windows given: the model's recommendation."""
        return self.exchange(
            "swap",
            lambda word: {
                "windows": WordSwap(),
                "windows + LocalBlend": WordSwap(local_blend=LocalBlend(word)),
                "LocalBlend alone": WordSwap(0.0, 0.0, LocalBlend(word)),
            },
        )

    def sweep(self) -> Facts:
        edits = {f"cross {c}, self {s}": WordSwap(c, s) for c, s in SWEEP}
        return self.exchange("sweep", lambda word: edits)

    def exchange(self, part: str, edits_of: Callable[[str], dict[str, WordSwap]]) -> Facts:
        """A noun of each scene exchanged, in every way that `edits_of` the noun names."""
        facts, rows, right_sources = Facts(), [], []
        scenes = self.scenes(part, self.items(part), self.swaps)
        for scene in tqdm(scenes, desc=part):
            options = self.swaps(scene)
            target, old, new = options[scene.layout % len(options)]
            others = [noun for noun in scene.nouns if noun != old]
            edits = {"no control": None, **edits_of(old)}
            images, seen = self.generate(scene, [target.caption] * len(edits), edits.values())
            absent = [f"no {noun}" for noun in scene.nouns if not seen.shows(0, noun)]
            right_sources.append(not absent)
            row = [(images[0], scene.caption, absent)]
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
        self.save(part, rows)
        return facts

    def swaps(self, scene: Scene) -> list[tuple[Scene, str, str]]:
        """Every exchange of one noun that changes one word of the caption: target, old, new."""
        world = self.detector.world
        roles = [("subject", noun) for noun in world.animals if noun not in scene.nouns]
        if scene.object:
            kind = [n for n in world.objects_of(scene.relation) if n not in scene.nouns]
            roles += [("object", noun) for noun in kind]
        words, found = scene.caption.split(), []
        for role, new in roles:
            target = replace(scene, **{role: new})
            changed = [a for a, b in zip(words, target.caption.split(), strict=False) if a != b]
            if self.knows(target) and changed == [getattr(scene, role)]:
                found.append((target, changed[0], new))
        return found

    def refine(self) -> Facts:
        facts, rows = Facts(), []
        for kind, scene in self.halves("refine", self.added, ("place", "colour")):
            options = self.added(scene, kind)
            target = options[scene.layout % len(options)]
            edits: dict[str, Refine | None] = {"no control": None, "windows": Refine()}
            if kind == "colour":
                edits["windows + LocalBlend"] = Refine(local_blend=LocalBlend(scene.object))
            images, seen = self.generate(scene, [target.caption] * len(edits), edits.values())
            row = [(images[0], scene.caption, [])]
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
                row.append((images[i], f"{target.caption}, {name}", _missing(shown)))
            rows.append(row)
        self.save("refine", rows)
        return facts

    def added(self, scene: Scene, kind: str) -> list[Scene]:
        """The same scene with any place or colour added that can be seen."""
        if kind == "place":
            targets = [replace(scene, place=p) for p in self.detector.world.places if p]
        else:
            colors = COLORS.keys() & adjectives(scene.object, scene.style)
            new = sorted(colors - {BY_NATURE.get(scene.object)})
            targets = [replace(scene, adjective=color) for color in new]
        free = not (scene.place if kind == "place" else scene.adjective)
        return [target for target in targets if free and self.knows(target)]

    def reweight(self) -> Facts:
        facts, rows = Facts(), []

        def named(scene: Scene, kind: str) -> str:
            return scene.place if kind == "place" else scene.object

        for kind, scene in self.halves("reweight", named, ("place", "noun")):
            word, part = named(scene, kind).split()[-1], "place" if kind == "place" else "object"
            edits = [Reweight({word: weight}) for weight in (0, 2)]
            images, seen = self.generate(scene, [scene.caption] * 2, edits)
            row = []
            for i, weight in enumerate((1, 0, 2)):
                shown, note = judge(seen, i, scene), facts[f"{kind} × {weight}"]
                note["shown"].append(shown[part])
                others = [noun for noun in scene.nouns if noun != word]
                note["other nouns kept"].append(all(seen.shows(i, noun) for noun in others))
                if weight:
                    wrong = _missing(shown)
                else:  # of which it is to be gone
                    wrong = _missing({k: v for k, v in shown.items() if k != part})
                    wrong += [f"still {word}"] if shown[part] else []
                row.append((images[i], f"{scene.caption}, {word} x {weight}", wrong))
            rows.append(row)
        self.save("reweight", rows)
        return facts

    def maps(self) -> Facts:
        """Rows: the size of the map, and the timestep or the mean over all."""
        facts, rows = Facts(), []
        for scenes in _batches(self.scenes("maps", self.items("maps")), 16):
            drawings = [
                draw(scene, self.model.sample_size[0] * self.model.vae.f) for scene in scenes
            ]
            store = self.look(scenes, [drawn.image for drawn in drawings])
            sizes = {(layer.height, layer.width) for layer in store.maps}
            calls = {f"t = {t}": call for call, t in enumerate(TIMESTEPS)}
            for i, (scene, drawn) in enumerate(zip(scenes, drawings, strict=True)):
                row = [(drawn.image, scene.caption, [])]
                for noun in scene.nouns:
                    for size in sorted(sizes, reverse=True):
                        # Every timestep at the coarse size, their mean at all.
                        whens = {"mean": None} | (calls if size == store.size else {})
                        for when, call in whens.items():
                            heat = store.word(noun, i, size=size, call=call).cpu()
                            found = localised(heat, drawn, noun)
                            for name, value in found.items():
                                facts[f"{size[0]} x {size[1]}, {when}"][name].append(value)
                            if when == "mean" and size == store.size:
                                wrong = [] if found["peak in box"] else ["peak outside"]
                                row.append((show.overlay(drawn.image, heat), noun, wrong))
                rows.append(row)
        self.save("maps", rows)
        return facts

    def photos(self) -> Facts:
        from .photos import measure

        return measure(self)

    @torch.inference_mode()
    def look(self, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> AttentionStore:
        """The nouns' maps in each picture, noised to each of the timesteps; without guidance."""
        model, rng = self.model, torch.Generator().manual_seed(scenes[0].layout)
        clean = model.vae.encode(to_tensor(images, images[0].width).to(model.device))
        noise = torch.randn(clean.shape, generator=rng).to(clean)
        tokens = [text.tokenize(model.tokenizer, scene.caption) for scene in scenes]
        context = text.encode(model.text_encoder, tokens)
        nouns = sorted({noun for scene in scenes for noun in scene.nouns})
        store = AttentionStore(words=nouns, by_call=True)
        coarse = model.unet.coarse_size(*model.sample_size)
        store.begin(tokens, coarse, model.device)
        for call, t in enumerate(TIMESTEPS):
            alpha_bar = make_scheduler(model).alpha_bar[t]
            x = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
            model.unet(x.to(context.dtype), t, context, store.at(call, len(TIMESTEPS), 0))
        return store


def judge(seen: Seen, i: int, scene: Scene) -> dict[str, bool]:
    """Whether picture i shows each thing that the scene's caption names."""
    shown = {"subject": seen.shows(i, scene.subject)}
    if scene.object:
        shown["object"] = seen.shows(i, scene.object)
    if scene.place:
        shown["place"] = seen.places[i] == scene.place
    if scene.style:
        shown["style"] = seen.looks[i] == look_of(scene)
    if scene.adjective in COLORS:
        shown["colour"] = seen.color(i, scene.object) == scene.adjective
    return shown


def localised(heat: Tensor, drawn: Drawn, noun: str) -> dict[str, bool | float]:
    """How well a word map, h w, fits the thing: whether the middle of its highest cell is in the
    thing's box, the share of cells for which that is so, and the IoU of map and mask, each above
    half of its maximum."""
    h, w = heat.shape
    left, top, right, bottom = (v * h / drawn.image.height for v in drawn.box(noun))
    ys, xs = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    box = ((ys >= top) & (ys < bottom))[:, None] & ((xs >= left) & (xs < right))
    mask = torch.from_numpy(average(drawn.masks[noun], h))
    return {
        "peak in box": bool(box.flatten()[heat.argmax()]),
        "chance": float(box.float().mean()),
        "IoU": iou(heat > heat.max() / 2, mask > mask.max() / 2),
    }


def _missing(shown: dict[str, bool]) -> list[str]:
    return [f"no {name}" for name, right in shown.items() if not right]


def _batches(items: Sequence, n: int) -> Iterator[Sequence]:
    return (items[i : i + n] for i in range(0, len(items), n))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="EmojiBench: measure a model of the emoji world.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=", ".join(ITEMS) + ", page; default: all but it"
    )
    parser.add_argument("--model", default="emoji", help="what minip2p.load takes")
    parser.add_argument("--quick", action="store_true", help="few items")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="what was judged, to see")
    parser.add_argument("--workers", type=int, help="processes that share the items, on Ray")
    parser.add_argument("--address", help="auto, or HOST:PORT of a Ray cluster, for the same")
    given = parser.parse_args(arguments)
    names = (*ITEMS, "page")
    if unknown := [part for part in given.parts if part not in names]:
        parser.error(f"there is no part {unknown[0]!r}, only: {', '.join(names)}")

    model = minip2p.load(given.model)
    detector = load()
    print(f"{given.model}: {given.steps} steps; the model recommends {model.defaults}")
    bench = Bench(model, detector, given.quick, given.steps, given.pictures)
    if "page" in given.parts:
        folder = given.pictures or Path(".")
        folder.mkdir(parents=True, exist_ok=True)
        bench.page(folder / "page.jpg")
    parts = [part for part in given.parts or ITEMS if part != "page"]
    if parts and (given.workers or given.address):
        from .shared import shared_out

        settings = given.model, given.quick, given.steps, given.pictures
        try:
            tables = shared_out(parts, settings, given.workers, given.address)
        except ValueError as error:  # no Ray, no cluster, or a share that failed
            parser.error(str(error))
    else:
        tables = bench.run(parts)
    if given.out:
        as_dicts = {
            part: {row: {name: f._asdict() for name, f in cs.items()} for row, cs in table.items()}
            for part, table in tables.items()
        }
        about = {"model": given.model, "steps": given.steps, "quick": given.quick}
        given.out.write_text(json.dumps(about | {"parts": as_dicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
