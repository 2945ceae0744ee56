"""The command line as its user meets it: what it prints, what it writes, and what it never does."""

import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EMOJI, Outcome, picture
from PIL import Image, ImageChops

import minip2p
from minip2p import sample, saved, show
from minip2p.options import make_parser, make_run
from minip2p.outputs import png
from minip2p.program import begin, end_at_once, is_running, printable, run_program
from minip2p.run import Run
from minip2p.unet import UNet

PACKAGE = Path(minip2p.__file__).parent
SQUIRREL = "a painting of a squirrel eating a burger"
Program = Callable[..., Outcome]


def start(
    *words: str, cwd: Path, code: str | None = None, program: str = "-m minip2p.sample"
) -> subprocess.Popen[str]:
    """Start a program, or other Python code, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *(program.split() if code is None else ["-c", code]), *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # Whoever runs the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_apart(*words: str, cwd: Path, code: str | None = None) -> Outcome:
    process = start(*words, cwd=cwd, code=code)
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Read all files below a folder, those that are hidden too; None for a folder."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


def wrote(outcome: Outcome, names: str, folder: str = "out") -> None:
    """Assert that the command wrote these pictures, named them, and said nothing else."""
    assert outcome.status == 0, outcome.err
    files = [f"{folder}/{name}.png" for name in names.split()]
    assert outcome.out.splitlines() == files
    assert set(os.listdir(folder)) == {f"{name}.png" for name in names.split()}
    for file in files:
        assert picture(file).format is None and Image.open(file).mode == "RGB"
    assert outcome.messages == []


def difference(a: str, b: str) -> int:
    """Return the greatest difference of two pictures, of 255."""
    extrema = ImageChops.difference(picture(a), picture(b)).getextrema()
    return max(high for _, high in extrema)


def metadata(path: str | Path) -> dict[str, Any]:
    """Read the texts in a PNG."""
    with Image.open(path) as image:
        return dict(image.text)


# --- mistakes -------------------------------------------------------------------------------------

# A command, and what its one sentence must say: the mistake, and what is possible. These are
# refused before a model is loaded, let alone downloaded.
EARLY: list[tuple[str, ...]] = [
    # what is no option, or has no value
    ("--nosuch", "--nosuch", "--help"),
    ("'a cat' 'a dog'", "a dog", "quotes"),
    ("'a cat' --steps", "--steps", "expected"),
    # numbers
    ("'a cat' --steps 0", "steps", "from 1 to 999", "0"),
    ("'a cat' --seed -1", "seed", "from 0 to", "-1"),
    ("'a cat' --guidance nan", "guidance", "number", "nan"),
    (f"'a cat' --height 4{'0' * 30}", "height", f"4{'0' * 30}"),
    ("'a cat' --scheduler euler", "scheduler", "euler", "ddim", "pndm"),
    ("'a cat' --dtype int8", "dtype", "int8", "float32", "bfloat16"),
    # twice, where only one makes sense
    ("'a cat' --steps 2 --steps 3", "--steps", "once"),
    ("'a cat' --swap cat=dog --sweep cross=0.1 --sweep self=0.1", "--sweep", "once"),
    ("'a cat' --reweight cat=1 --reweight cat=2", "--reweight", "two values", "'cat'"),
    ("'a cat' --swap cat=dog --cross-replace-steps .4 --cross-replace-steps .5", "one"),
    ("'a cat' --swap cat=dog --sweep cross=.1,.4 --cross-replace-steps .3", "--sweep", "--cross"),
    ("'a cat' --swap cat=dog --sweep cross=.5,0.5", "--sweep", "0.5"),
    # words and prompts
    ("'a cat' --swap cat", "--swap", "'cat'", "="),
    ("'a cat' --swap cat=", "--swap", "'cat='"),
    ("'a cat' --swap zebra=lion", "'zebra'", "a cat"),
    ("'a cat' --to ''", "--to", "''"),
    ("'a cat' --reweight cat=abc", "--reweight", "'abc'"),
    ("'a cat' --reweight cat=nan", "'cat'", "finite", "nan"),
    ("--swap cat=dog", "prompt"),
    ("'' --swap cat=dog", "prompt"),
    # windows
    ("'a cat' --swap cat=dog --cross-replace-steps 1.5", "--cross", "from 0 to 1", "'1.5'"),
    ("'a cat' --swap cat=dog --cross-replace-steps 0.8,0.2", "--cross", "start", "'0.8,0.2'"),
    ("'a cat' --swap cat=dog --self-replace-steps cat=0.4", "--self", "'cat=0.4'"),
    ("'a cat' --swap cat=dog --sweep foo=1", "--sweep", "cross=", "self=", "'foo=1'"),
    ("'a cat' --swap cat=dog --sweep cross=0.1,,0.5", "--sweep", "from 0 to 1", "''"),
    # an edit is missing
    ("'a cat' --blend cat", "--blend", "--swap"),
    ("'a cat' --cross-replace-steps 0.5", "--cross-replace-steps", "--swap"),
    ("'a cat' --sweep ''", "--sweep", "--swap"),
    ("'a cat' --explain", "--explain", "--swap"),
    # no place for the pictures
    (f"'a cat' --out '{__file__}/below'", "--out", "test_cli.py", "folder"),
    ("'a cat' --out 'a\0b'", "--out"),
    (f"'a cat' --out {'x' * 300}", "x" * 300, "too long"),
]
LATE: list[tuple[str, ...]] = [  # what only a model can tell
    ("'a cat' --height 65", "height", "multiple of 8", "65"),
    ("'a cat' --swap cat=dog --explain --height 65", "height", "multiple of 8", "65"),
    ("--blend cat", "'cat'", "squirrel", "lion"),
    ("'a caf\udce9' --steps 1", "caf", "UTF-8"),
    (f"--fast --dtype float16 --model '{EMOJI}'", "--fast", "float16", "float32"),
    ("'a cat' --model 'no\nsuch'", "such", ".safetensors"),
    ("'a cat' --tokenizer nosuch", "nosuch", "tokenizer.json"),
    ("'a cat' --device nonsense", "nonsense", "cpu"),
    ("'a cat' --ema", "--ema", "single file"),
]


def is_one_sentence(outcome: Outcome, parts: list[str]) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1 and outcome.err.endswith(".\n"), outcome.err
    assert "Traceback" not in outcome.err and "Error" not in outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.mark.filterwarnings("ignore:This model has never seen")
@pytest.mark.parametrize(
    "command, parts", [pytest.param(c, s, id=ascii(c)[1:70]) for c, *s in EARLY + LATE]
)
def test_a_mistake_is_one_sentence(run: Program, tmp_path: Path, monkeypatch, command, parts):
    if (command, *parts) in EARLY:
        monkeypatch.setattr(sample, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    is_one_sentence(run(*shlex.split(command)), parts)
    assert contents(tmp_path) == {}


def test_a_folder_that_may_not_be_written_to(run: Program, tmp_path: Path, monkeypatch):
    # The administrator, whom tests in containers run as, may write anywhere.
    (tmp_path / "locked").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and mode != os.W_OK)
    is_one_sentence(run("a cat", "--steps", "1", "--out", "locked/out"), ["--out", "locked"])
    assert contents(tmp_path) == {"locked": None}


# --- how a program ends ---------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[Any], None]:
    def program(argv: Any) -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (minip2p.UserError("It is\n wrong. "), 2, "It is wrong.\n"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device.\n"),
        (UserWarning("python -W error"), 2, "python -W error.\n"),
        (MemoryError(), 2, "There is not enough memory: ask for smaller pictures"),
        (torch.cuda.OutOfMemoryError("CUDA"), 2, "There is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "There is not enough"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (minip2p.UserError("a\x1b[2J\x9b1mé"), 2, "a\\x1b[2J\\x9b1mé.\n"),
    ],
    ids=repr,
)
def test_how_a_program_ends(capsys, monkeypatch, error, status, message):
    monkeypatch.setattr("warnings.formatwarning", None)
    assert run_program(raises(error), [], "Stopped.") == status
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug")])
def test_a_bug_shows_its_traceback(monkeypatch, error):
    monkeypatch.setattr("warnings.formatwarning", None)
    with pytest.raises(type(error)):
        run_program(raises(error), [])


def test_a_console_gets_what_it_can_show():
    class Console:
        encoding = "ascii"

    assert printable("Zoë's 🐱\n\t\x07\u202e", Console()) == "Zo\\xeb's \\U0001f431\n\t\\x07\\u202e"


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_run(tmp_path: Path, monkeypatch):
    """Without arguments, by a newcomer, on a console that has no ä."""
    outcome = run_apart("--out", "bär", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert outcome.status == 0 and outcome.messages == []
    names = [f"{name}.png" for name in ["source", "edit-1-baseline", "edit-1", "row"]]
    assert outcome.out.splitlines() == [f"b\\xe4r/{name}" for name in names]
    assert "50/50" in outcome.err  # the progress bar
    assert picture("bär/source.png").size == (128, 128)
    assert difference("bär/source.png", "bär/edit-1.png") > 100
    assert difference("bär/edit-1-baseline.png", "bär/edit-1.png") > 50
    assert set(os.listdir()) == {"bär"} and set(os.listdir("bär")) == {*names}


def test_one_prompt_is_one_picture(run: Program):
    wrote(run("a cat", "--steps", "2"), "picture")
    wrote(run("a cat", "--steps", "2", "--out", "a/b"), "picture", "a/b")
    wrote(run("", "--steps", "1", "--out", "empty"), "picture", "empty")
    assert difference("out/picture.png", "a/b/picture.png") == 0


@pytest.mark.parametrize(
    "command, names",
    [
        ("--swap squirrel=lion --to 'a photo of a cat'", "source edit-1 edit-2 row"),
        ("--to 'a squirrel at night' --baseline", "source edit-1-baseline edit-1 row"),
        ("--swap squirrel=lion --maps", "source source-maps edit-1 edit-1-maps row"),
        (
            "--swap squirrel=lion --sweep cross=.1,0.9 --self-replace-steps .2",
            "source edit-1-cross-0.1 edit-1-cross-0.9 row",
        ),
        (
            "--swap squirrel=lion --swap squirrel=dog --sweep self=0,1 --baseline",
            "source edit-1-baseline edit-1-self-0 edit-1-self-1 "
            "edit-2-baseline edit-2-self-0 edit-2-self-1 row",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_edits(run: Program, command, names):
    wrote(run(SQUIRREL, *shlex.split(command), "--steps", "1"), names)


@pytest.mark.filterwarnings("ignore")
def test_pictures_that_are_not_square(run: Program):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--blend", "lion", "--maps", "--steps", "1"]
    outcome = run(*command, "--height", "120", "--width", "160")
    wrote(outcome, "source source-maps edit-1 edit-1-maps row")
    assert picture("out/edit-1.png").size == (160, 120)
    sheet, maps = picture("out/row.png"), picture("out/edit-1-maps.png")
    assert 250 < sheet.height < 400
    assert maps.width - 8 == 3.5 * (sheet.width - 8)  # the picture and six words: "a" is one


def test_fast(run: Program, toy_folder: Path):
    """--fast changes the model, so it gets one of its own."""
    command = [SQUIRREL, "--steps", "1", "--model", str(toy_folder)]
    wrote(run(*command, "--fast"), "picture")
    wrote(run(*command, "--out", "usual"), "picture", "usual")
    assert difference("out/picture.png", "usual/picture.png") <= 1


def test_explain_prints_a_table_and_writes_nothing(run: Program, tmp_path: Path):
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


def test_captions_stay_below_their_pictures():
    wide = "WWWWWWWW MMMMMMMM WWWWWWWWWWWWWWWWWWWWWWWWWWWWWW"
    for size, captions in ((64, 64), [wide, wide]), ((24, 256), ["squirrel", "motorcycle", "café"]):
        sheet = show.row([Image.new("RGB", size, "red")] * len(captions), captions)
        column = (sheet.width - 8) // len(captions)
        for x in range(0, sheet.width, column):
            gap = sheet.crop((x, 0, x + 8, sheet.height))
            assert gap.getextrema() == ((255, 255),) * 3


def test_a_preview_is_redrawn(run: Program, monkeypatch):
    seen = []
    write = saved.write_files

    def write_files(files: dict[Path, bytes], *arguments: Any) -> None:
        write(files, *arguments)
        seen.append((metadata("p.PNG")["call"], picture("p.PNG")))

    monkeypatch.setattr(sample, "write_files", write_files)
    command = [SQUIRREL, "--swap", "squirrel=lion", "--preview", "p.PNG"]
    outcome = run(*command, "--steps", "25")
    assert outcome.status == 0 and outcome.messages == []
    assert outcome.out.splitlines()[-1] == "p.PNG"
    assert [call for call, _ in seen] == [f"{n} of 25" for n in (*range(2, 25, 2), 25)]
    assert len({image.tobytes() for _, image in seen}) > 1
    del seen[:]
    assert run(*command, "--steps", "3", "--out", "o").status == 0  # its own file is replaced
    assert [call for call, _ in seen] == ["1 of 3", "2 of 3", "3 of 3"]


# --- numbers that end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, method, message",
    [
        ("unet", "forward", "The latents became nan"),
        ("vae", "decode", "The decoded picture became nan"),
        ("text_encoder", "forward", "The text encoder's output became nan"),
    ],
)
def test_numbers_that_end(run: Program, toy, tmp_path: Path, monkeypatch, part, method, message):
    """No black picture: one sentence, and nothing is written."""
    compute = getattr(toy, part).__getattribute__(method)
    monkeypatch.setattr(getattr(toy, part), method, lambda *inputs: compute(*inputs) * torch.nan)
    command = [SQUIRREL, "--swap", "squirrel=lion", "--steps", "1", "--maps", "--html", "a.html"]
    outcome = run(*command)
    assert outcome.status == 2 and outcome.out == "" and contents(tmp_path) == {}
    assert outcome.messages == [f"{message} in float32: try another file of weights."]


def test_numbers_beyond_float16(run: Program, monkeypatch):
    compute = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *inputs: compute(*inputs) * 1e6)
    command = [SQUIRREL, "--steps", "2"]
    outcome = run(*command, "--dtype", "float16")
    assert outcome.status == 2 and outcome.out == "" and not Path("out").exists()
    (message,) = outcome.messages
    assert all(part in message for part in ("latents", "float16", "try float32"))
    wrote(run(*command), "picture")  # what it says to try is right


# --- files ----------------------------------------------------------------------------------------


def test_an_interruption_while_sampling(tmp_path: Path):
    process = start("a cat", "--steps", "999", cwd=tmp_path)
    seen = ""
    while not re.search(r"[3-9]/999", seen):
        seen += process.stderr.read(1)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    outcome = Outcome(process.returncode, out, seen + err)
    assert outcome.status == 130 and outcome.out == ""
    assert len(outcome.messages) == 1 and outcome.messages[0].startswith("Interrupted")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("minip2p", "numpy"),
        ("minip2p.studio", "minip2p.studio.request"),
    ],
)
def test_an_interruption_of_the_imports(tmp_path: Path, program: str, module: str):
    """After this module: one line, and the shell's status of Ctrl+C."""
    process = start(cwd=tmp_path, program=f"-X importtime -m {program}")
    while not re.search(rf"\| +{module}\n", line := process.stderr.readline()):
        assert process.poll() is None, line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    messages = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, messages) == (130, "", ["Interrupted."])


