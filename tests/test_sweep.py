"""Sweeps: files become runs, runs become pictures and rows, and whatever stops them they go on."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minip2p
from minip2p.sweep import __main__ as sweep
from minip2p.sweep import measure, results, study, worker
from minip2p.sweep.ray import Allocation
from minip2p.text import tokenize

Command = Callable[..., tuple[int, str]]  # words of a command → its status, and what it printed

SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
DATA = Path(__file__).parent / "data" / "studies"
MODEL: dict[str, Any] = {
    "id": "0123456789abcdef",
    "defaults": {
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "scheduler": "ddim",
        "cross_replace_steps": 0.8,
        "self_replace_steps": 0.6,
        "height": 64,
        "width": 64,
    },
}


def read(folder: Path, content: str, name: str = "study.toml") -> list[study.StudyRun]:
    (folder / name).write_text(content, "utf-8")
    return study.read(folder / name)


def resolved(model: dict[str, Any] = MODEL, **settings: Any) -> study.SweepRun:
    run = study.read_run({"prompt": SQUIRREL, **settings}, Path())
    return study.resolve([run], model)[0]


# --- files ----------------------------------------------------------------------------------------


def test_lists_are_multiplied_and_zip_groups_are_not(tmp_path):
    runs = read(tmp_path, f"""
prompt = "{SQUIRREL}"
seed = [1, 2]
cross_replace_steps = [0.2, [0.1, 0.8], {{ squirrel = 0.4, default_ = 0.8 }}]

