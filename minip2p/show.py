"""Draw results with Pillow: rows with captions, word maps, maps laid over an image.

Every function returns a new PIL image and changes nothing.
"""

from __future__ import annotations

import unicodedata
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .store import AttentionStore
from .vae import VAE, to_images
from .weights import StableDiffusion

CELL = 256  # a picture's height in a row, in pixels; smaller ones are enlarged to it
FONT_SIZE = 15
MARGIN = 8
COLUMNS = 8  # of word maps, before a new row
NARROW = 96  # captions have at least this width
FONTS = (  # of common systems, for captions with letters that Pillow's own font lacks
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoEmoji-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "seguisym.ttf",
)
# From nothing to the maximum, as in magma: dark, violet, red, yellow. Even steps of lightness.
COLOURS = torch.tensor(
    [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]],
    dtype=torch.float32,
    device="cpu",
)

# The map of each VAE from latents and a 1 to colours in [-1, 1], 5 3
LATENT_COLOURS: weakref.WeakKeyDictionary[VAE, Tensor] = weakref.WeakKeyDictionary()


def row(
    images: Sequence[Image.Image], captions: Sequence[str] = (), columns: int | None = None
) -> Image.Image:
    """Put images side by side, each above its caption; start a new row after every `columns`."""
    n = columns or len(images)
    starts = range(0, len(images), n)
    return grid(
        [images[i : i + n] for i in starts], [captions[i : i + n] for i in starts if captions]
    )


def grid(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Put rows of images below each other, each image above its caption. Rows may differ in length.

    A caption takes a font of the system where Pillow's own lacks letters. Letters that no
    font has are written as escapes, with a warning.
    """
    scale = max(1, round(CELL / rows[0][0].height))
    width = max(image.width for images in rows for image in images) * scale
    height = max(image.height for images in rows for image in images) * scale
    width = max(width, NARROW) if captions else width
    texts = [[_caption(text, width) for text in line] for line in captions]
    lines = max((text.count("\n") + 1 for line in texts for text, _ in line), default=0)
    cell = width + MARGIN, height + MARGIN + round(lines * FONT_SIZE * 1.3)

    columns = max(len(images) for images in rows)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, len(rows) * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            left, top = MARGIN + x * cell[0], MARGIN + y * cell[1]
            size = image.width * scale, image.height * scale
            middle = left + (width - size[0]) // 2
            sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (middle, top))
            if texts and x < len(texts[y]):
                below = left + width / 2, top + height + 4
                text, font = texts[y][x]
                draw.multiline_text(below, text, "black", font, "ma", align="center")
    return sheet


@cache
def _fonts() -> list[Any]:
    """Return Pillow's own font, then those of FONTS that the system has."""
    fonts: list[Any] = [ImageFont.load_default(FONT_SIZE)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, FONT_SIZE))
    return fonts


@cache
def _has(font: Any, letter: str) -> bool:
    """Tell whether a font has a letter: it draws another picture than for a code without one."""
    missing, drawn = font.getmask("\U0010ffff"), font.getmask(letter)
    return letter == " " or (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


@cache
def _warn_of_escapes() -> None:
    """Warn once that captions have letters which no font has."""
    warnings.warn(
        "Captions write letters that no known font has as escapes, such as \\u732b: install a font "
        "with these letters, for example Noto Sans.",
        stacklevel=4,
    )


def _caption(text: str, width: int) -> tuple[str, Any]:
    """Return `text` in lines of at most `width` pixels, and the font that has most of its letters.

    Letters that the font lacks are written without their accents, else as escapes.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    font = min(_fonts(), key=lambda font: sum(not _has(font, letter) for letter in text))
    written, is_escaped = "", False
    for letter in text:
        base_letter = unicodedata.normalize("NFKD", letter)[0]  # without its accent
        forms = [letter, base_letter]
        if is_escaped:  # marks of a letter that is not drawn would be boxes
            forms = [form for form in forms if unicodedata.category(form)[0] != "M"]
        shown = next((form for form in forms if _has(font, form)), None)
        is_escaped = shown is None
        if is_escaped:
            _warn_of_escapes()
        written += shown or letter.encode("unicode_escape").decode()
    return _wrap(written, font, width), font


def _wrap(text: str, font: Any, width: int) -> str:
    """Break `text` into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines[1:])


