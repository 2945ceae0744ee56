"""The command line on a given picture: --image and what belongs to it."""

import json
import os
from pathlib import Path

import pytest
from helpers import EMOJI
from PIL import Image
from test_cli import Program, contents, wrote

import minip2p
from minip2p import sample, show
from minip2p.options import make_parser
from minip2p.sweep import __main__ as sweep
from world.scenes import Scene, draw

BIRD = "a photo of a bird"
SWAP = "--swap", "bird=lion"
STEPS = "--steps", "3"


@pytest.fixture
def bird(tmp_path: Path) -> str:
    """A wide photograph with a place in it, 160 x 120."""
    exif = Image.Exif()
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # GPS latitude
    exif[0x010E] = "SECRET"
    image = draw(Scene("bird", style="photo", layout=7)).image.resize((160, 120))
    image.save(tmp_path / "bird.jpg", exif=exif, comment=b"SECRET", quality=95)
    return "bird.jpg"


def texts(path: str) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def pixels(folder: str) -> dict[str, bytes]:
    """Return the pixels of each picture in a folder."""
    return {path.name: Image.open(path).tobytes() for path in Path(folder).iterdir()}


def test_a_swap_in_a_photograph(run: Program, bird: str, monkeypatch):
    rows, grid = [], show.grid
    monkeypatch.setattr(sample.show, "grid", lambda *row: rows.append(row) or grid(*row))
    wrote(run(BIRD, "--image", bird, *SWAP, "--blend", "bird", *STEPS), "reconstruction edit-1 row")
    (((photo, again, edit),), (captions,)) = rows[0]
    assert captions == ["given", f"{BIRD} (reconstruction)", "a photo of a lion"]
    with Image.open(bird) as whole:
        middle = whole.crop((20, 0, 140, 120)).resize(photo.size, Image.Resampling.LANCZOS)
    assert photo.tobytes() == middle.tobytes()
    assert again.tobytes() != photo.tobytes() and edit.tobytes() != again.tobytes()
    record = json.loads(texts("out/edit-1.png")["run"])
    assert record["source"]["method"] == "direct" and record["scheduler"] == "ddim"
    assert texts("out/edit-1.png")["prompt"] == "a photo of a lion"


def test_nothing_of_its_metadata_is_written(run: Program, bird: str):
    options = "--put-back", "--html", "out.html", "--inversion", "kept.safetensors", "--maps"
    assert run(BIRD, "--image", bird, *SWAP, *STEPS, *options).status == 0
    files = contents(Path())
    assert b"SECRET" in files.pop("bird.jpg") and len(files) >= 7
    for name, content in files.items():
        assert not content or (b"SECRET" not in content and b"Exif" not in content), name


def test_edits_are_put_back_into_the_whole(run: Program, bird: str):
    done = run(BIRD, "--image", bird, *SWAP, *STEPS, "--put-back")
    wrote(done, "reconstruction edit-1 edit-1-put-back row")
    with Image.open("out/edit-1-put-back.png") as back, Image.open(bird) as whole:
        assert back.size == whole.size == (160, 120)
        assert back.crop((0, 0, 20, 120)).tobytes() == whole.crop((0, 0, 20, 120)).tobytes()
        assert back.tobytes() != whole.tobytes()


FRIENDLY = ["--method", "edit-friendly", "--skip", "1", "--guidance", "3"]


@pytest.mark.parametrize("options", [[], [*FRIENDLY, "--inversion-guidance", "1.5"]])
def test_an_inversion_is_kept_and_used(run: Program, bird: str, options: list[str]):
    command = [BIRD, *SWAP, "--inversion", "kept/bird.safetensors", *options]
    first = run(*command, "--image", bird, *STEPS)
    assert first.status == 0 and first.out.splitlines()[0] == "kept/bird.safetensors"
    before, kept = pixels("out"), contents(Path("kept"))
    assert list(kept) == ["bird.safetensors"]
    os.rename("out", "before")
    again = run(*command)
    assert again.status == 0 and pixels("out") == before and contents(Path("kept")) == kept
    assert "kept" not in again.out  # it was not written again
    with_picture = run(*command, "--image", bird, "--put-back", "--out", "third")
    assert with_picture.status == 0
    with Image.open("third/edit-1-put-back.png") as back:
        assert back.size == (160, 120)
    alone = run("--repeat", "third/row.png", "--inversion", "kept/bird.safetensors")
    assert alone.status == 2 and "from a picture, which is not in it: add --image" in alone.err
    assert run("--repeat", "third/row.png", "--image", bird, "--out", "fourth").status == 0
    assert pixels("fourth") == pixels("third")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for option in ("image", "out", "html", "preview", "inversion", "repeat"):
        options = make_parser().parse_args(["x", f"--{option}", "~/a"])
        assert getattr(options, option) == tmp_path / "a"
    options = sweep.make_parser().parse_args(["~/a.toml", "--out=~/a"])
    assert (options.study, options.out) == (tmp_path / "a.toml", tmp_path / "a")
    monkeypatch.setenv("HOME", str(EMOJI))
    assert len(minip2p.load(tokenizer="~/tokenizer", device="cpu").tokenizer)


