"""The studio without its page: draw what visitors ask for, one run at a time.

A newer change of the same visitor ends an older run at its next UNet call.
"""

from __future__ import annotations

import io
import secrets
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from ..errors import UserError, check, describe, is_number
from ..html.page import PageStore, page
from ..invert import Inversion, invert
from ..picture import FORMATS, read
from ..pipeline import Result
from ..program import MEMORY, is_out_of_memory
from ..run import Run, quoted
from ..settings import defaults_of
from ..weights import StableDiffusion
from .request import make_run, word_rows

NAMES = "Source", "Edited prompt, without control", "Edit"
MOST_PIXELS = 64_000_000  # of an uploaded picture: some 800 MB while it is decoded
MOST_PICTURES, MOST_INVERSIONS = 64, 16  # of all visitors; the oldest are dropped


class OutdatedError(Exception):
    """Nobody waits for the run: its visitor has changed something, or the studio closes."""


class Visitor:
    """Remember when a visitor's browser sent its latest change."""

    sent = 0.0


class Drawing(NamedTuple):
    result: Result
    page: str
    warnings: list[str]


class Studio:
    """A model that draws for one visitor at a time.

    loaded: model and tokenizer as `Run` has them. device: as the user chose it, or None.
    executor: one thread for all of torch's work, loading included. With two threads, each with a
    team of OpenMP's, a run takes 2.6 s instead of 1.6.
    """

    def __init__(
        self,
        model: StableDiffusion,
        executor: Executor,
        loaded: dict[str, Any] | None = None,
        device: str | None = None,
    ):
        self.model, self.executor = model, executor
        self.loaded, self.device = loaded or {}, device
        self.lock = threading.Lock()
        self.is_closing = False
        self.drawing_thread: int | None = None
        self.warnings: list[str] = []  # of the run that is drawn now
        self.pictures: OrderedDict[str, Image.Image] = OrderedDict()  # of the model's size, by key
        self.inversions: OrderedDict[tuple[Any, ...], Inversion] = OrderedDict()

    def advance(self, visitor: Visitor, sent: float) -> None:
        """Note the visitor's latest change. Raises OutdatedError if a later one is known."""
        with self.lock:
            self.check_awaited(visitor, sent)
            visitor.sent = sent

    def check_awaited(self, visitor: Visitor, sent: float) -> None:
        """Raise OutdatedError if nobody waits for the change that was sent then."""
        if sent < visitor.sent or self.is_closing:
            raise OutdatedError

    def record_warning(self, message: Any, category: type, *where: Any) -> None:
        """Keep a warning of the drawing thread for its visitor; stands for warnings.showwarning.

        warnings.catch_warnings would catch those of all threads, and so of other visitors. The
        other threads' warnings repeat these.
        """
        if threading.get_ident() == self.drawing_thread:
            self.warnings.append(str(message))

    def draw(self, run: Run, key: str, visitor: Visitor, sent: float) -> Drawing:
        """Draw when it is this run's turn. key: of the source picture, or "".

        Raises OutdatedError as soon as nobody waits for the run.
        """
        turn = self.executor.submit(self.draw_now, run, key, visitor, sent)
        try:
            while not wait([turn], timeout=0.05).done:
                self.check_awaited(visitor, sent)
            return turn.result()
        finally:
            turn.cancel()  # a run that waits; one that is drawn ends at its next UNet call

    def draw_now(self, run: Run, key: str, visitor: Visitor, sent: float) -> Drawing:
        self.check_awaited(visitor, sent)
        self.drawing_thread = threading.get_ident()
        self.warnings.clear()

        def after_call(*_: Any) -> None:
            self.check_awaited(visitor, sent)

        source = self.invert(run, key, after_call) if run.source else None
        result = run.generate(self.model, source=source, store=PageStore(), callback=after_call)
        text = page(result, result.edit, NAMES[: len(run.prompts)])
        return Drawing(result, text, list(dict.fromkeys(self.warnings)))

    # --- pictures --------------------------------------------------------------------------------

    def add_picture(self, data: bytes) -> str:
        """Keep what the model sees of an image file, and return its key.

        Called on the drawing thread: decoding two large files at once could fill the memory.
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
        keep(self.pictures, key, picture.image, MOST_PICTURES)
        return key

    def invert(self, run: Run, key: str, callback: Callable[..., object]) -> Inversion:
        """Return the inverted source picture: it is inverted once for all edits of it."""
        assert run.source
        described = key, run.prompts[0], run.num_inference_steps, run.source.guidance_scale
        inversion = self.inversions.get(described)
        if inversion is None:
            image = self.pictures.get(key)
            if image is None:
                raise UserError("The studio no longer has your picture: choose it again.")
            arguments = run.inversion() | {"callback": callback}
            inversion = invert(self.model, image, run.prompts[0], **arguments)
        keep(self.inversions, described, inversion, MOST_INVERSIONS)
        return inversion

    # --- answers ---------------------------------------------------------------------------------

    def answer(
        self,
        visitor: Visitor,
        sent: Any,
        settings: Any,
        prompt: Any,
        edited: Any,
        picture: Any,
        *numbers: Any,
    ) -> Iterator[dict[str, Any]]:
        """Yield what changes on the page: the words' rows at once, later the pictures.

        settings: the words' settings, as studio.js keeps them. picture: {"key", "name"}, or {}.
        numbers: steps, guidance, seed, guidance of the inversion.
        """
        start = time.perf_counter()
        try:
            check(is_number(sent), f"When a change was sent is a number, not {describe(sent)}.")
            self.advance(visitor, sent)
            rows = word_rows(self.model, prompt, edited)
            yield {"words": {"rows": rows}}
            key, name = read_picture(picture)
            names = "steps", "guidance", "seed", "inversion_guidance"
            values = dict(zip(names, numbers, strict=True))
            run = make_run(self.model, prompt, edited, values, settings, name, self.loaded)
            yield {"state": "Drawing …"}
            drawing = self.draw(run, key, visitor, sent)
            n, seconds = len(run.prompts), time.perf_counter() - start
            summary = (
                f"{n} picture{'s' * (n > 1)}, {run.num_inference_steps} steps, {seconds:.1f} s."
            )
            options = ["--device", self.device] if self.device else []
            yield {
                "words": {"rows": rows},  # an older answer's rows may have come later
                "state": " ".join([summary, *drawing.warnings]),
                "frame": {"page": drawing.page},
                # With a page of maps, as here: sums of written maps round differently.
                "command": quoted(run.command("--html", "out/page.html", *options)),
                "python": run.python(device=self.device),
            }
        except OutdatedError:
            yield {}
        except Exception as error:
            yield {"state": failure(error)}


def keep(store: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add a value as the newest, and drop the oldest beyond `most`."""
    store[key] = value
    store.move_to_end(key)
    while len(store) > most:
        store.popitem(last=False)


def read_picture(value: Any) -> tuple[str, str | None]:
    """Return the key and the name of a source picture, as studio.js has it; without one, "", None.

    Raises UserError for anything else.
    """
    if not value:
        return "", None
    parts: Any = value if isinstance(value, dict) else {}
    key, name = parts.get("key"), parts.get("name")
    is_text = isinstance(key, str) and isinstance(name, str) and name and len(name) <= 255
    check(is_text, f"A picture has a key and a name, and is not {describe(value)}.")
    return key, Path(name).name


def failure(error: Exception) -> str:
    """Return what the page says of an error. A fault of the studio's is in the terminal, too."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return MEMORY
    traceback.print_exception(error)
    return f"The studio failed: {type(error).__name__}. Its terminal says more."
