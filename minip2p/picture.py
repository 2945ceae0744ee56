"""Read a picture, from whatever holds it, as the pixels that a model takes.

    picture = read("bird.jpg", (512, 512))      upright, sRGB, cut to that height and width
    picture.tensor()                            the input of the VAE
    picture.put_back(edited)                    the whole photograph with the edit in its place

Only pixels are read: other content of a file, such as where it was taken, gets into no output.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import UserError, check, describe

FITS = ("crop", "pad", "stretch")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that runs a program
MAX_PIXELS = 178_956_970  # where Pillow stops reading, too, lest a small file fill the memory
MAX_METADATA = 2**26  # bytes of one part of a PNG's metadata
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
# Parts that pixels depend on: transparency, colour profile, rotation, and the frames that an
# animation has. Of the parts with a capital letter all do.
PNG_PARTS = (b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT")
PAPER = (255, 255, 255)  # behind transparent pixels, and around a padded picture
SMOOTH = Image.Resampling.LANCZOS

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive


@dataclass(frozen=True)
class Picture:
    """A picture as a model sees it, and the whole picture that it was cut from."""

    image: Image.Image  # RGB, of the model's size
    whole: Image.Image  # RGB, upright, of its own size
    inner: Box  # of `image`: the part that is the picture, without the paper around it
    box: Box  # of `whole`: the part that is seen there

    def tensor(self) -> Tensor:
        """Return the pixels from -1 to 1, float32. → 1 3 h w"""
        pixels = torch.from_numpy(np.array(self.image))  # h w 3
        return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1

    def put_back(self, edited: Image.Image) -> Image.Image:
        """Return the whole picture, in its own size, with `edited` where `image` was cut from."""
        left, top, right, bottom = self.box
        seen = edited.crop(self.inner).resize((right - left, bottom - top), SMOOTH)
        result = self.whole.copy()
        result.paste(seen, (left, top))
        return result


def read(source: Any, size: tuple[int, int], fit: str = "crop") -> Picture:
    """Read a picture: upright, in 8-bit sRGB on white paper, in the size of a model.

    source: the path of a file, a PIL image, an array (height width, or with 1, 3 or 4 channels at
    the end) or a tensor (the channels first) of bytes, 16-bit numbers or floats from 0 to 1.
    Colours are converted to sRGB where the picture has a colour profile.
    size: height and width. fit: "crop" keeps the middle, "pad" keeps everything and adds white,
    "stretch" changes the proportions.
    Raises UserError if it is no picture, is damaged or animated, or has too many pixels.
    """
    check(fit in FITS, f"A picture is fitted by {', '.join(FITS)}, not {fit!r}.")
    whole = whole_picture(source)
    small = size[::-1]
    inner, box = (0, 0, *small), (0, 0, *whole.size)
    if fit == "crop":
        box = middle(whole.size, small)
    if fit == "pad":
        inner = middle(small, whole.size)
    image = Image.new("RGB", small, PAPER)
    seen = inner[2] - inner[0], inner[3] - inner[1]
    with quiet():
        image.paste(whole.crop(box).resize(seen, SMOOTH), inner[:2])
    return Picture(image, whole, inner, box)


def middle(size: tuple[int, int], like: tuple[int, int]) -> Box:
    """Return the largest box in the middle of `size` with `like`'s proportions; width first."""
    scale = min(size[0] / like[0], size[1] / like[1])
    w, h = (max(1, round(side * scale)) for side in like)
    left, top = (size[0] - w) // 2, (size[1] - h) // 2
    return left, top, left + w, top + h


def whole_picture(source: Any) -> Image.Image:
    """Read a picture in its own size. → RGB, upright, without metadata"""
    if isinstance(source, Image.Image):
        return to_rgb(source, "The picture")
    if not isinstance(source, str | os.PathLike):
        return from_numbers(source)
    check("://" not in str(source), f"{source} is a web address: download the picture first.")
    path = Path(os.path.expanduser(source))
    try:
        check(not path.is_dir(), f"{path} is a folder: name a picture in it.")
        check(path.stat().st_size, f"{path} is empty, not a picture.")
        with quiet(), path.open("rb") as file:
            return to_rgb(Image.open(without_metadata(file), formats=FORMATS), str(path))
    except UnidentifiedImageError:
        raise UserError(
            f"{path} is no picture that can be read: save it as a PNG or a JPEG."
        ) from None
    except Image.DecompressionBombError:
        raise UserError(too_large(str(path))) from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error}.") from None