@pytest.mark.parametrize(
    ("command", "argv", "expected"),
    [
        ("python -m minip2p a", "-m a", True),
        ("python -m minip2p.sweep study.toml", "-m study.toml", True),
        ("python -B -mminip2p.sample -m x", "-m -m x", True),
        ("/usr/bin/python3 /usr/bin/minip2p a", "/usr/bin/minip2p a", True),
        ("python -m pytest tests", "-m tests", False),
        ("python -m thesis minip2p", "-m minip2p", False),
        ("python thesis.py minip2p", "thesis.py minip2p", False),
        ("python", "", False),
    ],
)
def test_programs_alone_prepare_their_process(monkeypatch, command: str, argv: str, expected: bool):
    """The environment and the signals of other people's processes stay what they are.

    argv: as sys.argv is while the modules are imported; -m stands for the module's file.
    """
    monkeypatch.setattr(sys, "orig_argv", command.split())
    monkeypatch.setattr(sys, "argv", argv.split(" "))
    assert is_running() == expected


def test_how_a_program_begins(monkeypatch):
    """A setting of the user's stays, and where Ctrl+C is ignored, it stays ignored."""
    monkeypatch.setattr("warnings.formatwarning", None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    monkeypatch.setattr(sys, "stderr", None)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        begin()
        with sys.stderr as stream:
            assert stream.write("") == 0 and not stream.isatty()
        assert os.environ["GOMP_SPINCOUNT"] == "5"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        monkeypatch.delenv("GOMP_SPINCOUNT")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        begin()
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
        assert signal.getsignal(signal.SIGINT) == end_at_once
        assert run_program(lambda argv: None, []) == 0
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        os.environ.pop("GOMP_SPINCOUNT", None)


def test_a_reader_who_has_seen_enough(tmp_path: Path):
    """`... | head -1` closes the pipe: no traceback, status 0, also after --explain."""
    code = (
        "import os, sys\n"
        "from minip2p.sample import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "status = main(['a cat', '--swap', 'cat=dog', '--explain'])\n"
        "sys.exit(main(['a cat', '--steps', '1']) or status)"
    )
    outcome = run_apart(cwd=tmp_path, code=code)
    assert outcome.status == 0 and outcome.messages == []
    assert (tmp_path / "out" / "picture.png").exists()


class Full:
    """A disk on which the second file does not fit, or can't take its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException):
        self.calls = 0
        original = getattr(Path, method)

        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise error
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, method, call)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_all_files_are_ready_before_one_is_replaced(tmp_path: Path, monkeypatch, error, durable):
    files = {tmp_path / name: b"new" for name in ("a", "b")}
    saved.write_files(dict.fromkeys(files, b"old"), durable=durable)
    Full(monkeypatch, "open", error)
    with pytest.raises((minip2p.UserError, KeyboardInterrupt)) as caught:
        saved.write_files(files, durable=durable)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'b'} can't be written: No space left on device."
    assert contents(tmp_path) == {"a": b"old", "b": b"old"}  # and nothing else


def test_a_file_that_cannot_take_its_place_is_named(tmp_path: Path, monkeypatch):
    files = {tmp_path / name: b"new" for name in ("a", "b")}
    Full(monkeypatch, "replace", OSError(1, "Operation not permitted"))
    with pytest.raises(minip2p.UserError, match=rf"b can't .*; already written: {tmp_path / 'a'}"):
        saved.write_files(files)
    assert contents(tmp_path) == {"a": b"new"}


def test_what_appears_during_a_run_is_not_replaced(run: Program, tmp_path: Path, monkeypatch):
    generate = Run.generate

    def late(*arguments: Any, **options: Any) -> minip2p.Result:
        Path("out").mkdir()
        Path("out/edit-1.png").write_text("mine")
        return generate(*arguments, **options)

    monkeypatch.setattr(Run, "generate", late)
    outcome = run("a cat", "--swap", "cat=dog", "--steps", "1")
    assert outcome.status == 2 and "out/edit-1.png was not written by minip2p" in outcome.err
    assert contents(tmp_path) == {"out": None, "out/edit-1.png": b"mine"}


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path):
    mask = os.umask(0o027)
    try:
        saved.write_files({tmp_path / "a": b""})
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_second_run_replaces_files_of_its_names_and_deletes_nothing(run: Program):
    first = [SQUIRREL, "--swap", "squirrel=lion", "--swap", "squirrel=dog", "--steps", "1"]
    page = ["--html", "page.html", "--preview", "now.PNG"]
    assert run(*first, *page, "--maps").messages == []
    before = set(os.listdir("out"))
    outcome = run(SQUIRREL, "--swap", "squirrel=cat", "--steps", "1", *page)
    replaced = "Replaced out/source.png, out/edit-1.png, out/row.png, page.html."
    assert outcome.status == 0 and outcome.messages == [replaced]
    assert set(os.listdir("out")) == before


@pytest.mark.parametrize(
    "command, name, content",
    [
        ("'a cat'", "out/picture.png", "a picture"),
        ("'a cat' --maps", "out/picture-maps.png", "text"),
        ("'a cat' --swap cat=dog", "out/row.png", "a folder"),
        ("'a cat' --swap cat=dog --swap cat=lion --maps", "out/edit-2-maps.png", "nowhere"),
        ("'a cat' --html page.html", "page.html", "text"),
        ("'a cat' --html page.png", "page.png", "a picture"),
        ("'a cat' --preview preview.png", "preview.png", "a picture"),
    ],
)
def test_what_minip2p_did_not_write_stays(run: Program, tmp_path: Path, command, name, content):
    Path("out").mkdir()
    if content == "a picture":
        Image.new("RGB", (8, 8)).save("mine.png")
        Path("mine.png").rename(name)
    elif content == "text":
        Path(name).write_text("mine")
    elif content == "a folder":
        Path(name).mkdir()
    else:
        Path(name).symlink_to("nosuch")

    def entries() -> dict[Path, tuple[int, int]]:
        return {p: (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")}

    before = entries()
    option = "--out" if "/" in name else "--html" if "page" in name else "--preview"
    is_one_sentence(run(*shlex.split(command), "--steps", "1"), [name, option])
    assert entries() == before


@pytest.mark.parametrize(
    "command",
    ["--preview out/picture.png", "--html ../{}/out/picture.png", "--html a.png --preview a.png"],
)
def test_two_files_in_one_place(run: Program, tmp_path: Path, command):
    command = command.format(tmp_path.name)
    is_one_sentence(run("a cat", *command.split()), [command.split()[-1], "another file"])
    assert contents(tmp_path) == {}


# --- metadata and runs again ----------------------------------------------------------------------


@pytest.fixture
def latents(monkeypatch) -> list[torch.Tensor]:
    """Collect the latents of every run."""
    results: list[torch.Tensor] = []
    generate = Run.generate

    def keep(*arguments: Any, **options: Any) -> minip2p.Result:
        result = generate(*arguments, **options)
        results.append(result.latents)
        return result

    monkeypatch.setattr(Run, "generate", keep)
    return results


REPEATS = {
    "swap with windows and a blend": (
        f"'{SQUIRREL}' --swap squirrel=lion --blend lion --cross-replace-steps lion=.4 "
        "--cross-replace-steps .8 --self-replace-steps .1,.5 --seed 1",
        "edit-1",
    ),
    "reweight": ("'a cat at night' --reweight night=-2 --height 48 --width 96", "source"),
    "sweep": (
        f"'{SQUIRREL}' --swap squirrel=lion --swap burger=cake --sweep cross=0.1,.9 --baseline",
        "edit-2-cross-0.9",
    ),
    "pndm": ("'a cat' --to 'a big cat' --scheduler pndm --guidance 3.25", "row"),
    "negative prompt": ("'a cat' --negative='--no, né' --eta 0.3 --scheduler ddim", "picture"),
    "maps and a page": ("'a cat' --swap cat=dog --maps --html a.html", "edit-1-maps"),
    "as a newcomer": ("", "row"),
    "a prompt that looks like an option": ("--steps=2 -- '--seed=1, a café 🐱'", "picture"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command, name", REPEATS.values(), ids=REPEATS.keys())
def test_repeat_makes_the_same(run: Program, latents, tmp_path: Path, command, name):
    """From the file's record, from its command, and as an equal Run from the words again."""
    words = [*([] if "--steps" in command else ["--steps", "2"]), *shlex.split(command)]
    assert run("--out", "first", *words).status == 0
    shutil.copy(f"first/{name}.png", "elsewhere.png")  # under another name

    outcome = run("--repeat", "elsewhere.png", "--out", "second")

    assert outcome.status == 0 and outcome.messages == [], outcome.err
    assert latents[0].equal(latents[1])
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    if "--html" in command:
        first["a.html"] = Path("a.html").read_bytes()
    assert first == second

    texts = metadata("elsewhere.png")
    recorded = Run.from_dict(json.loads(texts["run"]))
    program, again = shlex.split(texts["command"])[:3], shlex.split(texts["command"])[3:]
    assert program == ["python", "-m", "minip2p.sample"]
    assert make_run(make_parser().parse_args(again)) == recorded
    written = make_run(make_parser().parse_args(words))
    assert make_run(make_parser().parse_args(written.command()[3:])) == written


def test_repeat_of_every_picture_of_a_run(run: Program, latents):
    command = [SQUIRREL, "--swap", "squirrel=lion", "--swap", "burger=pizza", "--steps", "1"]
    assert run(*command).status == 0
    for name in ("source", "edit-2", "row"):
        outcome = run("--repeat", f"out/{name}.png", "--out", name)
        assert outcome.status == 0 and outcome.messages == []
        assert latents[-1].equal(latents[0])
    assert run("--repeat", "out/row.png", "--explain").out == run(*command, "--explain").out
    assert run("--repeat", "out/row.png", "--out", "m", "--maps", "--html", "m.html").status == 0
    assert Path("m/edit-1-maps.png").exists() and Path("m.html").exists()


def test_repeat_of_a_picture_of_the_second_edition(run: Program, latents):
    words = ["--steps=1", "--swap=cat=dog", "--html=p.html", "--", "a cat"]
    assert run(*words[:2], "--html=p.html", "a cat").status == 0
    Path("old.png").write_bytes(png(picture("out/edit-1.png"), {"command": words}))
    outcome = run("--repeat", "old.png", "--out", "again")
    assert outcome.status == 0 and latents[0].equal(latents[1])
    assert outcome.out.splitlines()[-1] == "again/p.html"


def test_where_files_are_is_not_recorded(run: Program):
    Path("secret").mkdir()
    draw = ["--html", "secret/p.html", "--preview", "secret/now.png", "--out", "secret/out"]
    Image.new("RGB", (64, 64), "red").save("secret/photo.png")
    image = ["--image", "secret/photo.png", "--inversion", "secret/kept"]
    assert run("a cat", "--swap", "cat=dog", "--steps", "1", *draw, *image).status == 0
    for name, content in contents(Path("secret")).items():
        assert b"secret" not in (content or b"") and b"photo" not in (content or b""), name


def test_repeat_says_where_the_picture_is_not_the_same(run: Program):
    assert run("a cat", "--steps", "1").status == 0
    texts = metadata("out/picture.png")
    for name, size in ("black.png", (128, 128)), ("small.png", (8, 8)):
        Path(name).write_bytes(png(Image.new("RGB", size), texts))
    outcome = run("--repeat", "black.png", "--out", "again")
    assert outcome.status == 0 and len(outcome.messages) == 1
    assert "black.png" in outcome.messages[0] and "of 255" in outcome.messages[0]
    outcome = run("--repeat", "small.png", "--out", "third")
    assert outcome.status == 0 and "small.png was not made again" in outcome.messages[0]


LIKE_CAT = {"prompts": ["a cat"]}
RECORDS: dict[str, dict[str, Any]] = {  # what a stranger may have written into a picture
    "foreign": {"parameters": "a cat, Steps: 20"},
    "broken": {"run": '{"prompts": ['},
    "code": {"run": "__import__('os').system('touch owned')"},
    "deep": {"run": "[" * 100_000},
    "unknown": {"run": LIKE_CAT | {"nosuch": 1}},
    "wrong": {"run": LIKE_CAT | {"num_inference_steps": "many"}},
    "hooks": {"run": LIKE_CAT | {"callers_own": ["the hook \x1b[2J"]}},
    "options": {"run": LIKE_CAT, "options": [1]},
    "help": {"command": ["--help"]},
    "version": {"command": ["--version", "--", "a cat"]},
    "mixed": {"command": ["--steps=1", 5]},
    "swaps": {"command": ["--swap=cat=dog"] * 5000},
    "zebra": {"command": ["--swap=zebra=lion", "--", "a cat"]},
}
NO_REPEATS = [
    ("--repeat nosuch.png", "nosuch.png", "No such file"),
    ("--repeat bare.png", "bare.png", "metadata"),
    ("--repeat foreign.png", "foreign.png", "metadata"),
    ("--repeat picture.jpg", "picture.jpg", "PNG"),
    ("--repeat half.png", "half.png", "PNG"),
    ("--repeat .", "directory"),
    *((f"--repeat {name}.png", f"{name}.png", "damaged") for name in [*RECORDS][1:]),
    ("--repeat out/picture.png --seed 8888", "leave out --seed", "--out"),
    ("--repeat out/picture.png --swap=a=b --baseline", "leave out --swap, --baseline"),
    ("'a dog' --repeat out/picture.png", "leave out the prompt"),
    ("--repeat out/picture.png -- --steps", "leave out the prompt"),
    ("--repeat out/picture.png --repeat out/picture.png", "--repeat", "once"),
    ("--repeat out/picture.png --image bare.png", "without a picture", "leave out --image"),
]


@pytest.fixture(scope="module")
def pictures(toy, tmp_path_factory) -> Path:
    """Draw a picture that can be repeated, and write others that can't."""
    folder = tmp_path_factory.mktemp("pictures")
    result = Run("a cat", num_inference_steps=1).generate(toy)
    (folder / "out").mkdir()
    whole = png(result.images[0], {"run": result.run, "file": "picture.png"})
    (folder / "out" / "picture.png").write_bytes(whole)
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    result.images[0].save(folder / "bare.png")
    result.images[0].save(folder / "picture.jpg")
    for name, texts in RECORDS.items():
        (folder / f"{name}.png").write_bytes(png(Image.new("RGB", (8, 8)), texts))
    return folder


@pytest.mark.parametrize("command, parts", [pytest.param(c, s, id=c) for c, *s in NO_REPEATS])
def test_what_cannot_be_repeated(run: Program, pictures, monkeypatch, command, parts):
    monkeypatch.chdir(pictures)
    before = contents(pictures)
    outcome = run(*shlex.split(command))
    is_one_sentence(outcome, parts)
    assert "\x1b" not in outcome.err and contents(pictures) == before


# --- imports --------------------------------------------------------------------------------------


def test_nothing_heavy_comes_with_minip2p_a_mistake_or_the_bundled_model(tmp_path: Path):
    code = (
        "import sys, minip2p\n"
        "assert not [name for name in sys.modules if name.startswith('minip2p.sample')]\n"
        "from minip2p.sample import main\n"
        "for command in ['--steps', 'x'], ['--nosuch'], ['a', '--baseline']:\n"
        "    assert main(command) == 2\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0\n"
        "heavy = 'transformers', 'diffusers', 'huggingface_hub', 'safetensors'\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "minip2p.load(device='cpu')\n"
        "heavy = 'transformers', 'diffusers', 'huggingface_hub', 'torch._dynamo'\n"
        "assert not [name for name in heavy if name in sys.modules]"
    )
    outcome = run_apart(cwd=tmp_path, code=code)
    assert outcome.status == 0, outcome.err
    assert all(f"--{option}" in outcome.out for option in ("swap", "sweep", "model", "maps"))


def test_the_program_says_its_version():
    command = [sys.executable, "-m", "minip2p", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    version = f"minip2p {minip2p.__version__}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, version, "")


def test_the_installed_command_is_there():
    """`minip2p`, as pyproject.toml has it."""
    project = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    name = re.search(r'^minip2p = "(.+)"$', project, re.MULTILINE)
    assert name and pkgutil.resolve_name(name[1]) is sample.main
