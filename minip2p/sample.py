"""Make a picture from a prompt, and edited ones from it: python -m minip2p.sample.

Options become a Run, the Run becomes pictures, and the pictures become files. Standard output has
one line for each file, standard error the progress and what there is to warn of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import fast, picture, show
from .command import code, edits_by_target, option_of, quoted
from .errors import UserError, check
from .explain import explain
from .html.page import PageStore, page
from .invert import Inversion, ReplayDDIM
from .options import is_given, make_parser, make_run
from .outputs import (
    SOFTWARE,
    check_folder,
    check_places,
    compare,
    name_outputs,
    png,
    read_png,
    write_run,
)
from .pipeline import Result
from .program import run_program, say
from .run import Run
from .saved import write_files
from .settings import defaults_of
from .weights import StableDiffusion, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: see program.py."""
    return run_program(
        sample, argv, "Interrupted: pictures that were not finished were not written."
    )


def sample(argv: Sequence[str]) -> None:
    """Make the pictures that a command asks for, and write their files."""
    options = make_parser().parse_args(argv)
    image, texts = read_png(options.repeat) if options.repeat else (None, {})
    run = repeated_run(options, texts) if options.repeat else make_run(options)
    source, run = load_inversion(options, run)
    check_files(options, run)

    model = load_model(options, run)
    if options.explain:
        say(explain_run(model, run))
        return
    if run.source and source is None:
        source = run.invert(model, progress=True)
        if options.inversion:
            options.inversion.parent.mkdir(parents=True, exist_ok=True)
            source.save(options.inversion)
            say(options.inversion)
    result = run.generate(
        model,
        source=source,
        store=PageStore() if options.html else options.maps,
        callback=previewer(model, run, options.preview) if options.preview else None,
        progress=True,
    )
    pictures = write(result, run.resolved(defaults_of(model)), options)
    if options.preview:
        say(options.preview)
    if image:
        compare(options.repeat, image, texts.get("file", ""), pictures)


# --- the user's own picture -----------------------------------------------------------------------


def load_inversion(options: argparse.Namespace, run: Run) -> tuple[Inversion | None, Run]:
    """Return what --inversion's file holds, or None, and the run with the file's settings.

    Raises UserError if the run asks for other settings than the file was made with.
    """
    path = options.inversion
    if run.source is None or path is None or not path.exists():
        return None, run
    source = Inversion.load(path)
    settings = source.settings
    # A command asks only for what it names, the run of --repeat for every setting.
    wanted = vars(options) | {"guidance_scale": options.inversion_guidance_scale}
    if options.repeat:
        wanted = run.inversion() | {"prompt": run.prompts[0]}
    elif settings["method"] == "edit-friendly" and wanted["guidance_scale"] is None:
        wanted["guidance_scale"] = options.guidance_scale
    for name, value in settings.items():
        option = option_of("inversion_guidance_scale" if name == "guidance_scale" else name)
        check(
            wanted.get(name) in (None, value),
            f"{path} was made with {option} {value}, not {wanted.get(name)}: give that, or name "
            "another file.",
        )
    if options.image is not None:
        size = settings["height"], settings["width"]
        read = picture.read(options.image, size, settings["fit"])
        is_same = read.image.tobytes() == source.picture.image.tobytes()
        check(is_same, f"{path} is of another picture than {options.image}: name another file.")
        source = replace(source, picture=read)  # with the whole of it, to put edits back
    how = {f.name: settings[f.name] for f in fields(run.source) if f.name in settings}
    sizes = {name: settings[name] for name in ("num_inference_steps", "seed", "height", "width")}
    return source, replace(run, source=replace(run.source, **how), **sizes)


# --- a run again ----------------------------------------------------------------------------------


BESIDE_REPEAT = ["out", "preview", "explain", "image", "inversion", "maps", "html", "device"]
EXTRAS = ["maps", "put_back", "fast"]  # options that are repeated, but are no part of a Run


