"""The bench of EmojiBench: a model, the detector that judges it, and the items that it draws.

Shapes:  h w pixels of a picture · 16 16 the detector's cells
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import minip2p
from minip2p import AttentionStore, metrics, show, text
from minip2p.vae import to_images

from .detector import BY_NATURE, Detector, Seen, look_of, to_tensor
from .scenes import COLORS, Drawn, Scene, adjectives, average, sample

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
TIMESTEPS = (200, 400, 600, 800)  # of the word maps


class Bench:
    """A model, the detector that judges it, and how many items are drawn.

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
        # (i, n): every n-th item from the i-th, for work that several processes share.
        self.shard = (0, 1)
        self.words = set(model.vocabulary or detector.world.words)
        if not self.words & set(detector.world.nouns):
            raise ValueError(f"The model knows nothing of the world {detector.world.name!r}.")

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
        """Return the part's first n scenes that fit and whose words the model knows."""
        first = ITEMS[part][0] if first is None else first
        every = (sample(self.detector.world, first + i, held_out) for i in range(50_000))
        chosen = list(islice((s for s in every if self.knows(s) and fits(s)), n))
        first, step = self.shard
        return chosen[first::step]

    def halves(
        self, part: str, fits: Callable[[Scene, str], object], kinds: Sequence[str]
    ) -> Iterator[tuple[str, Scene]]:
        """Yield a part's items, the same number of each kind, with a progress bar."""
        for kind in kinds:

            def is_kind(scene: Scene, kind: str = kind) -> object:
                return fits(scene, kind)

            scenes = self.scenes(part, self.items(part) // 2, is_kind)
            yield from ((kind, scene) for scene in tqdm(scenes, desc=f"{part} {kind}"))

    def knows(self, scene: Scene) -> bool:
        return self.words >= set(scene.caption.split())

    def generate(
        self, scene: Scene, targets: Sequence[str], edits: Sequence
    ) -> tuple[list[Image.Image], Seen]:
        """Draw the picture of a scene, then one for each target; the source is computed once."""
        out = minip2p.generate(
            self.model,
            [scene.caption, *targets],
            edit=list(edits),
            seed=scene.layout,
            num_inference_steps=self.steps,
        )
        return out.images, self.detector.see(out.images)

    def save(self, part: str, rows: Sequence[Sequence]) -> None:
        """Save contact sheets of eight rows each."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            first, step = self.shard
            name = part if step == 1 else f"{part}_{first + 1}of{step}"
            for page, page_rows in enumerate(batches(rows, 8), 1):
                contact_sheet(page_rows).save(self.folder / f"{name}_{page}.png")

    def pictures(self, scenes: Sequence[Scene]) -> list[Image.Image]:
        """Draw a picture of each scene, each from its own noise."""
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

    @torch.inference_mode()
    def redrawn(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Encode and decode pictures at the model's size."""
        pixels, vae = self.model.sample_size[0] * self.model.vae.f, self.model.vae
        parts = [to_tensor(batch, pixels).to(self.model.device) for batch in batches(images, 8)]
        return [image for x in parts for image in to_images(vae.decode(vae.encode(x)))]

    def swaps(self, scene: Scene) -> list[tuple[Scene, str, str]]:
        """List every exchange of one noun that changes one word: target, old and new noun."""
        world = self.detector.world
        roles = [("subject", noun) for noun in world.animals if noun not in scene.nouns]
        if scene.object:
            kind = [n for n in world.objects_of(scene.relation) if n not in scene.nouns]
            roles += [("object", noun) for noun in kind]
        words, targets = scene.caption.split(), []
        for role, new in roles:
            target = replace(scene, **{role: new})  # type: ignore[arg-type]  # both are nouns
            changed = [a for a, b in zip(words, target.caption.split(), strict=False) if a != b]
            if self.knows(target) and changed == [getattr(scene, role)]:
                targets.append((target, changed[0], new))
        return targets

    def added(self, scene: Scene, kind: str) -> list[Scene]:
        """List the same scene with each place or colour added that can be seen."""
        if kind == "place":
            targets = [replace(scene, place=p) for p in self.detector.world.places if p]
        else:
            colors = COLORS.keys() & adjectives(scene.object, scene.style)
            new = sorted(colors - {BY_NATURE.get(scene.object)})
            targets = [replace(scene, adjective=color) for color in new]
        free = not (scene.place if kind == "place" else scene.adjective)
        return [target for target in targets if free and self.knows(target)]

    @torch.inference_mode()
    def look(self, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> AttentionStore:
        """Keep the nouns' maps in each picture, noised to each timestep, without guidance."""
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
            alpha_bar = model.alpha_bars()[t]
            x = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
            model.unet(x.to(context.dtype), t, context, store.at(call, len(TIMESTEPS), 0))
        return store


def outside(a: Image.Image, b: Image.Image, region: Tensor) -> tuple[float, float]:
    """Return PSNR in dB and SSIM of two pictures outside a region and the cells next to it.

    region: 16 16, bool. Both are nan if that is the whole picture.
    """
    region = F.max_pool2d(region[None, None].float(), 3, stride=1, padding=1)
    keep = F.interpolate(region, (a.height, a.width))[0, 0] == 0  # h w
    if not keep.any():
        return math.nan, math.nan
    x, y = (to_tensor([a, b], a.width) / 2 + 0.5).split(1)  # 1 3 h w in [0, 1]
    psnr = metrics.psnr(metrics.squared_error(x, y)[0][keep].mean(), highest=60)
    ssim = metrics.ssim(x, y, border="replicate").mean(dim=1)[0]
    return psnr, float(ssim[keep].mean())


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str, Sequence[str]]]]) -> Image.Image:
    """Lay out pictures with captions; a wrong one has a red frame and says what is wrong."""
    images, texts = [], []
    for row in rows:
        images.append([ImageOps.expand(i, 2, "red" if wrong else "white") for i, _, wrong in row])
        texts.append([f"{t} - WRONG: {', '.join(w)}" if w else t for _, t, w in row])
    return show.grid(images, texts)


def judge(seen: Seen, i: int, scene: Scene) -> dict[str, bool]:
    """Tell whether picture i shows each thing that the scene's caption names."""
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
    """Measure how well a word map, h w, fits the thing.

    peak in box: the middle of the map's highest cell is in the thing's box. chance: the share of
    cells for which that is so. IoU: of map and mask, each above half of its maximum.
    """
    h, w = heat.shape
    left, top, right, bottom = (v * h / drawn.image.height for v in drawn.box(noun))
    ys, xs = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    box = ((ys >= top) & (ys < bottom))[:, None] & ((xs >= left) & (xs < right))
    mask = torch.from_numpy(average(drawn.masks[noun], h))
    return {
        "peak in box": bool(box.flatten()[heat.argmax()]),
        "chance": float(box.float().mean()),
        "IoU": metrics.iou(heat > heat.max() / 2, mask > mask.max() / 2),
    }


def missing(shown: dict[str, bool]) -> list[str]:
    return [f"no {name}" for name, right in shown.items() if not right]


def batches(items: Sequence, n: int) -> Iterator[Sequence]:
    return (items[i : i + n] for i in range(0, len(items), n))
