"""Sweeps: files become runs, runs become pictures and rows, and whatever stops them they go on."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import start_browser
from PIL import Image

import minip2p
from minip2p import LocalBlend, Refine, Reweight, WordSwap
from minip2p.html import report
from minip2p.sweep import measure, results, study, worker
from minip2p.sweep import program as sweep

SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
MODEL: dict[str, Any] = {
    "id": "0123456789abcdef",
    "dtype": "float32",
    "scheduler": "ddim",
    "defaults": {"guidance_scale": 4.0, "cross_replace_steps": 0.8, "self_replace_steps": 0.6},
    "height": 64,
    "width": 64,
    "pixels": 16 * 64 * 64,
}


def read(tmp_path: Path, content: str, name: str = "study.toml") -> study.Study:
    (tmp_path / name).write_text(content)
    return study.read(tmp_path / name)


def settled(**given: Any) -> dict[str, Any]:
    return study.settle(study.complete({"prompt": SQUIRREL, **given}), MODEL)


# --- files ----------------------------------------------------------------------------------------


def test_lists_are_multiplied_and_zip_groups_are_not(tmp_path: Path):
    found = read(tmp_path, f"""
prompt = "{SQUIRREL}"
seed = [1, 2]
cross_replace_steps = [0.2, [0.1, 0.8], {{ squirrel = 0.4, default_ = 0.8 }}]

