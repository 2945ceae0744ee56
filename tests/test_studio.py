"""The studio: from widgets to a run, whose turn it is, who gets in, and the page in a browser."""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import count
import pytest
import torch
from browser import Browser, start_browser
from helpers import picture as read_picture
from PIL import Image, ImageChops

import minip2p
from minip2p import LocalBlend, PromptEdit, Reweight, sample
from minip2p.errors import UserError
from minip2p.program import MEMORY
from minip2p.run import Run, SourcePicture
from minip2p.studio import __main__ as program
from minip2p.studio.drawing import OutdatedError, Studio, Visitor
from minip2p.studio.request import PROMPT, make_run, word_rows

PACKAGE = Path(minip2p.__file__).parent
BIRD = PACKAGE.parent / "docs" / "bird.png"
SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
NUMBERS = {"steps": 3, "guidance": 4.0, "seed": 8888, "inversion_guidance": 1}
SETTINGS: dict[str, Any] = {"cross_replace_steps": [0, 0.8], "self_replace_steps": [0, 0.6]}
SETTINGS |= {"windows": {}, "weights": {}, "blend": {}}


@pytest.fixture
def studio(toy, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    with ThreadPoolExecutor(1) as executor:
        studio = Studio(toy, executor, {"model": str(toy_folder)})
        monkeypatch.setattr(warnings, "showwarning", studio.record_warning)
        warnings.simplefilter("always", UserWarning)
        yield studio


def edit_run(studio: Studio, edited: str = LION, picture: str | None = None) -> Run:
    return make_run(studio.model, SQUIRREL, edited, NUMBERS, SETTINGS, picture)


# --- from widgets to a run -----------------------------------------------------------------------


def test_the_widgets_are_a_run(toy):
    """Windows and weights of words that have them; what is as usual is left out."""
    settings = SETTINGS | {
        "windows": {"lion": [0.1, 0.5], "panda": [0, 1]},  # no panda in either prompt
        "weights": {"lion": 2, "burger": 1.0, "squirrel": 3},  # the squirrel is in the source alone
        "blend": {"lion": True, "squirrel": True, "burger": False},
    }
    numbers = NUMBERS | {"inversion_guidance": 2.0}
    run = make_run(toy, SQUIRREL, LION, numbers, settings, "bird.png", {"model": "m"})
    windows = {"default_": (0.0, 0.8), "lion": (0.1, 0.5)}
    edit = Reweight(
        {"lion": 2.0}, PromptEdit(windows, (0.0, 0.6), LocalBlend(("lion", "squirrel")))
    )
    assert run == Run(
        (SQUIRREL, LION, LION),
        (None, edit),
        num_inference_steps=3,
        guidance_scale=4.0,
        source=SourcePicture("bird.png", guidance_scale=2.0),
        model="m",
    )
    alone = make_run(toy, SQUIRREL, "  ", NUMBERS, SETTINGS)
    assert (alone.prompts, alone.edits, alone.source) == ((SQUIRREL,), (), None)


def test_rows_are_the_words_that_can_be_named(toy):
    """Each once in any case; none of marks alone, none with the = at which a command splits."""
    rows = word_rows(toy, 'the "old" man', "A man, a=b - the MAN's hat!")
    assert [(row["name"], row["place"], row["is_minor"]) for row in rows] == [
        ("A", "edit", True),
        ("man", "both", False),
        ("the", "both", True),
        ("MAN's", "edit", False),
        ("hat", "edit", False),
        ("old", "source", False),
    ]
    assert word_rows(toy, "a cat", "") == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prompt": " "}, "Write a prompt first"),
        ({"prompt": None}, "A prompt is a string, not None"),
        ({"edited": "x" * (PROMPT + 1)}, f"at most {PROMPT} characters, not {PROMPT + 1}"),
        ({"steps": 1000}, "must be a whole number from 1 to 999, not 1000"),
        ({"steps": 2.5}, "must be a whole number"),
        ({"guidance": float("nan")}, "must be a number"),
        ({"inversion_guidance": "2"}, "must be a number"),
        ({"seed": -1}, "must be a whole number from 0"),
        ({"settings": None}, "settings are a dict, not None"),
        ({"windows": []}, "windows are a dict"),
        ({"windows": {"lion": [0.9, 0.1]}}, "A window is a fraction"),
        ({"cross_replace_steps": None}, "A window is a fraction"),
        ({"weights": {"lion": "2"}}, "weight"),
    ],
)
def test_what_is_out_of_bounds_is_refused(toy, changed: dict[str, Any], sentence: str):
    texts = {"prompt": SQUIRREL, "edited": LION} | changed
    numbers = NUMBERS | {k: v for k, v in changed.items() if k in NUMBERS}
    settings = SETTINGS | {k: v for k, v in changed.items() if k in SETTINGS}
    with pytest.raises(UserError, match=re.escape(sentence)):
        make_run(toy, texts["prompt"], texts["edited"], numbers,
                 changed.get("settings", settings), "bird.png")  # fmt: skip


