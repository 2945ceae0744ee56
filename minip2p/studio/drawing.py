"""The studio without its page: draw what visitors ask for, one run at a time.

A newer change of the same visitor ends an older run at its next UNet call.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import Any

from ..command import quoted
from ..errors import UserError, check, describe, is_number
from ..html.page import PageStore, page
from ..program import MEMORY, is_out_of_memory
from ..run import Run
from ..weights import StableDiffusion
from .pictures import Pictures
from .request import make_run, word_rows

NAMES = "Source", "Edited prompt, without control", "Edit"


class OutdatedError(Exception):
    """Nobody waits for the run: its visitor has changed something, or the studio closes."""


class Visitor:
    """Remember when a visitor's browser sent its latest change."""

    sent = 0.0


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
        self.pictures = Pictures(model)

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

    def draw(self, run: Run, key: str, visitor: Visitor, sent: float) -> tuple[str, list[str]]:
        """Draw when it is this run's turn, and return the page and the run's warnings.

        key: of the source picture, or "". Raises OutdatedError as soon as nobody waits for the run.
        """
        turn = self.executor.submit(self.draw_now, run, key, visitor, sent)
        try:
            while not wait([turn], timeout=0.05).done:
                self.check_awaited(visitor, sent)
            return turn.result()
        finally:
            turn.cancel()  # a run that waits; one that is drawn ends at its next UNet call

    def draw_now(self, run: Run, key: str, visitor: Visitor, sent: float) -> tuple[str, list[str]]:
        """Draw on the executor's thread. Raises OutdatedError at the next UNet call."""
        self.check_awaited(visitor, sent)
        self.drawing_thread = threading.get_ident()
        self.warnings.clear()

        def after_call(*_: Any) -> None:
            self.check_awaited(visitor, sent)

        source = self.pictures.invert(run, key, after_call) if run.source else None
        result = run.generate(self.model, source=source, store=PageStore(), callback=after_call)
        text = page(result, result.edit, NAMES[: len(run.prompts)])
        return text, list(dict.fromkeys(self.warnings))

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
            text, warnings = self.draw(run, key, visitor, sent)
            n, seconds = len(run.prompts), time.perf_counter() - start
            summary = (
                f"{n} picture{'s' * (n > 1)}, {run.num_inference_steps} steps, {seconds:.1f} s."
            )
            options = ["--device", self.device] if self.device else []
            yield {
                "words": {"rows": rows},  # an older answer's rows may have come later
                "state": " ".join([summary, *warnings]),
                "frame": {"page": text},
                # With a page of maps, as here: sums of written maps round differently.
                "command": quoted(run.command("--html", "out/page.html", *options)),
                "python": run.python(device=self.device),
            }
        except OutdatedError:
            yield {}
        except Exception as error:
            yield {"state": failure(error)}


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
