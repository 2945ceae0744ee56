"""Stable Diffusion 1.x and Prompt-to-Prompt, small enough to read in one sitting."""

import warnings

# `python -m minip2p.sample` runs a module that is imported below. It only calls the command line.
warnings.filterwarnings("ignore", "'minip2p.sample' found in sys.modules", RuntimeWarning)

from .attention import AttentionStore, Edit, Site  # noqa: E402
from .edit import LocalBlend, Refine, Reweight, WordSwap  # noqa: E402
from .sample import Result, denoise, explain, generate  # noqa: E402
from .scheduler import DDIM, PNDM  # noqa: E402
from .weights import StableDiffusion, WeightsError, load  # noqa: E402

__all__ = [
    "DDIM",
    "PNDM",
    "AttentionStore",
    "Edit",
    "LocalBlend",
    "Refine",
    "Result",
    "Reweight",
    "Site",
    "StableDiffusion",
    "WeightsError",
    "WordSwap",
    "denoise",
    "explain",
    "generate",
    "load",
]
