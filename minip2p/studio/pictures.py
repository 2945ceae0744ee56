"""Keep what visitors sent: pictures at the model's size, and their inversions."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import UserError, check
from ..invert import Inversion, invert
from ..picture import FORMATS, read
from ..run import Run
from ..settings import defaults_of
from ..weights import StableDiffusion

MOST_PIXELS = 64_000_000  # of an uploaded picture: some 800 MB while it is decoded
MOST_PICTURES, MOST_INVERSIONS = 64, 16  # of all visitors; the oldest are dropped


class Pictures:
    """Source pictures of all visitors, to be used on the drawing thread alone."""

    def __init__(self, model: StableDiffusion):
        self.model = model
        self.images: dict[str, Image.Image] = {}  # by key, the newest last
        self.inversions: dict[tuple[Any, ...], Inversion] = {}  # by the picture's key and settings

    def add(self, data: bytes) -> str:
        """Keep what the model sees of an image file, and return its key.

        Decoding two large files at once, on two threads, could fill the memory.
        Raises UserError if it is no picture or too large.
        """
        defaults = defaults_of(self.model)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = image.width * image.height
                check(
                    pixels <= MOST_PIXELS,
                    f"The picture has {pixels / 1e6:.0f} million pixels: make it smaller than "
                    f"{MOST_PIXELS / 1e6:.0f} million.",
                )
                picture = read(image, (defaults["height"], defaults["width"]))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
            raise UserError(
                "This is no picture that can be read: save it as a PNG or a JPEG."
            ) from None
        key = secrets.token_hex(16)  # no other visitor can guess it
        keep(self.images, key, picture.image, MOST_PICTURES)
        return key

    def invert(self, run: Run, key: str, callback: Callable[..., object]) -> Inversion:
        """Return a run's inverted source picture: it is inverted once for all edits of it."""
        assert run.source
        settings = key, run.prompts[0], run.num_inference_steps, run.source.guidance_scale
        inversion = self.inversions.get(settings)
        if inversion is None:
            image = self.images.get(key)
            if image is None:
                raise UserError("The studio no longer has your picture: choose it again.")
            arguments = run.inversion() | {"callback": callback}
            inversion = invert(self.model, image, run.prompts[0], **arguments)
        keep(self.inversions, settings, inversion, MOST_INVERSIONS)
        return inversion


def keep(store: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add a value as the newest, and drop the oldest beyond `most`."""
    store.pop(key, None)
    store[key] = value
    while len(store) > most:
        del store[next(iter(store))]
