"""The studio: what a visitor's widgets mean, whose turn it is, and the page in a real browser."""

import ast
import base64
import contextlib
import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, start_browser
from PIL import Image

import minip2p
from minip2p import LocalBlend, PromptEdit, Reweight
from minip2p import sample as cli
from minip2p.studio.app import OutdatedError, Studio, Visitor, main
from minip2p.studio.wish import LIMITS, PROMPT, Wish, make_wish, rows

PACKAGE = Path(minip2p.__file__).parent
BIRD = PACKAGE.parent / "docs" / "bird.png"
SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
NUMBERS = {"steps": 3, "guidance": 4.0, "seed": 8888}
SAID = {"all": [0, 0.8], "layout": [0, 0.6], "windows": {}, "weights": {}, "blend": {}}


@pytest.fixture(scope="module")
def model() -> minip2p.StableDiffusion:
    return minip2p.load(device="cpu")


@pytest.fixture(scope="module")
def studio(model: minip2p.StableDiffusion) -> Iterator[Studio]:
    with ThreadPoolExecutor(1) as hand:
        yield Studio(model, {}, hand)


# --- what the widgets mean -----------------------------------------------------------------------


def test_the_widgets_are_an_edit(model):
    """By hand: windows and weights of words that are there; what is at its default is left out."""
    said = SAID | {
        "windows": {"lion": [0.1, 0.5], "panda": [0, 1]},  # no panda in either prompt
        "weights": {"lion": 2, "burger": 1.0, "squirrel": 3},  # the squirrel's in the source alone
        "blend": {"lion": True, "squirrel": True, "burger": False},
    }
    wish = make_wish(model, SQUIRREL, LION, NUMBERS, said)
    edit = PromptEdit(
        {"default_": (0.0, 0.8), "lion": (0.1, 0.5)}, (0.0, 0.6), LocalBlend(("lion", "squirrel"))
    )
    assert wish.settings() == {
        "prompts": [SQUIRREL, LION, LION],
        "edit": [None, Reweight({"lion": 2.0}, edit)],
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "seed": 8888,
    }
    plain = make_wish(model, SQUIRREL, LION, NUMBERS, SAID).edit
    assert plain == PromptEdit({"default_": (0.0, 0.8)}, (0.0, 0.6))
    alone = make_wish(model, SQUIRREL, "  ", NUMBERS, SAID).settings()
    assert (alone["prompts"], alone["edit"]) == ([SQUIRREL], None)


def test_rows_are_the_words_that_can_be_named(model):
    """Each once, whatever its case; none of only marks, none with the = that a command parts at."""
    found = rows(model, 'the "old" man', "A man, a=b - the MAN's hat!")
    assert [(row["name"], row["own"]) for row in found] == [
        *(("A", True), ("man", True), ("the", True), ("MAN's", True), ("hat", True)),
        ("old", False),
    ]
    assert rows(model, "a cat", "") == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prompt": " "}, "Write a prompt first"),
        ({"prompt": None}, "A prompt is a string, not None"),
        ({"edited": "x" * (PROMPT + 1)}, f"at most {PROMPT} characters, not {PROMPT + 1}"),
        ({"steps": 101}, "steps must be a whole number from 1 to 100, not 101"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 100, not 2.5"),
        ({"steps": None}, "steps must be a whole number from 1 to 100, not None"),
        ({"guidance": float("nan")}, "guidance must be a number from 0 to 30, not nan"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"said": None}, "settings are a dict, not None"),
        ({"windows": []}, "windows are a dict"),
        ({"windows": {"lion": [0.9, 0.1]}}, "A window is a fraction"),
        ({"windows": {"lion": "all"}}, "A window is a fraction"),
        ({"all": None}, "A window is a fraction"),
        ({"weights": {"lion": 11}}, "weight of 'lion' must be a number from -10 to 10, not 11"),
        ({"weights": {"lion": "2"}}, "weight of 'lion' must be a number from -10 to 10, not '2'"),
    ],
)
def test_what_is_out_of_bounds_is_refused(model, changed: dict[str, Any], sentence: str):
    texts = {"prompt": SQUIRREL, "edited": LION} | changed
    numbers = NUMBERS | {k: v for k, v in changed.items() if k in LIMITS}
    said = SAID | {k: v for k, v in changed.items() if k in SAID}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_wish(model, texts["prompt"], texts["edited"], numbers, changed.get("said", said))


