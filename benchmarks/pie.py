"""Run PIE-Bench: 700 pictures, edited and measured as its authors do (Ju et al. 2024).

    python benchmarks/pie.py DATA --model FOLDER --method direct --out out/pie
    python benchmarks/pie.py --make pie-world         write a small set of the same shape

benchmarks/README.md describes the format of DATA. Every picture is inverted and edited in 50 steps
of DDIM with guidance 7.5, windows 0.4 and 0.6. A row of results.jsonl holds the figures of one
picture, or the error that kept it from being measured; a run that was interrupted continues, and
tries pictures with errors again. The means are printed under the published rows of SD 1.4.

--protocol published (default) does what the published figures did; --protocol plain what this
project would do. They differ in:

    what                      published                          plain
    edit                      Refine, blend on the annotated     the same, self-attention up to
                              words (start 0.2, threshold 0.3),  16 x 16
                              weight 2 of the new word, self-
                              attention up to 32 x 32
    mask of the blend         reads maps after the weights       reads maps before them
    blended word that one     the mask is the other prompt's     no blend and no weight
      prompt lacks              word's alone
    Refine, shorter prompt    padding reads the source's text    padding keeps its own maps
    edit-friendly             source guidance 1, skip 12 steps,  guidance 7.5, no skip, the edit
                              timesteps from 981, WordSwap at    above
                              equal lengths, self-attention up
                              to 16 x 16, no blend, no weight,
                              windows of all 50 steps
    resizing of pictures      bicubic                            Lanczos
    the edit is measured as   JPEG of quality 75                 PNG
    structure distance        pixels from 0 to 255 enter         pixels from 0 to 1, as in
                              ImageNet's normalisation,          Tumanyan et al. 2022, resized
                              resized without antialiasing (by   with antialiasing
                              torchvision 0.13)

Effects that were measured: JPEG lowers PSNR from 35.95 to 33.56 dB and SSIM from 98.4 to 94.2 (an
unchanged photograph has 95.5); published methods differ by 0.65. Structure distance differs by a
factor of 25 to 40, and by 4 % without antialiasing. The mask's weights change latents by 0.18 and
32 of 1,024 mask pixels, the padding by 2.1e-2, the resizing a picture by 0.37 of 255. pie_check.py
compares the figures with those of the authors' evaluator: they agree to 5e-5.

Both protocols differ from the published runs in three things. Pixels are rounded, not truncated
(0.45 of 255 on average). "direct" puts row 0 back; theirs adds offsets and drifts by rounding.
"edit-friendly" keeps the last noise, which theirs sets to 0 (edits 43 dB apart).

In both protocols the background is the picture with black where the mask is, and its error is
averaged over all pixels; "valid" columns average over the background alone. A picture without
background has no such figures. LPIPS needs the package lpips and its weights, structure distance
--dino FOLDER (facebook/dino-vitb8), CLIP scores --clip FOLDER (openai/clip-vit-large-patch14).

Shapes:  H W of a picture · b 3 H W in [0, 1]
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import minip2p  # noqa: E402
from minip2p import LocalBlend, Refine, Reweight, WordSwap, metrics  # noqa: E402
from minip2p.align import Alignment, Prompt, refinement  # noqa: E402
from minip2p.errors import UserError, check  # noqa: E402
from minip2p.pipeline import bind_edit  # noqa: E402
from minip2p.program import say  # noqa: E402
from minip2p.saved import write_files  # noqa: E402
from minip2p.sweep.ray import Work, cluster  # noqa: E402
from minip2p.sweep.results import Files, Row  # noqa: E402

STEPS, GUIDANCE, CROSS, SELF = 50, 7.5, 0.4, 0.6
SKIP = 12  # of 50 steps, in the published edit-friendly runs
KEYS = "attention.key", "attention.k_proj"  # in a ViTModel; the second since transformers 5
METHODS = {  # arguments of invert
    "direct": {"method": "direct"},
    "ddim": {"method": "ddim"},
    "negative-prompt": {"method": "ddim"},  # the source's prompt for the empty one
    "edit-friendly": {"method": "edit-friendly"},
}
COLUMNS = {  # what is printed: title, factor
    "structure": ("structure x 10^3", 1e3),
    "psnr": ("PSNR", 1),
    "lpips": ("LPIPS x 10^3", 1e3),
    "mse": ("MSE x 10^4", 1e4),
    "ssim": ("SSIM x 10^2", 1e2),
    "clip": ("CLIP whole", 1),
    "clip edited": ("CLIP edited", 1),
    "valid psnr": ("valid PSNR", 1),
    "valid mse": ("valid MSE x 10^4", 1e4),
    "valid ssim": ("valid SSIM x 10^2", 1e2),
}
PUBLISHED = {  # SD 1.4, 50 steps, Prompt-to-Prompt, in the order of COLUMNS (Ju et al. 2024)
    "DDIM": (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44),
    "negative-prompt": (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87),
    "null-text": (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86),
    "direct": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
}

# ---- The set -------------------------------------------------------------------------------------


def read_set(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the pictures of a set by their id. Raises UserError if the folder is no PIE-Bench."""
    file = folder / "mapping_file.json"
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no PIE-Bench: {file.name} can't be read: {error}.") from None
    check(isinstance(items, dict), f"{file} must be an object with a member for each picture.")
    for key, item in items.items():
        check(isinstance(item, dict), f"{file}: picture {key} must be an object, not {item!r}.")
        for name in ("image_path", "original_prompt", "editing_prompt", "blended_word", "mask"):
            check(name in item, f"{file}: picture {key} has no {name}.")
    return items


