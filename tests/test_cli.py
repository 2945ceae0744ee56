"""The command line as its user meets it: what it prints, what it writes, and what it never does."""

import ast
import errno
import importlib.metadata
import json
import os
import pickle
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

import minip2p
from minip2p import edit, show, weights
from minip2p.tools import cli, files, repeat

PACKAGE = Path(minip2p.__file__).parent
EMOJI = PACKAGE / "models" / "emoji"
SQUIRREL = "a painting of a squirrel eating a burger"


class Outcome(NamedTuple):
    """What is left of a command."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on standard error other than the progress bar."""
        lines = re.split(r"[\r\n]+", self.err)
        return [line for line in lines if line.strip() and not re.match(r"[\w: ]*\d+%\|", line)]


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def emoji() -> weights.StableDiffusion:
    return minip2p.load()


@pytest.fixture
def run(
    emoji: weights.StableDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """Runs a command in this process and in an empty folder. The bundled model is loaded once."""

    def load(source: str, **how: Any) -> weights.StableDiffusion:
        if source == "emoji" and how == usual:
            return emoji
        return weights.load(source, **how)

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        status = cli.main(words)
        return Outcome(status, *capsys.readouterr())

    usual = {"tokenizer": None, "device": None, "dtype": torch.float32, "ema": None}
    monkeypatch.setattr(cli, "load", load)
    monkeypatch.setattr(cli.fast, "keep_memory", lambda: None)  # it is for whole processes
    monkeypatch.setattr("warnings.formatwarning", None)  # main() sets it: it is to be set back
    monkeypatch.chdir(tmp_path)
    return run


def start(*words: str, cwd: Path, code: str | None = None) -> subprocess.Popen[str]:
    """The command, or other Python code, in a process of its own."""
    program = ["-m", "minip2p.sample"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # Whoever runs the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_apart(*words: str, cwd: Path, code: str | None = None) -> Outcome:
    process = start(*words, cwd=cwd, code=code)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder, those that are hidden too; None for a folder."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


def wrote(outcome: Outcome, names: str, folder: str = "out") -> None:
    """Asserts that the command ended well, wrote these files, named them, and said nothing else."""
    assert outcome.status == 0, outcome.err
    files = [f"{folder}/{name}.png" for name in names.split()]
    assert outcome.out.splitlines() == files
    assert set(os.listdir(folder)) == {f"{name}.png" for name in names.split()}
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.format == "PNG" and image.mode == "RGB"
    assert outcome.said == []


def picture(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def difference(a: str, b: str) -> int:
    """The greatest difference of two pictures, of 255."""
    extrema = ImageChops.difference(picture(a), picture(b)).getextrema()
    return max(high for _, high in extrema)


# --- mistakes -------------------------------------------------------------------------------------

# A command, and what its one sentence must say: the mistake, and what is possible.
MISTAKES: list[tuple[str, ...]] = [
    # what is no option, or has no value
    ("--nosuch", "--nosuch", "--help"),
    ("'a cat' --st 4", "--st", "--help"),
    ("'a cat' 'a dog'", "a dog", "quotes"),
    ("a squirrel eating a burger", "squirrel eating a burger", "quotes"),
    ("'a cat' --steps", "--steps", "expected"),
    ("'a cat' --swap", "--swap", "expected"),
    ("'a cat' --negative", "--negative", "expected"),
    # numbers
    ("'a cat' --steps 0", "steps", "from 1 to 999", "0"),
    ("'a cat' --steps -1", "steps", "from 1 to 999", "-1"),
    ("'a cat' --steps 1000", "steps", "from 1 to 999", "1000"),
    ("'a cat' --steps x", "steps", "whole number", "'x'"),
    ("'a cat' --steps 1.5", "steps", "whole number", "1.5"),
    ("'a cat' --seed -1", "seed", "from 0 to", "-1"),
    ("'a cat' --seed x", "seed", "whole number", "'x'"),
    ("'a cat' --seed 9223372036854775808", "seed", "from 0 to", "9223372036854775808"),
    ("'a cat' --guidance nan", "guidance", "number", "nan"),
    ("'a cat' --guidance x", "guidance", "number", "'x'"),
    ("'a cat' --guidance inf", "guidance", "number", "inf"),
    ("'a cat' --height 0", "height", "0"),
    ("'a cat' --height 65", "height", "multiple of 8", "65"),
    ("'a cat' --height -8", "height", "-8"),
    ("'a cat' --height x", "height", "whole number", "'x'"),
    ("'a cat' --width 0", "width", "0"),
    ("'a cat' --width 65", "width", "multiple of 8", "65"),
    ("'a cat' --width -8", "width", "-8"),
    ("'a cat' --width 1e3", "width", "whole number", "1e3"),
    ("'a cat' --height 40000000 --width 40000000", "40000000"),
    (f"'a cat' --height 4{'0' * 30}", "height", f"4{'0' * 30}"),
    ("'a cat' --eta 2", "eta", "from 0", "to 1", "2"),
    ("'a cat' --eta -0.5", "eta", "from 0", "to 1", "-0.5"),
    ("'a cat' --eta x", "eta", "number", "'x'"),
    ("'a cat' --eta 0.5 --scheduler pndm", "PNDM", "DDIM", "0.5"),
    ("'a cat' --scheduler euler", "scheduler", "euler", "ddim", "pndm"),
    ("'a cat' --dtype int8", "dtype", "int8", "float32", "bfloat16"),
    # twice, where only one makes sense
    ("'a cat' --steps 2 --steps 3", "--steps", "once"),
    ("'a cat' --swap cat=dog --self-replace-steps .1 --self-replace-steps .3", "--self", "once"),
    ("'a cat' --swap cat=dog --sweep cross=0.1 --sweep self=0.1", "--sweep", "once"),
    ("'a cat' --reweight cat=2 --reweight cat=3", "cat", "--reweight"),
    ("'a cat' --reweight cat=2 --reweight Cat=3", "'cat'", "'Cat'"),
    ("'a cat' --swap cat=dog --cross-replace-steps .4 --cross-replace-steps .5", "one"),
    (
        "'a cat' --swap cat=dog --cross-replace-steps cat=.4 --cross-replace-steps cat=.5",
        "'cat'",
        "one",
    ),
    (
        "'a cat' --swap cat=dog --cross-replace-steps cat=.4 --cross-replace-steps dog=.5",
        "'cat'",
        "'dog'",
        "once",
    ),
    ("'a cat' --swap cat=dog --sweep cross=.1,.4 --cross-replace-steps .3", "--sweep", "--cross"),
    ("'a cat' --swap cat=dog --sweep self=.1,.4 --self-replace-steps .3", "--sweep", "--self"),
    ("'a cat' --swap cat=dog --sweep cross=.5,0.5", "--sweep", "0.5"),
    # words and prompts
    ("'a cat' --swap cat", "--swap", "'cat'", "="),
    ("'a cat' --swap =lion", "--swap", "'=lion'"),
    ("'a cat' --swap cat=", "--swap", "'cat='"),
    ("'a cat' --swap zebra=lion", "'zebra'", "a cat"),
    ("'a cat' --swap a.t=lion", "'a.t'", "a cat"),
    ("'a cat' --to ''", "--to", "''"),
    ("'a cat' --to ' '", "--to", "' '"),
    ("'a cat' --reweight x", "--reweight", "'x'", "="),
    ("'a cat' --reweight cat=", "--reweight", "'cat='"),
    ("'a cat' --reweight cat=abc", "--reweight", "'cat'", "'abc'"),
    ("'a cat' --reweight cat=nan", "'cat'", "nan", "finite"),
    ("'a cat' --reweight cat=inf", "'cat'", "inf", "finite"),
    ("'a cat' --reweight zebra=2", "'zebra'", "a, cat"),
    ("'a cat' --swap cat=dog --blend zebra", "'zebra'", "a, cat, dog"),
    ("'a cat' --swap cat=dog --blend ''", "''", "a, cat, dog"),
    ("--blend cat", "'cat'", "squirrel", "lion"),
    ("--swap cat=dog", "prompt"),
    ("--to 'a dog'", "prompt"),
    ("--reweight cat=2", "prompt"),
    ("'' --swap cat=dog", "prompt"),
    ("'' --to 'a cat'", "prompt"),
    ("' ' --reweight cat=2", "prompt"),
    ("'a caf\udce9' --steps 1", "caf", "UTF-8"),
    (f"--fast --dtype float16 --model '{EMOJI}'", "--fast", "float16", "float32"),
    # windows
    ("'a cat' --swap cat=dog --cross-replace-steps 1.5", "--cross", "from 0 to 1", "'1.5'"),
    ("'a cat' --swap cat=dog --cross-replace-steps -0.1", "--cross", "from 0 to 1", "'-0.1'"),
    ("'a cat' --swap cat=dog --cross-replace-steps 0.8,0.2", "--cross", "start", "'0.8,0.2'"),
    ("'a cat' --swap cat=dog --cross-replace-steps 0,0.2,1", "--cross", "start", "'0,0.2,1'"),
    ("'a cat' --swap cat=dog --cross-replace-steps x", "--cross", "from 0 to 1", "'x'"),
    ("'a cat' --swap cat=dog --cross-replace-steps nan", "--cross", "from 0 to 1", "'nan'"),
    ("'a cat' --swap cat=dog --cross-replace-steps cat=2", "--cross", "from 0 to 1", "'2'"),
    ("'a cat' --swap cat=dog --cross-replace-steps zebra=0.4", "'zebra'", "a, cat, dog"),
    ("'a cat' --swap cat=dog --self-replace-steps 2", "--self", "from 0 to 1", "'2'"),
    ("'a cat' --swap cat=dog --self-replace-steps x", "--self", "from 0 to 1", "'x'"),
    ("'a cat' --swap cat=dog --self-replace-steps cat=0.4", "--self", "'cat=0.4'"),
    ("'a cat' --swap cat=dog --sweep x", "--sweep", "'x'"),
    ("'a cat' --swap cat=dog --sweep foo=1", "--sweep", "cross=", "self=", "'foo=1'"),
    ("'a cat' --swap cat=dog --sweep cross=", "--sweep", "'cross='"),
    ("'a cat' --swap cat=dog --sweep cross=2", "--sweep", "from 0 to 1", "'2'"),
    ("'a cat' --swap cat=dog --sweep cross=0.1,,0.5", "--sweep", "from 0 to 1", "''"),
    # an edit is missing
    ("'a cat' --blend cat", "--blend", "--swap"),
    ("'a cat' --cross-replace-steps 0.5", "--cross-replace-steps", "--swap"),
    ("'a cat' --self-replace-steps 0", "--self-replace-steps", "--swap"),
    ("'a cat' --self-replace-steps ''", "--self-replace-steps", "--swap"),
    ("'a cat' --sweep ''", "--sweep", "--swap"),
    ("'a cat' --baseline", "--baseline", "--swap"),
    ("'a cat' --explain", "--explain", "--swap"),
    ("'a cat' --swap cat=dog --explain --height 65", "height", "multiple of 8", "65"),
    # what is no model
    ("'a cat' --model nosuch", "nosuch", ".safetensors"),
    ("'a cat' --model {there}/empty", "empty", "unet/"),
    ("'a cat' --model {there}/index", "index", "diffusion_pytorch_model.safetensors"),
    ("'a cat' --model {there}/text.txt", "text.txt", "safetensors"),
    ("'a cat' --model {there}/empty.safetensors", "empty.safetensors", "safetensors"),
    ("'a cat' --model {there}/folder.safetensors", "folder.safetensors", "unet/"),
    ("'a cat' --model {there}/torch.ckpt", "torch.ckpt", "pickle", ".safetensors"),
    ("'a cat' --model {there}/pickle.pkl", "pickle.pkl", "pickle", ".safetensors"),
    ("'a cat' --model {there}/cut.safetensors", "cut.safetensors", "bytes", "again"),
    ("'a cat' --model {there}/cut", "vae", "bytes", "again"),
    ("'a cat' --model {there}/json", "config.json", "JSON"),
    ("'a cat' --model {there}/speechless", "speechless", "tokenizer"),
    ("'a cat' --model owner/name", "owner/name", "offline"),
    ("'a cat' --model 'no\nsuch'", "such", ".safetensors"),
    ("'a cat' --model 'a\0b'", "a", ".safetensors"),
    ("'a cat' --tokenizer nosuch", "nosuch", "tokenizer.json"),
    ("'a cat' --tokenizer {there}/empty", "empty", "vocab.json"),
    ("'a cat' --tokenizer {there}/text.txt", "text.txt", "vocab.json"),
    ("'a cat' --tokenizer {there}/json/unet", "unet", "vocab.json"),
    ("'a cat' --tokenizer {there}/strange", "strange", "tokenizer"),
    ("'a cat' --device nonsense", "nonsense", "cpu"),
    ("'a cat' --device cuda:99", "cuda:99", "cpu"),
    ("'a cat' --device meta", "meta", "cpu"),
    ("'a cat' --ema", "--ema", "single file"),
    ("'a cat' --no-ema", "--no-ema", "single file"),
    # no place for the pictures
    ("'a cat' --out {there}/text.txt", "--out", "text.txt", "folder"),
    ("'a cat' --out {there}/text.txt/below", "--out", "text.txt", "folder"),
    ("'a cat' --out 'a\0b'", "--out"),
    (f"'a cat' --out {'x' * 300}", "x" * 300, "too long"),
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders of the user's that are no model, no tokenizer and no folder."""
    root = tmp_path_factory.mktemp("there")
    for folder in ("empty", "index", "folder.safetensors", "strange"):
        (root / folder).mkdir()
    (root / "index" / "model_index.json").write_text("{}")
    (root / "strange" / "tokenizer.json").write_text("{}")
    (root / "text.txt").write_text("no model\n")
    (root / "empty.safetensors").touch()
    torch.save({"weight": torch.zeros(3)}, root / "torch.ckpt")
    (root / "pickle.pkl").write_bytes(pickle.dumps({"weight": 1.0}))
    half = (EMOJI / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:100_000]
    (root / "cut.safetensors").write_bytes(half)
    for name in ("cut", "json", "speechless"):
        shutil.copytree(EMOJI, root / name)
    (root / "cut" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(half)
    (root / "json" / "unet" / "config.json").write_text("{")
    shutil.rmtree(root / "speechless" / "tokenizer")
    return root


def test_there_are_mistakes_enough():
    assert len({command for command, *_ in MISTAKES}) == len(MISTAKES) >= 45


def is_one_sentence(outcome: Outcome, must_say: list[str]) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1 and outcome.err.endswith(".\n"), outcome.err
    assert "Traceback" not in outcome.err and "Error" not in outcome.err
    for part in must_say:
        assert part in outcome.err


@pytest.mark.filterwarnings("ignore:This model has never seen caf")
@pytest.mark.parametrize(
    "command, must_say", [pytest.param(c, s, id=ascii(c)[1:70]) for c, *s in MISTAKES]
)
def test_a_mistake_is_one_sentence(run: Run, there: Path, tmp_path: Path, command, must_say):
    before = contents(there)

    outcome = run(*shlex.split(command.replace("{there}", str(there))))

    is_one_sentence(outcome, must_say)
    assert contents(tmp_path) == {}
    assert contents(there) == before


@pytest.mark.parametrize(
    "command, must_say",
    [
        ("a squirrel eating a burger", ["squirrel eating a burger"]),
        ("'a cat' --seed x", ["seed", "'x'"]),
        ("'a cat' --swap cat=dog --blend zebra", ["'zebra'", "a, cat, dog"]),
    ],
)
def test_a_mistake_in_a_process_of_its_own(tmp_path: Path, command, must_say):
    outcome = run_apart(*shlex.split(command), cwd=tmp_path)
    is_one_sentence(outcome, must_say)
    assert contents(tmp_path) == {}


def test_a_folder_that_may_not_be_written_to(run: Run, tmp_path: Path, monkeypatch):
    # The administrator, whom tests in containers run as, may write anywhere.
    (tmp_path / "locked").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and mode != os.W_OK)
    outcome = run("a cat", "--steps", "1", "--out", "locked/out")
    is_one_sentence(outcome, ["--out", "locked"])
    assert contents(tmp_path) == {"locked": None}


def test_no_mistake_is_noticed_late():
    """What no model is needed for is refused before one is loaded, let alone downloaded."""
    late = [
        *("--steps 0", "--steps 1000", "--seed -1", "--guidance nan", "--height 0", "--width -8"),
        *("--eta 2", "--reweight cat=nan", "--reweight cat=1 --reweight cat=2", "--swap zebra=cat"),
        *("--to ''", "--sweep cross=0.5", "--swap cat=dog --sweep cross=.5,.5"),
    ]

    def load(*_: object, **__: object) -> None:
        raise AssertionError("A model was loaded.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load", load)
        patch.setattr("warnings.formatwarning", None)
        for command in late:
            assert cli.main(["a cat", *shlex.split(command)]) == 2, command


# --- what comes out -------------------------------------------------------------------------------


def test_the_first_run(tmp_path: Path, monkeypatch):
    """Without arguments, by a newcomer, from anywhere."""
    outcome = run_apart(cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    wrote(outcome, "source edit-1-baseline edit-1 row")
    assert "50/50" in outcome.err  # the progress bar
    assert picture("out/source.png").size == (128, 128)
    assert difference("out/source.png", "out/edit-1.png") > 100
    assert difference("out/edit-1-baseline.png", "out/edit-1.png") > 50
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_one_prompt_is_one_picture(run: Run):
    wrote(run("a cat", "--steps", "2"), "picture")
    wrote(run("a cat", "--steps", "2", "--out", "a/b"), "picture", "a/b")
    wrote(run("a cat", "--steps", "2", "--negative", "a dog", "--out", "n"), "picture", "n")
    wrote(run("a cat", "--steps", "2", "--seed", "1", "--out", "s"), "picture", "s")
    assert difference("out/picture.png", "a/b/picture.png") == 0
    assert difference("out/picture.png", "n/picture.png") > 5
    assert difference("out/picture.png", "s/picture.png") > 50


def test_an_empty_prompt_is_a_prompt(run: Run):
    wrote(run("", "--steps", "1"), "picture")


ONE, TWO = "source edit-1 row", "source edit-1 edit-2 row"


@pytest.mark.parametrize(
    "command, names",
    [
        ("--swap squirrel=lion", ONE),
        ("--swap squirrel=lion --swap burger=pizza", TWO),
        ("--swap squirrel=lion --to 'a photo of a cat'", TWO),
        ("--swap 'squirrel=a cat and a lion'", ONE),  # unequal word counts
        (
            "--to 'a painting of a squirrel eating a burger at night' --baseline",
            "source edit-1-baseline edit-1 row",
        ),
        ("--reweight burger=-2", ONE),
        ("--swap squirrel=lion --reweight lion=2 --reweight burger=.5", ONE),
        ("--swap squirrel=lion --blend squirrel", ONE),
        ("--swap squirrel=lion --blend lion --blend burger --scheduler pndm", ONE),
        ("--swap squirrel=lion --cross-replace-steps .8 --self-replace-steps .1,.5", ONE),
        ("--swap squirrel=lion --cross-replace-steps .1,.8 --cross-replace-steps lion=.4", ONE),
        ("--swap squirrel=lion --guidance 1 --eta 1", ONE),
        ("--swap squirrel=lion --maps", "source source-maps edit-1 edit-1-maps row"),
        (
            "--swap squirrel=lion --sweep cross=0.1,0.9 --self-replace-steps .2",
            "source edit-1-cross-0.1 edit-1-cross-0.9 row",
        ),
        (
            "--swap squirrel=lion --swap squirrel=dog --sweep self=0,1 --baseline",
            "source edit-1-baseline edit-1-self-0 edit-1-self-1 "
            "edit-2-baseline edit-2-self-0 edit-2-self-1 row",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:This model has never seen and")
def test_edits(run: Run, command, names):
    wrote(run(SQUIRREL, *shlex.split(command), "--steps", "2"), names)


def test_windows_do_what_they_say(run: Run):
    common = [SQUIRREL, "--swap", "squirrel=lion", "--baseline", "--steps", "6"]
    windows = {
        "none": "--cross-replace-steps 0 --self-replace-steps 0",
        "all": "--cross-replace-steps 1 --self-replace-steps 1",
        "word": "--cross-replace-steps 1 --cross-replace-steps lion=.2 --self-replace-steps 1",
        "blend": "--cross-replace-steps 0 --self-replace-steps 0 --blend lion",
    }
    for name, window in windows.items():
        assert run(*common, *window.split(), "--out", name).status == 0
    assert difference("none/edit-1.png", "none/edit-1-baseline.png") <= 1
    assert difference("all/edit-1.png", "all/edit-1-baseline.png") > 50
    assert difference("all/edit-1.png", "word/edit-1.png") > 20
    assert difference("none/edit-1.png", "blend/edit-1.png") > 20
    assert all(difference("none/source.png", f"{name}/source.png") <= 1 for name in windows)


@pytest.mark.parametrize("height, width", [(128, 192), (192, 128), (72, 200), (240, 320)])
def test_pictures_that_are_not_square(run: Run, height, width):
    """240 x 320 has latents of 30 x 40."""
    command = [SQUIRREL, "--swap", "squirrel=lion", "--blend", "lion", "--maps", "--steps", "2"]
    outcome = run(*command, "--height", str(height), "--width", str(width))
    wrote(outcome, "source source-maps edit-1 edit-1-maps row")
    assert picture("out/edit-1.png").size == (width, height)
    sheet, maps = picture("out/row.png"), picture("out/edit-1-maps.png")
    assert 250 < sheet.height < 400
    assert maps.width - 8 == 3.5 * (sheet.width - 8)  # the picture and six words: "a" is one


def test_a_sweep_has_a_row_for_each_edit(run: Run):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--swap", "squirrel=dog", "--steps", "1"]
    assert run(*command, "--sweep", "cross=0,0.5,1", "--out", "two").status == 0
    assert run(*command, "--sweep", "cross=0,0.5,1", "--baseline", "--out", "more").status == 0
    two, more = picture("two/row.png"), picture("more/row.png")
    assert two.width == 4 * (256 + 8) + 8 and more.width == 5 * (256 + 8) + 8
    assert two.height == more.height > 2 * (256 + 8)


def test_half_precision(run: Run):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--steps", "10"]
    wrote(run(*command, "--dtype", "bfloat16"), ONE)
    assert run(*command, "--out", "full").status == 0
    assert 0 < difference("out/edit-1.png", "full/edit-1.png") < 64


def test_fast_draws_the_same(run: Run):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--steps", "3", "--model", str(EMOJI)]
    wrote(run(*command, "--fast"), ONE)
    assert run(*command, "--out", "usual").status == 0
    assert difference("out/edit-1.png", "usual/edit-1.png") <= 1


def test_what_the_model_does_not_know_is_said(run: Run):
    with pytest.warns(UserWarning, match="never seen zebra; it knows: .*squirrel"):
        outcome = run("a zebra eating a burger", "--steps", "1")
    wrote(outcome, "picture")


CAKE = "A photograph of a {} eating a cake"
WINDOWS = "--cross-replace-steps .8 --self-replace-steps .2"
HOMEWORK = {  # the sections of the course that teaches Prompt-to-Prompt: each is one command
    "a picture": (f"'{SQUIRREL}' --seed 1024", "picture"),
    "the same noise": (
        f"'{SQUIRREL}' --swap squirrel=cat --cross-replace-steps 0 --self-replace-steps 0",
        ONE,
    ),
    "word swaps": (
        f"'{SQUIRREL}' --swap squirrel=cat --swap squirrel=lion --swap squirrel=dog {WINDOWS}",
        "source edit-1 edit-2 edit-3 row",
    ),
    "cross-attention": (
        f"'{SQUIRREL}' --swap squirrel=dog --sweep cross=.1,.5,.9 --self-replace-steps .2",
        "source edit-1-cross-.1 edit-1-cross-.5 edit-1-cross-.9 row",
    ),
    "self-attention": (
        f"'{SQUIRREL}' --swap squirrel=dog --sweep self=.1,.5,.9 --cross-replace-steps .5",
        "source edit-1-self-.1 edit-1-self-.5 edit-1-self-.9 row",
    ),
    "1 to n": (f"'{CAKE.format('lion')}' --swap lion=hippopotamus {WINDOWS}", ONE),
    "n to 1": (f"'{CAKE.format('hippopotamus')}' --swap hippopotamus=lion {WINDOWS}", ONE),
    "maps": (
        f"'{SQUIRREL}' --swap squirrel=lion --maps {WINDOWS}",
        "source source-maps edit-1 edit-1-maps row",
    ),
}


@pytest.mark.parametrize("command, names", HOMEWORK.values(), ids=HOMEWORK.keys())
@pytest.mark.filterwarnings("ignore:This model has never seen")
def test_the_homework(run: Run, command, names):
    wrote(run(*shlex.split(command), "--steps", "3"), names)


def test_explain_prints_a_table_and_writes_nothing(run: Run, tmp_path: Path):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--reweight", "burger=2", "--explain"]
    windows = ["--cross-replace-steps", ".5", "--self-replace-steps", ".2", "--blend", "lion"]
    outcome = run(*command, *windows, "--steps", "20", "--height", "256", "--width", "128")
    assert outcome.status == 0 and outcome.err == ""
    lines = [re.split(r" {2,}", line.strip()) for line in outcome.out.splitlines()]
    assert ["lion", "squirrel", "1 to 10 of 20"] in lines
    assert ["burger", "burger", "1 to 10 of 20", "weight 2 in all"] in lines
    # as the picture will be
    assert ["layout", "(self-attention up to 32 x 16)", "1 to 4 of 20"] in lines
    assert contents(tmp_path) == {}


# --- metadata and repeatability -------------------------------------------------------------------


def metadata(path: str | Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


@pytest.mark.filterwarnings("ignore:This model has never seen")
def test_metadata_repeats_the_picture(run: Run, tmp_path: Path):
    """A PNG says all that it takes to make it again, to the byte."""
    prompts = ["a café, a cat 🐱 and 猫", "a café, a dog 🐱 and 猫", "a dog eating a burger"]
    options = "--swap cat=dog --reweight dog=1.5 --blend dog --cross-replace-steps .7"
    more = "--steps 3 --guidance 5 --seed 7 --height 48 --scheduler ddim --eta .5 --dtype bfloat16"
    outcome = run(
        *(prompts[0], *options.split(), "--to", prompts[2], "--baseline", *more.split()),
        *("--negative", "noir né"),
    )
    assert outcome.status == 0
    found = metadata("out/edit-1.png")
    assert found["prompt"] == prompts[1]
    assert found["edit"].count("cross_replace_steps") == 1  # this picture's own
    assert metadata("out/edit-1-baseline.png")["edit"] == "None"
    assert metadata("out/source.png")["prompt"] == prompts[0]

    saved = metadata("out/row.png")
    assert saved["model"] == "emoji"
    again = minip2p.generate(
        minip2p.load(saved["model"], dtype=getattr(torch, saved["dtype"])),
        json.loads(saved["prompts"]),
        edit=eval(saved["edit"], dict(vars(edit))),
        num_inference_steps=json.loads(saved["num_inference_steps"]),
        guidance_scale=json.loads(saved["guidance_scale"]),
        negative_prompt=saved["negative_prompt"],
        seed=json.loads(saved["seed"]),
        height=json.loads(saved["height"]),
        width=json.loads(saved["width"]),
        scheduler=saved["scheduler"].lower(),
        eta=json.loads(saved["eta"]),
    )
    names = "source", "edit-1-baseline", "edit-1", "edit-2-baseline", "edit-2"
    for image, name in zip(again.images, names, strict=True):
        path = Path(f"out/{name}.png")
        assert files.png(image, metadata(path), path) == path.read_bytes()


def test_the_same_command_twice_gives_the_same_bytes(run: Run, tmp_path: Path):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--blend", "lion", "--maps", "--eta", "1"]
    for _ in range(2):
        assert run(*command, "--steps", "4", "--out", "a").status == 0
        (tmp_path / "a").rename(tmp_path / "b" if not (tmp_path / "b").exists() else tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert len(contents(tmp_path / "b")) == 5


def test_captions_stay_below_their_pictures():
    wide = "WWWWWWWW MMMMMMMM WWWWWWWWWWWWWWWWWWWWWWWWWWWWWW"
    for size, captions in ((64, 64), [wide, wide]), ((24, 256), ["squirrel", "motorcycle", "café"]):
        sheet = show.row([Image.new("RGB", size, "red")] * len(captions), captions)
        column = (sheet.width - 8) // len(captions)
        for x in range(0, sheet.width, column):
            gap = sheet.crop((x, 0, x + 8, sheet.height))
            assert gap.getextrema() == ((255, 255),) * 3


# --- numbers that end -----------------------------------------------------------------------------


def damaged(folder: Path, part: str, tensor: str, change: Callable[[torch.Tensor], None]) -> str:
    """A copy of the bundled model with one of its tensors changed."""
    shutil.copytree(EMOJI, folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    (name,) = [name for name in state if name.removeprefix("text_model.") == tensor]
    change(state[name])
    save_file(state, file)
    return str(folder)


def one_nan(tensor: torch.Tensor) -> None:
    tensor.flatten()[7] = torch.nan


def one_infinite(tensor: torch.Tensor) -> None:
    tensor.flatten()[7] = torch.inf


def large(tensor: torch.Tensor) -> None:
    tensor *= 3e4  # what comes out is beyond 65504, where float16 ends


NUMBERS_END = {
    "nan in the UNet": ("unet", "mid_block.resnets.0.conv1.weight", one_nan, "latents", "nan"),
    "infinite in the UNet": ("unet", "conv_in.bias", one_infinite, "latents", "float32"),
    "nan in the VAE": ("vae", "decoder.conv_in.weight", one_nan, "picture", "nan"),
    "nan in the text encoder": (
        "text_encoder",
        "encoder.layers.0.mlp.fc1.weight",
        one_nan,
        "text encoder",
        "nan",
    ),
}


@pytest.mark.parametrize("case", NUMBERS_END.values(), ids=NUMBERS_END.keys())
def test_numbers_that_end(run: Run, tmp_path: Path, case):
    """No black picture: one sentence, and nothing is written."""
    *where, what, became = case
    model = damaged(tmp_path / "model", *where)
    before = contents(tmp_path)
    for more in ([], ["--maps", "--html", "page.html"]):
        outcome = run(SQUIRREL, "--swap", "squirrel=lion", "--steps", "2", "--model", model, *more)
        assert outcome.status == 2 and outcome.out == ""
        assert len(outcome.said) == 1 and outcome.said[0].endswith("."), outcome.err
        for part in (what, became, "another file of weights"):
            assert part in outcome.said[0]
        assert "try float32" not in outcome.said[0]
        assert contents(tmp_path) == before


def test_numbers_beyond_float16(run: Run, tmp_path: Path):
    model = damaged(tmp_path / "model", "unet", "mid_block.resnets.0.norm2.weight", large)
    command = [SQUIRREL, "--steps", "2", "--model", model]
    outcome = run(*command, "--dtype", "float16")
    assert outcome.status == 2 and outcome.out == "" and not Path("out").exists()
    assert len(outcome.said) == 1, outcome.err
    for part in ("latents", "float16", "try float32"):
        assert part in outcome.said[0]
    wrote(run(*command), "picture")  # what it says to try is right


# --- nothing is lost ------------------------------------------------------------------------------


def test_an_interruption_while_sampling(tmp_path: Path):
    process = start("a cat", "--steps", "999", cwd=tmp_path)
    seen = ""
    while not re.search(r"[3-9]/999", seen):
        seen += process.stderr.read(1)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    outcome = Outcome(process.returncode, out, seen + err)
    assert outcome.status == 130
    assert outcome.out == ""
    assert len(outcome.said) == 1 and outcome.said[0].startswith("Interrupted")
    assert outcome.err.endswith(".\n")
    assert contents(tmp_path) == {}


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as the system reports it, without a name
ENCODER = OSError("encoder error -2 when writing image file")  # as Pillow does


@pytest.mark.parametrize(
    "error, status, must_say",
    [
        (KeyboardInterrupt(), 130, ["Interrupted"]),
        (FULL, 2, ["edit-1.png", os.strerror(errno.ENOSPC)]),
        (ENCODER, 2, ["edit-1.png", "encoder error"]),
    ],
    ids=["interrupted", "disk full", "encoder"],
)
@pytest.mark.parametrize("where", ["encoding", "writing"])
def test_all_files_are_written_or_none(
    run: Run, tmp_path: Path, monkeypatch, error, status, must_say, where
):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--steps", "1"]
    assert run(*command).status == 0
    before = contents(tmp_path)
    calls = iter(range(9))

    def save_half(image: Image.Image, file: Any, *args: Any, **settings: Any) -> None:
        if next(calls) == 0:  # the source's picture goes well
            return save(image, file, *args, **settings)
        file.write(b"half of it")
        raise error

    class Half:
        """A file on a disk that is full in the middle of the second."""

        def __init__(self, handle: int, mode: str):
            self.file = fdopen(handle, mode)

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            if next(calls) == 0:
                self.file.write(content)
                return
            self.file.write(content[: len(content) // 2])
            raise error

    save, fdopen = Image.Image.save, os.fdopen
    if where == "encoding":
        monkeypatch.setattr(Image.Image, "save", save_half)
    else:
        monkeypatch.setattr(os, "fdopen", Half)
    outcome = run(*command, "--seed", "1")

    assert outcome.status == status
    assert outcome.out == ""
    assert len(outcome.said) == 1 and outcome.said[0].endswith("."), outcome.said
    assert "None" not in outcome.said[0]
    for part in must_say:
        assert part in outcome.said[0]
    assert contents(tmp_path) == before


def test_a_folder_in_a_pictures_place(run: Run, tmp_path: Path):
    (tmp_path / "out" / "picture.png").mkdir(parents=True)
    outcome = run("a cat", "--steps", "1")
    is_one_sentence(outcome, ["out/picture.png", "folder", "--out"])  # before any time is spent
    assert contents(tmp_path) == {"out": None, "out/picture.png": None}


def test_a_reader_who_has_seen_enough(tmp_path: Path):
    """`... | head -1` closes the pipe: the pictures are written all the same, no traceback."""
    code = (
        "import os, sys\n"
        "from minip2p.tools import cli\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(cli.main(['a cat', '--steps', '1']))"
    )
    outcome = run_apart(cwd=tmp_path, code=code)
    assert outcome.status == 0 and outcome.said == []
    assert (tmp_path / "out" / "picture.png").exists()


# --- a run again ----------------------------------------------------------------------------------


@pytest.fixture
def latents(run: Run, monkeypatch) -> list[torch.Tensor]:
    """Of each run's pictures, as they come."""
    found = []

    def generate(*args: Any, **settings: Any) -> minip2p.Result:
        result = minip2p.generate(*args, **settings)
        found.append(result.latents)
        return result

    monkeypatch.setattr(cli, "generate", generate)
    return found


REPEATS = {
    "plain": ("'a cat'", "picture"),
    "swap with windows and a blend": (
        f"'{SQUIRREL}' --swap squirrel=lion --blend lion --cross-replace-steps lion=.4 "
        "--cross-replace-steps .8 --self-replace-steps .1,.5 --seed 1",
        "edit-1",
    ),
    "reweight": ("'a cat at night' --reweight night=-2 --reweight cat=1.5", "source"),
    "sweep": (
        f"'{SQUIRREL}' --swap squirrel=lion --sweep cross=0.1,.9 --baseline",
        "edit-1-cross-.9",
    ),
    "baseline": (f"'{SQUIRREL}' --swap squirrel=lion --baseline --fast", "edit-1-baseline"),
    "pndm": ("'a cat' --to 'a big cat' --scheduler pndm --guidance 3.25", "row"),
    "eta": ("'a cat' --swap cat=dog --eta 0.3 --scheduler ddim --dtype bfloat16", "row"),
    "negative prompt": ("'a cat' --negative='--no --dog, né' --seed 8888", "picture"),
    "not square": ("'a cat' --swap cat=dog --height 48 --width 96", "edit-1"),
    "maps and a page": ("'a cat' --swap cat=dog --maps --html a.html", "edit-1-maps"),
    "as a newcomer": ("", "row"),
    "a prompt that looks like an option": ("--steps=2 -- '--seed=1, a café'", "picture"),
}


@pytest.mark.filterwarnings("ignore:This model has never seen")
@pytest.mark.parametrize("command, picture", REPEATS.values(), ids=REPEATS.keys())
def test_repeat_makes_the_same(run: Run, latents, tmp_path: Path, command, picture):
    steps = [] if "--steps" in command else ["--steps", "3"]
    assert run(*steps, "--out", "first", *shlex.split(command)).status == 0
    shutil.copy(f"first/{picture}.png", "elsewhere.png")  # under another name

    outcome = run("--repeat", "elsewhere.png", "--out", "second")

    assert outcome.status == 0 and outcome.said == [], outcome.err
    assert latents[0].equal(latents[1])
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    if "--html" in command:
        first["a.html"] = Path("a.html").read_bytes()
    assert first == second


@pytest.mark.parametrize(
    "words",
    [
        "--no-ema -- x",
        "--ema -- x",
        "--model=a/b --tokenizer=c --device=cpu --fast -- --x",
        "--fit=pad --method=ddim --skip=2 --put-back --html=p.html -- x",
    ],
)
def test_a_command_is_read_as_it_was_written(words):
    words = words.split()
    assert repeat.command(cli.make_parser().parse_args(words), cli.make_parser()) == words


def test_where_files_are_is_not_recorded():
    words = "--html somewhere/else/p.html --out=o --preview=p --image=i --inversion=j --maps x"
    args = cli.make_parser().parse_args(words.split())
    assert repeat.command(args, cli.make_parser()) == ["--maps", "--html=p.html", "--", "x"]


def test_repeat_of_a_given_picture(run: Run, latents):
    assert run("a cat", "--steps", "2", "--out", "photo").status == 0
    edit = ["--image", "photo/picture.png", "--swap", "cat=dog", "--steps", "3", "--put-back"]
    assert run("a cat", *edit, "--inversion", "kept").status == 0
    for given in (["--image", "photo/picture.png"], ["--inversion", "kept"]):
        given += [] if given[0] == "--image" else ["--image", "photo/picture.png"]
        outcome = run("--repeat", "out/edit-1.png", *given, "--out", given[0][2:])
        assert outcome.status == 0 and outcome.said == []
        assert latents[-1].equal(latents[1])
    is_one_sentence(run("--repeat", "out/row.png"), ["out/row.png", "add --image FILE"])
    outcome = run("--repeat", "photo/picture.png", "--image", "photo/picture.png")
    is_one_sentence(outcome, ["no given picture", "leave out --image"])


def test_repeat_of_every_picture_of_a_run(run: Run, latents):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--swap", "burger=pizza", "--steps", "2"]
    assert run(*command).status == 0
    for name in ("source", "edit-1", "edit-2", "row"):
        outcome = run("--repeat", f"out/{name}.png", "--out", name)
        assert outcome.status == 0 and outcome.said == []
        assert latents[-1].equal(latents[0])
    assert run("--repeat", "out/row.png", "--explain").out == run(*command, "--explain").out
    assert run("--repeat", "out/row.png", "--out", "m", "--maps", "--html", "m.html").status == 0
    assert Path("m/edit-1-maps.png").exists() and Path("m.html").exists()


def test_repeat_says_where_the_picture_is_not_the_same(run: Run, monkeypatch):
    assert run("a cat", "--steps", "2").status == 0
    texts = metadata("out/picture.png")
    other = Image.new("RGB", (128, 128), "black")
    Path("black.png").write_bytes(files.png(other, texts, Path("black.png")))
    outcome = run("--repeat", "black.png", "--out", "again")
    assert outcome.status == 0 and len(outcome.said) == 1
    assert "black.png" in outcome.said[0] and "of 255" in outcome.said[0]
    small = Image.new("RGB", (8, 8))
    Path("small.png").write_bytes(files.png(small, texts, Path("small.png")))
    outcome = run("--repeat", "small.png", "--out", "third")
    assert outcome.status == 0 and "small.png was not made again" in outcome.said[0]


@pytest.fixture
def strange(run: Run) -> None:
    """Files that can't be repeated."""
    assert run("a cat", "--steps", "1").status == 0
    image, texts = picture("out/picture.png"), metadata("out/picture.png")

    def write(name: str, **changed: str) -> None:
        path = Path(f"{name}.png")
        path.write_bytes(files.png(image, texts | changed, path))

    image.save("bare.png")
    image.save("picture.jpg")
    Path("text.png").write_text("no picture")
    Path("folder.png").mkdir()
    whole = Path("out/picture.png").read_bytes()
    Path("half.png").write_bytes(whole[: len(whole) // 2])
    del texts["command"]
    write("foreign", parameters="a cat, Steps: 20")
    write("broken", command='["--steps=1", "--"')
    write("code", command="__import__('os').system('touch owned')")
    write("number", command="5")
    write("object", command='{"--steps": 1}')
    write("mixed", command='["--steps=1", 5]')
    write("unknown", command='["--nosuch=1", "--", "a cat"]')
    write("wrong", command='["--steps=many", "--", "a cat"]')
    write("spread", command='["--steps", "1", "--", "a cat"]')
    write("help", command='["--help"]')
    write("version", command='["--version", "--", "a cat"]')
    write("writing", command='["--out=owned", "--", "a cat"]')
    write("given", command='["--image=owned.png", "--", "a cat"]')
    write("page", command='["--html=../owned.html", "--", "a cat"]')
    write("itself", command='["--repeat=itself.png", "--", "a cat"]')
    write("deep", command="[" * 100_000)
    write("nothing", command="[]")
    write("edit", command='["--swap=zebra=lion", "--", "a cat"]')


NO_REPEATS = [
    ("--repeat nosuch.png", "nosuch.png", "No such file"),
    ("--repeat ''", "can't be read"),
    ("--repeat bare.png", "bare.png", "metadata"),
    ("--repeat foreign.png", "foreign.png", "metadata"),
    ("--repeat picture.jpg", "picture.jpg", "PNG"),
    ("--repeat text.png", "text.png", "PNG"),
    ("--repeat half.png", "half.png", "PNG"),
    ("--repeat folder.png", "folder.png", "directory"),
    *(
        (f"--repeat {name}.png", f"{name}.png", "damaged")
        for name in (
            *("broken", "code", "number", "object", "mixed", "unknown", "wrong", "spread"),
            *("help", "version", "writing", "given", "page", "itself", "deep", "nothing"),
        )
    ),
    ("--repeat edit.png", "'zebra'", "a cat"),
    ("--repeat out/picture.png --seed 8888", "leave out --seed", "--out"),
    ("--repeat out/picture.png --swap=a=b --baseline", "leave out --baseline, --swap"),
    ("'a dog' --repeat out/picture.png", "leave out a prompt"),
    ("--repeat out/picture.png -- --steps", "leave out a prompt"),
    ("--repeat out/picture.png --repeat out/picture.png", "--repeat", "once"),
]


@pytest.mark.parametrize("command, must_say", [pytest.param(c, s, id=c) for c, *s in NO_REPEATS])
def test_what_cannot_be_repeated(run: Run, strange, tmp_path: Path, command, must_say):
    before = contents(tmp_path)
    is_one_sentence(run(*shlex.split(command)), must_say)
    assert contents(tmp_path) == before


# --- a folder that is written twice ---------------------------------------------------------------


def test_another_run_takes_the_place_of_the_first(run: Run, tmp_path: Path):
    many = [SQUIRREL, "--swap", "squirrel=lion", "--swap", "squirrel=dog", "--maps", "--baseline"]
    few = [SQUIRREL, "--swap", "squirrel=cat", "--steps", "1"]
    assert run("a cat", "--steps", "1").said == []
    assert run(*many, "--steps", "1").said == []  # beside a picture that is no part of it
    notes = tmp_path / "out" / "edit-3.txt"
    notes.write_text("mine")
    Image.new("RGB", (8, 8)).save("out/edit-3.png")  # somebody's own, under such a name
    Image.new("RGB", (8, 8)).save("out/nice.png")
    shutil.copy("out/edit-2.png", "out/edit-9.png")  # and a copy of one of ours
    shutil.copy("out/edit-2.png", "out/lovely dog.png")

    outcome = run(*few)

    assert outcome.status == 0 and len(outcome.said) == 1
    replaced, removed = outcome.said[0].split("; ")
    assert replaced == "Replaced out/source.png, out/edit-1.png, out/row.png"
    gone = {"edit-1-baseline", "edit-1-baseline-maps", "edit-1-maps", "edit-2-baseline"}
    gone |= {"edit-2-baseline-maps", "edit-2-maps", "edit-2", "source-maps"}
    assert removed.startswith("removed ") and removed.endswith(", of another run.")
    assert set(re.findall(r"out/(\S+)\.png", removed)) == gone
    kept = {"picture.png", "edit-3.txt", "edit-3.png", "nice.png", "edit-9.png", "lovely dog.png"}
    assert set(os.listdir("out")) == {"source.png", "edit-1.png", "row.png"} | kept
    assert notes.read_text() == "mine"


def test_a_page_beside_pictures_takes_no_place_of_theirs(run: Run):
    assert run("a cat", "--swap", "cat=dog", "--swap", "cat=lion", "--steps", "1", "--out", ".")
    before = sorted(os.listdir())
    assert before == ["edit-1.png", "edit-2.png", "row.png", "source.png"]
    assert run("a cat", "--swap", "cat=dog", "--steps", "1", "--html", "page.html").said == []
    assert sorted(os.listdir()) == ["edit-1.png", "edit-2.png", "out", "page.html", *before[2:]]


def test_the_same_run_twice_is_said(run: Run):
    command = ["a cat", "--swap", "cat=dog", "--steps", "1"]
    page = ["--html", "page.html", "--preview", "preview.png"]
    assert run(*command, *page).said == []
    (said,) = run(*command, *page).said
    assert said == "Replaced out/source.png, out/edit-1.png, out/row.png, page.html."
    assert run("a cat", "--steps", "1", "--maps", "--out", "p").said == []
    (said,) = run("a cat", "--steps", "1", "--out", "p").said
    assert said == "Replaced p/picture.png; removed p/picture-maps.png, of another run."


@pytest.mark.parametrize(
    "command, name",
    [
        ("'a cat'", "out/picture.png"),
        ("'a cat' --maps", "out/picture-maps.png"),
        ("'a cat' --swap cat=dog", "out/row.png"),
        ("'a cat' --swap cat=dog --swap cat=lion --maps", "out/edit-2-maps.png"),
        ("'a cat' --html page.html", "page.html"),
        ("'a cat' --preview preview.png", "preview.png"),
    ],
)
@pytest.mark.parametrize("content", ["a picture", "text", "nowhere"])
def test_what_minip2p_did_not_write_stays(run: Run, tmp_path: Path, command, name, content):
    Path("out").mkdir()
    if content == "a picture":
        Image.new("RGB", (8, 8)).save("mine.png")
        Path("mine.png").rename(name)
    elif content == "text":
        Path(name).write_text("mine")
    else:
        Path(name).symlink_to("nosuch")

    def there() -> dict[Path, tuple[int, int]]:
        return {p: (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")}

    before = there()
    option = "--" + Path(name).stem if "/" not in name else "--out"
    option = "--html" if option == "--page" else option
    is_one_sentence(run(*shlex.split(command), "--steps", "1"), [name, "move it", option])
    assert there() == before


@pytest.mark.parametrize(
    "command",
    ["--preview out/picture.png", "--html ../{}/out/picture.png", "--html a.png --preview a.png"],
)
def test_two_files_in_one_place(run: Run, tmp_path: Path, command):
    command = command.format(tmp_path.name)
    is_one_sentence(run("a cat", *command.split()), [command.split()[-1], "another file"])
    assert contents(tmp_path) == {}


# --- words that not every edit has ----------------------------------------------------------------

BICYCLE = "a photo of a cat riding a bicycle"
DOG = "a photo of a dog riding a bicycle"
TWO_SWAPS = ["--swap", "bicycle=car", "--swap", "cat=dog", "--steps", "2"]


@pytest.mark.parametrize(
    "option, kept",
    [
        ("--blend car", "local_blend=LocalBlend(words=('car',)"),
        ("--blend car --blend bicycle", "local_blend=LocalBlend(words=('car', 'bicycle')"),
        ("--reweight car=2", "weights={'car': 2.0}"),
        ("--cross-replace-steps car=.4", "cross_replace_steps={'car': (0.0, 0.4)}"),
        ("--cross-replace-steps car=.4 --cross-replace-steps .8",
         "cross_replace_steps={'car': (0.0, 0.4), 'default_': (0.0, 0.8)}"),
    ],
)  # fmt: skip
def test_an_option_acts_where_its_word_is(run: Run, option, kept):
    with pytest.warns(UserWarning) as said:
        outcome = run(BICYCLE, *TWO_SWAPS, *option.split())
    wrote(outcome, TWO)
    (said,) = (str(warning.message) for warning in said)
    name = option.split("=")[0].split(" --blend b")[0]
    name = name.replace("car", "").strip() + " car"
    assert said == f"{name} does not act on {DOG!r}: no 'car' there."
    first, second = (metadata(f"out/edit-{n}.png")["edit"] for n in (1, 2))
    assert kept in first and "car" not in second
    alone = "bicycle" in option
    assert ("bicycle" in second) == alone  # the other word of the blend stays
    # Edits that have all words are as they would be alone.
    assert run(BICYCLE, *TWO_SWAPS[:2], *option.split(), "--steps", "2", "--out", "a").status == 0
    assert difference("out/edit-1.png", "a/edit-1.png") <= 1


def test_options_that_act_on_all_say_nothing(run: Run):
    for option in ("--blend cat", "--reweight photo=2", "--cross-replace-steps riding=.5"):
        wrote(run(BICYCLE, *TWO_SWAPS, *option.split(), "--out", option[2:5]), TWO, option[2:5])


@pytest.mark.filterwarnings("ignore:This model has never seen")
@pytest.mark.parametrize(
    "options, says",
    [
        ("--blend zebra", "'zebra'"),
        ("--blend car --blend zebra", "'zebra'"),
        ("--blend car --reweight zebra=2", "'zebra'"),
        ("--blend dog --cross-replace-steps zebra=.5", "'zebra'"),
    ],
)
def test_a_word_that_no_edit_has_is_a_mistake(run: Run, tmp_path: Path, options, says):
    is_one_sentence(run(BICYCLE, *TWO_SWAPS, *options.split()), [says, "bicycle, car, dog"])
    assert contents(tmp_path) == {}


def test_explain_shows_what_acts(run: Run):
    with pytest.warns(UserWarning, match="--blend car does not act on"):
        outcome = run(BICYCLE, *TWO_SWAPS, "--blend", "car", "--explain")
    first, second = outcome.out.split("Edit 2")
    assert "blend" in first and "blend" not in second


# --- previews -------------------------------------------------------------------------------------


def test_preview_is_redrawn(run: Run, monkeypatch):
    seen = []
    write = files.write_all

    def write_all(written: dict[Path, bytes]) -> None:
        write(written)
        if Path("p.png") in written:
            seen.append((metadata("p.png")["call"], picture("p.png")))

    monkeypatch.setattr(files, "write_all", write_all)
    outcome = run(SQUIRREL, "--swap", "squirrel=lion", "--steps", "25", "--preview", "p.png")
    assert outcome.status == 0 and outcome.said == []
    assert outcome.out.splitlines()[-1] == "p.png"
    assert [call for call, _ in seen] == [f"{n} of 25" for n in (*range(2, 25, 2), 25)]
    last, end = np.asarray(seen[-1][1], float), np.asarray(picture("out/row.png"), float)
    assert abs(last - end).mean() < abs(np.asarray(seen[0][1], float) - end).mean() / 2
    assert run("a cat", "--steps", "3", "--preview", "p.png", "--out", "o").status == 0
    assert [call for call, _ in seen[-3:]] == ["1 of 3", "2 of 3", "3 of 3"]


# --- imports --------------------------------------------------------------------------------------


def test_importing_minip2p_is_quick_and_brings_nothing_heavy(tmp_path: Path):
    code = (
        "import time, torch, sys\n"
        "start = time.process_time(); import minip2p; took = time.process_time() - start\n"
        "heavy = ['transformers', 'diffusers', 'huggingface_hub', 'safetensors']\n"
        "heavy.append('minip2p.tools.cli')\n"
        "print(took, *(name for name in heavy if name in sys.modules))"
    )
    times = []
    while not times or min(times) >= 0.1:  # other programs may have slowed it down
        took, *heavy = run_apart(cwd=tmp_path, code=code).out.split()
        assert heavy == []
        times.append(float(took))
        assert len(times) <= 5, times


def test_help_and_mistakes_come_without_transformers(tmp_path: Path):
    code = (
        "import sys\n"
        "from minip2p.tools import cli\n"
        "for command in ['--steps', 'x'], ['--steps', '0'], ['--nosuch'], ['a', '--baseline']:\n"
        "    assert cli.main(command) == 2\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0\n"
        "heavy = 'transformers', 'diffusers', 'huggingface_hub', 'safetensors'\n"
        "assert not [name for name in heavy if name in sys.modules]"
    )
    outcome = run_apart(cwd=tmp_path, code=code)
    assert outcome.status == 0, outcome.err
    assert all(f"--{option}" in outcome.out for option in ("swap", "sweep", "model", "maps"))


ORDER = (  # each imports none that comes after it; what is read comes before what is used
    *("check", "spacing", "scheduler", "words", "align", "attention", "unet", "vae", "text"),
    *("mask", "blend", "edit", "saved", "store"),
    *("weights.files", "weights.ema", "weights.build", "weights.schedule", "weights.clip"),
    *("weights.folder", "weights.single_file", "weights.hub", "weights"),
    *("settings", "progress", "picture", "invert", "sample"),
    *("tools.show", "tools.fast", "tools.table", "tools.page", "tools.given", "tools.files"),
    *("tools.repeat", "tools.job", "tools.cli", "__main__"),
    *("tools.measure", "tools.study", "tools.results", "tools.worker", "tools.cluster"),
    *("tools.report", "tools.sweep", "sweep"),
    *("tools.wish", "tools.studio", "studio"),
)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The modules that a module imports, at its head and in its functions; minip2p's as in ORDER.

    package: the folder it lies in, "" or "tools".
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue  # what it does as a program
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom):
            where = [package] if node.level == 1 and package else []
            where += [node.module] if node.module else []
            for alias in node.names:
                inside = ".".join([*where, alias.name])
                yield f".{inside if inside in ORDER else '.'.join(where)}"
        yield from imports(node, package)


def test_imports_run_one_way():
    """No circle: there is an order in which every module finds all that it imports."""
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    for path in files:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name == "tools":  # a folder, of which nothing is imported with it
            assert not list(imports(ast.parse(path.read_text()), name))
            continue
        earlier = ORDER[: ORDER.index(name)]
        package = name if path.stem == "__init__" else ".".join(parts[:-1])
        for module in imports(ast.parse(path.read_text()), package):
            assert module.split(".")[0] not in ("diffusers", "minip2p"), (name, module)
            assert not module.startswith(".") or module[1:] in earlier, (name, module)


@pytest.mark.parametrize("program", [["-m", "minip2p.sample"], ["-m", "minip2p"], None])
def test_each_way_to_start_it_says_its_version(program: list[str] | None):
    command = (
        [sys.executable, *program] if program else [str(Path(sys.executable).parent / "minip2p")]
    )
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    version = importlib.metadata.version("minip2p")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"minip2p {version}\n", "")


def test_the_installed_command_is_there():
    """`minip2p`, as pyproject.toml has it."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    name = re.search(r'^minip2p = "(.+)"$', project, re.MULTILINE)
    assert name and pkgutil.resolve_name(name[1]) is cli.main