@pytest.mark.parametrize("edited", ["", LION])
def test_the_copies_repeat_the_pictures(studio: Studio, edited: str, tmp_path, monkeypatch):
    """The command to the bit, Python but for rounding; both with a source picture of that name."""
    monkeypatch.chdir(tmp_path)
    Path("-my bird.png").write_bytes(BIRD.read_bytes())
    settings = SETTINGS | {
        "windows": {"lion": [0, 0.29]},
        "weights": {"lion": -0.30000000000000004},
    }
    key = studio.pictures.add(BIRD.read_bytes())
    *_, answer = studio.answer(
        Visitor(), 1, settings, SQUIRREL, edited, {"key": key, "name": "-my bird.png"}, 3, 4, 7, 2
    )
    images = page_images(answer["frame"]["page"])[1:]  # without the given picture
    assert sample.main(shlex.split(answer["command"])[3:]) == 0
    names = ["reconstruction", "edit-1-baseline", "edit-1"] if edited else ["reconstruction"]
    for name, image in zip(names, images, strict=True):
        assert read_picture(f"out/{name}.png").tobytes() == image.tobytes(), name
    assert "PageStore" not in answer["python"]
    variables: dict[str, Any] = {}
    exec(answer["python"], variables)
    for image, again in zip(images, variables["result"].images, strict=True):
        extrema = ImageChops.difference(image, again).getextrema()
        assert max(high for _, high in extrema) <= 1


def page_images(text: str) -> list[Image.Image]:
    files = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB") for file in files]


# --- the latest change wins ----------------------------------------------------------------------


def test_a_run_out_of_date_ends_at_its_next_call(studio: Studio, monkeypatch):
    """In the inversion and in the edit; nothing is left of it for the newer change."""
    key = studio.pictures.add(BIRD.read_bytes())
    run = edit_run(studio, LION, "bird.png")
    for last in (2, 5):  # three calls of the inversion, three of the edit
        visitor, checks = Visitor(), []

        def check(visitor: Visitor, sent: float, last: int = last, checks: Any = checks) -> None:
            if threading.get_ident() == studio.drawing_thread:
                checks.append(sent)
                visitor.sent = float(len(checks) > last)
            Studio.check_awaited(studio, visitor, sent)

        monkeypatch.setattr(studio, "check_awaited", check)
        with pytest.raises(OutdatedError):
            studio.draw_now(run, key, visitor, 0.5)
        assert len(checks) == last + 1
        studio.pictures.inversions.clear()
    text, _ = studio.draw_now(run, key, Visitor(), 1)
    assert text.count("<figure id=") == 3