def plain(prompt: str) -> str:
    """Remove the brackets around what changes. Raises UserError unless it is a text."""
    check(isinstance(prompt, str), f"A prompt must be a text, not {prompt!r}.")
    return prompt.replace("[", "").replace("]", "")


def blended_words(item: dict[str, Any]) -> list[str]:
    """Return the old and the new word, or no words. Raises UserError for anything else."""
    value = item["blended_word"]
    check(
        isinstance(value, str) and len(value.split()) != 1,
        f"blended_word must be empty or an old and a new word, not {value!r}.",
    )
    return value.split()[:2]


def decoded(runs: Sequence[int], height: int, width: int) -> Tensor:
    """Decode a mask from pairs of start and length, row by row. → H W, bool

    The border is always in it: the authors do so against slips of annotation. Raises UserError
    unless `runs` are such pairs.
    """
    is_pairs = isinstance(runs, list) and all(type(n) is int and n >= 0 for n in runs)
    check(
        is_pairs and len(runs) % 2 == 0,
        "The mask must be a list of pairs of numbers, start and length, and "
        + (f"has {len(runs)} numbers." if is_pairs else "it is none."),
    )
    mask = torch.zeros(height * width, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask[start : start + length] = True
    mask = mask.view(height, width)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def encoded(mask: Tensor) -> list[int]:
    """Encode a mask, H W, as pairs of start and length."""
    ends = (
        torch.cat([torch.zeros(1), mask.flatten().float(), torch.zeros(1)]).diff().nonzero()[:, 0]
    )
    return [n for a, b in ends.view(-1, 2).tolist() for n in (a, b - a)]


def make_set(folder: Path, n: int = 6, pixels: int = 512) -> None:
    """Write a set of the same shape: renders of scenes in which one noun is exchanged.

    true_images/ holds their true edits, which PIE-Bench does not have.
    """
    from world.bench import ITEMS
    from world.scenes import SMALL, draw, sample

    items: dict[str, dict[str, Any]] = {}
    for seed in range(ITEMS["photos"][0] + 5000, 2_000_000):
        scene = sample(SMALL, seed)
        new = next(a for a in SMALL.animals if a not in scene.nouns and len(a) > 3)
        target = replace(scene, subject=new)
        words, edited = scene.caption.split(), target.caption.split()
        if [a for a, b in zip(words, edited, strict=False) if a != b] != [scene.subject]:
            continue
        name = f"{len(items):012d}"
        original, true = draw(scene), draw(target)
        things = torch.from_numpy(original.masks[scene.subject] + true.masks[new])
        mask = F.interpolate((things > 0).float()[None, None], (pixels, pixels))[0, 0] > 0
        for kind, drawn in (("annotation_images", original), ("true_images", true)):
            path = folder / kind / "1_change_object" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            large = drawn.image.resize((pixels, pixels), Image.Resampling.BICUBIC)
            large.save(path, quality=95)
        items[name] = {
            "image_path": f"1_change_object/{name}.jpg",
            "original_prompt": scene.caption.replace(scene.subject, f"[{scene.subject}]", 1),
            "editing_prompt": target.caption.replace(new, f"[{new}]", 1),
            "editing_instruction": f"Change the {scene.subject} to a {new}",
            "editing_type_id": "1",
            "blended_word": f"{scene.subject} {new}",
            "mask": encoded(mask),
        }
        if len(items) == n:
            break
    (folder / "mapping_file.json").write_text(json.dumps(items, indent=1) + "\n")


# ---- Editing -------------------------------------------------------------------------------------


class PublishedRefine(Refine):
    """Refine as in google's code: padding takes over the source's token at the same position."""

    def align(self, source: Prompt, target: Prompt) -> Alignment:
        alignment = refinement(source, target)
        mapper, exists = alignment.mapper.clone(), alignment.exists.clone()
        padding = torch.arange(target.end + 1, len(exists))
        mapper[:, padding], exists[padding] = 0, 1
        mapper[padding, padding] = 1
        return Alignment(mapper, exists)


class PublishedEdit(minip2p.Hook):
    """A bound edit that replaces self-attention at twice the coarse size, too.

    Its blends read the maps after the token weights.
    """

    def __init__(self, edit: Any):
        self.edit = edit

    def at(self, call: int, calls: int, timestep: int) -> minip2p.Hook:
        return PublishedEdit(self.edit.at(call, calls, timestep))

    def applies_to(self, layer: minip2p.Layer) -> bool:
        return self.linear(layer) is not None

    def linear(self, layer: minip2p.Layer) -> Any:
        h, w = self.edit.coarse
        if not layer.is_cross:
            return self.edit.self_attn if layer.height * layer.width <= 4 * h * w else None
        edit = self.edit.linear(layer)
        return edit and replace(edit, probes=()).then_read(edit.probes)

    def after_step(self, latents: Tensor) -> Tensor:
        return self.edit.after_step(latents)


def edit_of(item: dict[str, Any]) -> Reweight | Refine:
    """Return the edit of the protocol "plain"."""
    words = blended_words(item)
    if not words:
        return Refine(CROSS, SELF)
    blend = LocalBlend(words, threshold=0.3, start=0.2)
    return Reweight({words[1]: 2.0}, Refine(CROSS, SELF, blend), everywhere=False)


def plain_edit(
    model: minip2p.StableDiffusion, prompts: list[str], item: dict[str, Any], size: Any
) -> tuple[Any, str]:
    """Return the bound edit of the protocol "plain", and a note where it lacks blend and weight."""
    try:
        return bind_edit(model, prompts, edit_of(item), size)[1], ""
    except UserError as error:  # an annotated word that the prompts do not have
        blended_words(item)
        return bind_edit(model, prompts, Refine(CROSS, SELF), size)[1], str(error)


def published_edit(
    model: minip2p.StableDiffusion, prompts: list[str], item: dict[str, Any], size: Any
) -> tuple[Any, str]:
    """Return the bound edit of the published runs, and a note where it has no blend."""
    words = blended_words(item)
    tokens = [minip2p.text.tokenize(model.tokenizer, prompt) for prompt in prompts]
    known = [word for word, prompt in zip(words, tokens, strict=bool(words)) if prompt.find(word)]
    blend = LocalBlend(known, threshold=0.3, start=0.2) if known else None
    edit: Any = PublishedRefine(CROSS, SELF, blend)
    if words and words[1] in known:
        edit = Reweight({words[1]: 2.0}, edit, everywhere=False)
    bound: Any = bind_edit(model, prompts, edit, size)[1]
    for row_blend in bound.blends:
        columns = torch.zeros_like(row_blend.columns)  # b 77 2
        for row, (word, prompt) in enumerate(zip(words, tokens, strict=True)):
            columns[row, prompt.find(word), 0] = 1
        row_blend.columns = columns
    lacks = words and not known
    return PublishedEdit(bound), f"The prompts have no word of {words}." if lacks else ""


def edit_friendly_edit(
    model: minip2p.StableDiffusion, prompts: list[str], steps: int, skip: int, size: Any
) -> Any:
    """Return the bound edit of the published edit-friendly runs.

    Their windows are fractions of all steps, counted from the first call that is made.
    """
    cross, self_window = (min(1.0, int(f * steps) / (steps - skip)) for f in (CROSS, SELF))
    same_length = len({len(prompt.split(" ")) for prompt in prompts}) == 1
    kind = WordSwap if same_length else PublishedRefine
    return bind_edit(model, prompts, kind(cross, self_window), size)[1]


def edited(
    model: minip2p.StableDiffusion,
    file: Path,
    item: dict[str, Any],
    method: str,
    steps: int,
    published: bool = True,
) -> tuple[Image.Image, Image.Image, str]:
    """Return the picture, its edit in the same size, and what could not be done."""
    prompts = [plain(item["original_prompt"]), plain(item["editing_prompt"])]
    settings: dict[str, Any] = {"num_inference_steps": steps, **METHODS[method]}
    picture: Any = file
    if published:
        f = model.vae.f
        with Image.open(file) as image:
            whole = image.convert("RGB")
        size = model.sample_size[1] * f, model.sample_size[0] * f
        picture = ImageOps.fit(whole, size, Image.Resampling.BICUBIC)
    skip = 0
    if method == "edit-friendly":
        skip = SKIP * steps // STEPS if published else 0
        settings |= {"guidance_scale": 1.0 if published else GUIDANCE, "skip": skip}
    source = minip2p.invert(model, picture, prompts[0], **settings)
    latent_size = source.trajectory.shape[-2:]
    if published and method == "edit-friendly":
        hook, note = edit_friendly_edit(model, prompts, steps, skip, latent_size), ""
    else:
        bind = published_edit if published else plain_edit
        hook, note = bind(model, prompts, item, latent_size)
    out = minip2p.generate(
        model,
        prompts,
        hooks=[hook],
        source=source,
        guidance_scale=GUIDANCE,
        negative_prompt=prompts[0] if method == "negative-prompt" else "",
    )
    if published:
        edit = out.images[1]
        if edit.size != whole.size:
            edit = edit.resize(whole.size, Image.Resampling.BICUBIC)
        return whole, edit, note
    return source.picture.whole, source.picture.put_back(out.images[1]), note


def stored(edit: Image.Image, published: bool) -> tuple[Image.Image, bytes]:
    """Return the edit as it is measured, and the content of its file."""
    file = io.BytesIO()
    edit.save(file, "JPEG" if published else "PNG")
    return Image.open(file).convert("RGB"), file.getvalue()


# ---- Metrics -------------------------------------------------------------------------------------


def compared(a: Image.Image, b: Image.Image, mask: Tensor) -> dict[str, float]:
    """Compute PSNR, MSE and SSIM outside of a mask: as published, and per valid pixel.

    mask: H W, bool. A mask without outside has no figures.
    """
    keep = ~mask
    if not keep.any():
        return {}
    x, y = (metrics.to_pixels(image).double() * keep for image in (a, b))
    mse = float((x - y).square().mean())
    valid_mse = mse * keep.numel() / int(keep.sum())
    ssim = metrics.ssim(x, y, "valid")
    inside = keep[5:-5, 5:-5]
    return {
        "psnr": metrics.psnr(mse),
        "mse": mse,
        "ssim": float(ssim.mean()),
        "valid psnr": metrics.psnr(valid_mse),
        "valid mse": valid_mse,
        # Of windows whose middle is valid; what is black on both sides agrees.
        "valid ssim": float(ssim[..., inside].mean()) if inside.any() else float("nan"),
    }


Metric = Callable[[Image.Image, Image.Image, Tensor, str], dict[str, float]]


def model_metrics(args: argparse.Namespace) -> Iterator[tuple[str, Metric | str]]:
    """Yield the metrics that need a model, or the reason why one is left out."""
    try:
        yield "LPIPS", lpips_of(args)
    except Exception as error:  # no package, or no weights and no network to get them
        yield "LPIPS", f"the package lpips and its weights are not at hand ({error})"
    for name, folder, make in (
        ("structure distance", args.dino, structure_of),
        ("CLIP scores", args.clip, clip_of),
    ):
        option = "--dino" if make is structure_of else "--clip"
        yield name, make(folder, args) if folder else f"give {option} FOLDER"


def lpips_of(args: argparse.Namespace) -> Metric:
    """Return LPIPS of the background, with SqueezeNet (Zhang et al. 2018)."""
    import lpips

    device = args.device
    net = lpips.LPIPS(net="squeeze", verbose=False).to(device).eval()

    def measure(a: Image.Image, b: Image.Image, mask: Tensor, prompt: str) -> dict[str, float]:
        if mask.all():
            return {}
        x, y = ((metrics.to_pixels(i) * ~mask * 2 - 1).to(device) for i in (a, b))
        return {"lpips": float(net(x, y))}

    return measure


def structure_of(folder: str, args: argparse.Namespace) -> Metric:
    """Return the distance of the similarities of DINO's last keys (Tumanyan et al. 2022, eq. 4)."""
    from transformers import ViTModel

    device, is_published = args.device, args.protocol == "published"
    net = ViTModel.from_pretrained(folder, add_pooling_layer=False).to(device).eval()
    layer = [m for name, m in net.named_modules() if name.endswith(KEYS)][-1]
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def resemblance(image: Image.Image) -> Tensor:
        size = net.config.image_size
        x = metrics.to_pixels(image) * (255 if is_published else 1)
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=not is_published)
        net(((x - mean) / std).to(device))
        keys = F.normalize(kept.pop(), dim=-1)  # tokens, heads·d
        return keys @ keys.T

    def measure(a: Image.Image, b: Image.Image, mask: Tensor, prompt: str) -> dict[str, float]:
        return {"structure": float(F.mse_loss(resemblance(b), resemblance(a)))}

    return measure


