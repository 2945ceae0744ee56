"""PIE-Bench: 700 given pictures, edited and measured as its authors do (Ju et al. 2024).

    python benchmarks/pie.py DATA --model FOLDER --method direct --out out/pie
    python benchmarks/pie.py --make pie-world         a small set of the same shape, of renders

DATA is the benchmark's folder: mapping_file.json and annotation_images/. Every picture is inverted,
edited with Refine, LocalBlend on the annotated words (start 0.2, threshold 0.3), twice the weight
of the new word, windows 0.4 and 0.6, guidance 7.5, 50 steps of DDIM from timestep 980; their
self-attention is the source's up to 32 x 32, twice the coarse size. Edits are written as pictures,
figures as one line of results.jsonl each: a run that was interrupted goes on where it was.

The mean of every column stands under the published rows of SD 1.4. Their background is what the
mask leaves, black elsewhere, and the mean over all pixels of the picture; "valid" columns are the
mean over the background's own. LPIPS needs the package lpips and its weights, structure distance
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
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import minip2p  # noqa: E402
from minip2p import LocalBlend, Refine, Reweight  # noqa: E402
from minip2p.pipeline import bind_edit  # noqa: E402
from minip2p.saved import write_files  # noqa: E402
from minip2p.sweep.ray import Work, cluster  # noqa: E402
from minip2p.sweep.results import Files, Row  # noqa: E402

STEPS, GUIDANCE, CROSS, SELF = 50, 7.5, 0.4, 0.6
METHODS = {  # arguments of invert
    "direct": {"method": "direct"},
    "ddim": {"method": "ddim"},
    "negative-prompt": {"method": "ddim"},  # the source's prompt for the empty one
    "edit-friendly": {"method": "edit-friendly", "guidance_scale": GUIDANCE},
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
    """Its pictures by their id. Raises ValueError if the folder is no PIE-Bench."""
    file = folder / "mapping_file.json"
    try:
        items = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no PIE-Bench: {file.name} can't be read: {error}.") from None
    for key, item in items.items():
        for name in ("image_path", "original_prompt", "editing_prompt", "blended_word", "mask"):
            if name not in item:
                raise ValueError(f"{file}: picture {key} has no {name}.")
    return items


def plain(prompt: str) -> str:
    """Without the brackets around what changes."""
    return prompt.replace("[", "").replace("]", "")


def decoded(runs: Sequence[int], height: int, width: int) -> Tensor:
    """A mask from pairs of start and length, row by row. → H W, bool; the border is always in it,
    as the authors have it against slips of annotation."""
    mask = torch.zeros(height * width, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask[start : start + length] = True
    mask = mask.view(height, width)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def encoded(mask: Tensor) -> list[int]:
    """The pairs of start and length of a mask, H W."""
    ends = (
        torch.cat([torch.zeros(1), mask.flatten().float(), torch.zeros(1)]).diff().nonzero()[:, 0]
    )
    return [n for a, b in ends.view(-1, 2).tolist() for n in (a, b - a)]


def make_set(folder: Path, n: int = 6, pixels: int = 512) -> None:
    """A set of the same shape: renders of scenes with one noun to exchange; their true edits, which
    PIE-Bench has not, beside them."""
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
        given, true = draw(scene), draw(target)
        things = torch.from_numpy(given.masks[scene.subject] + true.masks[new])
        mask = F.interpolate((things > 0).float()[None, None], (pixels, pixels))[0, 0] > 0
        for kind, drawn in (("annotation_images", given), ("true_images", true)):
            path = folder / kind / "1_change_object" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.image.resize((pixels, pixels), Image.Resampling.BICUBIC).save(path)
        items[name] = {
            "image_path": f"1_change_object/{name}.png",
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


class Wider(minip2p.Hook):
    """A bound edit whose self-attention is the source's at layers of twice the coarse size, too."""

    def __init__(self, edit: Any):
        self.edit = edit

    def at(self, call: int, calls: int, timestep: int) -> minip2p.Hook:
        return Wider(self.edit.at(call, calls, timestep))

    def applies_to(self, layer: minip2p.Layer) -> bool:
        return self.linear(layer) is not None

    def linear(self, layer: minip2p.Layer) -> Any:
        h, w = self.edit.coarse
        small = not layer.is_cross and layer.height * layer.width <= 4 * h * w
        return self.edit.self_attn if small else self.edit.linear(layer)

    def after_step(self, latents: Tensor) -> Tensor:
        return self.edit.after_step(latents)


