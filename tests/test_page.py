"""The interactive page: what is in the file, and what it does in a real browser."""

import base64
import io
import json
import math
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, start_browser
from helpers import TOKENIZER
from PIL import Image
from torch import Tensor

import minip2p
from minip2p import AttentionStore, Layer, LocalBlend, Refine, Reweight, WordSwap
from minip2p.edit import Edits, bind
from minip2p.errors import UserError
from minip2p.explain import table as explained_text
from minip2p.html.page import MAP_BYTES, PageStore, page
from minip2p.pipeline import Result
from minip2p.show import COLOURS
from minip2p.text import tokenize
from minip2p.weights.clip import load_tokenizer
from minip2p.weights.model import SD_DEFAULTS

SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
NASTY = "a x</script><script>alert(\"1\")</script>x y<!--<script>y & <b>café</b> 狗 'it' //b"
SIZE, CALLS = (16, 24), 6


# --- results whose maps are known ----------------------------------------------------------------


def peak(row: int, token: int, call: int, size: tuple[int, int] = SIZE) -> tuple[int, int]:
    """Return where a token's map is brightest: one place, but for the first two calls."""
    h, w = size
    return (2 * row + 3 * token) % h, (5 * token + 4 + (7 * (2 - call) if call < 2 else 0)) % w


def bump(row: int, token: int, call: int, size: tuple[int, int]) -> Tensor:
    h, w = size
    y, x = peak(row, token, call, size)
    squares = (torch.arange(h)[:, None] - y) ** 2 + (torch.arange(w) - x) ** 2
    return (0.3 + 0.05 * row + 0.02 * call) * torch.exp(-squares / 3)


def make(
    prompts: list[str], edit: Edits = None, calls: int = 5, size: tuple[int, int] = SIZE
) -> tuple[Result, Any]:
    """Return a result with maps at two layers of the coarse size and one of another."""
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = [tokenize(tokenizer, prompt) for prompt in prompts]
    store = PageStore()
    store.begin(tokens, size)
    for call in range(calls):
        store.at(call, calls, 0)
        maps = torch.stack([
            torch.stack([bump(r, k, call, size) for k in range(77)], dim=-1).flatten(0, 1)
            for r in range(len(prompts))
        ])  # fmt: skip
        store.add(Layer("a", "up", True, *size), maps * 1.5)
        store.add(Layer("b", "down", True, *size), maps * 0.5)
        store.add(Layer("c", "down", True, 2, 2), torch.rand(len(maps), 4, 77))
    images = [
        Image.new("RGB", (4 * size[1], 4 * size[0]), (40 * r, 90, 160)) for r in range(len(prompts))
    ]
    bound = bind(edit, tokens, latent_size=size, coarse=size, defaults=SD_DEFAULTS)
    return Result(images, torch.zeros(0), store, {"prompts": prompts, "seed": 8888}), bound


class Reader(HTMLParser):
    """The elements of a page, each as (tag, attributes, pieces of text), and those left open."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any], list[str]]] = []
        self.open: list[tuple[str, dict[str, Any], list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for _, _, pieces in self.open:
            pieces.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return ["".join(p) for t, a, p in self.elements if t == tag and wanted.items() <= a.items()]

    def values(self, tag: str, attribute: str) -> list[Any]:
        return [a.get(attribute) for t, a, _ in self.elements if t == tag]

    def words(self, row: int) -> list[dict[str, Any]]:
        return self.run()["rows"][row]["words"]

    def run(self) -> dict[str, Any]:
        return json.loads(self.texts("script", id="run")[0])


def decode(word: dict[str, Any], size: tuple[int, int] = SIZE) -> Tensor:
    """Return a word's maps, 1 + calls h w: the average, then every call."""
    maps = torch.frombuffer(bytearray(base64.b64decode(word["maps"])), dtype=torch.uint8)
    maps = maps.view(-1, *size).double() / 255
    return torch.cat([maps[:1] * word["scale"][0], maps[1:] * word["scale"][1]])


# --- what is in the file -------------------------------------------------------------------------


