"""Scenes of emoji with captions: what they show, where, and which pixels are what is known exactly.

    scene = sample(FULL, seed)       what there is: "a painting of a squirrel eating a burger"
    drawn = draw(scene)              the picture, and for every noun its mask and box

A scene's `layout` seed decides what the caption leaves open: position, scale, side, background,
clutter. So much is left open that a model can't know the layout from the caption: what an edit
keeps of a picture then proves something. One layout under two captions is an edit as it should be.
"""

import colorsys
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from .glyphs import ANIMALS, FOODS, FURNITURE, VEHICLES, glyph

CANVAS = 128  # pixels on each side of what is drawn; smaller pictures are averaged from it

Color = tuple[int, ...]
COLORS = {"red": 0.0, "blue": 0.6, "green": 0.36}  # hues
SIZES = {"big": 1.3, "small": 0.7}  # factors
STYLES = ("photo", "painting", "sketch", "watercolour")
PLACES = ("", "in the snow", "at night", "on the beach", "in the forest", "in the rain")
OBJECTS = {  # what each relation is with
    "eating": tuple(FOODS),
    "riding": tuple(VEHICLES),
    "sitting on": tuple(FURNITURE),
    "next to": (*VEHICLES, *FURNITURE, *ANIMALS),
    "": (),
}
OFTEN = {"eating": 0.42, "riding": 0.28, "sitting on": 0.1, "next to": 0.1, "": 0.1}
HELD_OUT = 8  # one in so many pairs of subject and object is never trained on


@dataclass(frozen=True)
class World:
    """The nouns, relations, places and styles of a world."""

    name: str
    animals: tuple[str, ...] = tuple(ANIMALS)
    objects: tuple[str, ...] = (*FOODS, *VEHICLES, *FURNITURE)
    places: tuple[str, ...] = PLACES
    styles: tuple[str, ...] = STYLES
    relations: tuple[str, ...] = tuple(OFTEN)

    @property
    def nouns(self) -> tuple[str, ...]:
        return self.animals + self.objects

    @property
    def words(self) -> list[str]:
        """Every word that a caption can have."""
        phrases = [*self.nouns, *self.places, *self.styles, *self.relations, *COLORS, *SIZES]
        return list(dict.fromkeys(["a", "an", "of", *" ".join(phrases).split()]))

    def objects_of(self, relation: str) -> list[str]:
        return [n for n in OBJECTS[relation] if n in self.nouns]


FULL = World("full")
SMALL = World(  # what two CPU cores learn in two hours
    "small",
    animals=("squirrel", "lion", "cat", "dog", "rabbit", "panda", "penguin", "bird", "deer"),
    objects=(
        *("burger", "pizza", "cake", "apple", "banana", "watermelon", "pretzel"),
        *("bicycle", "car", "motorcycle", "sofa"),
    ),
    places=("", "in the snow", "at night", "on the beach", "in the forest"),
    styles=("photo", "painting", "sketch"),
    relations=("eating", "riding", "sitting on", ""),
)
WORLDS = {world.name: world for world in (FULL, SMALL)}


@dataclass(frozen=True)
class Scene:
    """The content of a picture. An empty string means none of the kind."""

    subject: str
    relation: str = ""
    object: str = ""
    adjective: str = ""  # of the object: a colour or a size
    place: str = ""
    style: str = ""  # "" looks like a photo, and does not say so
    layout: int = 0  # seed of everything that the caption does not say

    @property
    def caption(self) -> str:
        text = article(self.subject)
        if self.style:
            text = f"a {self.style} of {text}"
        if self.relation:
            text += f" {self.relation} {article(f'{self.adjective} {self.object}'.strip())}"
        return f"{text} {self.place}".strip()

    @property
    def nouns(self) -> list[str]:
        return [noun for noun in (self.subject, self.object) if noun]

    @property
    def held_out(self) -> bool:
        """Tell whether this subject with this object is kept from training."""
        pair = f"{self.subject}+{self.object}"
        return bool(self.object) and zlib.crc32(pair.encode()) % HELD_OUT == 3


def article(noun: str) -> str:
    if noun.endswith("spaghetti"):
        return noun
    return f"{'an' if noun[0] in 'aeo' else 'a'} {noun}"