def edit_of(item: dict[str, Any]) -> Reweight | Refine:
    """As published; blended_word is empty or the old and the new word."""
    if not item["blended_word"]:
        return Refine(CROSS, SELF)
    old, new = item["blended_word"].split(" ")[:2]
    blend = LocalBlend([old, new], threshold=0.3, start=0.2)
    return Reweight({new: 2.0}, Refine(CROSS, SELF, blend), everywhere=False)


def edited(
    model: minip2p.StableDiffusion, file: Path, item: dict[str, Any], method: str, steps: int
) -> tuple[Image.Image, Image.Image, str]:
    """The picture, its edit in the same size, and what could not be done as published."""
    prompts = [plain(item["original_prompt"]), plain(item["editing_prompt"])]
    source = minip2p.invert(model, file, prompts[0], num_inference_steps=steps, **METHODS[method])
    size, note = source.trajectory.shape[-2:], ""
    try:
        bound = bind_edit(model, prompts, edit_of(item), size)[1]
    except ValueError as error:  # an annotated word that the prompts do not have
        note = str(error)
        bound = bind_edit(model, prompts, Refine(CROSS, SELF), size)[1]
    out = minip2p.generate(
        model,
        prompts,
        edit=Wider(bound),
        source=source,
        guidance_scale=GUIDANCE,
        negative_prompt=prompts[0] if method == "negative-prompt" else "",
    )
    return source.picture.whole, source.picture.put_back(out.images[1]), note


# ---- Metrics -------------------------------------------------------------------------------------


