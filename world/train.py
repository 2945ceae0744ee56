"""Train a small Stable Diffusion on the world, from nothing to a folder that minip2p.load() takes.

    python -m world.train --out FOLDER                 two CPU cores
    python -m world.train --preset gpu --out FOLDER    one GPU: the same, more of it

Three stages, each of which goes on where it was when the command is given again: scenes are drawn,
the VAE learns to write and read them, then UNet and text encoder learn to denoise together.
FOLDER/work holds checkpoints, the log, and pictures made on the way; the rest is the model.

The learning rate stays constant and falls to nothing over the last part, so that a run can be
given more samples after it has begun, as long as it has not reached that part.
"""

import argparse
import csv
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from minip2p import show
from minip2p.attention import Hook, Layer
from minip2p.scheduler import alpha_bars
from minip2p.text import tokenize
from minip2p.unet import UNet
from minip2p.vae import VAE, to_images
from minip2p.weights.clip import load_tokenizer

from . import scenes as world
from .vocabulary import save_tokenizer

LATENT = 16  # height and width of every latent
HEADS = 4
BRANCH = 0.25  # of the VAE's samples: the last part, of whole pictures, in which the rate falls
VALIDATION = 200_000  # first seed of scenes that are never trained on


@dataclass(frozen=True)
class Preset:
    """How large and how long."""

    world: world.World
    pixels: int
    scenes: int  # drawn for training
    vae_channels: tuple[int, ...]
    vae_groups: int
    vae_samples: int
    vae_batch: int
    channels: tuple[int, ...]
    samples: int  # of the UNet and the text encoder
    batch: int
    width: int = 128  # of a token
    text_layers: int = 2
    vae_rate: float = 1e-3
    rate: float = 2e-3
    supervise: float = 0.2  # weight of the loss on word maps; 0 leaves them to themselves
    supervise_until: float = 0.33  # share of the samples after which they are left to themselves
    crop: int = 64  # pixels on each side of what the VAE sees most of the time


PRESETS = {
    "small": Preset(world.SMALL, 128, 60_000, (16, 32, 64, 128), 8, 64_000, 16,
                    (64, 96, 128, 96), 400_000, 64),
    "gpu": Preset(world.SMALL, 128, 200_000, (16, 32, 64, 128), 8, 64_000, 16,
                  (64, 96, 128, 96), 640_000, 128),
}  # fmt: skip


# ---- One loop for both stages --------------------------------------------------------------------


