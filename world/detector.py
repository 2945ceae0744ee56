"""What a picture of the world shows, and where: the judge of EmojiBench, a small conv net.

    python -m world.detector                         renders scenes, learns, writes its file
    python -m world.detector --reconstruct FOLDER    half of them as that model's VAE draws them

It learns from renders, some of them blurred, noisy or pale, as generated pictures are. What is
blurred beyond recognition it learns to call nothing, lest colours alone pass for a thing.

Shapes:  b pictures · n nouns · 16 16 cells of a picture, 4 x 4 pixels each
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

from .scenes import COLORS, SMALL, WORLDS, Scene, World, adjectives, average, draw, sample

FILE = Path(__file__).with_name("detector.safetensors")
PIXELS, CELLS = 64, 16  # on each side
TRAINING, CHECK = 300_000, 400_000  # first seeds; models are trained on those below 200,000
LOOKS = ("", "painting", "sketch", "watercolour")  # "" is a photo, said or not
HUES = ("natural", *COLORS)
BY_NATURE = {"car": "red", "motorcycle": "red", "sofa": "blue", "tractor": "green"}
NONE = -100  # the class that cross_entropy leaves out


def look_of(scene: Scene) -> str:
    return "" if scene.style == "photo" else scene.style


def color_of(scene: Scene) -> str:
    """The colour that the object appears in; "" where that is not defined."""
    colors = [name for name in adjectives(scene.object, scene.style) if name in COLORS]
    if not colors:
        return ""
    own = BY_NATURE.get(scene.object, "natural")
    return scene.adjective if scene.adjective in colors else own


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
    """pictures in [-1, 1]: b 3 64 64 → logits of nouns b n 16 16, hues b 4 16 16, place, look"""

    def __init__(self, world: World, c: int = 64):
        super().__init__()
        self.world = world
        self.looks = [look for look in LOOKS if not look or look in world.styles]
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(24, c, 4, stride=2, padding=1),
            Block(c),
        )
        self.around = nn.Sequential(nn.Conv2d(c, c, 3, stride=2, padding=1), Block(c))  # b c 8 8
        self.end = nn.Sequential(Block(c), nn.GroupNorm(8, c), nn.SiLU())
        self.nouns = nn.Conv2d(c, len(world.nouns), 1)
        self.hues = nn.Conv2d(c, len(HUES), 1)
        self.place = nn.Linear(c, len(world.places))
        self.look = nn.Linear(c, len(self.looks))
        nn.init.constant_(self.nouns.bias, -4)  # most cells are no thing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.stem(x)
        x = self.end(x + F.interpolate(self.around(x), scale_factor=2))
        whole = x.mean(dim=(2, 3))
        return self.nouns(x), self.hues(x), self.place(whole), self.look(whole)

    @torch.inference_mode()
    def see(self, pictures: Sequence[Image.Image] | Tensor) -> "Seen":
        """pictures: PIL images of any size, or b 3 64 64 in [-1, 1]"""
        x = pictures if isinstance(pictures, Tensor) else to_tensor(pictures)
        parts = [self(some) for some in x.split(64)]
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
    """What a detector sees in b pictures. Pictures are named by their number."""

    nouns: tuple[str, ...]
    cells: Tensor  # b n 16 16: the probability that a cell shows a noun
    presence: Tensor  # b n: the mean of a noun's four most probable cells; above 0.5 it is there
    hues: Tensor  # b 4 16 16
    places: list[str]
    looks: list[str]

    def shows(self, picture: int, noun: str) -> bool:
        return bool(self.presence[picture, self.nouns.index(noun)] > 0.5)

    def shown(self, picture: int) -> list[str]:
        return [noun for noun in self.nouns if self.shows(picture, noun)]

    def mask(self, picture: int, noun: str) -> Tensor:
        """→ 16 16, bool"""
        return self.cells[picture, self.nouns.index(noun)] > 0.5

    def masks(self, picture: int, nouns: Sequence[str]) -> Tensor:
        """The cells of any of them. → 16 16, bool"""
        return torch.stack([self.mask(picture, noun) for noun in nouns]).any(dim=0)

    def color(self, picture: int, noun: str) -> str:
        """The colour of a noun, weighing the cells by how surely they show it."""
        cells = self.cells[picture, self.nouns.index(noun)]
        return HUES[int((self.hues[picture] * cells).sum(dim=(1, 2)).argmax())]


def to_tensor(pictures: Sequence[Image.Image], pixels: int = PIXELS) -> Tensor:
    """b pictures of any size → in [-1, 1]: b 3 h w"""
    small = [
        np.array(p.convert("RGB").resize((pixels, pixels), Image.Resampling.BOX)) for p in pictures
    ]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1


def load(file: Path = FILE) -> Detector:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: python -m world.detector makes it.")
    with safe_open(file, "pt") as opened:
        world = json.loads(opened.metadata()["world"])
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    detector = Detector(World(**{k: v if k == "name" else tuple(v) for k, v in world.items()}))
    detector.load_state_dict(state)
    return detector.eval().requires_grad_(False)


# ---- What it learns from -------------------------------------------------------------------------


@dataclass
class Renders:
    """Scenes as tensors: what the net sees and what it should say."""

    scenes: list[Scene]
    pictures: Tensor  # b 3 64 64, bytes
    nouns: Tensor  # b n 16 16, bool
    hues: Tensor  # b 16 16, classes; NONE outside of things that have a colour
    places: Tensor  # b, classes
    looks: Tensor


def render(detector: Detector, seeds: Iterable[int]) -> Renders:
    """Scenes of any pair of nouns, trained on by the models or not."""
    world = detector.world
    scenes = [sample(world, seed, held_out=None) for seed in seeds]
    pictures = torch.empty(len(scenes), 3, PIXELS, PIXELS, dtype=torch.uint8)
    nouns = torch.zeros(len(scenes), len(world.nouns), CELLS, CELLS, dtype=torch.bool)
    hues = torch.full((len(scenes), CELLS, CELLS), NONE)
    for i, scene in enumerate(scenes):
        drawn = draw(scene, PIXELS)
        pictures[i] = torch.from_numpy(np.array(drawn.image)).permute(2, 0, 1)
        for noun, mask in drawn.masks.items():
            nouns[i, world.nouns.index(noun)] = covered(mask)
        if color := color_of(scene):
            hues[i, covered(drawn.masks[scene.object])] = HUES.index(color)
    places = torch.tensor([world.places.index(scene.place) for scene in scenes])
    looks = torch.tensor([detector.looks.index(look_of(scene)) for scene in scenes])
    return Renders(scenes, pictures, nouns, hues, places, looks)


def covered(mask: np.ndarray) -> Tensor:
    """The cells of a thing: a quarter of them covered by it; and its six fullest. h w → 16 16"""
    share = torch.from_numpy(average(mask, CELLS))
    sixth = share.flatten().topk(6).values[-1].clamp(min=0.02)  # few are so small or hidden
    return (share >= 0.25) | (share >= sixth)


@torch.inference_mode()
def reconstruct(vae: minip2p.vae.VAE, pictures: Tensor) -> Tensor:
    """The pictures, bytes, as the VAE draws them."""
    drawn = [vae.decode(vae.encode(some / 127.5 - 1)).clamp(-1, 1) for some in pictures.split(32)]
    return ((torch.cat(drawn) + 1) * 127.5).round().to(torch.uint8)


def worsen(x: Tensor, rng: torch.Generator) -> Tensor:
    """Blurred, pale, noisy and moved by a pixel, each picture by its own random amount."""

    def amount(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=rng)

    dy, dx = (int(torch.randint(-1, 2, (), generator=rng)) for _ in range(2))
    x = x.roll((dy, dx), dims=(2, 3))
    x = x.lerp(blurred(x, 1.3), amount(0, 1))
    x = x * amount(0.75, 1.15) + amount(-0.1, 0.1)
    return (x + amount(0, 0.12) * torch.randn(x.shape, generator=rng)).clamp(-1, 1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    places = torch.arange(-5.0, 6.0)
    bell = (-(places**2) / (2 * sigma**2)).exp()
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (5, 5, 5, 5), mode="replicate")
    return F.conv2d(F.conv2d(x, bell, groups=x.shape[1]), bell.mT, groups=x.shape[1])


def blobs(x: Tensor) -> Tensor:
    """Only the colours of 8 x 8 places: too little to know a thing by."""
    return F.interpolate(F.avg_pool2d(x, 8), scale_factor=8, mode="bicubic").clamp(-1, 1)


# ---- Learning and checking -----------------------------------------------------------------------


def train(detector: Detector, renders: Renders, steps: int, batch: int = 64) -> None:
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
        spoilt = batch // 8
        x[:spoilt], nouns[:spoilt] = blobs(x[:spoilt]), 0
        hues[:spoilt] = places[:spoilt] = looks[:spoilt] = NONE

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
    """Shares of what is judged rightly. pictures: those of the scenes, drawn otherwise; bytes"""
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
    empty = detector.see(blobs(pictures / 127.5 - 1))
    judged["blob taken for a thing"] = [bool(empty.shown(i)) for i in range(len(renders.scenes))]
    return {what: float(np.mean(right)) for what, right in judged.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the detector that judges pictures.")
    parser.add_argument("--world", default=SMALL.name, choices=WORLDS)
    parser.add_argument("--renders", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--reconstruct", metavar="FOLDER", help="a model whose VAE draws half")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    detector = Detector(WORLDS[given.world])
    print(f"{sum(p.numel() for p in detector.parameters()):,} parameters")
    renders = render(detector, range(TRAINING, TRAINING + given.renders))
    fresh = render(detector, range(CHECK, CHECK + max(1, given.renders // 12)))
    worse = worsen(fresh.pictures / 127.5 - 1, torch.Generator().manual_seed(1))
    pictures = {
        "renders": fresh.pictures,
        "worsened": ((worse + 1) * 127.5).round().to(torch.uint8),
    }
    if given.reconstruct:
        vae = minip2p.load(given.reconstruct).vae
        renders.pictures[::2] = reconstruct(vae, renders.pictures[::2])
        pictures["reconstructed"] = reconstruct(vae, fresh.pictures)

    train(detector, renders, given.steps)
    detector.half().float().eval()  # as the file will have it
    figures = {kind: check(detector, fresh, some) for kind, some in pictures.items()}
    print(f"{len(fresh.scenes)} fresh scenes" + "".join(f"{kind:>15}" for kind in figures))
    for what in figures["renders"]:
        print(f"{what:<25}" + "".join(f"{100 * f[what]:13.2f} %" for f in figures.values()))

    state = {name: tensor.half().contiguous() for name, tensor in detector.state_dict().items()}
    about: dict[str, Any] = {"world": vars(detector.world), "hues": HUES, "looks": detector.looks}
    about |= {"figures": figures, "steps": given.steps, "renders": given.renders}
    save_file(state, given.out, {key: json.dumps(value) for key, value in about.items()})
    print(given.out)


if __name__ == "__main__":
    main()