def clip_processor(folder: str) -> Any:
    """Load CLIP's processor. Images are resized by Pillow, as in the published figures."""
    import transformers

    # transformers 5 resizes by torchvision, if it is there, and has another class for Pillow.
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    return transformers.CLIPProcessor(images.from_pretrained(folder), tokenizer)


def clip_of(folder: str, args: argparse.Namespace) -> Metric:
    """Return 100 times the cosine of picture and target prompt (Hessel et al. 2021).

    One figure is of the whole picture, the other of a picture that is black outside of the mask.
    """
    from transformers import CLIPModel

    device = args.device
    net = CLIPModel.from_pretrained(folder).to(device).eval()
    processor = clip_processor(folder)

    def score(pixels: Tensor, prompt: str) -> float:
        image = minip2p.vae.to_images(pixels * 2 - 1)[0]
        settings = {"return_tensors": "pt", "padding": True, "truncation": True}
        inputs = processor(text=[prompt], images=[image], **settings).to(device)
        out = net(**inputs)
        cosine = F.cosine_similarity(out.image_embeds, out.text_embeds)
        return max(0.0, 100 * float(cosine))

    def measure(a: Image.Image, b: Image.Image, mask: Tensor, prompt: str) -> dict[str, float]:
        pixels = metrics.to_pixels(b)
        return {"clip": score(pixels, prompt), "clip edited": score(pixels * mask, prompt)}

    return measure


