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
from PIL import Image
from torch import Tensor

import minip2p
from minip2p import AttentionStore, Layer, LocalBlend, Refine, Reweight, WordSwap
from minip2p.align import Prompt
from minip2p.edit import Edits, bind
from minip2p.explain import table as explained_text
from minip2p.html.page import MAP_BYTES, PageStore, page
from minip2p.pipeline import Result
from minip2p.show import COLOURS
from minip2p.text import tokenize
from minip2p.weights import SD_DEFAULTS
from minip2p.weights.clip import load_tokenizer

TOKENIZER = Path(minip2p.__file__).parent / "models" / "emoji" / "tokenizer"
SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
NASTY = "a x</script><script>alert(\"1\")</script>x y<!--<script>y & <b>café</b> 狗 'it' //b"


# --- results whose maps are known ----------------------------------------------------------------


def peak(row: int, token: int, call: int, size: tuple[int, int]) -> tuple[int, int]:
    """Where a token's map is brightest: always the same place, but for the first two calls."""
    h, w = size
    return (2 * row + 3 * token) % h, (5 * token + 4 + (7 * (2 - call) if call < 2 else 0)) % w


def bump(row: int, token: int, call: int, size: tuple[int, int]) -> Tensor:
    h, w = size
    y, x = peak(row, token, call, size)
    squares = (torch.arange(h)[:, None] - y) ** 2 + (torch.arange(w) - x) ** 2
    return (0.3 + 0.05 * row + 0.02 * call) * torch.exp(-squares / 3)


def fill(store: AttentionStore, calls: int) -> AttentionStore:
    """Maps at two layers of the coarse size and one of another, as a run would have left them."""
    for call in range(calls):
        store.at(call, calls, 0)
        maps = torch.stack([
            torch.stack([bump(r, k, call, store.size) for k in range(77)], dim=-1).flatten(0, 1)
            for r in range(len(store.prompts))
        ])  # fmt: skip
        store.add(Layer("a", "up", True, *store.size), maps * 1.5)
        store.add(Layer("b", "down", True, *store.size), maps * 0.5)
        store.add(Layer("c", "down", True, 2, 2), torch.rand(len(maps), 4, 77))
    return store


def make(
    prompts: list[str], edit: Edits = None, calls: int = 5, size: tuple[int, int] = (16, 24)
) -> tuple[Result, Any]:
    tokenizer = load_tokenizer(TOKENIZER)
    tokens: list[Prompt] = [tokenize(tokenizer, prompt) for prompt in prompts]
    store = PageStore()
    store.begin(tokens, size)
    pixels = size[1] * 4, size[0] * 4
    images = [Image.new("RGB", pixels, (40 * r, 90, 160)) for r in range(len(tokens))]
    settings = {"prompts": prompts, "seed": 8888, "unet_calls": calls, "edit": repr(edit)}
    bound = bind(edit, tokens, latent_size=size, coarse=size, defaults=SD_DEFAULTS)
    return Result(images, torch.zeros(0), fill(store, calls), settings), bound


