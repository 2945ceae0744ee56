"""A worker: a model, and one call of `generate` for runs that share their source."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import __version__, text
from ..edit import Reweight
from ..invert import Inversion
from ..outputs import png
from ..run import Run
from ..settings import defaults_of
from ..weights import load
from .measure import WordMaps, Words, changed_words, measure
from .results import RUN_ID, Files, Row
from .study import SweepRun


class Worker:
    """A model that makes a study's pictures."""

    def __init__(self, run: Run, device: str | None = None, latents: bool = False):
        """Load the model of a run. latents: keep the latents of every picture, too."""
        dtype = getattr(torch, run.dtype)
        self.model = load(run.model, tokenizer=run.tokenizer, device=device, dtype=dtype)
        self.latents = latents
        # The runs of one picture follow each other.
        self.invert = lru_cache(4)(lambda run: run.invert(self.model))

    def describe(self) -> dict[str, Any]:
        """Return what is needed of the model to fill in its defaults and to name its runs."""
        return {"id": self.model.identity(), "defaults": defaults_of(self.model)}

    def run(self, runs: Sequence[SweepRun]) -> list[tuple[Row, Files]]:
        """Make runs of one source, in one call of generate if possible.

        Where the call raises, as for lack of memory, they are made one by one; a single run that
        raises has the error in its row. The source picture is among the first run's files.
        """
        try:
            return self.make(runs)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        if len(runs) > 1:
            return [result for run in runs for result in self.run([run])]
        return [(runs[0].row | {"error": message}, {})]

    def make(self, runs: Sequence[SweepRun]) -> list[tuple[Row, Files]]:
        """Make runs of one source in one call of generate, and measure them."""
        edits = [run for run in runs if run.is_edit]
        call = replace(
            runs[0].run,
            prompts=[runs[0].run.prompts[0], *(run.run.prompts[1] for run in edits)],
            edits=[run.run.edits[0] for run in edits],
        )
        words = {run.id: self.words(run.run) for run in edits}
        all_words = dict.fromkeys(w for sides in words.values() for side in sides for w in side)
        began = time.perf_counter()
        result = call.generate(
            self.model,
            store=WordMaps(words=list(all_words)) if all_words else False,
            source=self.inversion(call),
        )
        shared: Row = {
            "seconds": round((time.perf_counter() - began) / len(runs), 4),
            "device": str(self.model.device),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "minip2p": __version__,
        }
        images, latents = result.images, result.latents
        place = {run.id: r for r, run in enumerate(edits, 1)}
        results: list[tuple[Row, Files]] = []
        for run in runs:
            row, files = run.row | shared, dict[str, bytes]()
            if run.is_edit:
                r = place[run.id]
                row |= measure(images[0], images[r], result.store, r, words[run.id])
                files = self.files(run.id, images[r], latents[r])
            if not results:
                files = self.files(run.source, images[0], latents[0]) | files
            results.append((row, files))
        return results

    def inversion(self, run: Run) -> Inversion | None:
        """Invert the picture of a run, once for all runs of the same inversion."""
        if run.source is None:
            return None
        # What the inversion does not depend on: the source has a guidance scale of its own.
        seed = run.seed if run.source.method == "edit-friendly" else 0
        return self.invert(replace(run.alone(), guidance_scale=1.0, seed=seed))

    def words(self, run: Run) -> Words:
        """Return the words that the edit changes or weighs, in the source and in the target."""
        source, target = (text.tokenize(self.model.tokenizer, prompt) for prompt in run.prompts)
        weights = run.edits[0].weights if isinstance(run.edits[0], Reweight) else {}
        return changed_words(source, target, list(weights))

    def files(self, name: str, image: Image.Image, latents: Tensor) -> Files:
        """Return a picture as a PNG with its run's id in it, and its latents if they are kept."""
        # A GPU is faster than zlib at its usual level.
        files = {f"{name}.png": png(image, {RUN_ID: name}, compress_level=1)}
        if self.latents:
            array = io.BytesIO()
            np.save(array, latents.cpu().numpy())
            files[f"{name}.npy"] = array.getvalue()
        return files
