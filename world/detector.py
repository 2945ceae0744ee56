"""The judge of EmojiBench, a small conv net: which things a picture shows, and where.

    python -m world.detector                         renders scenes, learns, writes its file
    python -m world.detector --reconstruct FOLDER    half of them as that model's VAE draws them
    python -m world.detector --before CHECKOUT       half of them as an earlier world drew them

It learns from renders, some of them a little blurred, bent, noisy or pale. It is as strict as an
eye: things that are smeared, as an unfinished model smears them, or blurred beyond recognition, it
learns to call nothing, lest colours and rough shapes pass for a thing.

Shapes:  b pictures · n nouns · 16 16 cells of a picture, 8 x 8 pixels each
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import minip2p

from . import scenes
from .scenes import COLORS, SMALL, WORLDS, Scene, World, adjectives, average

FILE = Path(__file__).with_name("detector.safetensors")
PIXELS, CELLS = 128, 16  # on each side
FINE, SPOILT = 1.2, 2.5  # pixels that a thing's parts are moved: still it; no longer it
CRISP, MUSH = 1.5, 3.0  # the same for the deviation of a blur
TRAINING, CHECK = 300_000, 400_000  # first seeds; models are trained on those below 200,000
LOOKS = ("", "painting", "sketch", "watercolour")  # "" is a photo, said or not
HUES = ("natural", *COLORS)
BY_NATURE = {"car": "red", "motorcycle": "red", "sofa": "blue", "tractor": "green"}
SURE = 0.9  # presence above which a thing is there; 98 of 100 in renders are
NONE = -100  # the class that cross_entropy leaves out


def look_of(scene: Scene) -> str:
    return "" if scene.style == "photo" else scene.style


def color_of(scene: Scene) -> str:
    """The colour that the object appears in; "" where that is not defined."""
    colors = [name for name in adjectives(scene.object, scene.style) if name in COLORS]
    if not colors:
        return ""
    natural = BY_NATURE.get(scene.object, "natural")
    return scene.adjective if scene.adjective in colors else natural


# ---- The net -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Detector(nn.Module):
    """pictures in [-1, 1]: b 3 128 128 → logits of nouns b n 16 16, hues b 4 16 16, place, look"""

    def __init__(self, world: World, c: int = 64):
        super().__init__()
        self.world = world
        self.looks = [look for look in LOOKS if not look or look in world.styles]
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, c, 4, stride=2, padding=1),
            Block(c),
        )
        self.around = nn.Sequential(nn.Conv2d(c, c, 3, stride=2, padding=1), Block(c))  # b c 8 8
        self.end = nn.Sequential(Block(c), nn.GroupNorm(8, c), nn.SiLU())
        self.nouns = nn.Conv2d(c, len(world.nouns), 1)
        self.hues = nn.Conv2d(c, len(HUES), 1)
        self.place = nn.Linear(c, len(world.places))
        self.look = nn.Linear(c, len(self.looks))
        assert self.nouns.bias is not None
        nn.init.constant_(self.nouns.bias, -4)  # most cells are no thing

    def cells(self, x: Tensor) -> Tensor:
        """Return the features of each cell. → b c 16 16"""
        x = self.stem(x)
        return self.end(x + F.interpolate(self.around(x), scale_factor=2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.cells(x)
        whole = x.mean(dim=(2, 3))
        return self.nouns(x), self.hues(x), self.place(whole), self.look(whole)

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image] | Tensor) -> Tensor:
        """Return the features that tell place and look of each whole picture. → b c"""
        x = pictures if isinstance(pictures, Tensor) else to_tensor(pictures)
        return torch.cat([self.cells(batch).mean(dim=(2, 3)) for batch in x.split(64)])

    @torch.inference_mode()
    def see(self, pictures: Sequence[Image.Image] | Tensor) -> "Seen":
        """Judge pictures: PIL images of any size, or b 3 128 128 from -1 to 1."""
        x = pictures if isinstance(pictures, Tensor) else to_tensor(pictures)
        parts = [self(batch) for batch in x.split(64)]
        nouns, hues, place, look = (torch.cat(p) for p in zip(*parts, strict=True))
        cells = nouns.sigmoid()
        return Seen(
            self.world.nouns,
            cells,
            cells.flatten(2).topk(4).values.mean(dim=-1),
            hues,
            [self.world.places[i] for i in place.argmax(dim=1)],
            [self.looks[i] for i in look.argmax(dim=1)],
        )


@dataclass
class Seen:
    """The things that a detector sees in b pictures, which are named by their number."""

    nouns: tuple[str, ...]
    cells: Tensor  # b n 16 16: the probability that a cell shows a noun
    presence: Tensor  # b n: the mean of a noun's four most probable cells; above SURE it is there
    hues: Tensor  # b 4 16 16
    places: list[str]
    looks: list[str]

    def shows(self, picture: int, noun: str) -> bool:
        return bool(self.presence[picture, self.nouns.index(noun)] > SURE)

    def shown(self, picture: int) -> list[str]:
        return [noun for noun in self.nouns if self.shows(picture, noun)]

    def mask(self, picture: int, noun: str) -> Tensor:
        """Return the cells of a thing. → 16 16, bool"""
        return self.cells[picture, self.nouns.index(noun)] > 0.5

    def masks(self, picture: int, nouns: Sequence[str]) -> Tensor:
        """The cells of any of them. → 16 16, bool"""
        return torch.stack([self.mask(picture, noun) for noun in nouns]).any(dim=0)

    def color(self, picture: int, noun: str) -> str:
        """The colour of a noun, weighing the cells by how surely they show it."""
        cells = self.cells[picture, self.nouns.index(noun)]
        return HUES[int((self.hues[picture] * cells).sum(dim=(1, 2)).argmax())]


def to_tensor(pictures: Sequence[Image.Image], pixels: int = PIXELS) -> Tensor:
    """Resize b pictures of any size, by averaging or smoothly. → b 3 h w, from -1 to 1"""
    ways = {True: Image.Resampling.BICUBIC, False: Image.Resampling.BOX}
    sized = [
        np.array(p.convert("RGB").resize((pixels, pixels), ways[p.width < pixels]))
        for p in pictures
    ]
    return torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2) / 127.5 - 1


def load(file: Path = FILE) -> Detector:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: python -m world.detector makes it.")
    with safe_open(file, "pt") as opened:
        world = json.loads(opened.metadata()["world"])
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    sizes: dict[str, Any] = {k: v if k == "name" else tuple(v) for k, v in world.items()}
    detector = Detector(World(**sizes))
    detector.load_state_dict(state)
    return detector.eval().requires_grad_(False)


# ---- What it learns from -------------------------------------------------------------------------


@dataclass
class Renders:
    """Scenes as tensors: what the net sees and what it should say."""

    scenes: list[Scene]
    pictures: Tensor  # b 3 128 128, bytes
    nouns: Tensor  # b n 16 16, bool
    hues: Tensor  # b 16 16, classes; NONE outside of things that have a colour
    places: Tensor  # b, classes
    looks: Tensor


def render(detector: Detector, seeds: Iterable[int], drawing: Any = scenes) -> Renders:
    """Draw scenes of any pair of nouns, whether the models were trained on them or not.

    drawing: the module that samples and draws them; an earlier one knows fewer words.
    """
    world = detector.world
    theirs = drawing.WORLDS[world.name]
    scenes_drawn = [drawing.sample(theirs, seed, held_out=None) for seed in seeds]
    pictures = torch.empty(len(scenes_drawn), 3, PIXELS, PIXELS, dtype=torch.uint8)
    nouns = torch.zeros(len(scenes_drawn), len(world.nouns), CELLS, CELLS, dtype=torch.bool)
    hues = torch.full((len(scenes_drawn), CELLS, CELLS), NONE)
    for i, scene in enumerate(scenes_drawn):
        drawn = drawing.draw(scene, PIXELS)
        pictures[i] = torch.from_numpy(np.array(drawn.image)).permute(2, 0, 1)
        for noun, mask in drawn.masks.items():
            nouns[i, world.nouns.index(noun)] = covered(mask)
        if color := color_of(scene):
            hues[i, covered(drawn.masks[scene.object])] = HUES.index(color)
    places = torch.tensor([world.places.index(scene.place) for scene in scenes_drawn])
    looks = torch.tensor([detector.looks.index(look_of(scene)) for scene in scenes_drawn])
    return Renders(scenes_drawn, pictures, nouns, hues, places, looks)


def both(a: Renders, b: Renders) -> Renders:
    """All of both."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Renders)]
    parts: list[Any] = [x + y if isinstance(x, list) else torch.cat([x, y]) for x, y in pairs]
    return Renders(*parts)