[[zip]]
swap = ["squirrel=lion", ["squirrel=cat", "burger=cake"]]
self_replace_steps = [0.4, 0.6]
""")  # fmt: skip
    assert found.about == {"model": "emoji", "tokenizer": None, "dtype": "float32"}
    runs = found.runs
    assert len(runs) == 2 * 3 * 2
    together = {(run["to"], run["self_replace_steps"][1]) for run in runs}
    assert together == {(LION, 0.4), ("a cat eating a cake", 0.6)}
    crosses = [run["cross_replace_steps"] for run in runs if run["seed"] == 2][::2]
    assert crosses == [[0, 0.2], [0.1, 0.8], {"squirrel": [0, 0.4], "default_": [0, 0.8]}]


def test_a_line_of_jsonl_is_a_run_and_its_lists_are_values(tmp_path: Path):
    lines = [{"prompt": SQUIRREL, "to": LION, "cross_replace_steps": [0.1, 0.8]}, {"prompt": LION}]
    found = read(tmp_path, "\n\n".join(map(json.dumps, lines)), "study.jsonl")
    assert [run["cross_replace_steps"] for run in found.runs] == [[0.1, 0.8], None]


def test_toml_without_a_reader_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "study.toml").write_text("seed = 1")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ValueError, match=r"Python 3\.10 reads TOML with `pip install tomli`"):
        study.read(tmp_path / "study.toml")


HEAD = f'prompt = "{SQUIRREL}"\n'
# A file; the line of its mistake; and what its sentence says.
MISTAKES = [
    ('prompt = "a\n', 1, ""),
    (HEAD + "\nsede = 1", 3, "no setting 'sede': is it seed?"),
    (HEAD + "colour = 1", 2, "no setting 'colour', only model"),
    (HEAD + "seed = []", 2, "the list of seed is empty"),
    (HEAD + "seed = [\n 1,\n 'x']", 4, "whole number from 0 to 9223372036854775807, not 'x'"),
    (HEAD + "seed = true", 2, "whole number"),
    (HEAD + "num_inference_steps = 0", 2, "from 1 to 999, not 0"),
    (HEAD + "guidance_scale = 'high'", 2, "number from -1000 to 1000"),
    (HEAD + "guidance_scale = nan", 2, "not nan"),
    (HEAD + 'scheduler = "euler"', 2, "ddim, pndm, not 'euler'"),
    (HEAD + 'dtype = "int8"', 2, "float32, float16, bfloat16, not 'int8'"),
    (HEAD + 'model = ["emoji", "other"]', 2, "a study has one"),
    ("seed = 1", 1, "every run needs a prompt"),
    ('prompt = " "', 1, "must be a prompt"),
    (HEAD + 'swap = "squirrel"', 2, "a swap takes two sides, A=B, not 'squirrel'"),
    (HEAD + 'swap = [\n"squirrel=lion",\n"dog=cat"]', 4, "no word 'dog' in 'a squirrel"),
    (HEAD + f'to = "{LION}"\nswap = "squirrel=lion"', 2, "swap and to"),
    (HEAD + "cross_replace_steps = 0.5", 2, "needs an edit: add swap, to or reweight"),
    (HEAD + 'swap = "squirrel=lion"\ncross_replace_steps = 1.5', 3, "from 0 to 1"),
    (HEAD + 'swap = "squirrel=lion"\ncross_replace_steps = { dog = 1 }', 3, "no word 'dog'"),
    (HEAD + 'swap = "squirrel=lion"\nblend = ["lion", "dog"]', 3, "no word 'dog'"),
    (HEAD + 'swap = "squirrel=lion"\nblend = { word = "lion" }', 3, "no 'word'"),
    (HEAD + 'swap = "squirrel=lion"\nblend = { words = "lion", threshold = 2 }', 3, "from 0 to"),
    (HEAD + 'image = "none.png"', 2, "there is no picture /"),
    (HEAD + f'image = "{__file__}"\nscheduler = "pndm"', 3, "of a given image it is ddim"),
    (HEAD + f'image = "{__file__}"\neta = 1.0', 3, "of a given image it is 0"),
    (HEAD + 'method = "direct"', 2, "of a given image, and there is none"),
    (HEAD + "reweight = { dog = 2 }", 2, "no word 'dog'"),
    (HEAD + "reweight = { squirrel = 'x' }", 2, "finite number"),
    (HEAD + "seed = 1\n[[zip]]\neta = [0, 1]\nseed = [1, 2]", 4, "a second time"),
    (HEAD + "[[zip]]\neta = [0, 1]\nseed = [1, 2, 3]", 3, "equal lengths, not eta 2, seed 3"),
    (HEAD + "zip = 3", 2, "headed [[zip]]"),
]


@pytest.mark.parametrize(("content", "line", "said"), MISTAKES)
def test_a_mistake_is_one_sentence_with_its_line(
    tmp_path: Path, content: str, line: int, said: str
):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert f"line {line}" in message and said in message, message
    assert message.count("study.toml") == 1  # a sentence, not one for each combination


def test_all_mistakes_of_a_file_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    lines = ['{"prompt": "a cat", "seed": -1}', '{"prompt": "a cat"}', "{", '{"swap": "cat=dog"}']
    Path("study.jsonl").write_text("\n".join(lines))
    assert sweep.main(["study.jsonl"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0].split(":")[0] for line in said] == [
        "study.jsonl line 1", "study.jsonl line 3", "study.jsonl line 4",
    ]  # fmt: skip
    assert not Path("runs").exists()


def test_the_page_about_sweeps_shows_a_study_and_names_every_setting(tmp_path: Path):
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text("utf-8")
    found = read(tmp_path, page.split("```toml\n")[1].split("```")[0])
    assert len(found.runs) == 2 * 2 * 3 * 2 * 3
    for name in (*study.ONE, *study.OF_STUDY):
        assert f"`{name}`" in page, name


# --- ids ------------------------------------------------------------------------------------------


def test_an_id_stays_what_it_is():
    """Written down: another id would have every study of an older version made again."""
    assert study.identify(settled()) == "b437bf411c421296"
    assert study.identify(settled(swap="squirrel=lion", blend="lion")) == "b08acc5c0d8773da"


def test_what_means_the_same_picture_has_one_id():
    def id_of(**given: Any) -> str:
        return study.identify(settled(**given))

    edit = id_of(swap="squirrel=lion")
    assert edit == id_of(to=LION)
    assert edit == id_of(to=LION, cross_replace_steps=0.8, self_replace_steps=[0, 0.6])
    assert edit == id_of(to=LION, guidance_scale=4, num_inference_steps=50, height=64)
    alone = id_of()
    assert alone == id_of(edit="none", reweight={"squirrel": 2})
    assert id_of(to=LION, edit="none") == id_of(
        to=LION, edit="none", blend="lion", cross_replace_steps=0.1
    )
    assert study.identify(study.source_of(settled(to=LION, blend="lion"))) == alone


def test_a_given_picture_is_known_by_what_is_in_it(tmp_path: Path):
    """Not by its name; and where no noise is drawn the seed makes no difference."""
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    for path, colour in zip(paths, ("red", "red", "blue"), strict=True):
        Image.new("RGB", (64, 64), colour).save(path)
    a, b, c = (study.identify(settled(image=path)) for path in paths)
    assert a == b != c
    assert a == study.identify(settled(image=paths[0], seed=1, method="direct"))
    drawn = [settled(image=paths[0], seed=seed, method="edit-friendly") for seed in (1, 2)]
    assert len({a, *map(study.identify, drawn)}) == 3


def test_everything_that_changes_the_picture_changes_the_id():
    given: list[dict[str, Any]] = [{}, {"to": LION}, {"reweight": {"squirrel": 2}}]
    given += [{"seed": 1}, {"num_inference_steps": 4}, {"guidance_scale": 3}, {"eta": 1}]
    given += [{"scheduler": "pndm"}, {"height": 128}, {"width": 128}, {"negative_prompt": "x"}]
    edits: list[dict[str, Any]] = [{"edit": "refine"}, {"edit": "none"}, {"blend": "lion"}]
    edits += [{"cross_replace_steps": 0.1}, {"self_replace_steps": 0.1}, {"reweight": {"lion": 2}}]
    edits += [{"blend": {"words": "lion", "threshold": 0.4}}]
    given += [{"to": LION} | edit for edit in edits]
    ids = [study.identify(settled(**one)) for one in given]
    for model in ({"id": "another"}, {"dtype": "float16"}):
        ids.append(
            study.identify(study.settle(study.complete({"prompt": SQUIRREL}), MODEL | model))
        )
    assert len(set(ids)) == len(ids)


def test_a_model_is_known_by_its_weights_and_words(emoji: minip2p.StableDiffusion):
    before = worker.identity(emoji)
    weight = next(emoji.unet.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
        changed = worker.identity(emoji)
        weight.view(-1)[0] -= 1
    assert worker.identity(emoji) == before != changed


def test_settings_become_the_edit_that_a_user_would_write():
    def edit(**given: Any) -> Any:
        return study.edit_of(study.complete({"prompt": SQUIRREL, **given}))

    assert edit() is None and edit(to=LION, edit="none") is None
    assert edit(to=LION, edit="swap", cross_replace_steps=0.5) == WordSwap([0.0, 0.5])
    weighed = edit(to=LION, edit="refine", reweight={"lion": 2}, blend=["lion"])
    assert weighed == Reweight({"lion": 2.0}, Refine(local_blend=LocalBlend("lion")))


def test_the_words_that_an_edit_is_about():
    def about(to: str, **given: Any) -> tuple[list[str], list[str]]:
        return study.changed_words(study.complete({"prompt": "a cat, red", "to": to, **given}))

    assert about("a dog, red") == (["cat"], ["dog"])
    assert about("a big cat, red") == ([], ["big"])
    assert about("a cat") == (["red"], [])
    assert about("a cat, red", reweight={"red": 2}) == (["red"], ["red"])


# --- measurements ---------------------------------------------------------------------------------


def ssim_at(x: np.ndarray, y: np.ndarray, i: int, j: int) -> float:
    """Wang et al. 2004, eq. 13, of one channel at one pixel, term by term."""
    weights = [
        [math.exp(-(a * a + b * b) / (2 * 1.5**2)) for b in range(-5, 6)] for a in range(-5, 6)
    ]
    w = np.array(weights) / np.sum(weights)
    p, q = (z[i - 5 : i + 6, j - 5 : j + 6] for z in (x, y))
    mp, mq = (w * p).sum(), (w * q).sum()
    vp, vq, cov = (
        (w * (p - mp) ** 2).sum(),
        (w * (q - mq) ** 2).sum(),
        (w * (p - mp) * (q - mq)).sum(),
    )
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))


def test_ssim_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    x = rng.random((2, 20, 24))
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1)
    found = measure.ssim(torch.tensor(x[None]).float(), torch.tensor(y[None]).float())[0]
    for c, i, j in ((0, 5, 5), (1, 9, 12), (0, 14, 18)):
        assert found[c, i, j] == pytest.approx(ssim_at(x[c], y[c], i, j), abs=1e-4)


def test_pictures_are_compared_on_both_sides():
    """Inside every channel is off by 0.1: 20 dB. Outside by nothing."""
    x = torch.full((1, 3, 32, 32), 0.5)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:16] = True
    found = measure.compared(x, x + 0.1 * inside, inside)
    assert found["psnr_inside"] == pytest.approx(20, abs=1e-3)
    assert found["psnr_outside"] == 60
    assert found["ssim_inside"] < 0.99 and found["ssim_outside"] > found["ssim_inside"]
    assert set(measure.compared(x, x, inside | True)) == {"psnr_inside", "ssim_inside"}


def test_where_words_look_is_local_blends_rule():
    maps = torch.zeros(8, 8)
    maps[2, 2], maps[6, 6] = 1.0, 0.25  # the second is below 0.3 of the maximum
    there = measure.where(maps, (16, 16))
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:8, 2:8] = True  # cells 1 to 3, of two pixels each
    assert there.equal(expected)


def test_a_visible_share_changes():
    source, edited = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16))
    edited.paste((0, 0, 40), (0, 0, 8, 4))
    edited.paste((10, 0, 0), (8, 8, 16, 16))  # too little to see
    found = measure.measure(source, edited, None, 1, ((), ()))
    assert found == {"changed": 0.125}


# --- pictures -------------------------------------------------------------------------------------

STUDY = f"""
prompt = "{SQUIRREL}"
swap = ["squirrel=lion", "burger=cake"]
cross_replace_steps = [0.0, 1.0]
seed = [1, 2]
num_inference_steps = 2
"""


@pytest.fixture(scope="module")
def emoji() -> minip2p.StableDiffusion:
    return minip2p.load(device="cpu")


@pytest.fixture
def folder(emoji: minip2p.StableDiffusion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, with a study. The bundled model is loaded once."""
    monkeypatch.setattr(worker, "load", lambda *_, **__: emoji)
    monkeypatch.setattr(sweep.fast, "keep_memory", lambda: None)  # it is for whole processes
    monkeypatch.setattr("warnings.formatwarning", None)  # main() sets it: it is to be set back
    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text(STUDY)
    return tmp_path


