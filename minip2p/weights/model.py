"""A loaded model: its parts, how it was trained, and what its source recommends."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..scheduler import alpha_bars
from ..text import TextEncoder, Tokenizer
from ..unet import UNet
from ..vae import VAE

SD_DEFAULTS = {  # what generate() takes where neither its caller nor the model has a value
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "cross_replace_steps": 0.8,
    "self_replace_steps": 0.4,
}


@dataclass
class StableDiffusion:
    """A model that is ready to run, and what its source recommends for running it."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    scheduler: str  # "pndm" or "ddim": the model's own
    schedule: dict[str, Any]  # how it was trained: keyword arguments of DDIM and PNDM
    sample_size: tuple[int, int]  # height and width of the latents it was trained on
    defaults: dict[str, Any]  # arguments of generate(), from minip2p.json, completed by SD's
    vocabulary: tuple[str, ...] = ()  # the words it was trained on, where its source lists them
    _identity: tuple[str, set[Any], str] = field(
        default=("", set(), ""), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.defaults = {**SD_DEFAULTS, "scheduler": self.scheduler, **self.defaults}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def alpha_bars(self) -> Tensor:
        """Return ᾱ_t of every training timestep t: num_train_timesteps, float32, on the CPU."""
        names = "num_train_timesteps", "beta_start", "beta_end"
        return alpha_bars(**{name: self.schedule[name] for name in names if name in self.schedule})

    def identity(self) -> str:
        """Return a hash, 16 hexadecimal digits, of all that the model's pictures depend on.

        That is its weights in their precision, its vocabulary of tokens and its noise levels. It is
        computed again only after one of them has changed. Raises UserError if it was not computed
        before fast.prepare, which packs weights so that they can't be read.
        """
        tensors = []
        for part in (self.text_encoder, self.unet, self.vae):
            # As in the first edition: the ids of studies made with it are to stay what they are.
            prefix = "encoder." if part is self.vae else "text_model."
            tensors += [(k.removeprefix(prefix), t) for k, t in part.state_dict().items()]
        settings = [sorted(self.tokenizer.get_vocab().items()), sorted(self.schedule.items())]
        text = json.dumps([settings, self.scheduler, self.sample_size])
        # In-place changes raise a tensor's version, but not through `.data`, as LoRAs are merged,
        # and tensors made in inference mode have none: hence the sum of a part of each.
        sums = torch.stack([t[0].sum().float() for _, t in tensors]).tolist()  # one wait for a GPU
        versions = {
            (name, t.data_ptr(), t.is_inference() or t._version, part_sum)
            for (name, t), part_sum in zip(tensors, sums, strict=True)
        }
        known_text, known_versions, identity = self._identity
        is_packed = getattr(self.unet, "is_packed", False)
        is_same = versions <= known_versions if is_packed else versions == known_versions
        if text == known_text and is_same:
            return identity
        check(
            not is_packed,
            "The weights of a prepared UNet can't be read: call model.identity() once before "
            "fast.prepare(model.unet).",
        )
        digest = hashlib.sha256()
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            data = tensor.cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().tobytes())
        digest.update(text.encode())
        self._identity = text, versions, digest.hexdigest()[:16]
        return self._identity[2]
