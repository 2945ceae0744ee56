"""Read a mask of the user's own, from whatever holds it, at the size of the latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError, check, describe

WHITES = 1, 255, 65535  # the value of white in a mask, or in a picture of 8 or 16 bits


def read_mask(mask: Any, latent_size: tuple[int, int]) -> Tensor:
    """Return where a mask lets an edit act. → bool h w

    mask: a PIL image, an array or a tensor, height x width, of the latents' size or a multiple of
    it, as the picture's. White is 1, 255 or 65535, the first that the maximum does not pass; what
    is above half of it is edited. Of an image, brightness counts, or opacity if it has one colour.
    Raises UserError if it is no such mask, or selects nothing.
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
    # Resizing a mask may overshoot a little: hence below 2, not up to 1.
    whites = [white for white in WHITES if high < white + 1]
    numbers_say = f"numbers from {low:g} to {high:g}"
    check(whites, f"A blend's mask has {numbers_say}: give it 0 and 1, or 0 and 255.")
    half = whites[0] / 2
    selected = F.adaptive_avg_pool2d(numbers[None], latent_size)[0] > half
    check(
        selected.any(),
        f"A blend's mask selects nothing: it has {numbers_say}, and what is edited is above "
        f"{half:g} on average of {height // h} x {width // w} pixels: give it 0 and 1, or 0 and "
        "255.",
    )
    return selected


def to_numbers(mask: Any) -> np.ndarray:
    """Convert a mask to numbers, a copy in float64."""
    values = of_image(mask) if isinstance(mask, Image.Image) else mask
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        numbers = np.array(values)
    except (TypeError, ValueError):  # rows of different lengths
        numbers = np.array(None)
    kinds = "a PIL image, or an array or a tensor of real numbers"
    check(numbers.dtype.kind in "buif", f"A blend's mask is {kinds}, not {describe(mask)}.")
    return numbers.astype(np.float64)


def of_image(image: Image.Image) -> np.ndarray:
    """Return the brightness, or the opacity where all visible pixels have one colour. → h w"""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # deeper than 8 bits
        return np.asarray(image)
    try:
        rgba = image.convert("RGBA")
    except (ValueError, OSError) as error:
        sentence = f"The image of a blend's mask, of mode {image.mode!r}, can't be read: {error}."
        raise UserError(sentence) from None
    alpha = np.asarray(rgba)[..., 3]
    visible = np.asarray(rgba)[alpha > 0][:, :3]
    is_one_colour = len(visible) and (visible == visible[0]).all()
    return alpha if is_one_colour and alpha.min() < alpha.max() else np.asarray(rgba.convert("L"))
