"""Stable Diffusion 1.x and Prompt-to-Prompt, small enough to read in one sitting."""

import warnings

# `python -m minip2p.sample` runs a module that is imported below. It only calls the command line.
warnings.filterwarnings("ignore", "'minip2p.sample' found in sys.modules", RuntimeWarning)

from .align import Alignment  # noqa: E402
from .attention import Edit, Site  # noqa: E402
from .blend import LocalBlend  # noqa: E402
from .edit import PromptEdit, Refine, Reweight, WordSwap  # noqa: E402
from .invert import Inversion, invert  # noqa: E402
from .sample import Result, denoise, generate  # noqa: E402
from .scheduler import DDIM, PNDM  # noqa: E402
from .store import AttentionStore, Chain  # noqa: E402
from .tools import fast, show  # noqa: E402
from .tools.table import explain  # noqa: E402
from .weights import StableDiffusion, WeightsError, load  # noqa: E402

__all__ = [
    "DDIM",
    "PNDM",
    "Alignment",
    "AttentionStore",
    "Chain",
    "Edit",
    "Inversion",
    "LocalBlend",
    "PromptEdit",
    "Refine",
    "Result",
    "Reweight",
    "Site",
    "StableDiffusion",
    "WeightsError",
    "WordSwap",
    "denoise",
    "explain",
    "fast",
    "generate",
    "invert",
    "load",
    "show",
]