def test_a_picture_is_inverted_once_and_few_are_kept(studio: Studio, monkeypatch):
    """Pictures are kept at the model's size; a key that nobody got is refused."""
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(buffer, "PNG")
    key = studio.pictures.add(buffer.getvalue())
    assert studio.pictures.images[key].size == (128, 128)
    for edited in (LION, "a cat eating a burger"):
        run = edit_run(studio, edited, "bird.png")
        studio.draw_now(run, key, Visitor(), 0)
    assert len(studio.pictures.inversions) == 1
    with pytest.raises(UserError, match="choose it again"):
        studio.draw_now(run, "x", Visitor(), 0)
    monkeypatch.setattr("minip2p.studio.pictures.MOST_PICTURES", 2)
    keys = [studio.pictures.add(BIRD.read_bytes()) for _ in range(3)]
    assert list(studio.pictures.images) == keys[1:]


@pytest.mark.parametrize(
    ("size", "sentence"), [(None, "no picture that can be read"), (9000, "has 81 million pixels")]
)
def test_a_picture_that_is_refused(studio: Studio, size: int | None, sentence: str):
    buffer = io.BytesIO(b"text")
    if size:
        Image.new("1", (size, size)).save(buffer, "PNG")
    with pytest.raises(UserError, match=sentence):
        studio.pictures.add(buffer.getvalue())


def test_who_waits_for_a_turn_leaves_when_out_of_date(studio: Studio):
    """And whoever is not out of date goes on waiting, and then draws."""
    run, outcomes = edit_run(studio, ""), {}
    visitors = {"leaves": Visitor(), "stays": Visitor()}

    def draw(name: str) -> None:
        try:
            outcomes[name] = studio.draw(run, "", visitors[name], 0.5)
        except OutdatedError as error:
            outcomes[name] = error

    is_free = threading.Event()
    studio.executor.submit(is_free.wait, 60)
    try:
        threads = {name: threading.Thread(target=draw, args=(name,)) for name in visitors}
        for thread in threads.values():
            thread.start()
        studio.advance(visitors["leaves"], 1.0)
        threads["leaves"].join(timeout=10)
        assert isinstance(outcomes["leaves"], OutdatedError) and "stays" not in outcomes
    finally:
        is_free.set()
    threads["stays"].join(timeout=60)
    assert "<figure id=" in outcomes["stays"][0]


def test_an_older_change_never_wins(studio: Studio):
    """And a studio that closes draws nothing."""
    visitor = Visitor()
    studio.advance(visitor, 199.0)
    with pytest.raises(OutdatedError):
        studio.advance(visitor, 5.0)
    assert visitor.sent == 199
    studio.is_closing = True
    with pytest.raises(OutdatedError):
        studio.draw(edit_run(studio), "", visitor, 300)


# --- answers -------------------------------------------------------------------------------------


def ask(
    studio: Studio, visitor: Visitor, sent: Any, edited: str = LION, **numbers: Any
) -> list[Any]:
    numbers = (NUMBERS | numbers).values()
    return list(studio.answer(visitor, sent, SETTINGS, SQUIRREL, edited, {}, *numbers))


def test_answers(studio: Studio):
    """Rows at once, pictures and copies later; mistakes are sentences, an old change is nothing."""
    visitor, edited = Visitor(), "a castle eating a burger"
    *first, last = ask(studio, visitor, 2.0, edited)
    words = {"rows": word_rows(studio.model, SQUIRREL, edited)}
    assert first == [{"words": words}, {"state": "Drawing …"}]
    assert list(last) == ["words", "state", "frame", "command", "python"]
    assert re.match(r"3 pictures, 3 steps, \d+\.\d s\. This model has never seen", last["state"])
    assert last["frame"]["page"].count("<figure id=") == 3
    assert ask(studio, visitor, 1.0) == [{}]
    for sent in ("3", None, float("nan")):
        assert "is a number" in ask(studio, visitor, sent)[0]["state"]
    assert "1 to 999" in ask(studio, visitor, 4.0, steps=1000)[-1]["state"]
    *_, refused = studio.answer(
        visitor, 5, SETTINGS, SQUIRREL, LION, {"path": "/etc/passwd"}, *NUMBERS.values()
    )
    assert refused["state"].startswith("A picture has a key and a name")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MEMORY),
        (MemoryError(), MEMORY),
        (KeyError("x"), "The studio failed: KeyError. Its terminal says more."),
    ],
)
def test_every_failure_is_told(studio: Studio, monkeypatch, capsys, error, sentence):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(studio, "draw_now", fail)
    assert ask(studio, Visitor(), 1)[-1] == {"state": sentence}
    assert ("Traceback" in capsys.readouterr().err) == (sentence != MEMORY)