def heat(weights: Tensor, size: tuple[int, int]) -> Image.Image:
    """Draw a map, 0 dark and its maximum yellow. weights: h w. size: width, height in pixels"""
    weights = weights.detach().float().cpu()
    weights = weights.clamp(min=0) / weights.max().clamp(min=1e-12)
    place = weights * (len(COLOURS) - 1)  # h w, between two of the colours
    low = place.long().clamp(max=len(COLOURS) - 2)
    colours = torch.lerp(COLOURS[low], COLOURS[low + 1], (place - low)[..., None])  # h w 3
    image = Image.fromarray(colours.round().to(torch.uint8).numpy())
    return image.resize(size, Image.Resampling.BICUBIC)


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """Lay a map over the image it belongs to. weights: h w"""
    return Image.blend(image.convert("L").convert("RGB"), heat(weights, image.size), 0.6)


def word_maps(
    image: Image.Image,
    store: AttentionStore,
    prompt: int = 0,
    words: Sequence[str] | None = None,
    **which: Any,
) -> Image.Image:
    """Show the image, then its map of each word: by default of every word of its prompt.

    which: size, places and call, as for AttentionStore.average.
    """
    words = list(words or store.words or store.prompt(prompt).words)
    maps = [overlay(image, store.word(word, prompt, **which)) for word in words]
    return row([image, *maps], [store.prompt(prompt).text, *words], COLUMNS)


def map_over_calls(
    image: Image.Image,
    store: AttentionStore,
    word: str,
    prompt: int = 0,
    columns: int = 8,
    **which: Any,
) -> Image.Image:
    """Show the image, then its map of `word` at some UNet calls, from the first to the last.

    The store must have been made with by_call=True.
    """
    calls = sorted({round(i * (store.calls - 1) / max(1, columns - 1)) for i in range(columns)})
    maps = [overlay(image, store.word(word, prompt, call=call, **which)) for call in calls]
    return row([image, *maps], [word, *(f"call {call}" for call in calls)])


@torch.no_grad()
def preview(model: StableDiffusion, latents: Tensor) -> list[Image.Image]:
    """Estimate pictures from latents quickly, by a linear map from each latent pixel to a colour.

    latents: b 4 h w → b RGB images of w x h
    """
    if model.vae not in LATENT_COLOURS:
        LATENT_COLOURS[model.vae] = latent_colours(model.vae, model.device)
    pixels = with_one(latents.float()) @ LATENT_COLOURS[model.vae]  # b h w 3
    return to_images(pixels.nan_to_num().permute(0, 3, 1, 2))


def latent_colours(vae: VAE, device: torch.device) -> Tensor:
    """Fit the map by least squares, on random latents and the VAE's pictures of them. → 5 3

    The latents are patches of 4 x 4, because neighbours in a picture's latents are alike: the VAE
    makes grey of white noise.
    """
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 4, 4, generator=rng, dtype=torch.float32, device="cpu").to(device)
    latents = F.interpolate(noise, scale_factor=4)  # b 4 16 16
    pixels = torch.cat([vae.decode(x) for x in latents.split(1)]).clamp(-1, 1)
    colours = F.avg_pool2d(pixels, vae.f).permute(0, 2, 3, 1)
    x, y = with_one(latents).flatten(0, 2), colours.flatten(0, 2)
    return torch.linalg.solve(x.mT @ x, x.mT @ y)  # the normal equations, on every device


def with_one(latents: Tensor) -> Tensor:
    """Append a 1 to the channels. latents: b 4 h w → b h w 5"""
    return F.pad(latents.permute(0, 2, 3, 1), (0, 1), value=1.0)