def test_everything_is_in_the_file_and_text_is_only_text():
    """Whatever prompts and names say, no element and no style refers to anything outside."""
    text = page(*make([NASTY, NASTY.replace("café", "狗")], WordSwap()), names=["<i>", "'\"&"])
    reader = Reader(text)
    assert not reader.open, "an element is not closed"
    for tag, attributes, _ in reader.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    (style,) = reader.texts("style")
    assert "url(" not in style and "@import" not in style and "default-src 'none'" in text
    assert reader.values("script", "type") == ["application/json", None]
    tags = {tag for tag, _, _ in reader.elements}
    assert not tags & {"iframe", "object", "embed", "video", "base"}

    assert reader.texts("p", class_="prompt")[0] == f"<begin> {NASTY} <end>"
    assert reader.texts("p", class_="role") == ["<i>", "'\"&"]
    assert reader.values("img", "alt")[0] == f"<i>: {NASTY}"
    assert reader.texts("title") == [f"minip2p · {NASTY}"]
    assert "狗" in [word["text"] for word in reader.words(0)]
    assert "{{calls}}" in Reader(page(*make(["a {{calls}} b"]))).texts("h1")[0]


@pytest.mark.parametrize("size", [(16, 16), SIZE])
def test_maps_are_those_of_the_store(size):
    """Every byte is the map of its word at its call, to 1/255 of the scale beside it."""
    result, bound = make([SQUIRREL, LION], WordSwap(), size=size)
    store, reader = result.attention, Reader(page(result, bound))
    run = reader.run()
    assert (run["size"], run["calls"], run["shown"]) == (list(size), 5, list(range(5)))
    assert run["colours"] == COLOURS.tolist()
    for r, prompt in enumerate(store.prompts):
        words = reader.words(r)
        assert [word["text"] for word in words] == ["<begin>", *prompt.text.split(), "<end>"]
        for n, word in enumerate(words[:-1]):  # each of these is one token, the n-th
            maps, (average, at_calls) = decode(word, size), word["scale"]
            assert (maps[0] - store.average()[r, ..., n]).abs().max() <= average / 255
            for call in range(5):
                expected = store.average(call=call)[r, ..., n]
                assert (maps[1 + call] - expected).abs().max() <= at_calls / 255
                assert maps[1 + call].argmax() == expected.argmax()
            assert maps[0].max() == pytest.approx(average)
            assert maps[1:].max() == pytest.approx(at_calls)
        expected = store.average()[r, ..., prompt.end :].sum(-1)
        assert (decode(words[-1], size)[0] - expected).abs().max() <= words[-1]["scale"][0] / 255


def test_words_keep_their_tokens_and_their_text():
    text = "A  café-goer's “burgers”, please ! " + "very " * 80
    with pytest.warns(UserWarning, match="room for 75"):
        result, bound = make([text])
    prompt = result.attention.prompts[0]
    reader = Reader(page(result, bound))
    words = [word["text"] for word in reader.words(0)]
    assert words[:7] == ["<begin>", "A", "café-goer's", "burgers", "please", "!", "very"]
    assert reader.texts("p", class_="prompt") == [f"<begin> {text} <end>"]
    assert reader.texts("s") == [text[prompt.cut :]]
    expected = result.attention.word("burgers")
    assert len(prompt.find("burgers")) > 1
    assert (decode(reader.words(0)[3])[0] - expected).abs().max() <= expected.max() / 255


def links(prompts: list[str], edit: Edits) -> list[dict[str, Any]]:
    return Reader(page(*make(prompts, edit, 10))).words(1)


def test_words_belong_together_as_they_are_aligned():
    swapped = links([SQUIRREL, LION], WordSwap({"default_": 0.8, "lion": (0.2, 0.5)}))
    assert [word["from"] for word in swapped] == [[n] for n in range(7)]
    assert [word["taken"] for word in swapped] == [[[0, 8]]] * 2 + [[[2, 5]]] + [[[0, 8]]] * 4
    assert swapped[2]["fate"] == "where the source looks at “squirrel”"

    refined = links([SQUIRREL, "a red squirrel eating a burger"], Refine(0.8))
    assert [word["from"] for word in refined] == [[0], [1], [], [2], [3], [4], [5], [6]]
    assert refined[2]["taken"] == [] and refined[2]["fate"] == "its own map"

    for edit, fate in (([None], "without control: its own map"), (None, "")):
        alone = links([SQUIRREL, LION], edit)
        assert [word["from"] for word in alone] == [[n] for n in range(7)]
        assert {word["fate"] for word in alone} == {fate}
        assert not any(word["taken"] for word in alone)