# --- the program ---------------------------------------------------------------------------------


def test_mistakes_at_the_start_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for argv, sentence in (
        ([], "The studio needs Gradio: pip install 'minip2p[studio]'."),
        (["--port", "70000"], "It must be a whole number from 0 to 65535, not 70000"),
        (["--share"], "--share"),
    ):
        assert program.main(argv) == 2
        output = capsys.readouterr()
        assert sentence.lower() in output.err.lower()
        assert output.err.count("\n") == 1 and not output.out


def test_gradio_is_imported_by_the_studio_alone_and_late():
    servers = {"gradio", "fastapi", "starlette", "uvicorn"}
    for name, path in count.modules().items():
        libraries = {target.split(".")[0] for target in count.imports(name, path, inside=True)}
        assert name.startswith("minip2p.studio.") or not libraries & servers, name
    check = f"import sys, minip2p.studio.drawing; assert not {servers} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


class Server:
    """The program in a process of its own, with folders of its own."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        environment = os.environ | {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
        for name in ("HOME", "TMPDIR", "work"):
            (folder / name).mkdir()
            environment[name] = str(folder / name)
        environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *sys.path[1:]])
        command = [sys.executable, "-B", "-m", "minip2p.studio", "--port=0", f"--model={model}"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            command, cwd=folder / "work", env=environment, text=True, **pipes
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        address = re.fullmatch(
            r"The studio is at (http://127\.0\.0\.1:\d+) until Ctrl\+C\.\n", line
        )
        assert address, line + self.process.stdout.read()
        self.address = address[1]

    def stop(self, number: int) -> None:
        """Stop it with an open tab. It leaves nothing, and says nothing."""
        listening = urllib.request.urlopen(self.address + "/gradio_api/heartbeat/tab")
        try:
            self.process.send_signal(number)
            assert self.process.wait(timeout=20) == 0
            assert self.process.stdout and self.process.stdout.read() == ""
        finally:
            self.process.kill()
            listening.close()
        assert not [
            path for name in ("HOME", "work", "TMPDIR") for path in self.folder.glob(f"{name}/*")
        ]

    def post(self, path: str, body: Any, **headers: str) -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(self.address + path, data, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def a_change(
    picture: Any, session: str = "x", fn_index: Any = 0, steps: int = 1, edited: str = LION
) -> dict[str, Any]:
    """Return what the page sends for a change."""
    data = [None, 1, SETTINGS, SQUIRREL, edited, picture, steps, 4, 1, 1]
    names = {"session_hash": session, "event_data": None, "trigger_id": None}
    return {"fn_index": fn_index, "data": data} | names


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'minip2p[studio]'")
    server = Server(tmp_path_factory.mktemp("studio"), toy_folder)
    try:
        yield server
    finally:
        server.stop(signal.SIGINT)


# --- who gets in ---------------------------------------------------------------------------------

JOIN = "/gradio_api/queue/join"


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (None, "GET /"),
        (None, "GET /assets/index.js"),
        (None, f"POST {JOIN} content-length=9"),
        (None, f"POST {JOIN} content-length=9 origin=http://127.0.0.1:7860"),
        (400, "GET / host=evil.example:7860"),
        (403, "GET /config origin=http://evil.example"),
        (403, f"POST {JOIN} content-length=9 origin=http://127.0.0.1:1234"),
        (403, "POST /picture content-length=9 origin=null"),
        (404, "GET /gradio_api/file=/etc/passwd"),
        (404, "GET /docs"),
        (404, "POST /gradio_api/upload content-length=9"),
        (404, "POST /gradio_api/run/answer content-length=9"),
        (404, "PUT / content-length=9"),
        (411, f"POST {JOIN}"),
        (411, f"POST {JOIN} content-length=-1"),
        (411, "POST /picture content-length=9 transfer-encoding=chunked"),
        (413, f"POST {JOIN} content-length=70000"),
        (413, "POST /picture content-length=10485761"),
    ],
)
def test_requests_are_refused_by_their_head(status: int | None, request_: str):
    door = pytest.importorskip("minip2p.studio.door")
    method, path, *headers = request_.split()
    pairs = {"host": "127.0.0.1:7860"} | dict(header.split("=", 1) for header in headers)
    encoded = [(name.encode(), value.encode()) for name, value in pairs.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded}
    assert (door.refuse(scope) or (None,))[0] == status


FILE = {"path": "/dev/zero", "meta": {"_type": "gradio.FileData"}}


def test_a_change_names_no_file():
    """Nor is it nested deeply, or another function's; a word may be "path"."""
    refuse = pytest.importorskip("minip2p.studio.door").refuse_change
    good = a_change({})
    good["data"][2] = SETTINGS | {"windows": {"path": [0, 1]}, "weights": {"path": 2}}
    assert refuse(json.dumps(good).encode()) is None
    nested = a_change({"a": [{"b": FILE}]})
    escaped = json.dumps(a_change(FILE)).replace('"path"', '"p\\u0061th"')
    bodies = [json.dumps(a_change(FILE)), json.dumps(nested), escaped, "", "[]", "{", '"x"']
    bodies += [json.dumps(a_change({}, fn_index=n)) for n in (-1, 999, None, "x")]
    bodies += ['{"fn_index": 0, "data":' + "[" * 30000 + "]" * 30000 + "}"]
    for body in bodies:
        assert refuse(body.encode())[0] == 400, body[:80]