def earlier(checkout: Path) -> Any:
    """Import world/scenes.py of another checkout."""
    folder = checkout / "world"
    spec = spec_from_file_location(
        "earlier_world", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: give a checkout of the repository.")
    sys.modules["earlier_world"] = module_from_spec(spec)
    return import_module("earlier_world.scenes")


def covered(mask: np.ndarray) -> Tensor:
    """The cells of a thing: a quarter of them covered by it; and its six fullest. h w → 16 16"""
    share = torch.from_numpy(average(mask, CELLS))
    sixth = share.flatten().topk(6).values[-1].clamp(min=0.02)  # few are so small or hidden
    return (share >= 0.25) | (share >= sixth)


@torch.inference_mode()
def reconstruct(model: minip2p.StableDiffusion, pictures: Tensor) -> Tensor:
    """Encode and decode pictures, bytes, with a model's VAE at its own size."""
    size = model.sample_size[0] * model.vae.f
    parts = []
    for batch in pictures.split(32):
        x = F.interpolate(batch / 127.5 - 1, (size, size), mode="area")
        y = model.vae.decode(model.vae.encode(x))
        y = F.interpolate(y, pictures.shape[2:], mode="bicubic", antialias=True)
        parts.append(((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def amount(x: Tensor, low: float, high: float, rng: torch.Generator) -> Tensor:
    """One for each picture. x: b ... → b 1 1 1"""
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=rng)


def worsen(x: Tensor, rng: torch.Generator) -> Tensor:
    """Bend, blur, fade and add noise, each picture by its own amount; things stay recognisable."""
    x = melted(x, amount(x, 0, FINE, rng), rng)
    x = x.lerp(blurred(x, CRISP), amount(x, 0, 1, rng))
    x = x * amount(x, 0.75, 1.15, rng) + amount(x, -0.1, 0.1, rng)
    return (x + amount(x, 0, 0.1, rng) * torch.randn(x.shape, generator=rng)).clamp(-1, 1)


def spoil(x: Tensor, nouns: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smear or blur the first half of the pictures wholly, of the others one thing.

    Places and looks can still be told. x: b 3 h w, nouns: b n 16 16, those that can be told → both
    """
    little, much = (float(torch.rand((), generator=rng)) for _ in range(2))
    bad = melted(x, amount(x, SPOILT, 3 * SPOILT, rng), rng)
    bad = blurred(bad, 0.8 + (CRISP - 0.3) * little)
    fog = blurred(x, MUSH * (1 + much))
    bad = torch.where(torch.rand(len(x), 1, 1, 1, generator=rng) < 0.7, bad, fog)
    present = nouns.amax(dim=(2, 3))  # b n
    chosen = (present * (0.1 + torch.rand(present.shape, generator=rng))).argmax(dim=1)
    hit = F.one_hot(chosen, present.shape[1]).to(nouns) * present
    hit[: len(x) // 2] = present[: len(x) // 2]
    region = (nouns * hit[:, :, None, None]).amax(dim=1, keepdim=True)  # b 1 16 16
    region = F.max_pool2d(region, 3, stride=1, padding=1)
    soft = F.interpolate(region, x.shape[2:], mode="bilinear")
    soft[: len(x) // 2] = 1
    return x.lerp(bad, soft), nouns * (1 - hit)[:, :, None, None]


def melted(x: Tensor, far: Tensor | float, rng: torch.Generator) -> Tensor:
    """Every part moved somewhere, by about `far` pixels, neighbours alike. x: b 3 h w"""
    b, _, h, w = x.shape
    grid = (12, 16, 24)[int(torch.randint(3, (), generator=rng))]
    moves = far * 2 / w * torch.randn(b, 2, grid, grid, generator=rng)
    moves = F.interpolate(moves, (h, w), mode="bicubic").permute(0, 2, 3, 1)  # b h w 2
    still = F.affine_grid(torch.eye(2, 3).expand(b, 2, 3), [b, 1, h, w], align_corners=False)
    return F.grid_sample(x, still + moves, padding_mode="reflection", align_corners=False)


def blurred(x: Tensor, sigma: float) -> Tensor:
    reach = max(5, round(3 * sigma))
    places = torch.arange(-reach, reach + 1.0)
    bell = (-(places**2) / (2 * sigma**2)).exp()
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, bell, groups=x.shape[1]), bell.mT, groups=x.shape[1])


def blobs(x: Tensor) -> Tensor:
    """Only the colours of 8 x 8 places: too little to know a thing by."""
    return F.interpolate(F.avg_pool2d(x, 16), scale_factor=16, mode="bicubic").clamp(-1, 1)


# ---- Learning and checking -----------------------------------------------------------------------


def train(detector: Detector, renders: Renders, steps: int, batch: int = 48) -> None:
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start = time.time()
    for step in range(steps):
        rows = torch.randint(len(renders.scenes), (batch,), generator=rng)
        nouns, places, looks = (
            renders.nouns[rows].float(),
            renders.places[rows],
            renders.looks[rows],
        )
        x = worsen(renders.pictures[rows] / 127.5 - 1, rng)
        hues = renders.hues[rows]
        empty, spoilt = slice(batch // 8), slice(batch // 8, batch // 2)
        x[empty], nouns[empty] = blobs(x[empty]), 0
        hues[empty] = places[empty] = looks[empty] = NONE
        x[spoilt], nouns[spoilt] = spoil(x[spoilt], nouns[spoilt], rng)
        hues[spoilt] = NONE

        says_nouns, says_hues, says_place, says_look = detector(x)
        loss = (
            F.binary_cross_entropy_with_logits(says_nouns, nouns, reduction="sum") / batch / 20
            + F.cross_entropy(says_hues, hues, reduction="sum", ignore_index=NONE) / batch / 40
            + F.cross_entropy(says_place, places, ignore_index=NONE)
            + F.cross_entropy(says_look, looks, ignore_index=NONE)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} of {steps}  loss {loss:.3f}  {time.time() - start:.0f} s")


def check(detector: Detector, renders: Renders, pictures: Tensor | None = None) -> dict[str, float]:
    """Return the shares of right judgements. pictures: of the scenes, drawn otherwise, as bytes"""
    pictures = renders.pictures if pictures is None else pictures
    seen = detector.see(pictures / 127.5 - 1)
    nouns = detector.world.nouns
    judged: dict[str, list[bool]] = {}

    def judge(what: str, right: bool) -> None:
        judged.setdefault(what, []).append(right)

    for i, scene in enumerate(renders.scenes):
        absent = [k for k, noun in enumerate(nouns) if noun not in scene.nouns]
        highest = seen.presence[i, absent].max()
        for role, noun in zip(("subject", "object"), scene.nouns, strict=False):
            judge(role, bool(seen.presence[i, nouns.index(noun)] > highest))
            judge("present", seen.shows(i, noun))
        for k in absent:
            judge("false positive", seen.shows(i, nouns[k]))
        judge("place", seen.places[i] == scene.place)
        judge("style", seen.looks[i] == look_of(scene))
        if color := color_of(scene):
            judge("colour", seen.color(i, scene.object) == color)
    x, rng = pictures / 127.5 - 1, torch.Generator().manual_seed(2)
    empty = detector.see(blobs(x))
    judged["blob taken for a thing"] = [bool(empty.shown(i)) for i in range(len(x))]
    spoilt = {
        "smeared": blurred(melted(x, 1.5 * SPOILT, rng), 1.0),
        "blurred": blurred(x, 1.5 * MUSH),
    }
    for how, bad in spoilt.items():
        seen = detector.see(bad)
        judged[f"{how} thing seen"] = [
            seen.shows(i, noun) for i, scene in enumerate(renders.scenes) for noun in scene.nouns
        ]
    return {what: float(np.mean(right)) for what, right in judged.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the detector that judges pictures.")
    parser.add_argument("--world", default=SMALL.name, choices=WORLDS)
    parser.add_argument("--renders", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--reconstruct", metavar="FOLDER", help="a model whose VAE draws half")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an earlier world, too")
    parser.add_argument("--on", type=Path, metavar="FILE", help="a detector that learns on")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    detector = Detector(WORLDS[options.world])
    if options.on:
        detector.load_state_dict(load(options.on).state_dict())
    print(f"{sum(p.numel() for p in detector.parameters()):,} parameters")
    n = options.renders // 2 if options.before else options.renders
    renders = render(detector, range(TRAINING, TRAINING + n))
    fresh = render(detector, range(CHECK, CHECK + max(1, options.renders // 12)))
    worse = worsen(fresh.pictures / 127.5 - 1, torch.Generator().manual_seed(1))
    pictures = {
        "renders": fresh.pictures,
        "worsened": ((worse + 1) * 127.5).round().to(torch.uint8),
    }
    if options.before:
        theirs = render(detector, range(TRAINING, TRAINING + n), earlier(options.before))
        renders = both(renders, theirs)
    if options.reconstruct:
        model = minip2p.load(options.reconstruct)
        renders.pictures[::2] = reconstruct(model, renders.pictures[::2])
        pictures["reconstructed"] = reconstruct(model, fresh.pictures)

    train(detector, renders, options.steps)
    detector.half().float().eval()  # as the file will have it
    figures = {kind: check(detector, fresh, drawn) for kind, drawn in pictures.items()}
    print(f"{len(fresh.scenes)} fresh scenes" + "".join(f"{kind:>15}" for kind in figures))
    for what in figures["renders"]:
        print(f"{what:<25}" + "".join(f"{100 * f[what]:13.2f} %" for f in figures.values()))

    state = {name: tensor.half().contiguous() for name, tensor in detector.state_dict().items()}
    metadata: dict[str, Any] = {
        "world": vars(detector.world),
        "hues": HUES,
        "looks": detector.looks,
    }
    metadata |= {"figures": figures, "steps": options.steps, "renders": options.renders}
    save_file(state, options.out, {key: json.dumps(value) for key, value in metadata.items()})
    print(options.out)


if __name__ == "__main__":
    main()