def test_tables_say_what_explain_says():
    blend = LocalBlend("lioness", start=0.2, subtract="a")
    swap = WordSwap({"default_": 0.8, "lioness": (0.2, 0.5)}, 0.4, blend)
    prompts = [SQUIRREL, "a lioness, eating a burger", LION, "a squirrel eating a big burger"]
    edits = [swap, None, Reweight({"burger": 2.0}, Refine(0.0))]
    result, bound = make(prompts, edits, calls=10)
    rows = iter(Reader(page(result, bound)).texts("tr"))
    explained = [line.strip() for line in explained_text(bound, 10).splitlines()]
    explained = [re.sub(r" x (?=\d)", " × ", line) for line in explained if line]
    starts = [n for n, line in enumerate(explained) if line.startswith(("Edit 1", "Edit 3"))]
    for start, end, has_weights in ((starts[0], starts[1] - 1, False), (starts[1], None, True)):
        assert next(rows).endswith("Weight") == has_weights
        for line in explained[start + 2 : end]:
            token, *cells = re.split(r"\s{2,}", re.sub(r"weight (\S+) in all", r"\1", line))
            is_usual = has_weights and token != "layout" and not cells[-1].isdigit()
            assert next(rows) == "".join([token, *cells]) + "1" * is_usual
    assert next(rows, None) is None


def test_settings_are_for_people():
    result, bound = make([SQUIRREL, LION])
    windows = {"cross_replace_steps": {"default_": [0.0, 0.8]}, "blend": None}
    result.run = {"edits": [None, windows], "guidance_scale": 4.0, "negative_prompt": ""}
    texts = Reader(page(result, bound)).texts("dd")
    assert texts == ["nonecross_replace_steps default_ 0 to 0.8", "4", "none"]


def test_size_is_bounded():
    """Three pictures of the bundled model's size or SD's, at 51 calls, and very long prompts."""
    torch.manual_seed(0)

    def write(prompt: str, pixels: int, calls: int) -> tuple[int, Reader]:
        result, bound = make([prompt] * 3, WordSwap(), 1, size=(16, 16))
        store = result.attention
        store.begin(store.prompts, (16, 16))
        store.calls = calls
        store.maps[Layer("a", "up", True, 16, 16)] = list(torch.rand(calls, 3, 256, 77))
        pictures = (torch.rand(3, pixels, pixels, 3) * 255).to(torch.uint8)
        result.images = [Image.fromarray(pixels.numpy()) for pixels in pictures]
        text = page(result, bound)
        return len(text.encode()), Reader(text)

    words = "a painting of a squirrel eating a burger in the snow"
    assert write(words, 64, 51)[0] < 1_000_000
    assert write(words, 512, 51)[0] < 2_500_000  # of noise; pictures are half of that
    size, reader = write("cat " * 75, 64, 100)
    assert reader.run()["shown"] == list(range(0, 100, 3))
    assert "one call in 3" in reader.texts("p", class_="soft")[0]
    assert size < 1.4 * MAP_BYTES + 300_000
    assert len(decode(reader.words(2)[7], (16, 16))) == 35


