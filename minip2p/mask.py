"""A mask of the user's own, from whatever holds it, as the latents that an edit may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .errors import check, describe

TOPS = 1, 255, 65535  # what "all of it" is called in a mask, or in a picture of 8 or 16 bits


def read_mask(mask: Any, latent_size: tuple[int, int]) -> Tensor:
    """A mask of the latents' size, or of a whole multiple of it as the picture's. → bool h w

    mask: a PIL image, an array or a tensor, height x width. Its numbers are from 0 to 1, to 255 or
    to 65535, to the first of these that the maximum does not pass; what is above half is edited.
    Of an image, brightness counts, or opacity if it has one colour only.
    Raises ValueError for what is no such mask, and for one that selects nothing.
    """
    numbers = torch.from_numpy(to_numbers(mask))
    h, w = latent_size
    height, width = numbers.shape if numbers.ndim == 2 else (0, 0)
    check(
        height and width and not height % h and not width % w and height * w == width * h,
        f"A blend's mask must be {h} x {w} (height x width), as the latents, or a multiple "
        f"of it, as the picture, not {' x '.join(map(str, numbers.shape)) or 'a number'}.",
    )
    low, high = numbers.min().item(), numbers.max().item()
    # Below 2, not up to 1: what resizes a mask may overshoot a little.
    tops = [top for top in TOPS if high < top + 1]
    check(
        tops,
        f"A blend's mask has numbers from {low:g} to {high:g}: give it 0 and 1, or 0 and 255.",
    )
    half = tops[0] / 2
    selected = F.adaptive_avg_pool2d(numbers[None], latent_size)[0] > half
    check(
        selected.any(),
        f"A blend's mask selects nothing: its numbers go from {low:g} to {high:g}, and only what "
        f"is above {half:g} on average of {height // h} x {width // w} pixels is edited: give it "
        "0 and 1, or 0 and 255.",
    )
    return selected


def to_numbers(mask: Any) -> np.ndarray:
    """→ float64, a copy that torch may write to"""
    given = of_image(mask) if isinstance(mask, Image.Image) else mask
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.double() if given.is_floating_point() else given).numpy()
    try:
        numbers = np.array(given)
    except (TypeError, ValueError):  # rows of different lengths
        numbers = np.array(None)
    check(
        numbers.dtype.kind in "buif",
        "A blend's mask is a PIL image, or an array or a tensor of real numbers, not "
        f"{describe(mask)}.",
    )
    return numbers.astype(np.float64)


def of_image(image: Image.Image) -> np.ndarray:
    """Brightness, or opacity where all that can be seen has the same colour. → h w"""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # deeper than 8 bits
        return np.asarray(image)
    try:
        rgba = image.convert("RGBA")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The image of a blend's mask, of mode {image.mode!r}, can't be read: {error}."
        ) from None
    colours = np.asarray(rgba)
    alpha = colours[..., 3]
    seen = colours[alpha > 0][:, :3]
    if len(seen) and alpha.min() < alpha.max() and (seen == seen[0]).all():
        return alpha
    return np.asarray(rgba.convert("L"))