@dataclass
class Stage:
    """What is trained, and how its loss comes about."""

    name: str
    modules: nn.ModuleDict
    draw: Callable[[torch.Generator, float], list[Tensor]]  # progress 0 to 1 → a batch, on the CPU
    loss: Callable[..., dict[str, Tensor]]  # of a batch: "loss" and more
    check: Callable[[], dict[str, float]]  # with averaged weights: on scenes that were never seen
    samples: int
    batch: int  # of all processes together
    rate: float
    longest: float = 1.0  # of the gradient: what is longer is shortened
    falling: float = BRANCH  # the last part, in which the rate falls to nothing
    recorded: bool = False  # by a GPU: draw's tensors always have the same shapes


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix of each weight's momentum (Jordan et al. 2024).

    A convolution's kernel counts as a matrix of outputs and all else. Steps are as long as AdamW's
    (Liu et al. 2025, eq. 4), so that both share a rate.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float | Tensor):
        super().__init__(weights, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            same: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same.setdefault(tuple(p.flatten(1).shape), []).append(p)
            for shape, weights in same.items():
                momentum = []
                for p in weights:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    kept = self.state[p]["momentum"]
                    kept.lerp_(p.grad, 1 - group["momentum"])
                    momentum.append(p.grad.lerp(kept, group["momentum"]).flatten(1))
                steps = orthogonal(torch.stack(momentum))
                length = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, direction in zip(weights, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(direction.view_as(p) * length)


def orthogonal(x: Tensor) -> Tensor:
    """x: n rows columns → about U V^T of each x = U S V^T, by five Newton-Schulz steps."""
    wide = x.shape[1] <= x.shape[2]
    y = x if wide else x.mT
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    y = y.bfloat16()
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return (y if wide else y.mT).to(x)


def fit(stage: Stage, work: Path, minutes: float = 4.0) -> None:
    """Train until `samples` were seen, and leave the average of the weights over the last steps.

    minutes: between checkpoints, by the clock; and between checks, of this process's own time, lest
    a run that has to wait for others does little else.
    """
    parameters = list(stage.modules.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(stage)
    file, step, seconds = work / f"{stage.name}.pt", 0, 0.0
    if file.exists():
        saved = torch.load(file, weights_only=True, map_location=parameters[0].device)
        stage.modules.load_state_dict(saved["modules"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average, step, seconds = saved["average"], saved["step"], saved["seconds"]

    rate = torch.zeros((), device=parameters[0].device)  # a tensor: a recorded step reads it again
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def take(*batch: Tensor) -> dict[str, Tensor]:
        losses = stage.loss(*batch)
        for p in parameters:
            p.grad = None
        losses["loss"].backward()
        share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, stage.longest)
        for optimizer in optimizers:
            optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def batch_of(step: int) -> list[Tensor]:
        # A seed for each step and process: a run that was interrupted goes on as it would have.
        seed = (step * processes() + rank()) * 2 + (stage.name == "unet")
        batch = stage.draw(torch.Generator().manual_seed(seed), step / steps)
        return [t.pin_memory() if rate.is_cuda else t for t in batch]

    take_step = Recorded(take) if rate.is_cuda and stage.recorded else take
    steps = math.ceil(stage.samples / stage.batch)
    log = Log(work / "log.csv", stage, steps, step, seconds) if main_process() else None
    kept, checked = time.monotonic(), time.process_time()
    batch = batch_of(step)
    while step < steps:
        rate.fill_(stage.rate * min(1, (step + 1) / 100, (1 - step / steps) / stage.falling))
        losses = take_step(*(t.to(rate.device, non_blocking=True) for t in batch))
        batch = batch_of(step + 1)  # while a GPU is at work on this one
        if not losses["loss"].isfinite():
            where = f"{file} has the weights of the last checkpoint" if file.exists() else "no file"
            raise FloatingPointError(
                f"{stage.name}: the loss is {losses['loss'].item()} at step {step} of {steps}; "
                f"{where}: try a lower rate than {stage.rate}."
            )
        step += 1
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        if log:
            log.add(step, losses)
        if (step % 20 == 0 or step == steps) and (
            first_says(time.monotonic() - kept > 60 * minutes) or step == steps
        ):
            if log and (time.process_time() - checked > 60 * minutes or step == steps):
                swap(parameters, average)
                log.check(step, stage.check())
                swap(parameters, average)
                checked = time.process_time()
            if log:
                torch.save(
                    {
                        "modules": stage.modules.state_dict(),
                        "optimizers": [o.state_dict() for o in optimizers],
                        "average": average,
                        "step": step,
                        "seconds": log.seconds(),
                    },
                    file.with_suffix(".tmp"),
                )
                file.with_suffix(".tmp").replace(file)
            kept = time.monotonic()
    swap(parameters, average)


class Recorded:
    """A step that a GPU records, as a CUDA graph, and repeats: else it would wait for Python.

    take: a batch, on the GPU → the losses, which the next step overwrites. The UNet's step of 128
    samples takes 42 ms instead of 284, on an H100 whose host is busy.
    """

    def __init__(self, take: Callable[..., dict[str, Tensor]]):
        self.take, self.calls = take, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        # What is made once, such as momenta, has to be there before the recording, and comes from
        # a stream beside the main one, as the recording does.
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.take(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.calls == 4:
            self.batch = [t.clone() for t in batch]
            with torch.cuda.graph(self.graph):
                self.losses = self.take(*self.batch)
        for old, new in zip(self.batch, batch, strict=True):
            old.copy_(new)
        self.graph.replay()
        return self.losses


def make_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels; AdamW for what is a vector, or looked up."""
    matrices, others = [], []
    for name, p in stage.modules.named_parameters():
        (matrices if p.ndim > 1 and "embeddings." not in name else others).append(p)
    adamw = torch.optim.AdamW(
        others,
        lr=stage.rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
        capturable=others[0].is_cuda,
    )
    return [Muon(matrices, stage.rate), adamw]


@torch.no_grad()
def swap(parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    for p, a in zip(parameters, average, strict=True):
        kept = p.clone()
        p.copy_(a)
        a.copy_(kept)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def processes() -> int:
    return dist.get_world_size() if distributed() else 1


def main_process() -> bool:
    return rank() == 0


def first_says(answer: bool) -> bool:
    """The first process's answer, in all: it keeps the time."""
    told = torch.tensor(float(answer))
    if distributed():
        dist.broadcast(told, src=0)
    return bool(told)


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Every process gets the mean of all processes' gradients."""
    if not distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= processes()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Log:
    """Rows of stage, samples seen, seconds, name of a number, the number; and a progress bar."""

    def __init__(self, path: Path, stage: Stage, steps: int, step: int, seconds: float):
        self.path, self.stage = path, stage
        self.start = time.monotonic() - seconds
        self.bar = tqdm(total=steps, initial=step, desc=stage.name, mininterval=5)
        self.sums: dict[str, list[float]] = {}

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """Note the numbers of a step; every 50 their means are written."""
        self.bar.update()
        for name, value in losses.items():
            self.sums.setdefault(name, []).append(value.item())
        if step % 50 == 0:
            means = {name: sum(values) / len(values) for name, values in self.sums.items()}
            self.write(step, means)
            self.bar.set_postfix_str(" ".join(f"{k} {v:.4f}" for k, v in means.items()))
            self.sums.clear()

    def check(self, step: int, found: dict[str, float]) -> None:
        self.write(step, found)
        tqdm.write(f"{self.stage.name} {step * self.stage.batch}: {found}")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        seen, seconds = step * self.stage.batch, f"{self.seconds():.0f}"
        with self.path.open("a", newline="") as file:
            for name, value in numbers.items():
                csv.writer(file).writerow([self.stage.name, seen, seconds, name, f"{value:.6g}"])


# ---- Scenes --------------------------------------------------------------------------------------


@dataclass
class Data:
    """Scenes, drawn: pictures n h w 3 in bytes, masks of subject and object n 2 16 16 in bytes."""

    scenes: list[world.Scene]
    pictures: np.ndarray
    masks: np.ndarray

    def images(self, indices: Tensor | slice, device: torch.device) -> Tensor:
        """→ b 3 h w in [-1, 1]"""
        return to_tensor(self.pictures[indices], device)

    def crops(self, n: int, pixels: int, generator: torch.Generator) -> Tensor:
        """Squares of random pictures, from random places. → n 3 pixels pixels in [-1, 1]"""
        h, w = self.pictures.shape[1:3]
        rows = torch.randint(len(self.scenes), (n,), generator=generator).tolist()
        ys = torch.randint(h - pixels + 1, (n,), generator=generator).tolist()
        xs = torch.randint(w - pixels + 1, (n,), generator=generator).tolist()
        cut = [
            self.pictures[i, y : y + pixels, x : x + pixels]
            for i, y, x in zip(rows, ys, xs, strict=True)
        ]
        return to_tensor(np.stack(cut))


def to_tensor(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """b h w 3 in bytes → b 3 h w in [-1, 1]"""
    x = torch.from_numpy(np.array(pictures)).to(device)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_one(job: tuple[world.Scene, int]) -> tuple[np.ndarray, np.ndarray]:
    scene, pixels = job
    drawn = world.draw(scene, pixels)
    masks = np.zeros((2, LATENT, LATENT), dtype=np.uint8)
    for i, noun in enumerate(scene.nouns):
        masks[i] = np.round(world.average(drawn.masks[noun], LATENT) * 255)
    return np.asarray(drawn.image), masks


def draw_data(preset: Preset, first: int, n: int) -> Data:
    scenes = [world.sample(preset.world, seed) for seed in range(first, first + n)]
    jobs = [(scene, preset.pixels) for scene in scenes]
    with Pool(os.cpu_count()) as pool:
        drawn = list(tqdm(pool.imap(draw_one, jobs, chunksize=64), total=n, desc="scenes"))
    pictures, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    return Data(scenes, pictures, masks)


# ---- The VAE -------------------------------------------------------------------------------------


def make_vae(preset: Preset) -> VAE:
    return VAE(preset.vae_channels, 2, 4, preset.vae_groups, scaling_factor=1.0)


def posterior(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def train_vae(preset: Preset, data: Data, unseen: Data, device: torch.device, work: Path) -> VAE:
    """L1, squared error and edges, and a little pull of the latents towards unit variance.

    A sample is a crop: a quarter of the cost. Whole pictures, which count as several, are one step
    in ten and, in the end, all.
    """
    vae = make_vae(preset).to(device)
    share = preset.vae_batch // processes()
    pictures = max(1, share * preset.crop**2 // preset.pixels**2)

    def draw(generator: torch.Generator, progress: float) -> list[Tensor]:
        whole = progress > 1 - BRANCH or torch.rand((), generator=generator) < 0.1
        n, pixels = (pictures, preset.pixels) if whole else (share, preset.crop)
        x = data.crops(n, pixels, generator)
        side = pixels * LATENT // preset.pixels
        return [x, torch.randn(n, 4, side, side, generator=generator)]

    def loss(x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        # On a CPU that has bfloat16 1.5 times as fast as float32, without channels_last.
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = posterior(vae, x)
            error = vae.decode(mean + (log_variance / 2).exp() * noise).float() - x
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2  # Kingma & Welling 2014
        l1, l2 = error.abs().mean(), (error**2).mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        total = l1 + 2 * l2 + 0.5 * edges + 1e-4 * kl
        return {"loss": total, "l1": l1.detach(), "edges": edges.detach(), "kl": kl.detach()}

    @torch.inference_mode()
    def check() -> dict[str, float]:
        x = unseen.images(slice(0, 64), device)
        y = torch.cat([vae.decode(vae.encode(some)).clamp(-1, 1) for some in x.split(8)])
        pairs = torch.stack([x, y], dim=1)[:16].flatten(0, 1)
        save_grid(pairs, 8, work / "vae.png")
        return {"psnr": psnr(x, y).mean().item()}

    # Few crops have strong colours and long gradients: shortened to 1 they would count too little.
    stage = Stage("vae", nn.ModuleDict({"vae": vae}), draw, loss, check, preset.vae_samples,
                  preset.vae_batch, preset.vae_rate, longest=10.0)  # fmt: skip
    fit(stage, work)
    return vae.eval().requires_grad_(False)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Decibels between pictures in [-1, 1], of each."""
    return -10 * (((x - y) / 2) ** 2).mean(dim=(1, 2, 3)).log10()


@torch.inference_mode()
def latents_of(vae: VAE, data: Data, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every picture's latent, unscaled, in half precision."""
    parts, n = [], 8 if device.type == "cpu" else 64  # few fit a CPU's cache: twice as fast
    for start in tqdm(range(0, len(data.scenes), n), desc="latents"):
        x = data.images(slice(start, start + n), device).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = posterior(vae, x)
        parts.append(torch.stack([mean, (log_variance / 2).exp()]).half().cpu())
    mean, deviation = torch.cat(parts, dim=1)
    return mean, deviation


# ---- UNet and text encoder -----------------------------------------------------------------------


class WordMaps(Hook):
    """Keeps how the words look, with gradients: the hook that edits maps can also train them."""

    def __init__(self, columns: Tensor):
        self.columns = columns  # b 77 n: which tokens each word is
        self.maps: list[Tensor] = []  # b h w n, of every cross-attention layer of at least 8 x 8

    def taught(self, layer: Layer) -> bool:
        return layer.is_cross and layer.height >= LATENT // 2

    def applies_to(self, layer: Layer) -> bool:
        # In bfloat16 a CPU learns faster through maps that are written out than fused; a GPU not.
        return self.taught(layer) or self.columns.device.type == "cpu"

    def __call__(self, probs: Tensor, layer: Layer) -> Tensor:
        if self.taught(layer):
            maps = (probs.mean(dim=1) @ self.columns).float()  # else 1 - 1e-4 below would be 1
            self.maps.append(maps.unflatten(1, (layer.height, layer.width)))
        return probs

    def loss(self, masks: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of each word's map with its thing's mask. masks: b n 16 16, weight: b n"""
        total = masks.new_zeros(())
        for maps in self.maps:
            maps = maps.permute(0, 3, 1, 2).clamp(1e-4, 1 - 1e-4)  # b n h w
            target = F.adaptive_avg_pool2d(masks, maps.shape[2:])
            entropy = -(target * maps.log() + (1 - target) * (1 - maps).log())
            total = total + (weight * entropy.mean(dim=(2, 3))).mean()
        return total / len(self.maps)


@dataclass
class Captions:
    """ids: n 77, columns: n 77 3 (subject, object, place), masks: n 3 16 16"""

    ids: Tensor
    columns: Tensor
    masks: Tensor
    empty: Tensor  # 77: the tokens of no prompt

    @classmethod
    def of(cls, data: Data, tokenizer: Any) -> "Captions":
        prompts = [tokenize(tokenizer, scene.caption) for scene in data.scenes]
        columns = torch.zeros(len(prompts), 77, 3)
        for i, (scene, prompt) in enumerate(zip(data.scenes, prompts, strict=True)):
            for word, phrase in enumerate((scene.subject, scene.object, scene.place)):
                if phrase:  # of a place its last word: snow, night, beach
                    columns[i, prompt.find(phrase.split()[-1]), word] = 1
        things = torch.from_numpy(data.masks).float() / 255
        # A place is wherever nothing stands; it shares those pixels with the words that are left.
        ground = 0.7 * (1 - things.sum(dim=1, keepdim=True)).clamp(0, 1)
        masks = torch.cat([things, ground], dim=1)
        ids = torch.tensor([prompt.ids for prompt in prompts])
        return cls(ids, columns, masks, torch.tensor(tokenize(tokenizer, "").ids))


def make_text_encoder(preset: Preset, vocabulary: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**text_config(preset, vocabulary)))


def text_config(preset: Preset, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": preset.width,
        "intermediate_size": 4 * preset.width,
        "num_hidden_layers": preset.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": preset.width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def train_unet(
    preset: Preset,
    vae: VAE,
    data: Data,
    unseen: Data,
    tokenizer: Any,
    device: torch.device,
    work: Path,
) -> tuple[UNet, nn.Module]:
    """Predict the noise (Ho et al. 2020), weighted by min-SNR-5 (Hang et al. 2023, eq. 5)."""
    torch.manual_seed(0)
    unet = UNet(preset.channels, 2, preset.width, HEADS).to(device)
    text_encoder = make_text_encoder(preset, len(tokenizer)).to(device)
    modules = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    share = preset.batch // processes()
    mean, deviation = stored_latents(vae, data, device, work)
    captions = Captions.of(data, tokenizer)
    alpha_bar = alpha_bars()
    snr = alpha_bar / (1 - alpha_bar)
    weights = (snr.clamp(max=5) / snr).clamp(min=0.1)
    weights = weights / weights.mean()

    def noised(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar[t].view(-1, 1, 1, 1).to(z)
        return a.sqrt() * z + (1 - a).sqrt() * noise

    # Thin lines are the hardest to learn: a sketch is drawn twice as often.
    often = torch.tensor([1.0 + (scene.style == "sketch") for scene in data.scenes])

    def draw(generator: torch.Generator, progress: float) -> list[Tensor]:
        i = often.multinomial(share, replacement=True, generator=generator)
        drawn, noise = torch.randn(2, share, *mean.shape[1:], generator=generator)
        z = (mean[i].float() + deviation[i].float() * drawn) * vae.scaling_factor
        # One timestep from each of `share` equal parts: less variance between the steps.
        t = torch.arange(share) + torch.rand(share, generator=generator)
        t = (t / share * 1000).long()[torch.randperm(share, generator=generator)]
        dropped = torch.rand(share, generator=generator) < 0.1  # for guidance (Ho & Salimans 2021)
        ids = torch.where(dropped[:, None], captions.empty, captions.ids[i])
        columns = captions.columns[i]
        # Maps matter where there is something to see: less at high noise, none without words.
        seen = columns.amax(dim=1) * ((~dropped) * alpha_bar[t].sqrt())[:, None]
        words = supervision(preset, progress) * seen
        return [noised(z, noise, t), noise, t, weights[t], ids, columns, captions.masks[i], words]

    def loss(
        x: Tensor, noise: Tensor, t: Tensor, weight: Tensor, ids: Tensor,
        columns: Tensor, masks: Tensor, word_weights: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        maps = WordMaps(columns)
        with torch.autocast(device.type, torch.bfloat16):
            context = text_encoder(input_ids=ids).last_hidden_state
            eps = unet(x, t, context, maps).float()
        errors = ((eps - noise) ** 2).mean(dim=(1, 2, 3))
        words = maps.loss(masks, word_weights)
        return {"loss": (errors * weight).mean() + words, "mse": errors.mean(), "words": words}

    new, checks = latents_of(vae, unseen, device), Captions.of(unseen, tokenizer)
    fixed = torch.Generator().manual_seed(5)
    check_noise = torch.randn(new[0].shape, generator=fixed)
    check_t = torch.randint(1000, (len(check_noise),), generator=fixed)

    @torch.inference_mode()
    def check() -> dict[str, float]:
        errors = []
        for part in torch.arange(len(check_noise)).split(64):
            z, noise, t = new[0][part].float(), check_noise[part], check_t[part]
            context = text_encoder(input_ids=checks.ids[part].to(device)).last_hidden_state
            x = noised(z * vae.scaling_factor, noise, t).to(device)
            eps = unet(x, t.to(device), context).float().cpu()
            errors.append(((eps - noise) ** 2).mean(dim=(1, 2, 3)))
        save_pictures(unet, vae, text_encoder, tokenizer, device, work / "unet.png")
        return {"validation": torch.cat(errors).mean().item()}

    stage = Stage(
        "unet", modules, draw, loss, check, preset.samples, preset.batch, preset.rate,
        falling=0.5, recorded=True,
    )  # fmt: skip
    fit(stage, work)
    return unet, text_encoder


def supervision(preset: Preset, progress: float) -> float:
    """The weight of the loss on word maps: it fades over a third of the samples, to nothing."""
    return preset.supervise * min(1.0, max(0.0, (preset.supervise_until - progress) * 3))


def stored_latents(vae: VAE, data: Data, device: torch.device, work: Path) -> tuple[Tensor, Tensor]:
    """The latents of all scenes, once; sets the VAE's scaling factor, 1 / their deviation."""
    file = work / "latents.pt"
    if main_process() and not file.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # the other processes wait
        torch.save(latents_of(vae, data, device), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        torch.set_num_threads(threads)
    if distributed():
        dist.barrier()
    mean, deviation = torch.load(file, weights_only=True)
    vae.scaling_factor = round(1 / mean.float().std().item(), 5)
    return mean, deviation


# ---- Pictures on the way -------------------------------------------------------------------------

LOOK = (
    "a painting of a squirrel eating a burger",
    "a painting of a lion eating a burger",
    "a photo of a cat riding a bicycle",
    "a photo of a rabbit eating a cake in the snow",
    "a dog riding a red car on the beach",
    "a sketch of a panda eating an apple",
    "a penguin sitting on a sofa",
    "a photo of a bird riding a motorcycle at night",
)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    pictures = to_images(images)
    show.grid([pictures[i : i + columns] for i in range(0, len(pictures), columns)]).save(path)


def save_pictures(
    unet: UNet, vae: VAE, text_encoder: nn.Module, tokenizer: Any, device: torch.device, path: Path
) -> None:
    from minip2p.pipeline import denoise
    from minip2p.scheduler import DDIM

    def context(texts: list[str]) -> Tensor:
        ids = torch.tensor([tokenize(tokenizer, text).ids for text in texts], device=device)
        return text_encoder(input_ids=ids).last_hidden_state

    seeds = torch.Generator().manual_seed(8888)
    x = torch.randn(len(LOOK), 4, LATENT, LATENT, generator=seeds).to(device)
    words, blank = context(list(LOOK)), context([""] * len(LOOK))
    for z in denoise(unet, DDIM(20), x, words, blank, guidance_scale=4.0):
        x = z
    save_grid(vae.decode(x).clamp(-1, 1), len(LOOK), path)


# ---- The folder ----------------------------------------------------------------------------------


def save_model(
    preset: Preset, vae: VAE, unet: UNet, text_encoder: nn.Module, tokenizer: Path, out: Path
) -> None:
    """Write a folder in diffusers' layout, float16, for diffusers and minip2p.load() alike."""
    vocabulary = len(json.loads((tokenizer / "vocab.json").read_text()))
    text_state = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in text_encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    levels = len(preset.vae_channels)
    parts: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = {
        "unet": (
            "diffusion_pytorch_model",
            unet.state_dict(),
            {
                "_class_name": "UNet2DConditionModel",
                "sample_size": LATENT,
                "block_out_channels": preset.channels,
                "layers_per_block": 2,
                "cross_attention_dim": preset.width,
                "attention_head_dim": HEADS,
                "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            },
        ),
        "vae": (
            "diffusion_pytorch_model",
            vae.state_dict(),
            {
                "_class_name": "AutoencoderKL",
                "sample_size": preset.pixels,
                "block_out_channels": preset.vae_channels,
                "layers_per_block": 2,
                "norm_num_groups": preset.vae_groups,
                "scaling_factor": vae.scaling_factor,
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels,
            },
        ),
        "text_encoder": (
            "model",
            text_state,
            {
                "architectures": ["CLIPTextModel"],
                "model_type": "clip_text_model",
                "dtype": "float32",  # else transformers computes in the file's half precision
                **text_config(preset, vocabulary),
            },
        ),
    }
    for part, (stem, state, config) in parts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        half = {name: tensor.half().contiguous().cpu() for name, tensor in state.items()}
        temporary = out / part / f"{stem}.tmp"
        save_file(half, temporary, metadata={"format": "pt"})
        temporary.replace(out / part / f"{stem}.safetensors")
        write_json(out / part / "config.json", config)
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    write_json(
        out / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "PNDMScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,  # for a DDIM made of this: diffusers' own default is True
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    )
    classes = {
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.31.0", **classes}
    write_json(out / "model_index.json", {**index, "requires_safety_checker": False})
    recommended = {"num_inference_steps": 50, "guidance_scale": 4.0, "scheduler": "ddim"}
    windows = {"cross_replace_steps": 0.8, "self_replace_steps": 0.6}  # chosen by EmojiBench
    write_json(out / "minip2p.json", {**recommended, **windows, "words": preset.world.words})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def plot(log: Path, out: Path) -> None:
    """The curves of a run: the VAE's PSNR, and the error of the predicted noise."""
    import matplotlib.pyplot as plt

    rows = list(csv.reader(log.open()))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, stage, names, label in (
        (axes[0], "vae", ["psnr"], "PSNR of unseen pictures, dB"),
        (axes[1], "unet", ["mse", "validation"], "mean squared error of the noise"),
    ):
        for name in names:
            points = [(int(r[1]), float(r[4])) for r in rows if (r[0], r[3]) == (stage, name)]
            axis.plot(*zip(*points, strict=True), label=name, marker=".", markersize=3)
        axis.set(xlabel=f"{stage}: pictures seen, thousands", ylabel=label)
        axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[1].legend()
    figure.savefig(out, dpi=90)


# ---- All of it -----------------------------------------------------------------------------------


def prepare(preset: Preset, out: Path) -> None:
    """What all processes read: the scenes, drawn, and the tokenizer."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    for name, first, n in (("training", 0, preset.scenes), ("unseen", VALIDATION, 256)):
        if not (work / f"{name}.npy").exists():
            data = draw_data(preset, first, n)
            np.save(work / f"{name}-masks.npy", data.masks)
            np.save(work / f"{name}.npy", data.pictures)
    save_tokenizer(work / "tokenizer")


def run(number: int, preset: Preset, out: Path, count: int, port: int) -> None:
    """One of `count` processes; with a GPU there is one."""
    work = out / "work"
    if count > 1:
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=number, world_size=count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    data, unseen = (
        Data(
            [world.sample(preset.world, seed) for seed in range(first, first + n)],
            np.load(work / f"{name}.npy", mmap_mode="r"),
            np.load(work / f"{name}-masks.npy"),
        )
        for name, first, n in (("training", 0, preset.scenes), ("unseen", VALIDATION, 256))
    )
    vae = train_vae(preset, data, unseen, device, work)
    tokenizer = load_tokenizer(work / "tokenizer")
    unet, text_encoder = train_unet(preset, vae, data, unseen, tokenizer, device, work)
    if main_process():
        save_model(preset, vae, unet, text_encoder, work / "tokenizer", out)
        plot(work / "log.csv", work / "curves.png")
    if distributed():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for field in ("scenes", "vae_samples", "samples", "batch"):
        parser.add_argument(
            f"--{field.replace('_', '-')}", type=int, help="instead of the preset's"
        )
    parser.add_argument("--supervise", type=float, help="weight of the loss on word maps")
    parser.add_argument(
        "--supervise-until", type=float, help="share of the samples after which it is nothing"
    )
    parser.add_argument("--channels", type=int, nargs=4, help="of the UNet's levels")
    parser.add_argument("--port", type=int, default=29517, help="for processes to find each other")
    args = vars(parser.parse_args())
    out, preset, port = args.pop("out"), PRESETS[args.pop("preset")], args.pop("port")
    preset = replace(preset, **{k: v for k, v in args.items() if v is not None})

    prepare(preset, out)
    count = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    # Two processes of one thread each train a third faster than one process of two.
    if count == 1:
        run(0, preset, out, 1, port)
    else:
        torch.multiprocessing.spawn(run, (preset, out, count, port), nprocs=count)


if __name__ == "__main__":
    main()