def test_pictures_are_the_results():
    result, bound = make([SQUIRREL, LION], WordSwap())
    sources = Reader(page(result, bound)).values("img", "src")
    for source, image in zip(sources, result.images, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.tobytes() == image.tobytes() and picture.size == image.size


@pytest.mark.parametrize(
    "store", [None, AttentionStore(), AttentionStore(by_call=True, words=["a"])]
)
def test_missing_maps_are_an_error(store):
    with pytest.raises(UserError, match=r"store=PageStore\(\)"):
        page(Result([], torch.zeros(0), store, {}))


@pytest.mark.slow
def test_a_run_of_the_bundled_model(model: minip2p.StableDiffusion):
    """PNDM makes one UNet call more than steps; where the edit acts, both maps are the same."""
    edit = WordSwap({"default_": 1.0, "lion": 0.5}, 0.4)
    settings = {"num_inference_steps": 3, "scheduler": "pndm", "store": PageStore()}
    result = minip2p.generate(model, [SQUIRREL, LION], edit=edit, **settings)
    assert {(layer.height, layer.width) for layer in result.attention.maps} == {(16, 16)}
    reader = Reader(page(result, result.edit))
    assert reader.run()["shown"] == [0, 1, 2, 3]
    squirrel, lion = (decode(reader.words(r)[2], (16, 16)) for r in (0, 1))
    assert reader.words(1)[2]["taken"] == [[0, 2]]
    differences = [(squirrel[1 + call] - lion[1 + call]).abs().max().item() for call in range(4)]
    assert max(differences[:2]) < 0.01 < 0.1 < min(differences[2:])


# --- what it does in a browser -------------------------------------------------------------------

BRIGHTEST = """
const canvas = document.querySelectorAll("figure")[arguments[0]].querySelector("canvas");
if (canvas.hidden || getComputedStyle(canvas).opacity === "0") return null;
const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let best = 0, most = -1;
for (let i = 0; i < data.length; i += 4) {
  const sum = data[i] + data[i + 1] + data[i + 2];
  if (sum > most) [best, most] = [i / 4, sum];
}
return [Math.floor(best / canvas.width) / canvas.height, best % canvas.width / canvas.width, most];
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, tmp_path: Path) -> Iterator[Browser]:
    """Open a page with a source, an edit and the edit without control; no word is chosen."""
    edit = WordSwap({"default_": 0.8, "lion": 0.5}, 0.4)
    path = tmp_path / "a page.html"
    path.write_text(page(*make([SQUIRREL, LION, LION], [edit, None], CALLS)), "utf-8")
    chromium.resize(1200, 900)
    chromium.pointer(0, 0)
    chromium.open(path)
    yield chromium
    assert chromium.errors() == []


def cells(browser: Browser, pictures: int = 3) -> list[tuple[int, int] | None]:
    """Return the pixel of the map at which each canvas is brightest."""
    places = [browser.js(BRIGHTEST, picture) for picture in range(pictures)]
    return [p and (math.floor(p[0] * SIZE[0]), math.floor(p[1] * SIZE[1])) for p in places]


def peaks(word: int, call: int = CALLS) -> list[tuple[int, int]]:
    return [peak(row, word, call) for row in range(3)]


def word(picture: int, n: int) -> str:
    return f'.word[data-row="{picture}"][data-word="{n}"]'


def marked(browser: Browser, kind: str) -> list[list[int]]:
    return browser.js(
        "return [...document.querySelectorAll('.word.' + arguments[0])]"
        ".map(e => [+e.dataset.row, +e.dataset.word])", kind)  # fmt: skip


def test_hovering_a_word_shows_where_each_picture_looks(browser: Browser):
    assert cells(browser) == [None] * 3 and browser.texts(".state") == [""] * 3
    for picture, n in ((1, 2), (0, 5), (2, 3)):
        browser.hover(word(picture, n))
        assert cells(browser) == peaks(n)
        assert marked(browser, "chosen") == [[picture, n]]
        assert marked(browser, "linked") == [[r, n] for r in range(3) if r != picture]
    browser.hover(word(0, 2))
    assert browser.texts("tr.linked th") == ["lion"]
    source, edited, alone = browser.texts(".state")
    assert source == "squirrel: up to 25\u00a0% (centre)."
    assert "where the source looks at “squirrel” at calls 1 to 3 of 6" in edited
    assert "without control: its own map" in alone
    browser.hover("h1")
    assert cells(browser) == [None] * 3 and marked(browser, "chosen") == []


def test_a_click_keeps_a_word_and_the_switch_shows_its_picture(browser: Browser):
    browser.click(word(0, 2))
    browser.hover(word(0, 5))
    assert cells(browser) == peaks(5)
    browser.click("#mapped")
    assert cells(browser) == [None] * 3 and browser.texts(".state")[0].startswith("squirrel")
    assert browser.js("return getComputedStyle(figures[0].querySelector('img')).filter") == "none"
    browser.click("#mapped")
    browser.hover("h1")
    assert cells(browser) == peaks(2)
    browser.click(word(0, 2))
    browser.hover("h1")
    assert cells(browser) == [None] * 3


def test_the_slider_goes_through_the_calls(browser: Browser):
    """Yellow is the average's own maximum; the calls have that of them all."""
    browser.click(word(1, 2))
    assert browser.texts("#when") == ["average of 6 calls"]
    assert browser.js(BRIGHTEST, 0)[2] > 0.9 * COLOURS[-1].sum()
    browser.js("slider.focus()")
    for presses, call, fate in ((1, 2, "where the source looks at “squirrel” at this call"),
                                (2, 4, "its own map at this call")):  # fmt: skip
        browser.press(*["right"] * presses)
        assert browser.texts("#when") == [f"call {call} of 6"]
        assert cells(browser) == peaks(2, call - 1)
        assert fate in browser.texts(".state")[1]
    assert peaks(2, 1) != peaks(2, 2)
    browser.js("slider.value = 0; slider.dispatchEvent(new Event('input'))")
    assert browser.js(BRIGHTEST, 0)[2] < 0.75 * COLOURS[-1].sum()
    assert "up to 30\u00a0% (left), yellow is 40\u00a0%" in browser.texts(".state")[0]
    browser.click("#average")
    assert browser.texts("#when") == ["average of 6 calls"]


def test_playing_runs_through_the_calls_and_pauses(browser: Browser):
    browser.js(
        "window.seen = [];"
        "new MutationObserver(() => seen.push(when.textContent)).observe(when, {childList: true})"
    )
    browser.click("#play")
    end = time.monotonic() + 30
    while len(seen := browser.js("return seen")) <= CALLS:
        assert time.monotonic() < end
    assert seen[: CALLS + 1] == [f"call {n} of {CALLS}" for n in (*range(1, CALLS + 1), 1)]
    assert browser.texts("#play") == ["Pause"]
    browser.click("#play")
    assert browser.texts("#play") == ["Play"] and browser.js("return timer") is None


def test_the_keyboard_alone_is_enough(browser: Browser):
    for _ in range(12):
        browser.press("tab")
        if marked(browser, "chosen"):
            break
    assert marked(browser, "chosen") == [[0, 0]]  # <begin>: the first word
    browser.press("tab", "tab")
    assert marked(browser, "chosen") == [[0, 2]] and cells(browser) == peaks(2)
    focused = "document.activeElement"
    assert browser.js(f"return getComputedStyle({focused}).outlineStyle") == "solid"
    assert browser.js(f"return {focused}.getAttribute('aria-pressed')") == "true"
    label = browser.js("return figures[1].querySelector('canvas').getAttribute('aria-label')")
    assert label.startswith("Where this picture looks at lion: up to ")
    for key, expected in (("enter", [None] * 3), ("enter", peaks(2)), ("escape", [None] * 3)):
        browser.press(key)
        assert cells(browser) == expected


def test_a_tap_is_enough(browser: Browser):
    def tap(selector: str) -> None:
        x, y = browser.middle(selector)
        touch = "Input.dispatchTouchEvent"
        browser.devtools(touch, type="touchStart", touchPoints=[{"x": x, "y": y}])
        browser.devtools(touch, type="touchEnd", touchPoints=[])

    for n, expected in ((2, peaks(2)), (5, peaks(5)), (5, [None] * 3)):
        tap(word(1, n))
        end = time.monotonic() + 10
        while cells(browser) != expected:
            assert time.monotonic() < end


def test_words_that_belong_together_are_drawn_together(browser: Browser, tmp_path: Path):
    """By way of the alignment, and not by their number: an added word belongs to none."""
    refined = make([SQUIRREL, "a squirrel eating a cake burger"], Refine(0.8), CALLS)
    (tmp_path / "refined.html").write_text(page(*refined), "utf-8")
    browser.open(tmp_path / "refined.html")
    browser.hover(word(1, 5))
    assert cells(browser, 2) == [None, peak(1, 5, CALLS)]
    assert browser.texts(".state")[0] == "No word here belongs to it."
    browser.hover(word(0, 5))
    assert marked(browser, "linked") == [[1, 6]]


def test_prompts_run_nothing_and_nothing_is_fetched(browser: Browser, tmp_path: Path):
    (tmp_path / "nasty.html").write_text(page(*make([NASTY, NASTY], WordSwap())), "utf-8")
    browser.open(tmp_path / "nasty.html")
    browser.hover(word(1, 2))
    assert browser.texts(".prompt")[0] == f"<begin> {NASTY} <end>"
    assert browser.js("return document.scripts.length") == 2 and browser.fetched() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_the_screen_and_can_be_read(browser: Browser, width: int, scheme: str):
    """No sideways scrolling; text has the contrast that WCAG asks for, 4.5 to 1."""
    browser.resize(width, 800)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.devtools("Emulation.setEmulatedMedia", features=media)
    browser.hover(word(1, 2))
    assert browser.js("return document.documentElement.scrollWidth") <= width
    shape = "const r = figures[0].querySelector('img').getBoundingClientRect();"
    assert browser.js(shape + "return r.width / r.height") == pytest.approx(24 / 16, rel=0.01)

    def luminance(name: str) -> float:
        probe = "const e = document.body.appendChild(document.createElement('i'));"
        probe += f"e.style.color = 'var(--{name})';"
        colour = browser.js(probe + "return getComputedStyle(e).color.match(/\\d+/g).map(Number)")
        linear = [c / 3294 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (luminance("paper") > 0.5) == (scheme == "light")
    pairs = ["ink paper", "soft paper", "ink card", "soft card", "ink tint", "on-accent accent"]
    for pair in pairs:
        low, high = sorted(map(luminance, pair.split()))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
