"""A given picture, from whatever holds it, as the pixels that a model wants.

    picture = read("bird.jpg", (512, 512))      upright, RGB, cut to that height and width
    picture.tensor()                            what the VAE takes
    picture.put_back(edited)                    the whole photograph with the edit in its place

Pixels are all that is taken: what else a file says, as where it was made, gets into no output.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import describe

FITS = ("crop", "pad", "stretch")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that runs a program
MOST = 178_956_970  # pixels: where Pillow stops reading, too, lest a small file fill the memory
PAPER = (255, 255, 255)  # behind what is transparent, and around what is padded
SMOOTH = Image.Resampling.LANCZOS

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive


@dataclass(frozen=True)
class Picture:
    """What a model sees of a picture, and where in the whole of it that is."""

    image: Image.Image  # RGB, of the model's size
    whole: Image.Image  # RGB, upright, of its own size
    inner: Box  # of `image`: the part that is the picture, and no paper around it
    box: Box  # of `whole`: the part that is seen there

    def tensor(self) -> Tensor:
        """→ 1 3 h w in [-1, 1]"""
        pixels = torch.from_numpy(np.array(self.image))  # h w 3
        return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1

    def put_back(self, edited: Image.Image) -> Image.Image:
        """The whole picture, in its own size, with `edited` where `image` was taken from."""
        left, top, right, bottom = self.box
        seen = edited.crop(self.inner).resize((right - left, bottom - top), SMOOTH)
        result = self.whole.copy()
        result.paste(seen, (left, top))
        return result


def read(source: Any, size: tuple[int, int], fit: str = "crop") -> Picture:
    """A picture from anywhere: upright, in 8-bit RGB on white paper, in the size of a model.

    source: the path of a file, a PIL image, an array (height width, or with 1, 3 or 4 channels at
    the end) or a tensor (the channels first) of bytes, 16-bit numbers or floats from 0 to 1.
    size: height and width. fit: "crop" keeps the middle, "pad" keeps everything and adds white,
    "stretch" changes the proportions.
    Raises ValueError for what is no picture, is damaged, animated, or too large.
    """
    if fit not in FITS:
        raise ValueError(f"A picture is fitted by {', '.join(FITS)}, not {fit!r}.")
    whole = whole_picture(source)
    small = size[::-1]
    inner, box = (0, 0, *small), (0, 0, *whole.size)
    if fit == "crop":
        box = middle(whole.size, small)
    if fit == "pad":
        inner = middle(small, whole.size)
    image = Image.new("RGB", small, PAPER)
    seen = inner[2] - inner[0], inner[3] - inner[1]
    image.paste(whole.crop(box).resize(seen, SMOOTH), inner[:2])
    return Picture(image, whole, inner, box)


def middle(of: tuple[int, int], like: tuple[int, int]) -> Box:
    """The largest box in the middle of one size with the proportions of another; width first."""
    scale = min(of[0] / like[0], of[1] / like[1])
    w, h = (max(1, round(side * scale)) for side in like)
    left, top = (of[0] - w) // 2, (of[1] - h) // 2
    return left, top, left + w, top + h


def whole_picture(source: Any) -> Image.Image:
    """→ RGB, upright, of its own size, without metadata"""
    if isinstance(source, Image.Image):
        return decoded(source, "The picture")
    if not isinstance(source, str | os.PathLike):
        return from_numbers(source)
    path = Path(source)
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a picture in it.")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty, not a picture.")
        with quiet(), Image.open(path, formats=FORMATS) as image:
            return decoded(image, str(path))
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is no picture that can be read: save it as a PNG or a JPEG."
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(too_large(str(path))) from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}.") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow warns of large files, of odd metadata and of palettes: of nothing to be done here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def too_large(name: str) -> str:
    return f"{name} has more than {MOST / 1e6:.0f} million pixels: make it smaller first."


def decoded(image: Image.Image, name: str) -> Image.Image:
    """Any PIL image → RGB, upright, on paper. name: what messages call it"""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: it is {image.width} x {image.height}.")
    if image.width * image.height > MOST:
        raise ValueError(too_large(name))
    try:
        with quiet():
            # An MPO is a camera's JPEG with a preview after it.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image.load()
            image = upright(image)
            # 16-bit grey becomes numbers: Pillow's own conversion would cut it off at 255.
            is_deep = image.mode in ("I", "F") or image.mode.startswith("I;")
            values = np.asarray(image) if is_deep else None
            rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    except Exception as error:  # a decoder fails in any way
        raise ValueError(f"{name} is damaged: {error}.") from None
    if frames > 1:
        raise ValueError(f"{name} has {frames} frames or pages: save one of them as a PNG.")
    if values is not None:
        is_bytes = image.mode == "F" and values.max() > 1
        return from_numbers(values, 255 if is_bytes else 1 if image.mode == "F" else 65535)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, PAPER), rgba).convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata: the picture is as good as ever
        return image


# ---- Arrays and tensors --------------------------------------------------------------------------


def from_numbers(values: Any, top: float | None = None) -> Image.Image:
    """An array or tensor → RGB on paper. top: the number that means white"""
    array = values
    if isinstance(values, Tensor):
        array = values.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        array = array if array.ndim < 3 else np.moveaxis(array, 0, -1)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise ValueError(
            "A picture is the path of a file, a PIL image, an array or a tensor of real numbers, "
            f"not {describe(values)}."
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(
            "An array of a picture is height x width, with 1, 3 or 4 channels at the end (of a "
            f"tensor: at the beginning), not {' x '.join(map(str, values.shape)) or 'a number'}."
        )
    array = to_bytes(array, top)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    return decoded(image, "The picture")


def to_bytes(array: np.ndarray, top: float | None) -> np.ndarray:
    if top is None:
        top = 1 if array.dtype.kind in "fb" else 65535 if array.dtype.str[1:] == "u2" else 255
    low, high = float(array.min()), float(array.max())
    slack = 0.01 * top if array.dtype.kind == "f" else 0  # of what resized it
    if not (-slack <= low and high <= top + slack):  # nan as well
        raise ValueError(
            f"The numbers of a picture in {array.dtype} are from 0 to {top}, not from {low:g} to "
            f"{high:g}."
        )
    return (array / top * 255).round().clip(0, 255).astype(np.uint8)
