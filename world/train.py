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
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from tqdm import tqdm

from minip2p import metrics, show
from minip2p.attention import Hook, Layer
from minip2p.scheduler import alpha_bars
from minip2p.text import tokenize
from minip2p.unet import UNet
from minip2p.vae import VAE, to_images
from minip2p.weights.clip import load_tokenizer

from . import scenes as world
from .model_folder import HEADS, LATENT, PRESETS, Preset, save_model, text_config
from .optimize import BRANCH, Stage, distributed, fit, main_process, processes
from .vocabulary import save_tokenizer

VALIDATION, UNSEEN = 200_000, 256  # first seed and number of scenes that are never trained on


# ---- Scenes --------------------------------------------------------------------------------------


@dataclass
class Data:
    """Scenes, drawn: pictures n h w 3 in bytes, masks of subject and object n 2 16 16 in bytes."""

    scenes: list[world.Scene]
    pictures: np.ndarray
    masks: np.ndarray

    def images(self, indices: Tensor | slice, device: torch.device) -> Tensor:
        """Return pictures, b 3 h w from -1 to 1."""
        return to_tensor(self.pictures[indices], device)

    def crops(self, n: int, pixels: int, generator: torch.Generator) -> Tensor:
        """Cut squares of random pictures at random places. → n 3 pixels pixels, from -1 to 1"""
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
    """Convert bytes, b h w 3, to b 3 h w from -1 to 1."""
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
    """Train the VAE: L1, squared error, edges, and a little pull of latents to unit variance.

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
        y = torch.cat([vae.decode(vae.encode(batch)).clamp(-1, 1) for batch in x.split(8)])
        pairs = torch.stack([x, y], dim=1)[:16].flatten(0, 1)
        save_grid(pairs, 8, work / "vae.png")
        return {"psnr": psnr(x, y).mean().item()}

    # Few crops have strong colours and long gradients: shortened to 1 they would count too little.
    stage = Stage("vae", nn.ModuleDict({"vae": vae}), draw, loss, check, preset.vae_samples,
                  preset.vae_batch, preset.vae_rate, longest=10.0)  # fmt: skip
    fit(stage, work)
    return vae.eval().requires_grad_(False)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Compute decibels between pictures from -1 to 1, of each. x, y: b 3 h w → b"""
    return -10 * metrics.squared_error(x / 2, y / 2).mean(dim=(1, 2)).log10()


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
        """Compute the cross-entropy of each word's map with its thing's mask.

        masks: b n 16 16, weight: b n
        """
        total = masks.new_zeros(())
        for maps in self.maps:
            maps = maps.permute(0, 3, 1, 2).clamp(1e-4, 1 - 1e-4)  # b n h w
            target = F.adaptive_avg_pool2d(masks, (maps.shape[2], maps.shape[3]))
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
    weights = loss_weights(alpha_bar)
    # Thin lines are the hardest to learn: a sketch is drawn twice as often.
    often = torch.tensor([1.0 + (scene.style == "sketch") for scene in data.scenes])

    def draw(generator: torch.Generator, progress: float) -> list[Tensor]:
        i = often.multinomial(share, replacement=True, generator=generator)
        drawn, noise = torch.randn(2, share, *mean.shape[1:], generator=generator)
        z = (mean[i].float() + deviation[i].float() * drawn) * vae.scaling_factor
        t = draw_timesteps(share, generator)
        dropped = torch.rand(share, generator=generator) < 0.1  # for guidance (Ho & Salimans 2021)
        ids = torch.where(dropped[:, None], captions.empty, captions.ids[i])
        columns = captions.columns[i]
        # Maps matter where there is something to see: less at high noise, none without words.
        seen = columns.amax(dim=1) * ((~dropped) * alpha_bar[t].sqrt())[:, None]
        words = supervision(preset, progress) * seen
        x = noised(z, noise, alpha_bar[t])
        return [x, noise, t, weights[t], ids, columns, captions.masks[i], words]

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

    @torch.inference_mode()
    def check() -> dict[str, float]:
        save_pictures(unet, vae, text_encoder, tokenizer, device, work / "unet.png")
        return {"validation": unseen_error()}

    unseen_error = make_validation(unet, text_encoder, vae, unseen, tokenizer, device)
    stage = Stage(
        "unet", modules, draw, loss, check, preset.samples, preset.batch, preset.rate,
        falling=0.5, recorded=True,
    )  # fmt: skip
    fit(stage, work)
    return unet, text_encoder


def draw_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """Draw a timestep from each of n equal parts, which varies less from step to step. → n"""
    t = torch.arange(n) + torch.rand(n, generator=generator)
    return (t / n * 1000).long()[torch.randperm(n, generator=generator)]


def noised(z: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Add noise to clean latents z, b 4 h w, of which ᾱ, b, is left (Ho et al. 2020, eq. 4)."""
    a = alpha_bar.view(-1, 1, 1, 1).to(z)
    return a.sqrt() * z + (1 - a).sqrt() * noise


def loss_weights(alpha_bar: Tensor) -> Tensor:
    """Return the weight of each timestep's error, of mean 1 (Hang et al. 2023, eq. 5)."""
    snr = alpha_bar / (1 - alpha_bar)
    weights = (snr.clamp(max=5) / snr).clamp(min=0.1)
    return weights / weights.mean()


def make_validation(
    unet: UNet,
    text_encoder: nn.Module,
    vae: VAE,
    unseen: Data,
    tokenizer: Any,
    device: torch.device,
) -> Callable[[], float]:
    """Return a function that computes the mean error of pictures that were not trained on."""
    latents, ids = latents_of(vae, unseen, device)[0], Captions.of(unseen, tokenizer).ids
    generator = torch.Generator().manual_seed(5)  # the same noise at every check
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(noise),), generator=generator)
    alpha_bar = alpha_bars()[timesteps]

    @torch.inference_mode()
    def validate() -> float:
        errors = []
        for part in torch.arange(len(noise)).split(64):
            context = text_encoder(input_ids=ids[part].to(device)).last_hidden_state
            z = latents[part].float() * vae.scaling_factor
            x = noised(z, noise[part], alpha_bar[part]).to(device)
            eps = unet(x, timesteps[part].to(device), context).float().cpu()
            errors.append(((eps - noise[part]) ** 2).mean(dim=(1, 2, 3)))
        return torch.cat(errors).mean().item()

    return validate


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
    """Make what all processes read: the scenes, drawn, and the tokenizer."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    for name, first, n in (("training", 0, preset.scenes), ("unseen", VALIDATION, UNSEEN)):
        if not (work / f"{name}.npy").exists():
            data = draw_data(preset, first, n)
            np.save(work / f"{name}-masks.npy", data.masks)
            np.save(work / f"{name}.npy", data.pictures)
    save_tokenizer(work / "tokenizer")


def run(number: int, preset: Preset, out: Path, count: int, port: int) -> None:
    """Train in one of `count` processes; with a GPU there is one."""
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
        for name, first, n in (("training", 0, preset.scenes), ("unseen", VALIDATION, UNSEEN))
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
        spawn(run, (preset, out, count, port), nprocs=count)


if __name__ == "__main__":
    main()