def pixels_of(image: Image.Image) -> Tensor:
    """→ 1 3 H W in [0, 1]"""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Wang et al. 2004, eq. 13, in Gaussian windows of 11 x 11 that are whole inside the picture.
    x, y: b 3 H W → b 3 H-10 W-10"""
    places = torch.arange(-5.0, 6.0, dtype=x.dtype)
    bell = (-(places**2) / (2 * 1.5**2)).exp()
    bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, bell, groups=t.shape[1]), bell.mT, groups=t.shape[1])

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance, c1, c2 = mean(x * y) - mean_x * mean_y, 0.01**2, 0.03**2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )


def compared(a: Image.Image, b: Image.Image, mask: Tensor) -> dict[str, float]:
    """PSNR, MSE and SSIM outside of a mask: as published, and per valid pixel. mask: H W, bool

    Nothing where nothing is outside.
    """
    keep = ~mask
    if not keep.any():
        return {}
    x, y = (pixels_of(image).double() * keep for image in (a, b))
    mse = float((x - y).square().mean())
    valid_mse = mse * keep.numel() / int(keep.sum())
    ssim = ssim_map(x, y)
    inside = keep[5:-5, 5:-5]
    return {
        "psnr": psnr(mse),
        "mse": mse,
        "ssim": float(ssim.mean()),
        "valid psnr": psnr(valid_mse),
        "valid mse": valid_mse,
        # Of windows whose middle is valid; what is black on both sides agrees.
        "valid ssim": float(ssim[..., inside].mean()) if inside.any() else float("nan"),
    }


def psnr(mse: float) -> float:
    """In dB, of values from 0 to 1."""
    return float("inf") if mse == 0 else -10 * float(np.log10(mse))


Metric = Callable[[Image.Image, Image.Image, Tensor, str], dict[str, float]]


def others(args: argparse.Namespace) -> Iterator[tuple[str, Metric | str]]:
    """The metrics that need a model of their own, or why one is left out."""
    try:
        yield "LPIPS", lpips_of(args.device)
    except Exception as error:  # no package, or no weights and no network to get them
        yield "LPIPS", f"the package lpips and its weights are not at hand ({error})"
    for name, folder, make in (
        ("structure distance", args.dino, structure_of),
        ("CLIP scores", args.clip, clip_of),
    ):
        option = "--dino" if make is structure_of else "--clip"
        yield name, make(folder, args.device) if folder else f"give {option} FOLDER"


def lpips_of(device: str) -> Metric:
    """Zhang et al. 2018, with SqueezeNet, of the background."""
    import lpips

    net = lpips.LPIPS(net="squeeze", verbose=False).to(device).eval()

    def measure(a: Image.Image, b: Image.Image, mask: Tensor, prompt: str) -> dict[str, float]:
        x, y = ((pixels_of(i) * ~mask * 2 - 1).to(device) for i in (a, b))
        return {"lpips": float(net(x, y))}

    return measure


def structure_of(folder: str, device: str) -> Metric:
    """Tumanyan et al. 2022, eq. 4: how the keys of DINO's last layer resemble each other."""
    from transformers import ViTModel

    net = ViTModel.from_pretrained(folder, add_pooling_layer=False).to(device).eval()
    names = "attention.key", "attention.k_proj"  # the second since transformers 5
    layer = [m for name, m in net.named_modules() if name.endswith(names)][-1]
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def resemblance(image: Image.Image) -> Tensor:
        size = net.config.image_size
        x = F.interpolate(pixels_of(image), (size, size), mode="bilinear", antialias=True)
        net(((x - mean) / std).to(device))
        keys = F.normalize(kept.pop(), dim=-1)  # tokens, heads·d
        return keys @ keys.T

    def measure(a: Image.Image, b: Image.Image, mask: Tensor, prompt: str) -> dict[str, float]:
        return {"structure": float(F.mse_loss(resemblance(b), resemblance(a)))}

    return measure


def clip_of(folder: str, device: str) -> Metric:
    """Hessel et al. 2021: 100 times the cosine of picture and target prompt, whole, and with all
    but the mask black."""
    from transformers import CLIPModel, CLIPProcessor

    net = CLIPModel.from_pretrained(folder).to(device).eval()
    processor = CLIPProcessor.from_pretrained(folder)

    def score(pixels: Tensor, prompt: str) -> float:
        image = minip2p.vae.to_images(pixels * 2 - 1)[0]
        settings = {"return_tensors": "pt", "padding": True, "truncation": True}
        inputs = processor(text=[prompt], images=[image], **settings).to(device)
        out = net(**inputs)
        cosine = F.cosine_similarity(out.image_embeds, out.text_embeds)
        return max(0.0, 100 * float(cosine))

    def measure(a: Image.Image, b: Image.Image, mask: Tensor, prompt: str) -> dict[str, float]:
        pixels = pixels_of(b)
        return {"clip": score(pixels, prompt), "clip edited": score(pixels * mask, prompt)}

    return measure


# ---- The run -------------------------------------------------------------------------------------


def finished(file: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier run has measured. Raises ValueError if it had other settings.

    The first line says them; a last line that was cut short does not count.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(about) + "\n")
        return {}
    first, *lines = file.read_text().split("\n")
    if json.loads(first) != about:
        raise ValueError(f"{file} is of a run with {first}, not {json.dumps(about)}: choose --out.")
    whole = lines[:-1]  # what ends with a newline
    file.write_text("".join(f"{line}\n" for line in [first, *whole]))
    return {result["id"]: result for result in map(json.loads, whole)}


@dataclass(frozen=True)
class Picture:
    """One of the set, to be edited."""

    row: dict[str, Any]  # its id
    item: dict[str, Any]  # what the set says of it