@pytest.mark.slow
def test_strangers_are_refused_and_the_studio_goes_on(server: Server):
    for picture in (FILE, FILE | {"path": str(BIRD)}, FILE | {"path": "http://127.0.0.1:1/x.png"}):
        assert server.post(JOIN, a_change(picture)) == 400
    assert server.post("/picture", b"no picture") == 400
    assert server.post("/picture", BIRD.read_bytes(), Origin="http://evil.example") == 403
    assert server.post("/picture", BIRD.read_bytes()) == 200
    assert server.post(JOIN, a_change({})) == 200


def visit(server: Server, session: str, edited: str = LION) -> str:
    """Ask for pictures, wait for the answer, and return its page."""
    assert server.post(JOIN, a_change({}, session, edited=edited)) == 200
    address = f"{server.address}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(address, timeout=300) as messages:
        done = next(line for line in messages if b'"process_completed"' in line)
    state, frame, *_ = json.loads(done.removeprefix(b"data:"))["output"]["data"]
    assert state["value"].startswith("3 pictures, 1 steps")
    return frame["value"]["page"]


@pytest.mark.slow
def test_sixty_visitors_at_once_get_what_they_asked_for(server: Server):
    edits = [LION, "a cat eating a burger"] * 30
    sessions = [f"visitor-{n}" for n in range(60)]
    with ThreadPoolExecutor(60) as pool:
        pages = list(pool.map(lambda *visitor: visit(server, *visitor), sessions, edits))
    assert len(set(pages[::2])) == len(set(pages[1::2])) == 1
    assert "lion" in pages[0] and "lion" not in pages[1]