WISHES = {
    "swap": (SQUIRREL, LION, SAID | {"windows": {"lion": [0, 0.34]}}, None),
    "everything": (
        SQUIRREL,
        LION,
        {
            "all": [0.1, 0.9],
            "layout": [0.34, 1],
            "windows": {"lion": [0.0, 0.29], "burger": [0.5, 0.5]},
            "weights": {"lion": 1.7, "eating": -0.30000000000000004},
            "blend": {"lion": True, "squirrel": True},
        },
        None,
    ),
    "refine, quotes": ('-a "cat" $HOME', "-a red 'cat's\" `$HOME` café\\", SAID, None),
    "alone": ("a cat", "", SAID, None),
    "picture": ("a photo of a bird", "a photo of a lion", SAID | {"blend": {"bird": True}}, BIRD),
}


@pytest.mark.filterwarnings("ignore:This model has never seen")
@pytest.mark.parametrize("name", WISHES)
def test_the_copies_repeat_the_pictures_to_the_bit(
    studio: Studio, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompt, edited, said, picture = WISHES[name]
    numbers = NUMBERS | {"seed": 7}
    wish = make_wish(studio.model, prompt, edited, numbers, said, picture and str(picture))
    made = studio.draw(wish, Visitor(), 0).result
    monkeypatch.chdir(tmp_path)
    if picture:
        (tmp_path / "bird.png").write_bytes(picture.read_bytes())

    names: dict[str, Any] = {}
    exec(wish.python({}), names)
    assert torch.equal(names["result"].latents, made.latents)
    assert Image.open("edit.png").tobytes() == made.images[-1].tobytes()

    python, dash_m, module, *arguments = shlex.split(wish.command({}))
    assert (python, dash_m, module) == ("python", "-m", "minip2p.sample")
    assert cli.main(arguments) == 0
    assert Path("out/page.html").exists()
    if edited:
        files = ["reconstruction" if picture else "source", "edit-1-baseline", "edit-1"]
    else:
        files = ["picture"]
    for file, image in zip(files, made.images, strict=True):
        assert Image.open(f"out/{file}.png").tobytes() == image.tobytes(), file


def test_the_copies_load_the_same_model():
    wish = Wish("a cat", "", NUMBERS, {}, (0, 0.6), {}, ())
    loaded = {"source": "my folder", "device": "cuda"}
    assert "minip2p.load(source='my folder', device='cuda')" in wish.python(loaded)
    assert '--model "my folder" --device cuda --steps 3' in wish.command(loaded)


# --- the latest change wins ----------------------------------------------------------------------


def test_a_run_out_of_date_ends_within_a_step(studio: Studio):
    """A change that is sent during the second UNet call: there is no third."""
    visitor, calls = Visitor(), []

    def second(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            visitor.sent = 1.0

    wish = make_wish(studio.model, SQUIRREL, LION, NUMBERS | {"steps": 9}, SAID)
    with contextlib.closing(Handle(studio.model.unet.register_forward_hook(second))):
        with pytest.raises(OutdatedError):
            studio.draw(wish, visitor, 0.5)
        assert len(calls) == 2
        studio.draw(wish, visitor, 1.0)  # the newer one: nothing is left of the other
        assert len(calls) == 11
    assert not studio.model.unet._forward_pre_hooks


def test_an_inversion_out_of_date_ends_within_a_step(studio: Studio):
    visitor, calls = Visitor(), []
    said = make_wish(
        studio.model, "a photo of a bird", "a photo of a lion", NUMBERS, SAID, str(BIRD)
    )

    def first(*_: Any) -> None:
        calls.append(1)
        visitor.sent = 1.0

    watched = studio.model.unet.register_forward_hook(first)
    with contextlib.closing(Handle(watched)), pytest.raises(OutdatedError):
        studio.draw(said, visitor, 0.5)
    assert len(calls) == 1


def test_a_picture_is_inverted_once_for_its_edits(studio: Studio):
    visitor, calls = Visitor(), []
    counted = studio.model.unet.register_forward_hook(lambda *_: calls.append(1))
    with contextlib.closing(Handle(counted)):
        for edited, expected in (("a photo of a lion", 3 + 3), ("a photo of a cat", 3)):
            calls.clear()
            wish = make_wish(studio.model, "a photo of a bird", edited, NUMBERS, SAID, str(BIRD))
            studio.draw(wish, visitor, 0)
            assert len(calls) == expected


class Handle:
    def __init__(self, hook: Any):
        self.close = hook.remove


def test_who_waits_for_a_turn_leaves_when_out_of_date(studio: Studio):
    """And whoever is not out of date goes on waiting, and then draws."""
    wish, outcomes = make_wish(studio.model, SQUIRREL, "", NUMBERS, SAID), {}
    visitors = {"leaves": Visitor(), "stays": Visitor()}

    def draw(name: str) -> None:
        try:
            outcomes[name] = studio.draw(wish, visitors[name], 0.5)
        except OutdatedError as error:
            outcomes[name] = error

    busy = threading.Event()
    studio.hand.submit(busy.wait, 60)
    try:
        threads = {name: threading.Thread(target=draw, args=(name,)) for name in visitors}
        for thread in threads.values():
            thread.start()
        visitors["leaves"].sent = 1.0
        threads["leaves"].join(timeout=10)
        assert isinstance(outcomes["leaves"], OutdatedError) and "stays" not in outcomes
    finally:
        busy.set()
    threads["stays"].join(timeout=60)
    assert isinstance(outcomes["stays"].result, minip2p.Result)


def test_answers(studio: Studio):
    """Rows at once, pictures and copies later; mistakes are sentences, an old change is nothing."""
    visitor, numbers = Visitor(), list(NUMBERS.values())
    asked = [visitor, 2.0, SAID, SQUIRREL, "a castle eating a burger", None, *numbers]
    *first, last = studio.answer(*asked)
    words = {"rows": rows(studio.model, asked[3], asked[4])}
    assert first == [{"words": words}, {"state": "Drawing …"}]
    assert list(last) == ["words", "state", "frame", "command", "python"]
    assert re.match(r"\d+\.\d s\. This model has never seen castle; it knows", last["state"])
    assert last["frame"]["page"].count("<figure id=") == 3
    assert list(studio.answer(visitor, 1.0, *asked[2:])) == [{}]
    for sent in ("3", None, float("nan")):
        assert "is a number" in next(studio.answer(visitor, sent, *asked[2:]))["state"]
    assert list(studio.answer(visitor, 3.0, SAID, " ", "", None, *numbers)) == [
        {"state": "Write a prompt first: what the picture shows."}
    ]
    *_, refused = studio.answer(visitor, 4.0, SAID, SQUIRREL, LION, None, 1000, 4, 1)
    assert refused == {"state": "The steps must be a whole number from 1 to 100, not 1000."}
    *_, refused = studio.answer(visitor, 5.0, SAID, SQUIRREL, LION, __file__, *numbers)
    assert "no picture that can be read" in refused["state"]


# --- Gradio --------------------------------------------------------------------------------------


def test_without_gradio_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        "The studio needs Gradio: pip install 'minip2p[studio]'.\n"
    )


def test_mistakes_at_the_start_are_one_sentence(capsys):
    for argv, sentence in (
        (["--port", "70000"], "It must be a whole number from 0 to 65535, not '70000'"),
        (["--share"], "--share"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr()
        assert sentence.lower() in said.err.lower() and said.err.count("\n") == 1 and not said.out


def test_gradio_is_imported_in_one_place_and_late():
    names = {"gradio", "fastapi", "starlette", "uvicorn"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        found = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""] * (not node.level)
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert path.name == "studio.py" or not found & names, path
    program = f"import sys, minip2p, minip2p.studio; assert not {names} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# --- in a real browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a studio in a process of its own; afterwards: what it wrote, and where."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs Gradio: pip install 'minip2p[studio]'")
    folder = tmp_path_factory.mktemp("studio")
    environment = os.environ | {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    for name in ("HOME", "TMPDIR", "work"):
        (folder / name).mkdir()
        environment[name] = str(folder / name)
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *sys.path[1:]])
    command = [sys.executable, "-B", "-m", "minip2p.studio", "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder / "work", env=environment, **pipes)
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.fullmatch(r"The studio is at (http://127\.0\.0\.1:\d+) until Ctrl\+C\.\n", line)
        assert found, line + process.stdout.read()
        yield found[1]
        outside = [path for name in ("HOME", "work") for path in (folder / name).rglob("*")]
        assert not outside
        assert len(list((folder / "TMPDIR").glob("minip2p-studio-*"))) == 1
    finally:
        process.send_signal(2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.kill()
    left = list((folder / "TMPDIR").rglob("minip2p-studio-*"))
    assert not left, "the temporary folder is still there"


@pytest.fixture(scope="module")
def chromium(address: str) -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


class Page:
    """The studio in one tab."""

    def __init__(self, browser: Browser, address: str):
        self.browser = browser
        self.tab = browser("POST", "/window/new", type="tab")["handle"]
        self.go()
        browser("POST", "/window/rect", width=1400, height=1300)  # no word is out of sight
        browser("POST", "/url", url=address)
        self.until(lambda: self.done())

    def go(self) -> None:
        self.browser("POST", "/window", handle=self.tab)
        self.browser("POST", "/frame", id=None)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.js(script, *arguments)

    def text(self, name: str) -> str:
        return self.js(f"return document.querySelector('#{name} textarea, #{name} input').value")

    def done(self) -> bool:
        return bool(re.match(r"\d+\.\d s\.", self.text("state")))

    def until(self, holds: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(urllib.error.HTTPError, TypeError):  # not there yet
                if holds():
                    return
            assert time.monotonic() < end, self.text("state")
            time.sleep(0.02)

    def drawn(self, *parts: str) -> None:
        """Wait for the pictures of a command with these parts, in a frame that has loaded."""
        self.until(lambda: self.done() and all(part in self.text("command") for part in parts))
        frames = "return [...document.querySelectorAll('#frame iframe')].map(e => e.className)"
        self.until(lambda: self.js(frames) == [""])

    def close(self) -> None:
        self.go()
        first, *_ = self.browser("DELETE", "/window")
        self.browser("POST", "/window", handle=first)

    def type(self, name: str, text: str) -> None:
        box = self.js(f"return document.querySelector('#{name} textarea, #{name} input')")
        (element,) = box.values()
        self.browser("POST", f"/element/{element}/clear")
        self.browser("POST", f"/element/{element}/value", text=text)

    def names(self) -> list[str]:
        found = self.js(
            "return [...document.querySelectorAll('#words .name')].map(e => e.textContent)"
        )
        return [name for name in found if name]

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        element = self.js("return document.querySelector('#frame iframe:not(.coming)')")
        self.browser("POST", "/frame", id=element)
        try:
            yield
        finally:
            self.browser("POST", "/frame", id=None)

    def point(self, row: int, word: int, *then: str) -> list[str]:
        """The mouse onto a word in the frame. What the pictures' sentences say then."""
        middle = (
            "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [r.x, r.y, r.width / 2, r.height / 2]"
        )
        left, top, *_ = self.js(middle, "#frame iframe:not(.coming)")
        with self.frame():
            x, y, dx, dy = self.js(middle, f'.word[data-row="{row}"][data-word="{word}"]')
        self.browser.pointer(left + x + dx, top + y + dy, *then)
        states: list[str] = []

        def read() -> bool:
            with self.frame():
                states[:] = self.js(
                    "return [...document.querySelectorAll('.state')].map(e => e.textContent)"
                )
            return all(states)

        self.until(read, 10)
        return states

    def pictures(self) -> list[bytes]:
        """The pixels of those in the frame."""
        with self.frame():
            sources = self.js("return [...document.querySelectorAll('figure img')].map(e => e.src)")
        files = [io.BytesIO(base64.b64decode(source.split(",")[1])) for source in sources]
        return [Image.open(file).convert("RGB").tobytes() for file in files]


@pytest.fixture
def tab(chromium: Browser, address: str) -> Iterator[Page]:
    page = Page(chromium, address)
    yield page
    page.close()
    assert chromium.errors() == []


def repeated(page: Page, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pixels of what the copied command makes."""
    monkeypatch.chdir(folder)
    assert cli.main(shlex.split(page.text("command"))[3:]) == 0
    images = {path.stem: Image.open(path).tobytes() for path in Path("out").glob("*.png")}
    return [images[name] for name in ("source", "edit-1-baseline", "edit-1")]


@pytest.mark.slow
def test_type_hover_and_copy(tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tab.type("edited", "a painting of a panda eating a burger")
    tab.drawn('--to "a painting of a panda eating a burger"')
    assert tab.names() == [
        *("all words", "a", "painting", "of", "panda", "eating", "burger", "squirrel", "layout")
    ]
    assert tab.js("return document.querySelector('#frame iframe').getAttribute('sandbox')") == (
        "allow-scripts"
    )
    with tab.frame():
        assert tab.js("try { parent.document } catch { return 'walled off' }") == "walled off"
    states = tab.point(2, 5)
    assert states[0].startswith("squirrel: up to") and states[2].startswith("panda: up to")
    assert "where the source looks at “squirrel” at calls 1 to 16 of 20" in states[2]
    pictures = tab.pictures()
    assert len(set(pictures)) == 3
    assert repeated(tab, tmp_path, monkeypatch) == pictures


@pytest.mark.slow
def test_drag_a_window(tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every move of the mouse is a change: the last one is what is drawn."""
    tab.drawn()
    tab.point(2, 5, "Down", "Up")  # pinned
    x, y, width = tab.js(
        "const e = document.querySelector('[aria-label=\"lion: end of the window\"]');"
        "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
        "return [r.x + 8 + .8 * (r.width - 16), r.y + r.height / 2, r.width]"
    )
    tab.browser.pointer(x, y, "Down")
    for step in range(1, 21):
        tab.browser.pointer(x - step / 20 * 0.6 * width, y)
    tab.browser.pointer(x - 0.6 * width, y, "Up")
    percent = tab.js(
        "return document.querySelector('[aria-label=\"lion: end of the window\"]').value"
    )
    assert 0.1 < float(percent) < 0.3
    tab.drawn(f"--cross-replace-steps lion=0.0,{percent} ")
    with tab.frame():  # the word is pinned in the page of the new pictures, too
        state = tab.js("return document.querySelectorAll('.state')[2].textContent")
    assert f"at calls 1 to {int(20 * float(percent))} of 20" in state
    assert repeated(tab, tmp_path, monkeypatch) == tab.pictures()


@pytest.mark.slow
def test_two_visitors_at_once(tab: Page, chromium: Browser, address: str):
    """Each gets what he asked for, and the same as if he were alone."""
    other = Page(chromium, address)
    tab.go()
    tab.type("edited", "a painting of a cat eating a burger")
    other.go()
    other.type("edited", "a painting of a dog eating a burger")
    other.drawn("of a dog eating")
    theirs = other.pictures()
    other.close()
    tab.go()
    tab.drawn("of a cat eating")
    own = tab.pictures()
    assert own[0] == theirs[0] and own[2] != theirs[2]
    tab.type("edited", "a painting of a dog eating a burger")
    tab.drawn("of a dog eating")
    assert tab.pictures() == theirs


@pytest.mark.slow
def test_upload_a_picture(tab: Page):
    (element,) = tab.js("return document.querySelector('#picture input[type=file]')").values()
    tab.type("prompt", "a photo of a bird")
    tab.type("edited", "a photo of a lion")
    tab.browser("POST", f"/element/{element}/value", text=str(BIRD))
    tab.drawn("--image bird.png", "a photo of a lion")
    given = tab.pictures()[0]
    size = (128, 128)
    assert given == minip2p.picture.read(BIRD, size).image.tobytes()


@pytest.mark.slow
def test_nothing_is_fetched_and_only_this_machine_is_answered(tab: Page, address: str):
    fetched = tab.js("return performance.getEntriesByType('resource').map(e => e.name)")
    assert fetched and all(url.startswith((address, "data:", "blob:")) for url in fetched)
    with urllib.request.urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "other.example"}))
    port = int(address.rpartition(":")[2])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        host, _, local = line.split()[1].partition(":")
        if int(local, 16) == port:
            assert socket.inet_ntoa(bytes.fromhex(host)[::-1]) == "127.0.0.1"


@pytest.mark.slow
def test_a_phone_sees_all_of_it(tab: Page):
    """Nothing is wider than the screen."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    tab.browser.devtools("Emulation.setDeviceMetricsOverride", **size)
    try:
        tab.until(lambda: tab.js("return innerWidth") == 390)
        assert tab.js("return document.documentElement.scrollWidth") <= 390
        with tab.frame():
            assert tab.js("return document.documentElement.scrollWidth <= innerWidth")
        bars = tab.js(
            "return [...document.querySelectorAll('#words .row:not(.head) .bar')]"
            ".map(e => e.getBoundingClientRect().width)"
        )
        assert min(bars) > 120
    finally:
        tab.browser.devtools("Emulation.clearDeviceMetricsOverride")