def repeated_run(options: argparse.Namespace, texts: dict[str, str]) -> Run:
    """Return the run in the texts of --repeat's picture, and set its options beside the Run.

    Nothing in the file is run as code, and nothing of it says where files are written.
    Raises UserError for a picture without a run, and for options that would change the run.
    """
    allowed = [*BESIDE_REPEAT, "repeat"]
    changes = [n for n in vars(options) if n not in allowed and is_given(options, n)]
    check(
        not changes,
        "--repeat makes a picture's run as it was: leave out "
        f"{', '.join(map(option_of, changes))}; beside it there can be "
        f"{', '.join(map(option_of, BESIDE_REPEAT))}.",
    )
    run, extras, page_name = read_record(options.repeat, texts)
    has_picture = options.image or (options.inversion and options.inversion.exists())
    check(
        run.source or not has_picture,
        f"{options.repeat} was made without a picture: leave out --image and --inversion.",
    )
    is_enough = options.image if extras["put_back"] else has_picture or not run.source
    check(
        is_enough,
        f"{options.repeat} was made from a picture, which is not in it: add --image FILE.",
    )
    if run.source:
        run = replace(run, source=replace(run.source, image=options.image and str(options.image)))
    for name in EXTRAS:
        setattr(options, name, getattr(options, name) or extras[name])
    if page_name and not options.html:
        options.html = options.out / page_name
    return run


def read_record(path: Path, texts: dict[str, str]) -> tuple[Run, dict[str, bool], str]:
    """Return the run in a picture's metadata, the options of EXTRAS, and the name of its page."""
    if "run" not in texts and "command" not in texts:
        raise UserError(
            f"{path} does not say how it was made: --repeat takes a picture that minip2p's command "
            "line wrote, with its metadata."
        )
    try:
        if "run" in texts:
            run = Run.from_dict(json.loads(texts["run"]))
            extras = json.loads(texts.get("options", "{}"))
        else:  # of the second edition: its command, as a list of words
            words = json.loads(texts["command"])
            check(words and not {"-h", "--help", "--version"} & {*words}, "it is another command")
            recorded = make_parser().parse_args(words)
            run, extras = make_run(recorded), vars(recorded)
        page_name = Path(extras.get("html") or "").name
        return run, {name: bool(extras.get(name)) for name in EXTRAS}, page_name
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} can't be repeated: its metadata is damaged, or another version of minip2p "
            f"wrote it ({str(error).rstrip('.')[:200]})."
        ) from None


# --- from a run to files --------------------------------------------------------------------------


def check_files(options: argparse.Namespace, run: Run) -> None:
    """Raise UserError, before time is spent on pictures, if they can't be written."""
    if options.explain:
        return
    check_folder(options.out)
    if options.inversion:
        check_folder(options.inversion.parent, "--inversion")
    names = [output.name for output in name_outputs(run)]
    pictures = [*names, *(f"{name}-maps" for name in names if options.maps)]
    pictures += [f"{name}-put-back" for name in names[1:] if options.put_back]
    pictures += ["row"] if len(names) > 1 or run.source else []
    paths = [options.out / f"{name}.png" for name in pictures]
    check_places(paths, {"--html": options.html, "--preview": options.preview})


def load_model(options: argparse.Namespace, run: Run) -> StableDiffusion:
    """Load the model of a run, prepared for the device that it runs on."""
    dtype = getattr(torch, run.dtype)
    loading = {"tokenizer": run.tokenizer, "device": options.device, "ema": run.ema}
    model = load(run.model, dtype=dtype, **loading)
    if model.device.type == "cpu":
        fast.keep_memory()
    if options.fast:
        if run.source or options.inversion:
            model.identity()  # of the weights, which can't be read once they are packed
        fast.prepare(model.unet)
    return model