@pytest.mark.slow
def test_a_hundred_edits_do_not_add_to_the_memory(server: Server):
    """The page of each has 190 kB, and only the latest of each visitor is kept."""

    def memory() -> int:
        """Return what the server holds, in pages of 4 KiB."""
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])

    for n in range(30):  # until the allocator's pools are full
        visit(server, f"edit-{n % 4}")
    before = memory()
    for n in range(100):
        visit(server, f"edit-{n % 4}")
    assert (memory() - before) * 4096 < 2**23


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_in_a_run(tmp_path: Path, toy_folder: Path, name: str):
    pytest.importorskip("gradio")
    server = Server(tmp_path, toy_folder)
    assert server.post(JOIN, a_change({}, steps=100)) == 200
    server.stop(getattr(signal, name))


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(server: Server) -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


class Page:
    """The studio's page, loaded anew."""

    def __init__(self, browser: Browser, address: str):
        self.browser, self.js = browser, browser.js
        browser.resize(1400, 1300)  # no word is out of sight
        browser.open(address)
        self.wait_for()

    def text(self, name: str) -> str:
        return self.js(f"return document.querySelector('#{name} textarea, #{name} input').value")

    def until(self, holds: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(urllib.error.HTTPError, TypeError):  # not there yet
                if holds():
                    return
            assert time.monotonic() < end, self.text("state")
            time.sleep(0.02)

    def wait_for(self, *parts: str) -> None:
        """Wait for the pictures of a command with these parts, in a frame that has loaded."""
        done = r"\d pictures?, \d+ steps, \d+\.\d s\."
        self.until(lambda: re.match(done, self.text("state")))
        self.until(lambda: all(part in self.text("command") for part in parts))
        frames = "return [...document.querySelectorAll('#frame iframe')].map(e => e.className)"
        self.until(lambda: self.js(frames) == [""])

    def type(self, name: str, text: str) -> None:
        (element,) = self.js(f"return document.querySelector('#{name} textarea')").values()
        self.browser("POST", f"/element/{element}/clear")
        self.browser("POST", f"/element/{element}/value", text=text)

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        element = self.js("return document.querySelector('#frame iframe:not(.coming)')")
        self.browser("POST", "/frame", id=element)
        try:
            yield
        finally:
            self.browser("POST", "/frame", id=None)

    def click_inside(self, selector: str) -> None:
        """Click an element of the frame, as soon as neither moves any more."""

        def middle() -> tuple[float, float]:
            rect = "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            x, y = self.js(rect + "return [r.x, r.y]", "#frame iframe:not(.coming)")
            with self.frame():
                dx, dy = self.js(rect + "return [r.x + r.width / 2, r.y + r.height / 2]", selector)
            return x + dx, y + dy

        places = [middle()]
        while len(places) < 4 or len(set(places[-4:])) > 1:
            time.sleep(0.1)
            places.append(middle())
        self.browser.pointer(*places[-1], "Down", "Up")

    def states(self) -> list[str]:
        """Return the sentences below the pictures, as soon as there are any."""
        states: list[str] = []

        def read() -> bool:
            with self.frame():
                states[:] = self.browser.texts(".state")
            return all(states)

        self.until(read, 10)
        return states

    def pictures(self) -> list[bytes]:
        with self.frame():
            text = self.js("return document.querySelector('#pictures').outerHTML")
        return [image.tobytes() for image in page_images(text)]


@pytest.fixture
def tab(chromium: Browser, server: Server) -> Iterator[Page]:
    yield Page(chromium, server.address)
    assert chromium.errors() == []


@pytest.mark.slow
def test_type_point_and_copy(tab: Page, server: Server, tmp_path: Path, monkeypatch):
    tab.type("edited", "a painting of a panda eating a burger")
    tab.wait_for('--to "a painting of a panda eating a burger"')
    names = [name for name in tab.browser.texts("#words .name") if name]
    assert names == [
        *("cross_replace_steps", "self_replace_steps"),
        *("a", "painting", "of", "panda", "eating", "burger", "squirrel"),
    ]
    heights = "return [...document.querySelectorAll('#words .minor')].map(e => e.offsetHeight)"
    assert tab.js(heights) == [0, 0]
    tab.browser.click("#words .unfold")
    assert min(tab.js(heights)) > 0
    sandbox = "return document.querySelector('#frame iframe').getAttribute('sandbox')"
    assert tab.js(sandbox) == "allow-scripts"
    with tab.frame():
        assert tab.js("try { parent.document } catch { return 'walled off' }") == "walled off"
    tab.click_inside('.word[data-row="2"][data-word="5"]')
    states = tab.states()
    assert states[0].startswith("squirrel: up to") and states[2].startswith("panda: up to")
    assert "where the source looks at “squirrel” at calls 1 to 16 of 20" in states[2]
    pictures = tab.pictures()
    monkeypatch.chdir(tmp_path)
    assert sample.main(shlex.split(tab.text("command"))[3:]) == 0
    files = ["source", "edit-1-baseline", "edit-1"]
    assert [read_picture(f"out/{name}.png").tobytes() for name in files] == pictures
    urls = tab.browser.fetched()
    assert urls and all(url.startswith(server.address) for url in urls)


@pytest.mark.slow
def test_drag_a_window_and_choose_a_preset(tab: Page):
    """The last of the mouse's moves is drawn; the pinned word and the switch outlive the page."""
    tab.click_inside('.word[data-row="2"][data-word="5"]')
    tab.click_inside("#mapped")
    handle = "[aria-label='lion: end of the window']"
    x, y = tab.browser.middle(handle)
    width = tab.js("return document.querySelector(arguments[0]).offsetWidth", handle)
    x += 0.3 * (width - 16)  # from the middle to 0.8
    tab.browser.pointer(x, y, "Down")
    for step in range(1, 21):
        tab.browser.pointer(x - step / 20 * 0.6 * width, y)
    tab.browser.pointer(x - 0.6 * width, y, "Up")
    percent = tab.js("return document.querySelector(arguments[0]).value", handle)
    assert 0.1 < float(percent) < 0.3
    tab.wait_for(f"--cross-replace-steps lion=0,{percent} ")
    assert f"at calls 1 to {int(20 * float(percent))} of 20" in tab.states()[2]
    with tab.frame():
        assert tab.js("return figures.map(f => f.classList.contains('lit'))") == [False] * 3
    tab.click_inside("#mapped")
    with tab.frame():
        assert tab.js("return figures.map(f => f.classList.contains('lit'))") == [True] * 3
    tab.browser.click("#words .presets button:nth-child(2)")
    tab.wait_for("--cross-replace-steps 0,1 ", "lion=0,0.4", "--self-replace-steps 0,0.4")


@pytest.mark.slow
def test_upload_a_picture(tab: Page, tmp_path: Path):
    (element,) = tab.js("return document.querySelector('#picture input')").values()
    (tmp_path / "no picture.png").write_text("text")
    tab.browser("POST", f"/element/{element}/value", text=str(tmp_path / "no picture.png"))
    tab.until(lambda: "no picture that can be read" in tab.browser.texts("#picture")[0])
    (refusal,) = tab.browser.errors()
    assert "400" in refusal
    tab.browser("POST", f"/element/{element}/value", text=str(BIRD))
    tab.wait_for("--image bird.png")
    expected = minip2p.picture.read(BIRD, (128, 128)).image.tobytes()
    assert tab.pictures()[0] == expected
    tab.browser.click("#picture button")
    tab.until(lambda: "--image" not in tab.text("command"))
    tab.wait_for()


@pytest.mark.slow
def test_a_phone_sees_all_of_it(tab: Page):
    """Nothing is wider than the screen."""
    tab.browser.resize(390, 844)
    tab.until(lambda: tab.js("return innerWidth") == 390)
    assert tab.js("return document.documentElement.scrollWidth") <= 390
    with tab.frame():
        assert tab.js("return document.documentElement.scrollWidth <= innerWidth")
    bars = "return [...document.querySelectorAll('#words .word:not(.minor) .bar')]"
    assert min(tab.js(bars + ".map(e => e.offsetWidth)")) > 120