def rows_of(folder: str | Path = "runs/study") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").open()]


def complete_and_once(folder: Path, n: int) -> None:
    """Asserts that each of n runs is there: one whole row, one whole picture, its name the id."""
    rows = rows_of(folder)
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)) == n
    assert not [row for row in rows if "error" in row]
    for row in rows:
        with Image.open(folder / f"{row['id']}.png") as image:
            image.load()
    sources = {row["source"] for row in rows}
    assert {path.stem for path in folder.glob("*.png")} == set(ids) | sources
    assert not list(folder.glob(".*.part"))


def test_a_study_becomes_pictures_and_rows(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep.main(["study.toml"]) == 0
    assert "8 runs, 8 of them new, 0 with an error" in capsys.readouterr().out
    complete_and_once(Path("runs/study"), 8)
    rows = rows_of()
    assert {(row["to"], row["cross_replace_steps"][1], row["seed"]) for row in rows} == {
        (to, cross, seed)
        for to in (LION, "a squirrel eating a cake")
        for cross in (0.0, 1.0)
        for seed in (1, 2)
    }
    for row in rows:
        others = "weights", "dtype", "picture"
        settings = {key: row[key] for key in (*others, *study.ONE) if key not in ("swap", "image")}
        assert study.identify(settings) == row["id"]  # all that the id is made of is in the row
        assert row["seconds"] > 0 and 0 < row["changed"] < 1
        assert row["psnr_inside"] < row["psnr_outside"] and row["ssim_inside"] < row["ssim_outside"]
        assert 0 < row["looks_at"] < 1 and 0 <= row["looks_iou"] <= 1
    for to in (LION, "a squirrel eating a cake"):  # its attention taken over: more is kept
        kept = {row["cross_replace_steps"][1]: row["psnr_outside"] for row in rows
                if row["to"] == to and row["seed"] == 1}  # fmt: skip
        assert kept[1.0] > kept[0.0]


def test_what_is_there_is_not_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sweep.main(["study.toml", "--out", "out"])
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}

    def generate(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(worker, "generate", generate)
    assert sweep.main(["study.toml", "--out", "out"]) == 0
    assert "8 runs, 0 of them new" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_half_a_line_a_lost_picture_and_an_error_are_made_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    sweep.main(["study.toml", "--out", "out"])
    table = Path("out/results.jsonl")
    lines = table.read_text().splitlines(keepends=True)
    failed = json.loads(lines[0]) | {"error": "ValueError: no"}
    lost = json.loads(lines[1])["id"]
    Path(f"out/{lost}.png").unlink()
    table.write_text(json.dumps(failed) + "\n" + "".join(lines[1:-1]) + lines[-1][:100])
    capsys.readouterr()
    assert sweep.main(["study.toml", "--out", "out"]) == 0
    said = capsys.readouterr()
    assert "8 runs, 3 of them new" in said.out
    assert "results.jsonl line 8 can't be read: its run is made again." in said.err
    complete_and_once(Path("out"), 8)


def test_one_run_that_raises_has_its_error_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    """A word swap between prompts of different lengths, found when the edit is bound."""
    lines = [{"to": LION, "edit": "swap"}, {"to": f"{LION} at night", "edit": "swap"}, {}]
    same = {"prompt": SQUIRREL, "num_inference_steps": 2}
    Path("study.jsonl").write_text("\n".join(json.dumps(same | line) for line in lines))
    assert sweep.main(["study.jsonl"]) == 1
    errors = {row["to"]: row.get("error") for row in rows_of()}
    assert errors[None] is errors[LION] is None and "use Refine" in errors[f"{LION} at night"]
    said = capsys.readouterr()
    assert "3 runs, 3 of them new, 1 with an error" in said.out and "use Refine" in said.err


def test_together_or_alone_makes_no_difference(folder: Path, emoji: minip2p.StableDiffusion):
    """1e-6 of the largest latent: an edit's row does not depend on the rows beside it."""
    Path("study.toml").write_text(STUDY.replace("steps = 2", "steps = 6"))
    for out, batch in (("alone", "2"), ("together", "16")):
        assert sweep.main(["study.toml", "--out", out, "--batch", batch, "--latents"]) == 0
    for row in rows_of("alone"):
        alone, together = (np.load(f"{out}/{row['id']}.npy") for out in ("alone", "together"))
        assert abs(alone - together).max() <= 1e-6 * abs(alone).max()
    result = minip2p.generate(
        emoji, [row["prompt"], row["to"]], seed=row["seed"], num_inference_steps=6,
        edit=minip2p.PromptEdit(cross_replace_steps=row["cross_replace_steps"]),
    )  # fmt: skip
    assert np.abs(result.latents[1].numpy() - alone).max() <= 1e-6 * abs(alone).max()
    assert (np.array(result.images[1]) == np.array(Image.open(f"alone/{row['id']}.png"))).all()


def test_runs_of_one_source_are_one_call(
    folder: Path, emoji: minip2p.StableDiffusion, monkeypatch: pytest.MonkeyPatch
):
    """In each call every distinct text is encoded once: source, two edited prompts, blank."""
    calls, encoded = [], []
    generate, encoder = worker.generate, emoji.text_encoder
    monkeypatch.setattr(
        worker, "generate", lambda m, p, **k: calls.append(p) or generate(m, p, **k)
    )
    handle = encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        sweep.main(["study.toml"])
    finally:
        handle.remove()
    assert [len(prompts) for prompts in calls] == [5, 5]
    assert encoded == [(1, 77)] * 8


def test_a_given_picture_is_inverted_once_and_edited(
    folder: Path, emoji: minip2p.StableDiffusion, monkeypatch: pytest.MonkeyPatch
):
    photo = minip2p.generate(emoji, SQUIRREL, num_inference_steps=4).images[0]
    photo.save("photo.png")
    Path("study.toml").write_text(
        STUDY.replace("seed = [1, 2]", 'image = "photo.png"\nguidance_scale = [2, 4]')
    )
    calls, invert = [], worker.invert
    monkeypatch.setattr(worker, "invert", lambda *a, **k: calls.append(k) or invert(*a, **k))
    assert sweep.main(["study.toml"]) == 0
    complete_and_once(Path("runs/study"), 8)
    assert [call["image"] for call in calls] == [str(folder / "photo.png")]  # for both guidances
    found = minip2p.invert(emoji, "photo.png", SQUIRREL, num_inference_steps=2)
    row = rows_of()[0]
    source = np.asarray(Image.open(f"runs/study/{row['source']}.png"), int)
    assert abs(source - np.asarray(found.reconstruction, int)).max() <= 1


def test_groups_are_as_large_as_fits():
    row: dict[str, Any] = {"id": "", "source": "", "image": None}

    def job(id: str, source: str) -> worker.Job:
        return worker.Job(id, source, settled(**({} if id == source else {"to": LION})), row)

    jobs = [job("a", "a"), *(job(f"a{i}", "a") for i in range(5)), job("b1", "b"), job("c", "c")]

    def ids(**how: int) -> list[list[str]]:
        return [[job.id for job in group] for group in sweep.grouped(jobs, **how)]

    whole = ["a", "a0", "a1", "a2", "a3", "a4"]
    assert ids(pixels=16 * 64 * 64) == [whole, ["b1"], ["c"]]
    assert ids(pixels=3 * 64 * 64) == [whole[:3], whole[3:5], whole[5:], ["b1"], ["c"]]
    assert ids(pixels=10**9, batch=2)[:2] == [whole[:2], whole[2:3]]


def test_a_batch_fits_into_half_of_the_memory(
    emoji: minip2p.StableDiffusion, monkeypatch: pytest.MonkeyPatch
):
    h, w = emoji.sample_size
    picture = 2 * worker.BYTES * emoji.unet.conv_in.out_channels * h * w  # prompt and blank
    for memory, beside, expected in ((10, 0, 5), (10, 1, 2), (0, 0, 2), (1000, 0, worker.MOST)):
        monkeypatch.setattr(worker, "free_memory", lambda _, n=memory: n * picture)
        assert worker.pixels_that_fit(emoji, beside) == expected * 128 * 128
    monkeypatch.undo()
    assert worker.free_memory(emoji.device) > 2**28


def test_a_dry_run_says_how_much_there_is_and_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    Path("study.toml").write_text(STUDY + 'edit = ["auto", "none"]\nscheduler = "pndm"\n')
    assert sweep.main(["study.toml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    # Without control the window makes no difference: 2 swaps x 2 seeds x (2 windows + 1).
    assert "16 runs, 12 of them different, 12 to be made: 14 pictures with their sources" in said
    assert "in 2 calls of generate, 6 UNet calls" in said  # PNDM calls once more than its steps
    assert "about 0:00:0" in said and not Path("runs").exists()


def test_two_sweeps_do_not_write_into_one_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    with results.only_one(folder):
        assert sweep.main(["study.toml", "--out", str(folder)]) == 2
    assert "Another sweep is writing" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--workers", "2"], ["--address", "auto"]])
def test_without_ray_its_options_are_one_sentence(
    folder: Path,
    option: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep.main(["study.toml", *option]) == 2
    said = "--workers and --address need Ray: pip install 'minip2p[ray]'.\n"
    assert capsys.readouterr().err == said


def test_the_table_is_parquet_too(folder: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    sweep.main(["study.toml"])
    read = parquet.read_table("runs/study/results.parquet").to_pylist()
    rows = rows_of()
    assert [row["id"] for row in read] == [row["id"] for row in rows]
    for one, other in zip(read, rows, strict=True):
        assert one["psnr_outside"] == other["psnr_outside"] and one["seed"] == other["seed"]
        assert json.loads(one["cross_replace_steps"]) == other["cross_replace_steps"]


# --- what stops a sweep ---------------------------------------------------------------------------


def start(*words: str, cwd: Path, threads: int = 2, **how: Any) -> subprocess.Popen[str]:
    package = str(Path(minip2p.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "minip2p.sweep", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def wait_for_rows(table: Path, n: int, process: subprocess.Popen[str]) -> None:
    while not table.exists() or table.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_killed_and_started_again(folder: Path):
    Path("study.toml").write_text(STUDY.replace("[1, 2]", "[1, 2, 3, 4, 5, 6]"))
    process = start("study.toml", "--out", "out", cwd=folder)
    wait_for_rows(Path("out/results.jsonl"), 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = len(rows_of("out"))
    assert 4 <= there < 24
    assert sweep.main(["study.toml", "--out", "out"]) == 0
    complete_and_once(Path("out"), 24)


def limited(size: int) -> None:
    """The disk takes no file longer than that: a write of the rest is refused."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_refuses_is_a_sentence_and_the_rest_is_made_later(folder: Path):
    process = start("study.toml", "--out", "out", cwd=folder, preexec_fn=lambda: limited(5000))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    last = said.splitlines()[-1]
    assert "can't be written" in last and "the same command goes on from there" in last, said
    assert "Traceback" not in said
    assert sweep.main(["study.toml", "--out", "out"]) == 0
    complete_and_once(Path("out"), 8)


# --- the report -----------------------------------------------------------------------------------


def fake_results(folder: Path, n: int) -> None:
    """Rows and pictures as a sweep writes them, in no time."""
    folder.mkdir()
    with (folder / "results.jsonl").open("w") as table:
        for i in range(n):
            cross = [0.0, 0.2, 0.4, 0.6, 0.8][i % 5]
            swap = [["squirrel=lion"], ["burger=cake"]][i // 5 % 2]
            settings = settled(
                swap=swap,
                cross_replace_steps=cross,
                seed=i // 10,
            )
            row = {"id": f"{i:016x}", "source": f"{i // 10:04x}", "swap": swap, **settings}
            row |= {"psnr_outside": 20 + 10 * cross + i % 3, "ssim_inside": 0.3 + cross / 2}
            row = row | {"error": "ValueError: </script> no"} if i == 7 else row
            table.write(json.dumps(row) + "\n")
            for name in {row["id"], row["source"]} if i != 7 else set():
                Image.new("RGB", (64, 64), (i % 256, 100, 50)).save(folder / f"{name}.png")


def test_labels_are_for_people():
    assert [report.label(v) for v in ([0.0, 0.8], [0.1, 0.8], None, [], 4.0, 50, True)] == [
        *("0.8", "0.1 to 0.8", "none", "none", "4", "50", "True"),
    ]
    assert report.label({"lion": [0.0, 0.4], "default_": [0.0, 0.8]}) == "lion 0.4, others 0.8"
    blend = {"words": ["lion"], "subtract": ["cake"], "threshold": 0.4, "start": 0.0}
    assert report.label(blend) == "lion without cake, threshold 0.4"


def test_the_report_is_one_file_with_everything_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake_results(tmp_path / "out", 20)
    assert sweep.main(["report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/report.html\n"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "default-src 'none'" in page and page.count("</script>") == 2
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["settings"] == ["swap", "cross_replace_steps", "seed"]
    assert len(data["rows"]) == 20 and len(data["pictures"]) == 19 + 2
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in data["pictures"].values())
    edited = [name for name, _ in data["measures"]].index("edited")
    assert data["rows"][4]["found"][edited] == pytest.approx(1 - 0.7)


def test_a_folder_without_results_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep.main(["report", str(tmp_path)]) == 2
    assert "has no results.jsonl with rows" in capsys.readouterr().err


def test_the_report_in_a_browser(tmp_path: Path):
    """500 rows: it is sorted, filtered, laid out anew and looked at, and nothing is fetched."""
    fake_results(tmp_path / "out", 500)
    path = report.write_report(tmp_path / "out")
    column = (
        "const n = [...document.querySelectorAll('#all th button')]"
        ".findIndex(b => b.textContent === arguments[0]) + 1;"
        "return [...document.querySelectorAll('#all tbody tr')].map(r => r.cells[n]?.textContent)"
    )
    click = (
        "[...document.querySelectorAll('#all th button')]"
        ".find(b => b.textContent === arguments[0]).click()"
    )
    choose = (
        "const s = [...document.querySelectorAll('label')].find(l => l.textContent"
        ".startsWith(arguments[0])).querySelector('select');"
        "s.value = [...s.options].find(o => o.textContent === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'))"
    )
    with start_browser() as page:
        page("POST", "/window/rect", width=1400, height=1000)
        page.open(path)
        assert page.js("return document.querySelectorAll('#all tbody tr').length") == 500
        assert page.js("return document.querySelectorAll('#plots svg').length") == 3

        page.js(click, "psnr_outside")
        values = page.js(column, "psnr_outside")
        numbers = [float(v) for v in values if v and v[0].isdigit()]
        assert numbers == sorted(numbers) and len(numbers) == 499
        page.js(click, "psnr_outside")
        values = page.js(column, "psnr_outside")
        assert [float(v) for v in values if v and v[0].isdigit()] == numbers[::-1]

        page.js(choose, "swap", "burger=cake")
        assert page.js("return document.querySelector('#count').textContent") == "250 of 500 runs"
        assert set(page.js(column, "swap")) == {"burger=cake"}
        page.js("const i = document.querySelector('#typed'); i.value = '0.4';"
                "i.dispatchEvent(new Event('input'))")  # fmt: skip
        assert page.js("return document.querySelector('#count').textContent") == "50 of 500 runs"

        page.js(choose, "Down", "seed")
        assert page.js("return document.querySelectorAll('#sheet tbody tr').length") == 50
        page.js("document.querySelector('#sheet .picture').click()")
        assert page.js("return document.querySelector('dialog').open")
        assert page.fetched() == page.errors() == []
