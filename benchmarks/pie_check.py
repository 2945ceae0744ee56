"""Compare the figures of pie.py with those of the authors' evaluator, on the same pictures.

    pip install --target LIBRARY --no-deps torchmetrics==1.2.0 lightning-utilities \\
        torchvision==0.15.2 lpips==0.1.4
    PYTHONPATH=LIBRARY python benchmarks/pie_check.py --theirs PnPInversion

--theirs is a checkout of github.com/cure-lab/PnPInversion. Its evaluate.py runs unchanged, with
libraries of its time, on a small set that pie.py edits with the bundled model. DINO, CLIP and
SqueezeNet have random weights, the same on both sides. It takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pie
import torch
import transformers
from PIL import Image
from torch import nn

import minip2p
from minip2p import metrics, vae

METHOD, FOLDER = "1_directinversion+p2p", "output/directinversion+p2p"  # names in evaluate.py
CLIP = "openai/clip-vit-large-patch14"  # evaluate.py's name, a folder here
MASKED = {"structure_distance": "structure"} | {n: n for n in ("psnr", "lpips", "mse", "ssim")}
PARTS = "", "_unedit_part", "_edit_part"
CLIP_COLUMNS = [f"clip_similarity_{n}" for n in ("source_image", "target_image")]
CLIP_COLUMNS += ["clip_similarity_target_image_edit_part"]
COLUMNS = [name + part for name in MASKED for part in PARTS] + CLIP_COLUMNS


def save_networks(dino: Path, clip: Path, vit: transformers.ViTConfig, pixels: int) -> None:
    """Save a ViT of this config and a small CLIP for images of `pixels`, with random weights."""
    torch.manual_seed(0)
    transformers.ViTModel(vit).save_pretrained(dino)
    folder = Path(minip2p.__file__).parent / "models" / "emoji" / "tokenizer"
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 37}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**sizes, **ends, "vocab_size": len(tokenizer)}
    vision = {**sizes, "image_size": pixels, "patch_size": 10}
    torch.manual_seed(1)  # whose cosines are not all negative, and cut off at 0
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(clip)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(clip)


class Dino(nn.Module):
    """A ViTModel with the modules of DINO's code that the evaluator hooks.

    The evaluator reads the keys from the output of `qkv`. Queries and values are keys here.
    """

    def __init__(self, vit: transformers.ViTModel):
        super().__init__()
        self.vit, self.blocks = vit, nn.ModuleList()
        for name, to_keys in list(vit.named_modules()):
            if name.endswith(pie.KEYS):
                block: Any = nn.Identity()
                block.attn = nn.Identity()
                block.attn.qkv, block.attn.attn_drop = nn.Identity(), nn.Identity()
                self.blocks.append(block)
                to_keys.register_forward_hook(self.pass_on(block.attn.qkv))

    @staticmethod
    def pass_on(qkv: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, keys: torch.Tensor) -> None:
            qkv(torch.cat([keys, keys, keys], dim=-1))

        return hook

    def forward(self, x: torch.Tensor) -> Any:
        return self.vit(x)


def load_random_weights(dino: str) -> None:
    """Replace what downloads DINO's and SqueezeNet's weights."""
    import torchvision

    vit = transformers.ViTModel.from_pretrained(dino, add_pooling_layer=False)
    torch.hub.load = lambda *_: Dino(vit)
    torch.manual_seed(2)
    squeeze = torchvision.models.squeezenet1_1().state_dict()
    torchvision.models._api.WeightsEnum.get_state_dict = lambda *_, **__: squeeze


def return_tensors(name: str) -> None:
    """Let a method of CLIPModel return its tensor, as it did before transformers 5."""
    method = getattr(transformers.CLIPModel, name)

    def features(*args: Any) -> torch.Tensor:
        out = method(*args)
        return getattr(out, "pooler_output", out)

    setattr(transformers.CLIPModel, name, features)


def figures_of_theirs(checkout: Path) -> dict[str, dict[str, float]]:
    """Run evaluate.py on data/ and output/ of this folder. → the columns of every picture"""
    return_tensors("get_image_features")
    return_tensors("get_text_features")
    transformers.CLIPProcessor.from_pretrained = pie.clip_processor  # by Pillow, as theirs was
    sys.path.insert(0, str(checkout))
    options = ["--device", "cpu", "--tgt_methods", METHOD, "--result_path", "theirs.csv"]
    sys.argv = ["evaluate.py", *options, "--metrics", *COLUMNS]
    with contextlib.redirect_stdout(sys.stderr):
        runpy.run_path(str(checkout / "evaluation" / "evaluate.py"), run_name="__main__")
    with open("theirs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {r["file_id"]: {c: float(r[f"{METHOD}|{c}"].strip("[]")) for c in COLUMNS} for r in rows}


def blackened(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    return vae.to_images(metrics.to_pixels(image) * ~mask * 2 - 1)[0]


def figures_of_ours(
    item: dict[str, Any], row: dict[str, Any], measure: dict[str, Any]
) -> dict[str, float]:
    """Return the row of results.jsonl, and the columns that are not in it by the same metrics."""
    name = item["image_path"]
    a, b = (
        Image.open(f"{folder}/annotation_images/{name}").convert("RGB")
        for folder in ("data", FOLDER)
    )
    mask = pie.decoded(item["mask"], a.height, a.width)
    figures = {}
    for part, hidden in zip(PARTS, (torch.zeros_like(mask), mask, ~mask), strict=True):
        values = pie.compared(a, b, hidden) | measure["LPIPS"](a, b, hidden, "")
        if not hidden.all():
            pair = (blackened(image, hidden) for image in (a, b))
            values |= measure["structure distance"](*pair, mask, "")
        for name, key in MASKED.items():
            figures[name + part] = values.get(key, float("nan"))
    source = pie.plain(item["original_prompt"])
    figures["clip_similarity_source_image"] = measure["CLIP scores"](a, a, mask, source)["clip"]
    for name in ("psnr", "lpips", "mse", "ssim"):
        figures[f"{name}_unedit_part"] = row.get(name, float("nan"))
    figures["structure_distance"] = row["structure"]
    figures["clip_similarity_target_image"] = row["clip"]
    figures["clip_similarity_target_image_edit_part"] = row["clip edited"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="pie.py beside the authors' evaluator.")
    parser.add_argument("--theirs", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("out/pie-check"), metavar="FOLDER")
    parser.add_argument("--pictures", type=int, default=4)
    args = parser.parse_args()
    checkout = args.theirs.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)
    transformers.logging.set_verbosity_error()

    pie.make_set(Path("data"), args.pictures)
    items = pie.read_set(Path("data"))
    *_, last = items
    items[last]["mask"] = [0, 512 * 512]  # a picture without background
    Path("data/mapping_file.json").write_text(json.dumps(items))
    vit = transformers.ViTConfig(image_size=224, patch_size=8, intermediate_size=768)
    save_networks(Path("dino"), Path(CLIP), vit, 50)
    load_random_weights("dino")

    Path(FOLDER, "results.jsonl").unlink(missing_ok=True)  # measure again
    networks = ["--dino", "dino", "--clip", CLIP]
    pie.main(["data", "--out", FOLDER, "--steps", "10", "--device", "cpu", *networks])
    lines = Path(FOLDER, "results.jsonl").read_text().splitlines()[1:]
    rows = {row["id"]: row for row in map(json.loads, lines)}
    options = Namespace(device="cpu", protocol="published", dino="dino", clip=CLIP)
    measure = dict(pie.model_metrics(options))
    ours = {key: figures_of_ours(items[key], rows[key], measure) for key in items}
    theirs = figures_of_theirs(checkout)

    print("| column | pie.py | evaluate.py | largest difference |\n|---|---|---|---|")
    for column in COLUMNS:
        x, y = (np.array([side[key][column] for key in theirs]) for side in (ours, theirs))
        difference = abs(np.nan_to_num(x, nan=-1) - np.nan_to_num(y, nan=-1)).max()
        print(f"| {column} | {np.nanmean(x):.6g} | {np.nanmean(y):.6g} | {difference:.1e} |")


if __name__ == "__main__":
    main()
