"""Stable Diffusion 1.x and Prompt-to-Prompt, small enough to read in one sitting."""

from .attention import AttentionStore, Edit, Site
from .edit import LocalBlend, Refine, Reweight, WordSwap
from .sample import Result, denoise, explain, generate
from .scheduler import DDIM, PNDM
from .weights import StableDiffusion, WeightsError, load

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
