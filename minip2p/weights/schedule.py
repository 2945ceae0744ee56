"""A scheduler's config: the noise levels that training had, and the sampler.

Every field of diffusers' DDIM and PNDM configs stands in a table below, or is read by a function.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from ..scheduler import SPACINGS
from .build import check_fields, positive_number, unsupported, whole_number
from .files import Config

REFUSED = {  # unless they have these values: SD 1.x was trained with them
    "prediction_type": "epsilon",
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "use_flow_sigmas": False,
}
WITHOUT_EFFECT = {
    "steps_offset": "it is 1 whatever stands there: diffusers' pipeline of SD 1.x corrects it so",
    "clip_sample": "latents are not clipped: diffusers' pipeline switches that off as well",
    "clip_sample_range": "it belongs to clip_sample",
    "dynamic_thresholding_ratio": "it belongs to thresholding",
    "sample_max_value": "it belongs to thresholding",
}
# Classes that sample from the same noise levels with a predicted noise. All others are refused.
FAMILY = r"(DDIM|PNDM|DDPM(?!Wuerstchen)|LMS|Euler|Heun|DPM|KDPM2|DEIS|UniPC|SASolver)\w*"
FEW_STEPS = ("LCMScheduler", "TCDScheduler")


def noise_levels(config: Config) -> dict[str, Any]:
    """Return the noise levels of training and how they are visited, as arguments of DDIM and PNDM.

    Raises WeightsError if the model was trained with other noise, or to predict something else.
    """
    name = class_name(config)
    if not (re.fullmatch(FAMILY, name) or name in FEW_STEPS):
        raise unsupported(
            config, "_class_name", "a sampler of predicted noise such as DDIMScheduler"
        )
    check_fields(config, REFUSED)
    spacing = config.get("timestep_spacing") or "leading"
    if spacing not in SPACINGS:
        raise unsupported(config, "timestep_spacing", " or ".join(SPACINGS))
    if name in FEW_STEPS:  # they begin with the noisiest timestep, whatever stands there
        spacing = "trailing"
    if type(config.get("set_alpha_to_one", False)) not in (bool, type(None)):
        raise unsupported(config, "set_alpha_to_one", "True or False")
    levels = {
        "num_train_timesteps": whole_number(config, "num_train_timesteps", 1000),
        "beta_start": positive_number(config, "beta_start", 0.00085, below=1),
        "beta_end": positive_number(config, "beta_end", 0.012, below=1),
        "steps_offset": 1,  # see WITHOUT_EFFECT
        "set_alpha_to_one": config.get("set_alpha_to_one") or False,
    }
    return levels if spacing == "leading" else levels | {"timestep_spacing": spacing}


def sampler(config: Config) -> str:
    """Return the sampler's name, pndm or ddim. Warn if that is not what the config asks for."""
    name = class_name(config)
    if name == "PNDMScheduler":
        if config.get("skip_prk_steps") is False:
            warn(config, "skip_prk_steps = False", "PNDM runs without Runge-Kutta steps, as SD's")
        return "pndm"
    if name in FEW_STEPS:
        instead = (
            "DDIM takes its place, and a model distilled to few steps wants num_inference_steps "
            "from 4 to 8 and guidance_scale 1 (--steps 8 --guidance 1)"
        )
        warn(config, name, instead)
    elif name != "DDIMScheduler":
        warn(config, name, "DDIM takes its place, with the same noise levels")
    return "ddim"


def class_name(config: Config) -> str:
    return str(config.get("_class_name") or "PNDMScheduler")  # SD 1.x's own


def warn(config: Config, asks: str, instead: str) -> None:
    warnings.warn(f"{config.path} asks for {asks}: {instead}.", stacklevel=4)
