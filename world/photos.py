"""Given pictures, edited, against the truth: the same scene drawn with the other noun.

    python -m world.photos                    every way, the table of README.md: half an hour
    python -m world.photos --many             84 pictures, the two ways that one would choose
    python -m world.photos --quick            four pictures, these two
    python -m world.photos --costs            seconds of inverting and editing, by method

A "photograph" is a render of a scene that was never trained on. It is inverted, one noun of its
caption is exchanged, and the result is compared with the input outside of the old and the new
thing, and with the true picture, which no photograph has.

row 0        of the source's row to the VAE's picture of the input, in dB: 60 is as exact as it gets
background   outside of both things and a twentieth of the width around them, to the input
to truth     the whole picture to the true one
IoU          of the cells where the new thing is seen, to those where it truly is
work         rows that the UNet computes for a picture: of the inversion, and of the edit

Shapes:  h w pixels of a picture · 16 16 the detector's cells
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import minip2p
from minip2p import LocalBlend, WordSwap, metrics
from minip2p.invert import invert
from minip2p.vae import to_images

from .bench import STEPS, Bench
from .detector import covered, load
from .figures import Facts, written
from .scenes import Drawn, Scene, draw


@dataclass(frozen=True)
class Way:
    """How pictures are inverted, and the edits that are made of each."""

    name: str
    guidance: float
    edits: Sequence[str] = ("windows", "+ LocalBlend")
    steps: int = STEPS
    inversion: Mapping[str, Any] = field(default_factory=dict)  # arguments of invert
    negative: bool = False  # the source's prompt in place of the empty one (Miyake et al. 2023)


def ddim(**options: Any) -> dict[str, Any]:
    return {"method": "ddim", **options}


def friendly(guidance: float, **options: Any) -> dict[str, Any]:
    return {"method": "edit-friendly", "guidance_scale": guidance, **options}


DIRECT = Way("direct", 3)
FRIENDLY = Way("edit-friendly", 3, inversion=friendly(3))
CHOSEN = (DIRECT, FRIENDLY)
MANY = 84  # pictures, for narrower intervals
WAYS = (
    Way("DDIM", 1, ["windows"], inversion=ddim()),
    Way("DDIM", 1, ["windows"], 50, ddim()),
    Way("DDIM", 3, ["windows"], inversion=ddim()),
    Way("DDIM", 7.5, ["windows"], inversion=ddim()),
    Way("negative-prompt", 3, ["windows"], inversion=ddim(), negative=True),
    Way("negative-prompt", 7.5, ["windows"], inversion=ddim(), negative=True),
    Way("direct", 3, ["windows", "+ LocalBlend", "+ the true mask"]),
    Way("direct", 5, ["+ LocalBlend"]),
    Way("direct", 7.5, ["+ LocalBlend"]),
    Way("direct", 3, ["+ LocalBlend"], 50),
    Way("fixed point", 1, ["+ LocalBlend"], inversion=ddim(refinements=3)),
    Way("direct, fixed point", 3, ["+ LocalBlend"], inversion={"refinements": 3}),
    FRIENDLY,
    Way("edit-friendly", 7.5, inversion=friendly(7.5)),
    Way("edit-friendly, 7 skipped", 7.5, inversion=friendly(7.5, skip=7)),
)


def measure(bench: Bench, ways: Sequence[Way] = CHOSEN, n: int | None = None) -> Facts:
    """Edit every picture in every way. n: the number of pictures, instead of the bench's."""
    facts, sheet = Facts(), []
    scenes = bench.scenes("photos", n or bench.items("photos"), bench.swaps)
    for scene in tqdm(scenes, desc="photos"):
        options = bench.swaps(scene)
        target, old, new = options[scene.layout % len(options)]
        pixels = bench.model.sample_size[0] * bench.model.vae.f
        pair = Pair(draw(scene, pixels), draw(target, pixels), old, new)
        results: dict[str, Image.Image] = {"the input": pair.photo.image}
        for way in ways:
            results |= edited(bench.model, way, pair, scene.caption, target.caption, facts)
        seen = bench.detector.see([*results.values(), pair.true.image])
        row: list[Any] = [(pair.true.image, f"the truth: {new}", [])]
        for i, (name, image) in enumerate(results.items()):
            note = facts[name]
            shows_new, lost_old = seen.shows(i, new), not seen.shows(i, old)
            note["new there"].append(shows_new)
            note["old gone"].append(lost_old)
            note["background"].append(psnr(image, pair.photo.image, ~pair.changed))
            note["to truth"].append(psnr(image, pair.true.image))
            note["in the thing"].append(psnr(image, pair.true.image, pair.changed))
            note["IoU"].append(metrics.iou(seen.mask(i, new), covered(pair.true.masks[new])))
            wrong = [f"no {new}"] * (not shows_new) + [f"still {old}"] * (not lost_old)
            wrong = [] if name == "the input" else wrong
            row.append((image, f"{name}, {note['background'][-1]:.1f} dB", wrong))
        ceilings(bench, pair, facts)
        sheet.append(row)
    bench.save("photos", sheet)
    return facts


