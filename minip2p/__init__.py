"""Stable Diffusion 1.x and Prompt-to-Prompt, small enough to read in one sitting."""

from . import program

if program.is_running():  # never in a process that only imports minip2p
    program.begin()  # before torch is imported

from . import fast, show
from .align import Alignment, Prompt
from .attention import Hook, Layer
from .blend import LocalBlend
from .edit import PromptEdit, Refine, Reweight, WordSwap
from .errors import UserError
from .explain import explain
from .invert import Inversion, invert
from .linear_edit import LinearEdit, SourceMaps
from .pipeline import Result, denoise, generate
from .run import Run, SourcePicture
from .scheduler import DDIM, PNDM, Scheduler
from .store import AttentionStore
from .weights import StableDiffusion, WeightsError, load

__version__ = "0.2.0"

__all__ = [
    "DDIM",
    "PNDM",
    "Alignment",
    "AttentionStore",
    "Hook",
    "Inversion",
    "Layer",
    "LinearEdit",
    "LocalBlend",
    "Prompt",
    "PromptEdit",
    "Refine",
    "Result",
    "Reweight",
    "Run",
    "Scheduler",
    "SourceMaps",
    "SourcePicture",
    "StableDiffusion",
    "UserError",
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