class Editor:
    """A model and the metrics, in this process or on a Ray cluster."""

    def __init__(self, args: argparse.Namespace):
        model = minip2p.load(args.model, device=args.device)
        # The authors' scheduler has no offset: timesteps 980 to 0.
        schedule = {**model.schedule, "steps_offset": 0, "set_alpha_to_one": False}
        self.model, self.args = replace(model, schedule=schedule), args
        metrics = dict(others(args))
        self.metrics = [metric for metric in metrics.values() if not isinstance(metric, str)]
        self.left_out = {name: why for name, why in metrics.items() if isinstance(why, str)}

    def describe(self) -> dict[str, Any]:
        return {"id": self.model.identity(), "left out": self.left_out}

    @torch.inference_mode()
    def run(self, pictures: Sequence[Picture]) -> list[tuple[Row, Files]]:
        """The figures of each, and its edit as a PNG."""
        made = []
        for picture in pictures:
            item, path = picture.item, Path(picture.item["image_path"])
            source = self.args.data / "annotation_images" / path
            given, edit, note = edited(self.model, source, item, self.args.method, self.args.steps)
            mask = decoded(item["mask"], given.height, given.width)
            row = {**picture.row, "note": note, **compared(given, edit, mask)}
            for metric in self.metrics:
                row |= metric(given, edit, mask, plain(item["editing_prompt"]))
            png = io.BytesIO()
            edit.save(png, "PNG")
            made.append((row, {str(path.with_suffix(".png")): png.getvalue()}))
        return made


@contextmanager
def editors(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Work]]:
    """What an Editor tells, and a function from groups of pictures to what was made of each."""
    if args.workers or args.address:
        device = None if args.device == "cuda" else args.device
        with cluster(Editor, (args,), device, args.workers, args.address) as those:
            yield those
    else:
        editor = Editor(args)
        yield editor.describe(), lambda groups: map(editor.run, groups)


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of every picture, by its id. Raises ValueError if one can't be made."""
    items = read_set(args.data)
    chosen = {k: v for k, v in items.items() if not args.only or k in args.only}
    about = {"model": args.model, "method": args.method, "steps": args.steps}
    file = args.out / "results.jsonl"
    results = finished(file, about)
    left = [[Picture({"id": key}, item)] for key, item in chosen.items() if key not in results]
    if not left:
        return {key: results[key] for key in chosen}
    with editors(args) as (told, work):
        for name, why in told["left out"].items():
            print(f"Left out: {name}: {why}.", file=sys.stderr)
        for made in tqdm(work(left), desc=args.method, total=len(left)):
            for row, files in made:
                if "error" in row:  # its worker was lost, again and again
                    raise ValueError(f"{row['id']}: {row['error']}")
                for name, content in files.items():
                    target = args.out / "annotation_images" / name
                    write_files({target: content})
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                results[row["id"]] = row
    return {key: results[key] for key in chosen}


def table(results: dict[str, dict[str, Any]], method: str) -> str:
    """The mean of every column, under the published rows."""
    rows = [["", *(title for title, _ in COLUMNS.values())]]
    for name, values in PUBLISHED.items():
        blank = [""] * (len(COLUMNS) - len(values))
        rows.append([f"{name}, published", *(f"{value:.2f}" for value in values), *blank])
    own = [f"{method}, {len(results)} pictures"]
    for name, (_, factor) in COLUMNS.items():
        known = [r[name] for r in results.values() if np.isfinite(r.get(name, np.nan))]
        own.append(f"{factor * float(np.mean(known)):.2f}" if known else "-")
    rows.append(own)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    noted = [f"{key}: {r['note']}" for key, r in results.items() if r["note"]]
    if noted:
        lines += [f"{len(noted)} without blend and weight:", *noted]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="PIE-Bench with minip2p.")
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="folder with mapping_file.json and annotation_images/")
    add("--make", type=Path, metavar="FOLDER", help="write a small set of renders there, and stop")
    add("--model", default="emoji", help="what minip2p.load takes")
    add("--method", choices=METHODS, default="direct")
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
        print(table(run(args), args.method))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