def explain_run(model: StableDiffusion, run: Run) -> str:
    """Return the tables that --explain prints. No picture is inverted for them."""
    run = run.resolved(defaults_of(model))
    steps: dict[str, Any] = {
        "num_inference_steps": run.num_inference_steps,
        "scheduler": run.scheduler,
    }
    if run.source:
        assert run.num_inference_steps is not None
        schedule = ReplayDDIM(run.num_inference_steps, run.source.skip, **model.schedule)
        steps = {"scheduler": schedule}
    return explain(model, run.prompts, list(run.edits), height=run.height, width=run.width, **steps)


def previewer(model: StableDiffusion, run: Run, path: Path) -> Callable[[int, int, Tensor], None]:
    """Return a callback that redraws --preview's file ten times in a run, or after each call."""
    captions = [output.caption for output in name_outputs(run)]

    def draw(call: int, calls: int, latents: Tensor) -> None:
        if (call + 1) % max(1, calls // 10) == 0 or call + 1 == calls:
            image = show.row(show.preview(model, latents), captions)
            texts = {"prompts": list(run.prompts), "call": f"{call + 1} of {calls}"}
            write_files({path: png(image, texts)})

    return draw


def write(result: Result, run: Run, options: argparse.Namespace) -> dict[str, Image.Image]:
    """Write all files of a run, and return the pictures by the names of their files.

    run: with all defaults filled in, as the files record it.
    """
    outputs = name_outputs(run)
    if run.source:  # the name of the user's file is nobody's business
        run = replace(run, source=replace(run.source, image="PICTURE"))
    command = quoted(run.command(*(option_of(name) for name in EXTRAS if is_given(options, name))))
    extras = {name: bool(getattr(options, name)) for name in EXTRAS}
    extras["html"] = options.html and options.html.name
    texts = {"command": command, "run": record_of(run), "options": extras}

    pictures = {}
    for i, (image, output) in enumerate(zip(result.images, outputs, strict=True)):
        pictures[f"{output.name}.png"] = image, {"prompt": run.prompts[i]}
        if options.maps:
            maps = show.word_maps(image, result.attention, i)
            pictures[f"{output.name}-maps.png"] = maps, {"prompt": run.prompts[i]}
        if options.put_back and i:
            whole = result.source.picture.put_back(image)
            pictures[f"{output.name}-put-back.png"] = whole, {"prompt": run.prompts[i]}
    if len(result.images) > 1 or result.source:
        captions = [output.caption for output in outputs]
        pictures["row.png"] = side_by_side(result, run, captions), {}

    # All files are made before the first is written.
    files = {
        options.out / name: png(image, {**prompt, **texts, "file": name})
        for name, (image, prompt) in pictures.items()
    }
    if options.html:
        shown = record_of(run) | {"edits": list(map(code, run.edits)), "command": command}
        text = page(
            replace(result, run=shown | {"Software": SOFTWARE}),
            result.edit,
            [output.name for output in outputs],
        )
        files[options.html] = text.encode()
    write_run(files)
    return {name: image for name, (image, _) in pictures.items()}


def record_of(run: Run) -> dict[str, Any]:
    """Return the run as plain data, without the name of the user's own picture."""
    run = replace(run, source=replace(run.source, image=None)) if run.source else run
    return {name: value for name, value in run.to_dict().items() if value is not None}


def side_by_side(result: Result, run: Run, captions: list[str]) -> Image.Image:
    """Draw all pictures in one row; with several edits a prompt, in one row for each prompt."""
    images, first = result.images, 1
    if result.source:
        images, first = [result.source.picture.image, *images], 2
        captions = ["given", f"{captions[0]} (reconstruction)", *captions[1:]]
    targets = edits_by_target(run)
    is_swept = any(sum(edit is not None for edit in edits) > 1 for _, edits in targets)
    columns = len(targets[0][1]) if is_swept else len(images)
    starts = range(first, max(len(images), first + 1), columns)
    rows = [images[:first] + images[i : i + columns] for i in starts]
    return show.grid(rows, [captions[:first] + captions[i : i + columns] for i in starts])


if __name__ == "__main__":
    sys.exit(main())