# ---- The run -------------------------------------------------------------------------------------


def finished(file: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what an earlier run has measured. Raises UserError if it had other settings.

    The first line says them. A last line that was cut short does not count, nor do errors.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings) + "\n")
        return {}
    first, *lines = file.read_text().split("\n")
    if json.loads(first) != settings:
        raise UserError(
            f"{file} is of a run with {first}, not {json.dumps(settings)}: choose --out."
        )
    measured = [line for line in lines[:-1] if "error" not in json.loads(line)]
    file.write_text("".join(f"{line}\n" for line in [first, *measured]))
    return {result["id"]: result for result in map(json.loads, measured)}


@dataclass(frozen=True)
class Picture:
    """One of the set, to be edited."""

    row: dict[str, Any]  # its id
    item: dict[str, Any]  # what the set says of it


class Editor:
    """A model and the metrics, in this process or on a Ray cluster."""

    def __init__(self, args: argparse.Namespace):
        model = minip2p.load(args.model, device=args.device)
        # The authors' scheduler has no offset, timesteps 980 to 0, but in edit-friendly runs.
        has_offset = args.protocol == "published" and args.method == "edit-friendly"
        schedule = {
            **model.schedule,
            "steps_offset": int(has_offset),
            "set_alpha_to_one": False,
        }
        self.model, self.args = replace(model, schedule=schedule), args
        loaded = dict(model_metrics(args))
        self.metrics = [metric for metric in loaded.values() if not isinstance(metric, str)]
        self.left_out = {name: reason for name, reason in loaded.items() if isinstance(reason, str)}

    def describe(self) -> dict[str, Any]:
        return {"id": self.model.identity(), "left out": self.left_out}

    @torch.inference_mode()
    def run(self, pictures: Sequence[Picture]) -> list[tuple[Row, Files]]:
        """Return the figures of each picture, or an error, and the file of its edit."""
        results: list[tuple[Row, Files]] = []
        for picture in pictures:
            try:
                results.append(self.measured(picture))
            except (OSError, ValueError, TypeError, AttributeError) as error:
                # One damaged picture or wrong annotation of 700 must not end the run.
                results.append(({**picture.row, "note": "", "error": str(error)}, {}))
        return results

    def measured(self, picture: Picture) -> tuple[Row, Files]:
        """Edit one picture. Raises UserError or OSError where it can't be done."""
        item, path = picture.item, Path(picture.item["image_path"])
        published = self.args.protocol == "published"
        file = self.args.data / "annotation_images" / path
        original, edit, note = edited(
            self.model, file, item, self.args.method, self.args.steps, published
        )
        edit, content = stored(edit, published)
        mask = decoded(item["mask"], original.height, original.width)
        row = {**picture.row, "note": note, **compared(original, edit, mask)}
        for metric in self.metrics:
            row |= metric(original, edit, mask, plain(item["editing_prompt"]))
        return row, {str(path.with_suffix(".jpg" if published else ".png")): content}