# ---- Conversion ----------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings of large files, odd metadata and palettes: the pixels are sound.

    A PNG's colour profile and its other metadata may be larger than Pillow allows by default.
    """
    limit, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, MAX_METADATA
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = limit


def without_metadata(file: BinaryIO) -> BinaryIO:
    """Copy a PNG without the parts that no pixel depends on, since Pillow refuses some of them.

    Small texts that say how to turn the picture stay. Other formats are returned unchanged.
    """
    chunks = [file.read(len(PNG))]
    while chunks[0] == PNG and (header := file.read(8)):
        name, length = header[4:], int.from_bytes(header[:4], "big")
        content = file.read(length + 4)  # and its checksum
        turns = length < 2**15 and content.startswith((b"Raw profile", b"XML:com.adobe.xmp"))
        if name[:1].isupper() or name in PNG_PARTS or turns:
            chunks += [header, content]
        if name == b"IEND":
            return io.BytesIO(b"".join(chunks))
    file.seek(0)
    return file


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert any PIL image. name: for messages → RGB, upright, sRGB, on paper"""
    check(0 not in image.size, f"{name} has no pixels: it is {image.width} x {image.height}.")
    check(image.width * image.height <= MAX_PIXELS, too_large(name))
    try:
        with quiet():
            # An MPO is a camera's JPEG with a preview after it.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image.load()
            image = upright(image)
            # 16-bit grey becomes numbers: Pillow's own conversion would cut it off at 255.
            is_deep = image.mode in ("I", "F") or image.mode.startswith("I;")
            values = np.asarray(image) if is_deep else None
            rgba = to_srgb(image, image.convert("LA" if image.mode == "La" else "RGBA"))
    except MemoryError:
        raise
    except Exception as error:  # a decoder fails in any way
        raise UserError(f"{name} is damaged: {error}.") from None
    check(frames == 1, f"{name} has {frames} frames or pages: save one of them as a PNG.")
    if values is not None:
        is_bytes = image.mode == "F" and values.max() > 1
        top = 255 if is_bytes else 1 if image.mode == "F" else 65535
        return from_numbers(values, top, image.info.get("icc_profile"))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, PAPER), rgba).convert("RGB")


def too_large(name: str) -> str:
    """Return the sentence for a picture with too many pixels."""
    return f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels: make it smaller first."


def upright(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF data says."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged metadata: the picture is as good as ever
        return image


def to_srgb(image: Image.Image, converted: Image.Image) -> Image.Image:
    """Convert colours to sRGB by the profile of `image`; a broken or unfitting one is ignored.

    converted: the image without its profile, LA or RGBA → RGBA
    """
    rgba = converted.convert("RGBA")
    profile = image.info.get("icc_profile")
    if not profile:
        return rgba
    from PIL import ImageCms  # slow to import

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        is_fitting = {"L": image.mode in ("1", "L", "LA", "La"), "CMYK": image.mode == "CMYK"}
        if not is_fitting.get(mode, image.mode != "CMYK"):
            return rgba
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, ImportError, KeyError, OSError, TypeError, ValueError):
        return rgba
    if mode == "RGB":
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(36, 6, 3)
        converted_cube = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
        if np.abs(converted_cube.astype(int) - cube).max() <= 2:
            return rgba  # it is sRGB itself, and only rounding would change the picture
    rgb = ImageCms.applyTransform(image if mode == "CMYK" else rgba.convert(mode), transform)
    assert rgb is not None  # it is None where the image is changed in place
    rgb.putalpha(rgba.getchannel("A"))
    return rgb


# ---- Arrays and tensors --------------------------------------------------------------------------


def from_numbers(
    values: Any, top: float | None = None, icc_profile: bytes | None = None
) -> Image.Image:
    """Convert an array or a tensor. top: the number that means white → RGB on paper"""
    array = values
    if isinstance(values, Tensor):
        array = values.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        array = array if array.ndim < 3 else np.moveaxis(array, 0, -1)
    check(
        isinstance(array, np.ndarray) and array.dtype.kind in "buif",
        "A picture is the path of a file, a PIL image, an array or a tensor of real numbers, "
        f"not {describe(values)}.",
    )
    if array.ndim == 2:
        array = array[..., None]
    check(
        array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.size,
        "An array of a picture is height x width, with 1, 3 or 4 channels at the end (of a "
        f"tensor: at the beginning), not {' x '.join(map(str, values.shape)) or 'a number'}.",
    )
    array = to_bytes(array, top)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if icc_profile:
        image.info["icc_profile"] = icc_profile
    return to_rgb(image, "The picture")


def to_bytes(array: np.ndarray, top: float | None) -> np.ndarray:
    """Scale numbers from 0 to `top` to bytes. Raises UserError if some lie outside."""
    if top is None:
        top = 1 if array.dtype.kind in "fb" else 65535 if array.dtype.str[1:] == "u2" else 255
    low, high = float(array.min()), float(array.max())
    slack = 0.01 * top if array.dtype.kind == "f" else 0  # resizing overshoots
    check(
        -slack <= low and high <= top + slack,  # false for nan as well
        f"The numbers of a picture in {array.dtype} are from 0 to {top}, not from {low:g} to "
        f"{high:g}.",
    )
    return (array / top * 255).round().clip(0, 255).astype(np.uint8)