[[zip]]
swap = ["squirrel=lion", ["squirrel=cat", "burger=cake"]]
self_replace_steps = [0.4, 0.6]
""")  # fmt: skip
    assert len(runs) == 2 * 3 * 2
    edits = [run.edits[0] for run, _ in runs]
    pairs = {(run.prompts[1], run.edits[0].self_replace_steps) for run, _ in runs}
    assert pairs == {(LION, (0, 0.4)), ("a cat eating a cake", (0, 0.6))}
    windows = [edit.cross_replace_steps for edit in edits[:6:2]]
    assert windows == [(0, 0.2), (0.1, 0.8), {"squirrel": (0, 0.4), "default_": (0, 0.8)}]


def test_a_line_of_jsonl_is_a_run_and_its_lists_are_values(tmp_path):
    """A text may hold what str.splitlines cuts at; files that were joined have several BOMs."""
    lines = [
        {"prompt": "a\u2028\x85cat", "to": LION, "cross_replace_steps": [0.1, 0.8]},
        {"prompt": "b"},
    ]
    text = "\n\n\ufeff".join(json.dumps(line, ensure_ascii=False) for line in lines)
    runs = read(tmp_path, f"\ufeff{text}\r\n", "study.jsonl")
    assert [run.prompts for run, _ in runs] == [("a\u2028\x85cat", LION), ("b",)]
    assert runs[0].run.edits[0].cross_replace_steps == (0.1, 0.8)
    assert len(read(tmp_path, '\ufeffprompt = "a cat"')) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("name", ["study.toml", "study.jsonl"])
def test_other_encodings_are_named(tmp_path, encoding, name):
    (tmp_path / name).write_bytes('prompt = "a café"'.encode(encoding))
    with pytest.raises(minip2p.UserError, match=f"{name} can't be read: it is no text in UTF-8"):
        study.read(tmp_path / name)


def test_a_picture_stands_beside_its_study(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in (tmp_path / "home", tmp_path / "set"):
        folder.mkdir()
        shutil.copy(DATA / "bird.png", folder)
    for image, path in (
        ("bird.png", "set/bird.png"),
        ("../set/bird.png", "set/bird.png"),
        ("~/bird.png", "home/bird.png"),
        (f"{tmp_path}/home/bird.png", "home/bird.png"),
    ):
        line = json.dumps({"prompt": "a bird", "image": image})
        (study_run,) = read(tmp_path / "set", line, "study.jsonl")
        assert study_run.run.source.image == str(tmp_path / path)


def test_toml_without_a_parser_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(
        minip2p.UserError, match=r"Python 3\.10 reads TOML with `pip install tomli`"
    ):
        read(tmp_path, "seed = 1")


HEAD = f'prompt = "{SQUIRREL}"\n'
SWAP = HEAD + 'swap = "squirrel=lion"\n'
MISTAKES = [
    ('prompt = "a\n', "line 1"),
    ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ("a ." * 100_000 + "a = 1", "a key of 200 parts or more"),
    (HEAD + "sede = 1", "there is no setting 'sede': is it seed?"),
    (HEAD + "seed = []", "seed: its list is empty"),
    (HEAD + "seed = [1, 'x']", "seed must be a whole number from 0 to 9223372036854775807"),
    (HEAD + 'model = ["emoji", "other"]', "model: a study has one for all runs"),
    ("seed = 1", "prompt: every run needs a prompt"),
    ('prompt = " "', "prompt: it must be a prompt"),
    (HEAD + 'swap = ["squirrel=lion", "dog=cat"]', "no word 'dog' in 'a squirrel"),
    (SWAP + f'to = "{LION}"', "to: swap and to both give the edited prompt"),
    (HEAD + "cross_replace_steps = 0.5", "it needs an edit: add swap, to or reweight"),
    (SWAP + "cross_replace_steps = 1.5", "A window is a fraction"),
    (SWAP + 'blend = [["lion", "dog"]]', "blend: there is no word 'dog'"),
    (SWAP + 'blend = { word = "lion" }', "blend: it needs words"),
    (HEAD + 'image = "none.png"', "image: there is no picture /"),
    (HEAD + 'image = "https://a.b/c.png"', "image: https://a.b/c.png is a web address: download"),
    (HEAD + f'image = "{DATA}/bird.png"\nscheduler = "pndm"', "leave out scheduler and eta"),
    (HEAD + 'method = "direct"', "method: it needs a picture to edit: add image"),
    (HEAD + "seed = 1\n[[zip]]\neta = [0, 1]\nseed = [1, 2]", "seed: it stands in a [[zip]] and"),
    (HEAD + "[[zip]]\neta = [0, 1]\nseed = [1, 2, 3]", "equal lengths, not eta 2, seed 3"),
    (HEAD + f"seed = {[1] * 999}\neta = {[0] * 999}", "multiply to 998001 runs, and a study has"),
    (HEAD + "zip = 3", "zip: a group is headed [[zip]]"),
]


@pytest.mark.parametrize(("content", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, content, sentence):
    with pytest.raises(minip2p.UserError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert sentence in message, message
    assert message.count("study.toml") == 1  # one sentence, not one for each combination


def test_all_mistakes_of_a_file_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ['{"prompt": "a cat", "seed": -1}', '{"prompt": "a cat"}', "[" * 5000, '{"to": "b"}']
    Path("study.jsonl").write_text("\n".join(lines))
    assert sweep.main(["study.jsonl"]) == 2
    places = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert places == ["study.jsonl line 1", "study.jsonl line 3", "study.jsonl line 4"]
    assert not Path("runs").exists()


def test_the_page_about_sweeps_shows_a_study_and_names_every_setting(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text("utf-8")
    assert len(read(tmp_path, page.split("```toml\n")[1].split("```")[0])) == 2 * 2 * 3 * 2 * 3
    for name in study.SETTINGS:
        assert f"`{name}`" in page, name


# --- ids ------------------------------------------------------------------------------------------


def stand_in(path: Path) -> None:
    """Write a picture as a sweep does, in no time."""
    info = PngInfo()
    info.add_itxt(results.RUN_ID, path.stem)
    Image.new("RGB", (8, 8), f"#{path.stem[:6]}").save(path, pnginfo=info)


@pytest.mark.parametrize(("name", "n"), [("grid.toml", 14), ("set.jsonl", 6)])
def test_a_study_of_the_second_edition_goes_on_without_a_run(
    name, n, model, tmp_path, monkeypatch, capsys
):
    """The tables in tests/data were written by version 0.1.0: every id stays."""
    old = shutil.copytree(DATA, tmp_path / "old")
    table = old / f"{name.split('.')[0]}.results.jsonl"
    table = table.rename(old / "results.jsonl")
    for row in results.read_rows(old).values():
        stand_in(old / f"{row['id']}.png")
        stand_in(old / f"{row['source']}.png")
    before = table.read_bytes()
    monkeypatch.setattr(worker, "load", lambda *_, **__: model)
    assert sweep.main([str(old / name), "--out", str(old)]) == 0
    assert f"{n} runs, 0 of them new, 0 with an error" in capsys.readouterr().out
    assert table.read_bytes() == before


def test_what_means_the_same_picture_has_one_id(tmp_path):
    def id_of(**settings: Any) -> str:
        return resolved(**settings).id

    edit = id_of(swap="squirrel=lion")
    assert edit == id_of(to=LION)
    assert edit == id_of(to=LION, cross_replace_steps=0.8, self_replace_steps=[0, 0.6])
    assert edit == id_of(to=LION, guidance_scale=4, num_inference_steps=50, height=64)
    assert id_of() == id_of(edit="none", reweight={"squirrel": 2})
    without = id_of(to=LION, edit="none")
    assert without == id_of(to=LION, edit="none", blend="lion", cross_replace_steps=0.1)
    assert resolved(to=LION, blend="lion").source == id_of()
    # A picture is known by what is in its file; without new noise the seed has no effect.
    copy = shutil.copy(DATA / "bird.png", tmp_path / "copy.png")
    alone = id_of(image=str(DATA / "bird.png"))
    assert alone == id_of(image=str(copy), seed=1, method="direct", inversion_guidance_scale=1)


def test_what_is_told_apart():
    """docs/sweep.md lists these: they are different runs although their pictures may be equal."""
    edits: list[dict[str, Any]] = [{}, {"edit": "swap"}, {"reweight": {"lion": 1}}]
    edits += [{"cross_replace_steps": {"default_": 0.8}}, {"blend": "lion"}, {"blend": "Lion"}]
    ids = [resolved(to=LION, **edit).id for edit in edits]
    assert len(set(ids)) == len(ids)


# --- measurements ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "weighted", "words"),
    [
        ("a dog, red", [], (["cat"], ["dog"])),
        ("a big cat, red", [], ([], ["big"])),
        ("a cat", [], (["red"], [])),
        ("A Cat, RED", [], ([], [])),  # other spellings are no change
        ("a cat, red", ["Red"], (["Red"], ["Red"])),
        ("a dog, red", ["a cat", "cat,"], (["a cat"], ["dog"])),  # a phrase, and no token twice
    ],
)
def test_the_words_that_an_edit_changes(model, to, weighted, words):
    prompts = (tokenize(model.tokenizer, text) for text in ("a cat, red", to))
    assert measure.changed_words(*prompts, weighted) == words


def test_pictures_are_compared_on_both_sides():
    """Inside every channel is off by 0.1: 20 dB. Outside none is."""
    x = torch.full((1, 3, 32, 32), 0.5)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:16] = True
    figures = measure.compare(x, x + 0.1 * inside, inside)
    assert figures["psnr_inside"] == pytest.approx(20, abs=1e-3)
    assert figures["psnr_outside"] == 60
    assert figures["ssim_inside"] < 0.99 and figures["ssim_outside"] > figures["ssim_inside"]
    assert set(measure.compare(x, x, inside | True)) == {"psnr_inside", "ssim_inside"}


def test_where_words_look_is_the_rule_of_local_blend():
    maps = torch.zeros(8, 8)
    maps[2, 2], maps[6, 6] = 1.0, 0.25  # the second is below 0.3 of the maximum
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:8, 2:8] = True  # cells 1 to 3, of two pixels each
    assert measure.looked_at(maps, (16, 16)).equal(expected)


def test_a_visible_share_changes():
    source, edited = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16))
    edited.paste((0, 0, 40), (0, 0, 8, 4))
    edited.paste((10, 0, 0), (8, 8, 16, 16))  # too little to see
    assert measure.measure(source, edited, None, 1, ((), ())) == {"changed": 0.125}


# --- pictures -------------------------------------------------------------------------------------

STUDY = f"""
prompt = "{SQUIRREL}"
swap = ["squirrel=lion", "burger=cake"]
cross_replace_steps = [0.0, 1.0]
seed = [1, 2]
num_inference_steps = 2
"""
MAKING = "seconds", "worker"  # what differs when a run is made again


@pytest.fixture
def folder(toy: minip2p.StableDiffusion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Enter an empty folder with a study. The toy model is loaded once."""
    monkeypatch.setattr(worker, "load", lambda *_, **__: toy)
    monkeypatch.setattr(sweep.fast, "keep_memory", lambda: None)  # it is for whole processes
    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text(STUDY)
    return tmp_path


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the program and returns its status and what it printed."""

    def run(*words: str) -> tuple[int, str]:
        status = sweep.main([*(words or ["study.toml"]), "--out", "out"])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def rows_of(folder: str | Path = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").open()]


def assert_complete(folder: Path, n: int) -> None:
    """Assert that each of n runs has one row without an error and one whole picture."""
    rows = rows_of(folder)
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)) == n
    assert not [row for row in rows if "error" in row]
    names = set(ids) | {row["source"] for row in rows}
    assert {path.stem for path in folder.glob("*.png")} == names
    assert all(results.is_whole(path) for path in folder.glob("*.png"))
    assert not list(folder.glob(".*.tmp"))


def test_a_study_becomes_pictures_and_rows(command, model, monkeypatch):
    """With the bundled model: an edit changes more where its words look."""
    monkeypatch.setattr(worker, "load", lambda *_, **__: model)
    Path("study.toml").write_text(STUDY.replace("[1, 2]", "[1]"))
    status, printed = command()
    assert status == 0 and "4 runs, 4 of them new, 0 with an error" in printed
    assert_complete(Path("out"), 4)
    rows = rows_of()
    assert {(row["swap_text"], row["cross_replace_steps_text"]) for row in rows} == {
        (swap, window) for swap in ("squirrel=lion", "burger=cake") for window in ("0", "1")
    }
    for row in rows:
        assert row["file"] == f"{row['id']}.png" and row["reweight_text"] == "none"
        assert row["seconds"] > 0 and 0 < row["changed"] < 1
        assert row["psnr_inside"] < row["psnr_outside"] and row["ssim_inside"] < row["ssim_outside"]
        assert 0 < row["looks_at"] < 1 and 0 <= row["looks_iou"] <= 1


def test_only_what_is_not_there_is_made(command, monkeypatch):
    """Half a row, an error, an empty picture, a lost one, a lost source, latents asked for late."""
    command()
    table = Path("out/results.jsonl")
    whole = {path.name: path.read_bytes() for path in Path("out").glob("*.png")}
    lines = table.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    failed = json.dumps(rows[0] | {"error": "ValueError: no"}) + "\n"
    (Path("out") / rows[1]["file"]).unlink()
    (Path("out") / rows[2]["file"]).write_bytes(b"")
    (Path("out") / f"{rows[7]['source']}.png").unlink()
    table.write_text(failed + "".join(lines[1:-1]) + lines[-1][:100])
    (Path("out") / ".lock").write_text("mine")
    assert "8 runs, 4 of them new" in command()[1]
    assert_complete(Path("out"), 8)
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.png")} == whole
    assert (Path("out") / ".lock").read_text() == "mine"

    other = json.dumps(rows[0] | {"id": "f" * 16}) + "\n"  # another study's, without its picture
    table.write_text(table.read_text() + other)
    before = table.read_bytes()
    assert "8 runs, 0 of them new" in command()[1] and table.read_bytes() == before
    assert "8 runs, 8 of them new" in command("study.toml", "--latents")[1]
    assert {path.stem for path in Path("out").glob("*.npy")} == {
        p.stem for p in Path("out").glob("*.png")
    }
    (Path("out") / f"{rows[7]['source']}.npy").write_bytes(b"")
    assert "8 runs, 1 of them new" in command("study.toml", "--latents")[1]
    assert other in table.read_text()


@pytest.mark.parametrize(
    "line", ['{"experiment": 7}', "loss 0.3", '{"id": "../a", "source": "b"}', "[" * 5000]
)
def test_the_files_of_others_are_not_touched(command, line):
    Path("out").mkdir()
    Path("out/results.jsonl").write_text(line + "\n")
    for words in ([], ["study.toml", "--dry-run"]):
        status, printed = command(*words)
        assert status == 2 and "line 1 was not written by a sweep: remove the line" in printed
    assert sweep.main(["report", "out"]) == 2
    assert Path("out/results.jsonl").read_text() == line + "\n"


def test_a_lock_that_another_sweep_holds_or_that_is_a_link(command):
    Path("out").mkdir()
    with results.locked(Path("out")):
        status, printed = command()
    assert status == 2 and "Another sweep is writing into out" in printed
    Path("thesis.tex").write_text("mine")
    Path("out/.lock").unlink()
    Path("out/.lock").symlink_to("../thesis.tex")
    assert command()[0] == 2 and Path("thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_a_sweep_goes_on_and_warns(command, code, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="out can't be locked .*: start no second sweep into it"):
        assert command()[0] == 0
    assert_complete(Path("out"), 8)


def test_runs_that_raise_have_their_errors_and_the_others_go_on(command, monkeypatch):
    """A swap between prompts of different lengths is found when the edit is bound."""
    lines = [{"to": LION, "edit": "swap"}, {"to": f"{LION} at night", "edit": "swap"}, {}]
    common = {"prompt": SQUIRREL, "num_inference_steps": 2}
    Path("study.jsonl").write_text("\n".join(json.dumps(common | line) for line in lines))
    status, printed = command("study.jsonl")
    assert status == 1 and "3 runs, 3 of them new, 1 with an error" in printed
    errors = {row["to"]: row.get("error") for row in rows_of()}
    assert errors[None] is errors[LION] is None and "use Refine" in errors[f"{LION} at night"]


def test_a_batch_that_does_not_fit_into_memory_is_made_one_by_one(command, monkeypatch):
    generate, sizes = minip2p.Run.generate, []

    def limited(run: minip2p.Run, *arguments: Any, **settings: Any) -> Any:
        sizes.append(len(run.prompts))
        if len(run.prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(run, *arguments, **settings)

    monkeypatch.setattr(minip2p.Run, "generate", limited)
    assert command()[0] == 0
    assert sizes == [5, 2, 2, 2, 2] * 2
    assert_complete(Path("out"), 8)


def test_together_or_alone_makes_no_difference(folder, toy, monkeypatch):
    """Runs of one source are one call; latents differ by at most 1e-6 of the largest."""
    generate, sizes = minip2p.Run.generate, []
    monkeypatch.setattr(
        minip2p.Run,
        "generate",
        lambda run, *a, **k: sizes.append(len(run.prompts)) or generate(run, *a, **k),
    )
    for out, batch in (("alone", "2"), ("together", "16")):
        assert sweep.main(["study.toml", "--out", out, "--batch", batch, "--latents"]) == 0
    assert sizes == [2] * 8 + [5] * 2
    for row in rows_of("alone"):
        alone, together = (np.load(f"{out}/{row['id']}.npy") for out in ("alone", "together"))
        assert abs(alone - together).max() <= 1e-6 * abs(alone).max()
    window = minip2p.PromptEdit(cross_replace_steps=row["cross_replace_steps"])
    prompts = [row["prompt"], row["to"]]
    result = minip2p.generate(toy, prompts, edit=window, seed=row["seed"], num_inference_steps=2)
    assert np.abs(result.latents[1].numpy() - alone).max() <= 1e-6 * abs(alone).max()
    assert (np.array(result.images[1]) == np.array(Image.open(f"alone/{row['id']}.png"))).all()


def test_a_picture_is_inverted_once_for_all_its_edits(command, folder, toy, monkeypatch):
    shutil.copy(DATA / "bird.png", "bird.png")
    image = 'image = "bird.png"\nguidance_scale = [2, 4]'
    Path("study.toml").write_text(STUDY.replace("seed = [1, 2]", image))
    inversions, invert = [], minip2p.Run.invert
    monkeypatch.setattr(
        minip2p.Run, "invert", lambda run, *a: inversions.append(run.source) or invert(run, *a)
    )
    assert command()[0] == 0
    assert_complete(Path("out"), 8)
    assert [source.image for source in inversions] == [str(folder / "bird.png")]
    inversion = minip2p.invert(toy, "bird.png", SQUIRREL, num_inference_steps=2)
    source = np.asarray(Image.open(f"out/{rows_of()[0]['source']}.png"), int)
    assert abs(source - np.asarray(inversion.reconstruction, int)).max() <= 1


def test_a_dry_run_counts_and_makes_one_call(command):
    Path("study.toml").write_text(STUDY + 'edit = ["auto", "none"]\nscheduler = "pndm"\n')
    status, printed = command("study.toml", "--dry-run")
    # Without control the window makes no difference: 2 swaps x 2 seeds x (2 windows + 1).
    assert "16 runs, 12 of them different, 12 to be made: 14 pictures with their sources" in printed
    assert "in 2 calls of generate, 6 UNet calls" in printed  # PNDM calls once more than its steps
    assert "One call is made to estimate the time" in printed
    assert status == 0 and "about 0:00:0" in printed and not Path("out").exists()


@pytest.mark.parametrize("option", [["--workers", "2"], ["--address", "auto"]])
def test_without_ray_its_options_are_one_sentence(command, option, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    sentence = "--workers and --address need Ray: pip install 'minip2p[ray]'.\n"
    assert command("study.toml", *option) == (2, sentence)
    assert not Path("out").exists()


def test_workers_share_the_resources_of_a_cluster():
    cpus, gpus = [{"CPU": 8}, {"CPU": 8}], [{"CPU": 8, "GPU": 2}]
    assert Allocation.of(cpus, None, cpu=False) == Allocation(2, 8, {"num_cpus": 8})
    assert Allocation.of(cpus, 5, cpu=False) == Allocation(5, 3, {"num_cpus": 3})
    assert Allocation.of(gpus, None, cpu=False) == Allocation(2, 4, {"num_gpus": 1})
    assert Allocation.of(gpus, None, cpu=True) == Allocation(1, 8, {"num_cpus": 8})


# --- what stops a sweep ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5])
def test_a_full_disk_is_one_sentence_and_the_rest_is_made_later(command, n, monkeypatch):
    """The disk is full when the n-th file is written."""
    calls, fsync = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    status, printed = command()
    last = printed.splitlines()[-1]
    assert status == 2
    assert "can't be written: No space left on device: what is there is kept" in last
    assert not list(Path("out").glob(".*.tmp"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert command()[0] == 0
    assert_complete(Path("out"), 8)


@pytest.mark.slow
def test_killed_at_20_random_moments_and_resumed(command, folder):
    """Rows and pictures are those of a sweep that was not interrupted, and no run has two rows."""
    Path("study.toml").write_text(STUDY.replace("[1, 2]", "[1, 2, 3, 4]"))
    began = time.perf_counter()
    words = ["study.toml", "--batch", "3", "--latents"]
    command(*words)
    took = time.perf_counter() - began

    def content() -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        rows = [{k: v for k, v in row.items() if k not in MAKING} for row in rows_of()]
        files = {
            p.name: p.read_bytes() for p in Path("out").iterdir() if p.suffix in (".png", ".npy")
        }
        return sorted(rows, key=lambda row: row["id"]), files

    expected, moments, kept = content(), random.Random(0), []
    for _ in range(20):
        shutil.rmtree("out")
        process = multiprocessing.get_context("fork").Process(target=command, args=words)
        process.start()
        process.join(moments.uniform(0, took))
        process.kill()
        process.join()
        rows = results.read_rows(Path("out"))
        kept.append(len(rows))
        assert all(results.is_whole(Path("out") / row["file"]) for row in rows.values())
        assert f"16 runs, {16 - len(rows)} of them new, 0 with an error" in command(*words)[1]
        assert content() == expected
    assert len(set(kept)) > 3  # they were killed at different moments