def sample(world: World, seed: int, held_out: bool | None = False) -> Scene:
    """Draw a random scene. held_out: pairs that training sees, only others (True), any (None)."""
    rng = random.Random(f"scene {world.name} {seed}")
    while True:
        weights = [OFTEN[relation] for relation in world.relations]
        relation = rng.choices(world.relations, weights)[0]
        subject = rng.choice(world.animals)
        others = [noun for noun in world.objects_of(relation) if noun != subject]
        noun = rng.choice(others) if others else ""
        style = rng.choice(world.styles) if rng.random() < 0.8 else ""
        scene = Scene(
            subject,
            relation,
            noun,
            adjective=rng.choice(adjectives(noun, style)) if rng.random() < 0.45 else "",
            place=rng.choice(world.places) if rng.random() < 0.7 else "",
            style=style,
            layout=rng.getrandbits(32),
        )
        if held_out is None or scene.held_out == held_out:
            return scene


def adjectives(noun: str, style: str) -> list[str]:
    """List the adjectives of a thing. Foods keep their own colours, and a sketch has none."""
    if not noun:
        return [""]
    colored = noun in (*VEHICLES, *FURNITURE) and style != "sketch"
    return [*SIZES, *(COLORS if colored else ())]


class Drawn(NamedTuple):
    image: Image.Image  # RGB
    masks: dict[str, np.ndarray]  # of each noun: h w, how much of each pixel is it, 0 to 1

    def box(self, noun: str) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of its visible part in pixels, the last two exclusive."""
        ys, xs = np.nonzero(self.masks[noun] > 0.5)
        return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def draw(scene: Scene, pixels: int = CANVAS) -> Drawn:
    """The picture of a scene: `pixels` must divide CANVAS."""
    rng = random.Random(f"layout {scene.layout}")
    canvas = background(rng, scene.place)
    things, masks = foreground(rng, scene)

    shadow = things.getchannel("A").filter(ImageFilter.GaussianBlur(3)).point(lambda v: v * 0.35)
    shadow = ImageChops.offset(shadow, 2, 3)
    canvas.paste((20, 20, 40), (0, 0), shadow)
    if scene.place == "at night":
        alpha = things.getchannel("A")
        dark = ImageChops.multiply(things.convert("RGB"), flat((190, 195, 225)))
        things = dark.convert("RGBA")
        things.putalpha(alpha)
    canvas.paste(things, (0, 0), things)
    if scene.place in WEATHER:
        WEATHER[scene.place](rng, canvas)
    if rng.random() < 0.5:  # everything looks to the left: half of the scenes are mirrored
        canvas = ImageOps.mirror(canvas)
        masks = {noun: mask[:, ::-1] for noun, mask in masks.items()}
    canvas = LOOKS[scene.style](canvas)

    k = CANVAS // pixels
    image = canvas.reduce(k) if k > 1 else canvas
    return Drawn(image, {noun: average(mask, pixels) for noun, mask in masks.items()})


def average(mask: np.ndarray, size: int) -> np.ndarray:
    """Average square blocks. h w → size size"""
    k = mask.shape[0] // size
    return mask.reshape(size, k, size, k).mean(axis=(1, 3))


# ---- Things --------------------------------------------------------------------------------------


def foreground(rng: random.Random, scene: Scene) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """The things of a scene on a transparent canvas, and what can be seen of each."""
    factor = SIZES.get(scene.adjective, 1.0)
    scale = rng.uniform(0.82, 1.12)
    ground = rng.uniform(100, 122)  # where things stand
    subject, thing = scene.subject, scene.object

    # name, centre and base relative to the group's middle and ground, size: back to front
    if scene.relation == "eating":
        size, food = rng.uniform(60, 70), rng.uniform(44, 51) * factor
        gap = rng.uniform(-8, 2)
        group = [(subject, (food + gap) / 2, 0.0, size), (thing, -(size + gap) / 2, 2.0, food)]
    elif scene.relation == "riding":
        size, vehicle = rng.uniform(50, 58), rng.uniform(74, 86) * (factor + 1) / 2
        low = 0.25 if thing == "skateboard" else 0.48
        group = [(subject, rng.uniform(-6, 8), -vehicle * low, size), (thing, 0.0, 0.0, vehicle)]
    elif scene.relation == "sitting on":
        size, seat = rng.uniform(52, 60), rng.uniform(82, 92) * (factor + 1) / 2
        group = [(thing, 0.0, 0.0, seat), (subject, rng.uniform(-12, 12), -seat * 0.22, size)]
    elif scene.relation == "next to":
        size, other = rng.uniform(50, 58), rng.uniform(48, 56) * (factor + 1) / 2
        gap = rng.uniform(-4, 6)
        group = [(subject, (other + gap) / 2, 0.0, size), (thing, -(size + gap) / 2, 1.0, other)]
    else:
        group = [(subject, 0.0, 0.0, rng.uniform(66, 88))]

    half = [(x - size / 2, x + size / 2) for _, x, _, size in group]
    left, right = min(h[0] for h in half) * scale, max(h[1] for h in half) * scale
    margin = 4.0
    low, high = margin - left, CANVAS - margin - right
    middle = rng.uniform(low, high) if low < high else CANVAS / 2 - (left + right) / 2

    things = Image.new("RGBA", (CANVAS, CANVAS))
    masks: dict[str, np.ndarray] = {}
    for name, x, base, size in group:
        picture = glyph(name)
        if name == thing and scene.adjective in COLORS:
            picture = colored(picture, COLORS[scene.adjective])
        k = size * scale / max(picture.size)
        w, h = (max(1, round(side * k)) for side in picture.size)
        picture = picture.resize((w, h), Image.Resampling.LANCZOS)
        place = round(middle + x * scale - w / 2), round(ground + base * scale - h)
        layer = Image.new("RGBA", things.size)
        layer.paste(picture, place)
        things = Image.alpha_composite(things, layer)
        mask = np.asarray(layer.getchannel("A"), dtype=np.float32) / 255
        masks = {noun: other * (1 - mask) for noun, other in masks.items()} | {name: mask}
    return things, masks


def colored(picture: Image.Image, hue: float) -> Image.Image:
    """Give what has a colour another one; grey stays grey."""
    h, s, v = picture.convert("RGB").convert("HSV").split()
    h = h.point(lambda _: round(hue * 255))
    s = s.point(lambda value: min(255, value * 5 // 2))
    result = Image.merge("HSV", (h, s, v)).convert("RGBA")
    result.putalpha(picture.getchannel("A"))
    return result


# ---- Places --------------------------------------------------------------------------------------


def background(rng: random.Random, place: str) -> Image.Image:
    """An empty place."""
    horizon = rng.randint(66, 94)
    if place == "in the snow":
        canvas = sky(rng, (168, 196, 224), (220, 232, 242), (244, 248, 252), horizon)
        draw_on = ImageDraw.Draw(canvas)
        x, width = rng.randint(-50, 90), rng.randint(60, 120)
        draw_on.ellipse([x, horizon - 12, x + width, horizon + 40], fill=(244, 248, 252))
    elif place == "at night":
        canvas = sky(rng, (14, 18, 52), (38, 44, 92), (30, 42, 40), horizon)
        draw_on = ImageDraw.Draw(canvas)
        for _ in range(12):
            x, y = rng.randint(0, CANVAS), rng.randint(0, horizon - 8)
            draw_on.ellipse([x, y, x + 2, y + 2], fill=(250, 250, 220))
        x, y = rng.randint(6, 100), rng.randint(4, 18)
        draw_on.ellipse([x, y, x + 20, y + 20], fill=(252, 244, 190))
    elif place == "on the beach":
        canvas = sky(rng, (110, 190, 240), (190, 226, 248), (240, 214, 156), horizon)
        sea = ramp(near(rng, (30, 120, 190)), near(rng, (70, 170, 205)), 14)
        canvas.paste(sea, (0, horizon - 14))
        stand(canvas, "palm", rng.randint(4, 124), horizon + 6, rng.randint(50, 66))
    elif place == "in the forest":
        canvas = sky(rng, (176, 214, 190), (206, 228, 200), (96, 140, 62), horizon)
        for i in range(6):
            x, y = i * 25 + rng.randint(-12, 12), horizon + rng.randint(-2, 5)
            stand(canvas, "tree", x, y, rng.randint(44, 62))
    elif place == "in the rain":
        canvas = sky(rng, (104, 114, 128), (150, 158, 168), (104, 112, 104), horizon)
    else:  # a room
        wall, floor = pastel(rng, 0.13, 0.97), pastel(rng, 0.3, 0.75)
        canvas = sky(rng, wall, wall, floor, horizon)
        for _ in range(rng.randint(0, 2)):  # something on the wall
            w, h = rng.randint(12, 34), rng.randint(12, 30)
            x, y = rng.randint(0, CANVAS - w), rng.randint(2, 30)
            box = [x, y, x + w, y + h]
            color = pastel(rng, 0.4, 0.8)
            if rng.random() < 0.5:
                ImageDraw.Draw(canvas).rectangle(box, fill=color, outline=(250, 250, 250), width=2)
            else:
                ImageDraw.Draw(canvas).ellipse(box, fill=color)
    return canvas


def sky(rng: random.Random, top: Color, bottom: Color, ground: Color, horizon: int) -> Image.Image:
    canvas = flat(ground)
    canvas.paste(ramp(near(rng, top), near(rng, bottom), horizon), (0, 0))
    soil = near(rng, ground)
    darker = tuple(round(c * 0.9) for c in soil)
    canvas.paste(ramp(soil, darker, CANVAS - horizon), (0, horizon))
    return canvas


def flat(color: Color, height: int = CANVAS) -> Image.Image:
    return Image.new("RGB", (CANVAS, height), color)


def ramp(top: Color, bottom: Color, height: int) -> Image.Image:
    """Paint a vertical gradient from one colour to another."""
    mask = Image.linear_gradient("L").resize((CANVAS, height))
    return Image.composite(flat(bottom, height), flat(top, height), mask)


def near(rng: random.Random, color: Color, far: int = 10) -> Color:
    return tuple(max(0, min(255, c + rng.randint(-far, far))) for c in color)


def pastel(rng: random.Random, saturation: float, value: float) -> Color:
    s, v = saturation * rng.uniform(0.5, 1.5), value * rng.uniform(0.85, 1)
    return tuple(round(c * 255) for c in colorsys.hsv_to_rgb(rng.random(), s, v))


def stand(canvas: Image.Image, name: str, x: int, base: int, height: int) -> None:
    picture = glyph(name)
    picture = picture.resize((round(picture.width * height / picture.height), height))
    canvas.paste(picture, (round(x - picture.width / 2), base - height), picture)


def snow(rng: random.Random, canvas: Image.Image) -> None:
    for _ in range(16):
        x, y = rng.randint(0, CANVAS), rng.randint(0, 110)
        ImageDraw.Draw(canvas).ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], fill=(255, 255, 255))


def rain(rng: random.Random, canvas: Image.Image) -> None:
    for _ in range(24):
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        ImageDraw.Draw(canvas).line([x, y, x - 3, y + 9], fill=(214, 222, 232))


WEATHER = {"in the snow": snow, "in the rain": rain}


# ---- Styles --------------------------------------------------------------------------------------


def painting(canvas: Image.Image) -> Image.Image:
    """Broad strokes, strong colours and a golden frame."""
    canvas = ImageEnhance.Color(canvas.filter(ImageFilter.MedianFilter(3))).enhance(1.4)
    framed = ImageDraw.Draw(canvas)
    framed.rectangle([0, 0, CANVAS - 1, CANVAS - 1], outline=(122, 84, 30), width=8)
    framed.rectangle([2, 2, CANVAS - 3, CANVAS - 3], outline=(206, 162, 70), width=4)
    return canvas


def sketch(canvas: Image.Image) -> Image.Image:
    """Draw in pencil: dark where it is darker than around it, on white paper, a little shaded."""
    grey = np.asarray(ImageOps.grayscale(canvas), dtype=np.float32) + 8
    around = np.asarray(ImageOps.grayscale(canvas.filter(ImageFilter.GaussianBlur(4)))) + 8.0
    lines = np.minimum(1, grey / around) ** 1.6
    tone = 165 + grey * 0.35
    return Image.fromarray(np.minimum(255, lines * tone).astype(np.uint8)).convert("RGB")


def watercolour(canvas: Image.Image) -> Image.Image:
    """Soft and pale, fading into white paper at the edges."""
    canvas = ImageEnhance.Color(canvas.filter(ImageFilter.GaussianBlur(1.5))).enhance(1.2)
    canvas = Image.blend(canvas, flat((255, 255, 255)), 0.25)
    paper = Image.new("L", canvas.size, 0)
    ImageDraw.Draw(paper).ellipse([4, 4, CANVAS - 5, CANVAS - 5], fill=255)
    paper = paper.filter(ImageFilter.GaussianBlur(10))
    return Image.composite(canvas, flat((252, 250, 244)), paper)


LOOKS = {
    "": lambda canvas: canvas,
    "photo": lambda canvas: canvas,
    "painting": painting,
    "sketch": sketch,
    "watercolour": watercolour,
}


def contact_sheet(scenes: Sequence[Scene], columns: int = 8, pixels: int = CANVAS) -> Image.Image:
    rows = -(-len(scenes) // columns)
    whole = Image.new("RGB", (columns * (pixels + 2), rows * (pixels + 2)), "white")
    for i, scene in enumerate(scenes):
        y, x = divmod(i, columns)
        whole.paste(draw(scene, pixels).image, (x * (pixels + 2), y * (pixels + 2)))
    return whole


if __name__ == "__main__":  # the picture in README.md
    file = Path(__file__).with_name("scenes.png")
    contact_sheet([sample(FULL, seed) for seed in range(36)], columns=12, pixels=64).save(file)
    print(file)