def test_a_sweep(run: Program, bird: str):
    done = run(BIRD, "--image", bird, *SWAP, *STEPS, "--sweep", "cross=0.2,0.8", "--baseline")
    wrote(done, "reconstruction edit-1-baseline edit-1-cross-0.2 edit-1-cross-0.8 row")


def test_the_page_shows_it(run: Program, bird: str):
    assert run(BIRD, "--image", bird, *SWAP, *STEPS, "--html", "a.html").status == 0
    text = Path("a.html").read_text()
    assert text.count("<figure") == 3 and text.count('<figure id="picture-') == 2
    assert text.index("the given picture") < text.index(f"reconstruction: {BIRD}")
    assert run(BIRD, *SWAP, *STEPS, "--html", "a.html", "--seed", "1").status == 0
    assert "the given picture" not in Path("a.html").read_text()


def test_explain_counts_the_calls_that_there_will_be(run: Program, bird: str):
    table = run(BIRD, "--image", bird, *SWAP, "--steps", "20", "--skip", "7", "--explain")
    assert table.status == 0 and "of 13" in table.out and "of 20" not in table.out
    assert os.listdir() == [bird]
    assert run(BIRD, "--image", bird, "--steps", "4", "--skip", "1", "--inversion", "a").status == 0
    table = run(BIRD, "--inversion", "a", *SWAP, "--explain")
    assert table.status == 0 and "of 3" in table.out


MISTAKES = {
    "no prompt": (["--image", "bird.jpg"], "give it first, in quotes"),
    "fit alone": ([BIRD, "--fit", "pad"], "--fit needs your own picture: add --image"),
    "put-back alone": ([BIRD, "--put-back"], "--put-back needs the whole picture"),
    "long skip": ([BIRD, "--image", "bird.jpg", *STEPS, "--skip", "3"], "0 to 2, not 3"),
    "scheduler": ([BIRD, "--image", "bird.jpg", "--scheduler", "pndm"], "leave out scheduler"),
    "no inversion": ([BIRD, "--inversion", "no.safetensors"], "There is no no.safetensors"),
    "other prompt": (["a photo of a cat", "--inversion", "kept"], "a photo of a bird"),
    "other seed": ([BIRD, "--inversion", "kept", "--seed", "8888"], "--seed 5, not 8888"),
    "other guidance": (
        [BIRD, "--inversion", "friendly", "--guidance", "9"],
        "--inversion-guidance 3.0, not 9.0",
    ),
    "an address": ([BIRD, "--image", "https://a.org/b.png"], "not the address 'https://a.org/b"),
    "kept otherwise": ([BIRD, "--inversion", "kept", "--method", "ddim"], "--method direct"),
    "other picture": ([BIRD, "--inversion", "kept", "--image", "cat.png"], "another picture"),
    "put back what": ([BIRD, "--inversion", "kept", "--put-back"], "add --image FILE"),
    "nowhere": ([BIRD, "--image", "bird.jpg", "--inversion", "words.png/a"], "--inversion"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(run: Program, bird: str, name: str):
    command, *parts = MISTAKES[name]
    Path("words.png").write_text("a photo of a bird")
    draw(Scene("cat", layout=1)).image.save("cat.png")
    options = {"kept": [], "friendly": ["--method", "edit-friendly", "--guidance", "3"]}
    for file in {*options} & {*command}:
        keep = ["--inversion", file, "--seed", "5", "--out", "o", *options[file]]
        assert run(BIRD, "--image", bird, *keep, *STEPS).status == 0
    before = contents(Path())
    done = run(*command)
    assert done.status == 2 and done.out == "" and len(done.messages) == 1, done
    for part in parts:
        assert part in done.messages[0]
    assert contents(Path()) == before