@dataclass(frozen=True)
class Pair:
    """A picture, and the same scene with one noun exchanged."""

    photo: Drawn
    true: Drawn
    old: str
    new: str

    @property
    def changed(self) -> Tensor:
        """Return where either thing is, and a twentieth of the width around. → h w, bool"""
        things = torch.from_numpy(self.photo.masks[self.old] + self.true.masks[self.new])
        reach = round(things.shape[1] / 20)
        near = F.max_pool2d((things[None] > 0).float(), 2 * reach + 1, stride=1, padding=reach)
        return near[0] > 0


def edited(
    model: minip2p.StableDiffusion, way: Way, pair: Pair, prompt: str, target: str, facts: Facts
) -> dict[str, Image.Image]:
    """Make one picture for each edit of a way, and note what needs no detector."""
    blend = LocalBlend(pair.old)
    edits = {
        "windows": WordSwap(),
        "+ LocalBlend": WordSwap(local_blend=blend),
        "+ the true mask": WordSwap(local_blend=LocalBlend(mask=pair.changed.float())),
    }
    settings: dict[str, Any] = {
        "guidance_scale": way.guidance,
        "negative_prompt": prompt if way.negative else "",
    }
    with counted(model) as inverting:
        source = invert(
            model, pair.photo.image, prompt, num_inference_steps=way.steps, **way.inversion
        )
    results = {}
    for kind in way.edits:
        name = f"{way.name}, {way.steps}, {way.guidance:g}, {kind}"
        with counted(model) as editing:
            out = minip2p.generate(
                model, [prompt, target], edit=edits[kind], source=source, **settings
            )
        facts[name]["row 0"].append(psnr(out.images[0], source.reconstruction))
        facts[name]["work"].append(float(sum(inverting) + sum(editing)))
        results[name] = out.images[1]
    return results


@contextmanager
def counted(model: minip2p.StableDiffusion) -> Iterator[list[int]]:
    """Count the rows of each UNet call."""
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        hook.remove()


def ceilings(bench: Bench, pair: Pair, facts: Facts) -> None:
    """Measure what the VAE alone loses of the input and of the truth."""
    for name, drawn in (("the VAE alone", pair.photo), ("the truth through the VAE", pair.true)):
        pixels = minip2p.picture.read(drawn.image, drawn.image.size).tensor()
        with torch.inference_mode():
            latent = bench.model.vae.encode(pixels.to(bench.model.device))
            image = to_images(bench.model.vae.decode(latent))[0]
        where = ~pair.changed
        facts[name]["background"].append(psnr(image, drawn.image, where))
        facts[name]["in the thing"].append(psnr(image, drawn.image, ~where))


def psnr(a: Image.Image, b: Image.Image, where: Tensor | None = None) -> float:
    """Return PSNR in dB, at most 60; nan for an empty region. where: h w, bool"""
    error = metrics.squared_error(*(metrics.to_pixels(image).double() for image in (a, b)))[0]
    error = error if where is None else error[where]
    return metrics.psnr(error.mean(), highest=60) if error.numel() else math.nan


def costs(model: minip2p.StableDiffusion, rounds: int = 7) -> Facts:
    """Measure seconds of wall clock, all ways in turn in each round; the first does not count."""
    facts, image = Facts(), draw(Scene("bird", style="photo", layout=1)).image
    prompts = ["a photo of a bird", "a photo of a lion"]
    edit = WordSwap(local_blend=LocalBlend("bird"))
    steps: dict[str, Any] = {"num_inference_steps": STEPS}
    ways = {
        "direct": {},
        "direct, refined 3 times": {"refinements": 3},
        "edit-friendly": friendly(3),
        "DDIM": ddim(),
        "generated": None,
    }
    for n in range(1 + rounds):
        for name, how in ways.items():
            source, before = None, time.perf_counter()
            with counted(model) as rows:
                if how is not None:
                    source = invert(model, image, prompts[0], **steps, **how)
                inverted, upward = time.perf_counter(), sum(rows)
                settings: dict[str, Any] = {} if source else steps
                minip2p.generate(
                    model, prompts, edit=edit, source=source, guidance_scale=3, **settings
                )
            done = time.perf_counter()
            if n:
                facts[name]["rows up"].append(float(upward))
                facts[name]["seconds up"].append(inverted - before)
                facts[name]["rows of an edit"].append(float(sum(rows) - upward))
                facts[name]["seconds of an edit"].append(done - inverted)
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Edit given pictures, compare with the truth.")
    parser.add_argument("--model", default="emoji", help="what minip2p.load takes")
    parser.add_argument("--many", action="store_true", help=f"{MANY} pictures, two ways")
    parser.add_argument("--quick", action="store_true", help="few pictures, two ways")
    parser.add_argument("--costs", action="store_true", help="seconds instead")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="what was judged, to see")
    options = parser.parse_args(arguments)
    model = minip2p.load(options.model)
    if options.costs:
        facts = costs(model)
    else:
        bench = Bench(model, load(), options.quick, folder=options.pictures)
        few = options.quick or options.many
        facts = measure(bench, CHOSEN if few else WAYS, MANY if options.many else None)
    print(written(facts.table()))


if __name__ == "__main__":
    main()
