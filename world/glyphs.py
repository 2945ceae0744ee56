"""The glyphs of the world, as one sheet: rendering needs no font, and every machine draws the same.

    python -m world.glyphs       draws glyphs.png again from Noto Color Emoji (size 109)

The sheet holds renders of Noto Color Emoji (Debian: fonts-noto-color-emoji; font: SIL Open Font
License 1.1, images: Apache 2.0).
"""

import sys
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHEET = Path(__file__).with_name("glyphs.png")
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CELL, COLUMNS = 96, 8  # pixels on each side of a cell; cells in a row

# fmt: off
ANIMALS = {
    "squirrel": "🐿️", "lion": "🦁", "cat": "🐱", "dog": "🐕", "rabbit": "🐇", "bird": "🐦",
    "mouse": "🐁", "deer": "🦌", "panda": "🐼", "fox": "🦊", "bear": "🐻", "tiger": "🐅",
    "elephant": "🐘", "monkey": "🐒", "penguin": "🐧", "owl": "🦉", "frog": "🐸", "pig": "🐖",
}
FOODS = {
    "burger": "🍔", "pizza": "🍕", "cake": "🍰", "apple": "🍎", "banana": "🍌", "donut": "🍩",
    "watermelon": "🍉", "spaghetti": "🍝", "strawberry": "🍓", "carrot": "🥕", "cookie": "🍪",
    "sandwich": "🥪", "cheese": "🧀", "pretzel": "🥨",
}
VEHICLES = {
    "bicycle": "🚲", "car": "🚗", "motorcycle": "🏍️", "tractor": "🚜", "skateboard": "🛹",
    "bus": "🚌",
}
FURNITURE = {"sofa": "🛋️", "chair": "🪑", "bed": "🛏️"}
SCENERY = {"tree": "🌲", "palm": "🌴"}
# fmt: on
GLYPHS = {**ANIMALS, **FOODS, **VEHICLES, **FURNITURE, **SCENERY}
THIN = {"bicycle": 2, "deer": 1}  # lines that are lost in a small picture: wider by so many pixels


@cache
def glyph(name: str) -> Image.Image:
    """An RGBA picture without empty margins, at most CELL pixels on each side."""
    y, x = divmod(list(GLYPHS).index(name), COLUMNS)
    cell = sheet().crop((x * CELL, y * CELL, (x + 1) * CELL, (y + 1) * CELL))
    return cell.crop(cell.getbbox())


@cache
def sheet() -> Image.Image:
    return Image.open(SHEET).convert("RGBA")


def draw_sheet(font_file: str = FONT) -> Image.Image:
    font = ImageFont.truetype(font_file, 109)  # the one size that the bitmap font has
    rows = -(-len(GLYPHS) // COLUMNS)
    whole = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, (name, text) in enumerate(GLYPHS.items()):
        picture = Image.new("RGBA", (170, 170))
        ImageDraw.Draw(picture).text((10, 10), text, font=font, embedded_color=True)
        picture = picture.crop(picture.getbbox())
        if name in THIN:
            picture = thickened(picture, THIN[name])
        picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        whole.paste(picture, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return whole


def thickened(picture: Image.Image, far: int) -> Image.Image:
    """The picture over copies of itself that are moved by up to so many pixels."""
    steps = range(-far, far + 1)
    moves = sorted(((x, y) for x in steps for y in steps), key=lambda m: -(m[0] ** 2 + m[1] ** 2))
    size = picture.width + 2 * far, picture.height + 2 * far
    whole = Image.new("RGBA", size)
    for x, y in moves:  # the picture itself comes last
        layer = Image.new("RGBA", size)
        layer.paste(picture, (far + x, far + y))
        whole = Image.alpha_composite(whole, layer)
    return whole


if __name__ == "__main__":
    draw_sheet(*sys.argv[1:2]).save(SHEET, optimize=True)
    print(SHEET)