class Reader(HTMLParser):
    """Elements, and the text of those with a class or an id."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.within: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        own: list[str] = []
        self.elements.append((tag, dict(attributes)))
        self.texts.append((tag, dict(attributes), own))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.within.append((tag, own))

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for _, own in self.within:
            own.append(data)

    def text(self, tag: str, **attributes: str) -> list[str]:
        return [
            "".join(own)
            for name, has, own in self.texts
            if name == tag and all(has.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]

    def run(self) -> dict[str, Any]:
        return json.loads(self.text("script", id="run")[0])


def decoded(word: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """1 + calls, h w: the average, then every call."""
    maps = torch.frombuffer(bytearray(base64.b64decode(word["maps"])), dtype=torch.uint8)
    maps = maps.view(-1, *size).double() / 255
    return torch.cat([maps[:1] * word["scale"][0], maps[1:] * word["scale"][1]])


# --- what is in the file -------------------------------------------------------------------------


def test_everything_is_in_the_file():
    """No element and no style names anything outside, whatever the prompts say."""
    text = page(*make([NASTY, NASTY.replace("café", "狗")], WordSwap()))
    reader = Reader(text)
    assert not reader.within, "an element is not closed"
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    (style,) = reader.text("style")
    assert "url(" not in style and "@import" not in style
    scripts = [a.get("type") for tag, a in reader.elements if tag == "script"]
    assert scripts == ["application/json", None]
    assert not {tag for tag, _ in reader.elements} & {"iframe", "object", "embed", "video", "base"}
    assert "default-src 'none'" in text


def test_text_is_only_text():
    reader = Reader(page(*make([NASTY, NASTY], WordSwap()), names=["<i>", "'\"&"]))
    for r, shown in enumerate(reader.text("p", class_="prompt")):
        assert shown == f"<begin> {NASTY} <end>", r
    assert reader.text("p", class_="role") == ["<i>", "'\"&"]
    alts = [attributes["alt"] for tag, attributes in reader.elements if tag == "img"]
    assert alts == [f"<i>: {NASTY}", f"'\"&: {NASTY}"]
    assert reader.text("title") == [f"minip2p · {NASTY}"]
    assert "狗" in [word["text"] for word in reader.run()["rows"][0]["words"]]
    assert "{{calls}}" in Reader(page(*make(["a {{calls}} b"]))).text("h1")[0]


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_maps_are_those_of_the_store(size):
    """Every byte is the map of its word at its call, to 1/255 of the scale beside it."""
    result, bound = make([SQUIRREL, LION], WordSwap(), size=size)
    store, run = result.attention, Reader(page(result, bound)).run()
    assert run["size"] == list(size) and run["calls"] == 5 and run["shown"] == list(range(5))
    assert run["colours"] == COLOURS.tolist()
    for r, row in enumerate(run["rows"]):
        names = [word["text"] for word in row["words"]]
        assert names == ["<begin>", *store.prompts[r].text.split(), "<end>"]
        for n, word in enumerate(row["words"][:-1]):  # each of these is one token, the n-th
            maps, (average, at_calls) = decoded(word, size), word["scale"]
            assert (maps[0] - store.average()[r, ..., n]).abs().max() <= average / 255
            for call in range(5):
                true = store.average(call=call)[r, ..., n]
                assert (maps[1 + call] - true).abs().max() <= at_calls / 255
                assert maps[1 + call].argmax() == true.argmax()
            assert maps[0].max() == pytest.approx(average)
            assert maps[1:].max() == pytest.approx(at_calls)
        end = decoded(row["words"][-1], size)[0]
        true = store.average()[r, ..., store.prompts[r].end :].sum(-1)
        assert (end - true).abs().max() <= row["words"][-1]["scale"][0] / 255


def test_words_keep_their_tokens_and_their_text():
    text = "A  café-goer's “burgers”, please ! " + "very " * 80
    with pytest.warns(UserWarning, match="room for 75"):
        result, bound = make([text])
    prompt = result.attention.prompts[0]
    reader = Reader(page(result, bound))
    words = [word["text"] for word in reader.run()["rows"][0]["words"]]
    assert words[:7] == ["<begin>", "A", "café-goer's", "burgers", "please", "!", "very"]
    (shown,) = reader.text("p", class_="prompt")
    assert shown == f"<begin> {text} <end>"
    assert reader.text("s") == [text[prompt.cut :]]
    one = decoded(reader.run()["rows"][0]["words"][3], (16, 24))[0]
    true = result.attention.word("burgers")
    assert len(prompt.find("burgers")) > 1
    assert (one - true).abs().max() <= true.max() / 255


def links(prompts: list[str], edit: Edits, calls: int = 10) -> list[dict[str, Any]]:
    rows = Reader(page(*make(prompts, edit, calls))).run()["rows"]
    assert "from" not in rows[0]["words"][0]
    return rows[1]["words"]


def test_words_belong_together_as_they_are_aligned():
    swapped = links([SQUIRREL, LION], WordSwap({"default_": 0.8, "lion": (0.2, 0.5)}))
    assert [word["from"] for word in swapped] == [[n] for n in range(7)]
    assert [word["taken"] for word in swapped] == [[[0, 8]]] * 2 + [[[2, 5]]] + [[[0, 8]]] * 4
    assert swapped[2]["fate"] == "where the source looks at “squirrel”"

    refined = links([SQUIRREL, "a red squirrel eating a burger"], Refine(0.8))
    assert [word["from"] for word in refined] == [[0], [1], [], [2], [3], [4], [5], [6]]
    assert refined[2]["taken"] == [] and refined[2]["fate"] == "its own map"

    weighed = links([SQUIRREL, SQUIRREL], Reweight({"burger": 2.0}))
    assert [word["from"] for word in weighed] == [[n] for n in range(7)]

    alone = links([SQUIRREL, LION], [None])
    assert [word["from"] for word in alone] == [[n] for n in range(7)]
    assert {word["fate"] for word in alone} == {"without control: its own map"}
    assert not any(word["taken"] for word in alone)
    assert {word["fate"] for word in links([SQUIRREL, LION], None)} == {""}


def test_tables_say_what_explain_says():
    edits = [
        WordSwap(
            {"default_": 0.8, "lioness": (0.2, 0.5)},
            0.4,
            LocalBlend("lioness", start=0.2, subtract="a"),
        ),
        None,
        Reweight({"burger": 2.0}, Refine(0.0)),
    ]
    prompts = [SQUIRREL, "a lioness, eating a burger", LION, "a squirrel eating a big burger"]
    result, bound = make(prompts, edits, calls=10)
    reader = Reader(page(result, bound))
    explained = [line.strip() for line in explained_text(bound, 10).splitlines()]
    explained = [re.sub(r" x (?=\d)", " × ", line) for line in explained if line]
    starts = [n for n, line in enumerate(explained) if line.startswith(("Edit 1", "Edit 3"))]
    shown = iter(reader.text("tr"))
    for start, end, weighed in ((starts[0], starts[1] - 1, False), (starts[1], None, True)):
        assert next(shown).endswith("Weight") == weighed
        for line in explained[start + 2 : end]:
            token, *cells = re.split(r"\s{2,}", re.sub(r"weight (\S+) in all", r"\1", line))
            usual = weighed and token != "layout" and not cells[-1].isdigit()
            assert next(shown) == "".join([token, *cells]) + "1" * usual
    assert next(shown, None) is None


def test_size_is_bounded():
    """Three pictures of the bundled model's size or SD's, at 51 calls, and very long prompts."""
    torch.manual_seed(0)

    def size_of(prompt: str, pixels: int, calls: int) -> tuple[int, Reader]:
        result, bound = make([prompt] * 3, WordSwap(), 1, size=(16, 16))
        store = result.attention
        store.begin(store.prompts, (16, 16))
        store.calls = calls
        store.maps[Layer("a", "up", True, 16, 16)] = list(torch.rand(calls, 3, 256, 77))
        noise = (torch.rand(3, pixels, pixels, 3) * 255).to(torch.uint8)
        result.images = [Image.fromarray(image.numpy()) for image in noise]
        text = page(result, bound)
        return len(text.encode()), Reader(text)

    words = "a painting of a squirrel eating a burger in the snow"
    assert size_of(words, 64, 51)[0] < 1_000_000
    assert size_of(words, 512, 51)[0] < 2_500_000  # of noise; pictures are half of that
    size, reader = size_of("cat " * 75, 64, 100)
    run = reader.run()
    assert run["shown"] == list(range(0, 100, 3))
    assert "one call in 3" in reader.text("p", class_="soft")[0]
    assert size < 1.4 * MAP_BYTES + 300_000
    assert len(decoded(run["rows"][2]["words"][7], (16, 16))) == 35


def test_pictures_are_the_results():
    result, bound = make([SQUIRREL, LION], WordSwap())
    reader = Reader(page(result, bound))
    pictures = [a["src"].partition(",")[2] for tag, a in reader.elements if tag == "img"]
    for picture, image in zip(pictures, result.images, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(picture))) as shown:
            assert shown.tobytes() == image.tobytes() and shown.size == image.size


@pytest.mark.parametrize(
    "store", [None, AttentionStore(), AttentionStore(by_call=True, words=["a"])]
)
def test_missing_maps_are_an_error(store):
    with pytest.raises(ValueError, match=r"store=PageStore\(\)"):
        page(Result([], torch.zeros(0), store, {}))


@pytest.mark.slow
def test_a_run_of_the_bundled_model():
    """PNDM makes one UNet call more than steps; where the edit acts, both maps are the same."""
    edit = WordSwap({"default_": 1.0, "lion": 0.5}, 0.4)
    model, store = minip2p.load(), PageStore()
    result = minip2p.generate(
        model, [SQUIRREL, LION], edit=edit, num_inference_steps=3, scheduler="pndm", store=store
    )
    bound = bind(edit, store.prompts, latent_size=(16, 16), coarse=(16, 16), defaults=SD_DEFAULTS)
    assert {(layer.height, layer.width) for layer in store.maps} == {(16, 16)}
    run = Reader(page(result, bound)).run()
    assert run["calls"] == 4 and run["shown"] == [0, 1, 2, 3]
    squirrel, lion = (decoded(run["rows"][r]["words"][2], (16, 16)) for r in (0, 1))
    assert run["rows"][1]["words"][2]["taken"] == [[0, 2]]
    apart = [(squirrel[1 + call] - lion[1 + call]).abs().max().item() for call in range(4)]
    assert max(apart[:2]) < 0.01 < 0.1 < min(apart[2:])


# --- what it does in a browser --------------------------------------------------------------------

CALLS = 6
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
    """On a page with a source, an edit and the edit without control; no word is chosen."""
    edit = WordSwap({"default_": 0.8, "lion": 0.5}, 0.4)
    result, bound = make([SQUIRREL, LION, LION], [edit, None], CALLS)
    path = tmp_path / "a page.html"
    path.write_text(page(result, bound), "utf-8")
    chromium.resize(1200, 900)
    chromium.pointer(0, 0)
    chromium.open(path)
    yield chromium
    assert chromium.errors() == []


def cell(
    browser: Browser, picture: int, size: tuple[int, int] = (16, 24)
) -> tuple[int, int] | None:
    """The pixel of the map in which the canvas is brightest."""
    found = browser.js(BRIGHTEST, picture)
    return found and (math.floor(found[0] * size[0]), math.floor(found[1] * size[1]))


def cells(browser: Browser) -> list[tuple[int, int] | None]:
    return [cell(browser, picture) for picture in range(3)]


def places(word: int, call: int = CALLS) -> list[tuple[int, int]]:
    """Where the maps of one word are brightest, at one call or in the average."""
    return [peak(row, word, call, (16, 24)) for row in range(3)]


def word(picture: int, n: int) -> str:
    return f'.word[data-row="{picture}"][data-word="{n}"]'


def marked(browser: Browser, kind: str) -> list[list[int]]:
    script = (
        "return [...document.querySelectorAll('.word.' + arguments[0])]"
        ".map(e => [+e.dataset.row, +e.dataset.word])"
    )
    return browser.js(script, kind)


def test_hovering_a_word_shows_where_each_picture_looks(browser: Browser):
    assert cells(browser) == [None] * 3 and browser.texts(".state") == [""] * 3
    for picture, n in ((1, 2), (0, 5), (2, 3)):
        browser.hover(word(picture, n))
        assert cells(browser) == places(n)
        assert marked(browser, "chosen") == [[picture, n]]
        assert marked(browser, "linked") == [[r, n] for r in range(3) if r != picture]
    browser.hover(word(0, 2))
    assert browser.texts("tr.linked th") == ["lion"]
    source, edited, alone = browser.texts(".state")
    assert source == "squirrel: up to 25\u00a0% (centre)."
    assert "where the source looks at “squirrel” at calls 1 to 3 of 6" in edited
    assert "without control: its own map" in alone
    browser.hover(word(0, 5))
    assert browser.texts(".state")[0] == "burger: up to 25\u00a0% (bottom left)."
    browser.hover("h1")
    assert cells(browser) == [None] * 3 and marked(browser, "chosen") == []


def test_the_brightest_place_is_yellow_on_the_scale_that_is_told(browser: Browser):
    """In the average the map reaches its own maximum; a call is scaled by that of all calls."""
    browser.hover(word(0, 2))
    assert browser.js(BRIGHTEST, 0)[2] > 0.9 * COLOURS[-1].sum()
    browser.js("slider.value = 0; slider.dispatchEvent(new Event('input'))")
    assert browser.js(BRIGHTEST, 0)[2] < 0.75 * COLOURS[-1].sum()
    assert "up to 30\u00a0%" in browser.texts(".state")[0]
    assert "yellow is 40\u00a0%" in browser.texts(".state")[0]


def test_the_slider_goes_through_the_calls(browser: Browser):
    browser.click(word(1, 2))
    assert browser.texts("#when") == ["average of 6 calls"]
    browser.js("slider.focus()")
    browser.press("right")
    assert browser.texts("#when") == ["call 2 of 6"]
    assert cells(browser) == places(2, 1) != places(2, 2)
    assert "where the source looks at “squirrel” at this call" in browser.texts(".state")[1]
    browser.press("right", "right")
    assert browser.texts("#when") == ["call 4 of 6"]
    assert cells(browser) == places(2, 3)
    assert "its own map at this call" in browser.texts(".state")[1]
    browser.click("#average")
    assert browser.texts("#when") == ["average of 6 calls"]


def test_playing_runs_through_the_calls_and_pauses(browser: Browser):
    browser.js(
        "window.seen = [];"
        "new MutationObserver(() => seen.push(when.textContent)).observe(when, {childList: true})"
    )
    browser.click("#play")
    until = time.monotonic() + 30
    while len(seen := browser.js("return seen")) <= CALLS and time.monotonic() < until:
        time.sleep(0.1)
    assert seen[: CALLS + 1] == [f"call {n} of {CALLS}" for n in (*range(1, CALLS + 1), 1)]
    assert browser.texts("#play") == ["Pause"]
    browser.click("#play")
    at = browser.texts("#when")
    time.sleep(0.5)
    assert browser.texts("#play") == ["Play"] and browser.texts("#when") == at


def test_a_click_keeps_a_word_and_the_next_lets_go(browser: Browser):
    browser.click(word(0, 2))
    browser.hover(word(0, 5))
    assert cells(browser) == places(5)
    browser.hover("h1")
    assert cells(browser) == places(2)
    browser.click(word(0, 2))
    browser.hover("h1")
    assert cells(browser) == [None] * 3


def test_the_keyboard_alone_is_enough(browser: Browser):
    for _ in range(12):
        browser.press("tab")
        if marked(browser, "chosen"):
            break
    assert marked(browser, "chosen") == [[0, 0]]  # <begin>: the first word
    browser.press("tab", "tab")
    assert marked(browser, "chosen") == [[0, 2]] and cells(browser) == places(2)
    ring = browser.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    assert browser.js("return document.activeElement.getAttribute('aria-pressed')") == "true"
    label = browser.js("return figures[1].querySelector('canvas').getAttribute('aria-label')")
    assert label.startswith("Where this picture looks at lion: up to ")
    browser.press("enter")
    assert cells(browser) == [None] * 3
    browser.press("enter")
    assert cells(browser) == places(2)
    browser.press("escape")
    assert cells(browser) == [None] * 3


def test_a_tap_is_enough(browser: Browser):
    def tap(selector: str) -> None:
        x, y = browser.middle(selector)
        browser.devtools(
            "Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}]
        )
        browser.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        time.sleep(0.3)

    tap(word(1, 2))
    assert cells(browser) == places(2)
    tap(word(1, 5))
    assert cells(browser) == places(5)
    tap(word(1, 5))
    assert cells(browser) == [None] * 3


def test_words_that_belong_together_are_drawn_together(browser: Browser, tmp_path: Path):
    """By way of the alignment, and not by their number: an added word belongs to none."""
    result, bound = make([SQUIRREL, "a squirrel eating a cake burger"], Refine(0.8), CALLS)
    (tmp_path / "refined.html").write_text(page(result, bound), "utf-8")
    browser.open(tmp_path / "refined.html")
    browser.hover(word(1, 5))
    assert cell(browser, 0) is None and cell(browser, 1) == peak(1, 5, CALLS, (16, 24))
    assert browser.texts(".state")[0] == "No word here belongs to it."
    browser.hover(word(0, 5))
    assert marked(browser, "linked") == [[1, 6]]


def test_prompts_run_nothing_and_nothing_is_fetched(browser: Browser, tmp_path: Path):
    (tmp_path / "nasty.html").write_text(page(*make([NASTY, NASTY], WordSwap())), "utf-8")
    browser.open(tmp_path / "nasty.html")
    browser.hover(word(1, 2))
    assert browser.texts(".prompt")[0] == f"<begin> {NASTY} <end>"
    assert browser.js("return document.scripts.length") == 2
    assert browser.fetched() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 700, 1200])
def test_it_fits_the_screen_and_can_be_read(browser: Browser, width: int, scheme: str):
    """No sideways scrolling; text has the contrast that WCAG asks for, 4.5 to 1."""
    browser.resize(width, 800)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.devtools("Emulation.setEmulatedMedia", features=media)
    browser.hover(word(1, 2))
    assert browser.js("return document.documentElement.scrollWidth") <= width
    shape = "const r = figures[0].querySelector('img').getBoundingClientRect();"
    assert browser.js(shape + "return r.width / r.height") == pytest.approx(24 / 16, rel=0.01)
    names = ["paper", "card", "ink", "soft", "accent", "on-accent", "tint"]
    script = """
        const probe = document.body.appendChild(document.createElement("i"));
        return arguments[0].map(name => {
          probe.style.color = `var(--${name})`;
          return getComputedStyle(probe).color.match(/\\d+/g).map(Number);
        });"""
    colours = dict(zip(names, browser.js(script, names), strict=True))
    assert (sum(colours["paper"]) > 600) == (scheme == "light")

    def luminance(name: str) -> float:
        linear = [
            c / 3294 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colours[name]
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [
        ("ink", "paper"),
        ("soft", "paper"),
        ("ink", "card"),
        ("soft", "card"),
        ("ink", "tint"),
    ]
    for text, ground in [*pairs, ("on-accent", "accent")]:
        low, high = sorted((luminance(text), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