@contextmanager
def editors(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Work]]:
    """Yield an Editor's description, and a function from groups of pictures to their results."""
    if args.workers or args.address:
        device = None if args.device == "cuda" else args.device
        with cluster(Editor, (args,), device, args.workers, args.address) as workers:
            yield workers
    else:
        editor = Editor(args)
        yield editor.describe(), lambda groups: map(editor.run, groups)


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the figures or the error of every picture, by its id."""
    items = read_set(args.data)
    chosen = {k: v for k, v in items.items() if not args.only or k in args.only}
    settings = {"model": args.model, "method": args.method, "steps": args.steps}
    settings["protocol"] = args.protocol
    file = args.out / "results.jsonl"
    results = finished(file, settings)
    left = [[Picture({"id": key}, item)] for key, item in chosen.items() if key not in results]
    if not left:
        return {key: results[key] for key in chosen}
    with editors(args) as (description, work):
        for name, reason in description["left out"].items():
            print(f"Left out: {name}: {reason}.", file=sys.stderr)
        for finished_groups in tqdm(work(left), desc=args.method, total=len(left)):
            for row, files in finished_groups:
                for name, content in files.items():
                    target = args.out / "annotation_images" / name
                    write_files({target: content})
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                results[row["id"]] = row
    return {key: results[key] for key in chosen}


def table(results: dict[str, dict[str, Any]], method: str, protocol: str) -> str:
    """Return the mean of every column under the published rows, then notes and errors."""
    errors = {key: r["error"] for key, r in results.items() if "error" in r}
    rows = [["", *(title for title, _ in COLUMNS.values())]]
    for name, values in PUBLISHED.items():
        blank = [""] * (len(COLUMNS) - len(values))
        rows.append([f"{name}, published", *(f"{value:.2f}" for value in values), *blank])
    means = [f"{method}, {protocol}, {len(results) - len(errors)} pictures"]
    for name, (_, factor) in COLUMNS.items():
        known = [r[name] for r in results.values() if np.isfinite(r.get(name, np.nan))]
        means.append(f"{factor * float(np.mean(known)):.2f}" if known else "-")
    rows.append(means)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    noted = [f"{key}: {r['note']}" for key, r in results.items() if r["note"]]
    if noted:
        lines += [f"{len(noted)} without blend and weight:", *noted]
    if errors:
        lines += [f"{len(errors)} with an error:", *(f"{k}: {e}" for k, e in errors.items())]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="PIE-Bench with minip2p.")
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="folder with mapping_file.json and annotation_images/")
    add("--make", type=Path, metavar="FOLDER", help="write a small set of renders there, and stop")
    add("--model", default="emoji", help="what minip2p.load takes")
    add("--method", choices=METHODS, default="direct")
    add("--protocol", choices=("published", "plain"), default="published", help="see the source")
    add("--steps", type=int, default=STEPS)
    add("--out", type=Path, default=Path("out/pie"), metavar="FOLDER")
    add("--only", nargs="*", metavar="ID", help="of these pictures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, help="processes that share the pictures, on Ray")
    add("--address", help="auto, or HOST:PORT of a Ray cluster, for the same")
    add("--dino", metavar="FOLDER", help="facebook/dino-vitb8, for structure distance")
    add("--clip", metavar="FOLDER", help="openai/clip-vit-large-patch14, for CLIP scores")
    args = parser.parse_args(arguments)
    if args.make:
        return make_set(args.make)
    if args.data is None:
        parser.error("give PIE-Bench's folder, or --make FOLDER for a small set of its shape")
    try:
        say(table(run(args), args.method, args.protocol))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
