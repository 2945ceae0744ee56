"""The report of a sweep: what its page shows, what it refuses, and how it behaves in a browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMEDRIVER, CHROMIUM, start_browser
from PIL import Image

import minip2p
from minip2p.html import report
from minip2p.sweep import __main__ as sweep
from minip2p.sweep.study import label

ROW = {"prompt": "a cat", "to": "a dog", "edit": "auto", "num_inference_steps": 4}
WINDOWS = [0.0, 0.2, 0.4, 0.6, 0.8]


def write_results(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows, each with an id of its own, and a picture for each that has no error."""
    folder.mkdir()
    with (folder / "results.jsonl").open("w") as table:
        for i, row in enumerate(rows):
            row = {"id": f"{i:016x}", "source": f"f{i // 10:015d}"} | ROW | row
            table.write(json.dumps(row) + "\n")
            for name in {row["id"], row["source"]} if "error" not in row else ():
                Image.new("RGB", (64, 64), (i % 256, 100, 50)).save(folder / f"{name}.png")
    return folder


def write_grid(folder: Path, n: int) -> Path:
    """Write two swaps at five windows for each seed."""
    rows: list[dict[str, Any]] = [
        {
            "swap": [["squirrel=lion"], ["burger=cake"]][i // 5 % 2],
            "cross_replace_steps": [0.0, WINDOWS[i % 5]],
            "seed": i // 10,
            "psnr_outside": 20 + 10 * WINDOWS[i % 5] + i % 3,
            "ssim_inside": 0.3 + WINDOWS[i % 5] / 2,
        }
        for i in range(n)
    ]
    rows[7]["error"] = "ValueError: </script> no"
    return write_results(folder, rows)


def write_pictures(folder: Path) -> Path:
    """Write ten images, each with two swaps of its own, without and with a blend."""
    rows: list[dict[str, Any]] = []
    for i in range(10):
        for noun in (f"lion {i}", f"dog {i}"):
            for blend in (None, {"words": [noun], "threshold": 0.3, "start": 0.0, "subtract": []}):
                row = {"source": f"f{i:015d}", "image": f"/photos/{i}.png", "prompt": f"a bird {i}"}
                row |= {"swap": [f"bird={noun}"], "blend": blend, "psnr_outside": 20.0 + i}
                rows.append(row | {"ssim_inside": 0.5 if blend else 0.25, "changed": i / 10})
    return write_results(folder, rows)


def data_of(folder: Path) -> dict[str, Any]:
    page = report.write_report(folder).read_text()
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_labels_are_short_and_tell_values_apart():
    values = [[0.0, 0.8], [0.1, 0.8], None, [], 4.0, 50, True]
    assert [label(v) for v in values] == ["0.8", "0.1 to 0.8", "none", "none", "4", "50", "True"]
    assert label({"lion": [0.0, 0.4], "default_": [0.0, 0.8]}) == "lion 0.4, others 0.8"
    blend = {"words": ["lion"], "subtract": ["cake"], "threshold": 0.4, "start": 0.0}
    assert label(blend) == "lion, threshold 0.4, subtract cake"
    for a, b in (
        ([0.0, 0.3333333], [0.0, 0.3333334]),
        ({"words": ["bird", "lion"]}, {"words": ["bird, lion"]}),
        (["a=b", "c=d"], ["a=b, c=d"]),
        ("none", None),
        ({"others": 1.0}, {"default_": 1.0}),
        (1, 1.0),
    ):
        first, second, *_ = report.distinct_labels([a, b])
        assert first != second or a == b


def test_blends_of_a_swap_are_named_by_its_words():
    """Each picture has other words; a blend of anything else keeps all words as they are."""
    bird, cat = {"words": ["bird", "lion"]}, {"words": ["dog"], "threshold": 0.4}
    rows = [{"swap": ["bird=lion"], "blend": bird}, {"swap": ["cat=dog"], "blend": cat}, {}]
    pair, new, none = report.blend_labels(rows)
    assert "replaced word" in pair and "new word" in pair
    assert "new word" in new and "0.4" in new and none == "none"
    rows.append({"swap": ["cat=dog"], "blend": {"words": ["snow"]}})
    assert "lion" in report.blend_labels(rows)[0]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/a/b/1.png"], ["1.png"]),
        (["/s/cat/1.png", "/s/dog/1.png", "/s/2.png"], ["cat/1.png", "dog/1.png", "2.png"]),
        (["/set/1.png", "1.png"], ["/set/1.png", "1.png"]),
    ],
)  # fmt: skip
def test_images_are_named_below_the_folder_that_they_share(paths, labels):
    rows = [{"image": path, "picture": "x"} for path in paths]
    assert report.image_labels([*rows, {}]) == [*labels, "none"]
    changed = [{"image": "/a/1.png", "picture": picture} for picture in "xy"]
    assert report.image_labels(changed) == ["1.png (x)", "1.png (y)"]


def test_the_report_is_one_file_with_everything_in_it(tmp_path, capsys):
    folder = write_grid(tmp_path / "out", 20)
    assert sweep.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    page = (folder / "report.html").read_text()
    assert "default-src 'none'" in page and page.count("</script>") == 2
    data = data_of(folder)
    assert data["settings"] == ["swap", "cross_replace_steps", "seed"]
    assert len(data["rows"]) == 20 and len(data["pictures"]) == 19 + 2
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in data["pictures"].values())
    edited = [name for name, _ in data["measures"]].index("edited")
    assert data["rows"][4]["figures"][edited] == pytest.approx(1 - 0.7)


def test_a_report_from_a_stranger_shows_no_other_file(tmp_path, monkeypatch):
    """Pictures are PNG, of the folder, and of a reasonable size; figures are finite numbers."""
    rows = [{"seconds": float("nan"), "changed": 10**400, "seed": [[[1]]], "blend": {"words": 5}}]
    folder = write_results(tmp_path / "out", [*rows, {}, {}, {}])
    image = Image.new("RGB", (64, 64))
    image.save(folder / f"{1:016x}.png", "EPS")
    (folder / f"{2:016x}.png").write_bytes(b"")
    (folder / f"{3:016x}.png").unlink()
    (folder / f"{3:016x}.png").mkdir()
    assert data_of(folder)["pictures"].keys() == {f"{0:016x}", "f" + 15 * "0"}
    assert data_of(folder)["rows"][0]["figures"] == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert data_of(folder)["pictures"] == {}


def test_a_folder_without_results_and_a_page_of_others_are_refused(tmp_path):
    with pytest.raises(minip2p.UserError, match=r"has no results\.jsonl with rows"):
        report.write_report(tmp_path)
    folder = write_results(tmp_path / "out", [{}])
    (folder / "report.html").write_text("mine")
    with pytest.raises(minip2p.UserError, match="is no report of a sweep"):
        report.write_report(folder)
    assert (folder / "report.html").read_text() == "mine"


# --- in a browser ---------------------------------------------------------------------------------

NEEDS_A_BROWSER = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver"
)
COLUMN = (
    "const n = [...document.querySelectorAll('#all th button')]"
    ".findIndex(b => b.textContent === arguments[0]) + 1;"
    "return [...document.querySelectorAll('#all tbody tr')].map(r => r.cells[n]?.textContent)"
)
SORT = (
    "[...document.querySelectorAll('#all th button')]"
    ".find(b => b.textContent === arguments[0]).click()"
)
CHOOSE = (
    "const s = [...document.querySelectorAll('label')].find(l => l.textContent"
    ".startsWith(arguments[0])).querySelector('select');"
    "s.value = [...s.options].find(o => o.textContent === arguments[1]).value;"
    "s.dispatchEvent(new Event('change'))"
)
COUNT = "return document.querySelectorAll(arguments[0]).length"
CUT = (  # texts of the plots that reach over the edge, and legends that are wider than their place
    "const cut = [...document.querySelectorAll('svg text')].filter(t => { const b = t.getBBox();"
    "const v = t.ownerSVGElement.viewBox.baseVal; return b.x < 0 || b.x + b.width > v.width; });"
    "const wide = [...document.querySelectorAll('.legend')]"
    ".filter(l => l.scrollWidth > l.clientWidth);"
    "return [...cut, ...wide].map(t => t.textContent)"
)


@NEEDS_A_BROWSER
def test_a_grid_in_a_browser(tmp_path):
    """500 rows are sorted, filtered, laid out anew and looked at, and nothing is fetched."""
    path = report.write_report(write_grid(tmp_path / "out", 500))
    with start_browser() as page:
        page("POST", "/window/rect", width=1400, height=1000)
        page.open(path)
        assert page.js(COUNT, "#all tbody tr") == 500 and page.js(COUNT, "#plots svg") == 3
        assert page.js(COUNT, "#sheet tbody tr") == 2 and page.js(COUNT, "#sheet thead th") == 6
        assert page.js(CUT) == []

        for is_descending in (False, True):
            page.js(SORT, "psnr_outside")
            numbers = [float(v) for v in page.js(COLUMN, "psnr_outside") if v and v[0].isdigit()]
            assert len(numbers) == 499 and numbers == sorted(numbers, reverse=is_descending)

        page.js(CHOOSE, "swap", "burger=cake")
        assert page.js("return document.querySelector('#count').textContent") == "250 of 500 runs"
        assert set(page.js(COLUMN, "swap")) == {"burger=cake"}
        page.js("const i = document.querySelector('#typed'); i.value = '0.4';"
                "i.dispatchEvent(new Event('input'))")  # fmt: skip
        assert page.js("return document.querySelector('#count').textContent") == "50 of 500 runs"

        page.js(CHOOSE, "Down", "seed")
        assert page.js(COUNT, "#sheet tbody tr") == 50
        page.js("document.querySelector('#sheet .picture').click()")
        assert page.js("return document.querySelector('dialog').open")
        fetched = page.js("return performance.getEntriesByType('resource').map(r => r.name)")
        assert [name for name in fetched if not name.startswith("data:")] == []
        assert page("POST", "/se/log", type="browser") == []


@NEEDS_A_BROWSER
def test_pictures_with_edits_in_a_browser(tmp_path):
    """A row a picture, with captions that tell its edits apart; the plots are over the blend."""
    path = report.write_report(write_pictures(tmp_path / "out"))
    with start_browser() as page:
        page("POST", "/window/rect", width=1400, height=1000)
        page.open(path)
        assert page.js(COUNT, "#sheet tbody tr") == 10 and page.js(COUNT, "#sheet figure") == 40
        captions = page.js(
            "return [...document.querySelectorAll('#sheet tbody tr:first-child figcaption')]"
            ".map(c => c.textContent)"
        )
        assert captions == [
            f"bird={noun} 0\nblend: {blend}"
            for noun in ("lion", "dog")
            for blend in ("none", "new word")
        ]
        head = page.js("return document.querySelector('#sheet tbody th').textContent")
        assert head == "a bird 0\nimage: 0.png"
        legends = page.js(
            "return [...document.querySelectorAll('.legend')].map(l => l.textContent)"
        )
        assert all(legend.startswith("blend") for legend in legends) and page.js(CUT) == []
        page.js(CHOOSE, "Setting", "swap")
        assert page.js(CUT) == []
        page.js(CHOOSE, "Down", "nothing")
        assert page.js(COUNT, "#sheet figure") == 6  # and 34 more
        assert page("POST", "/se/log", type="browser") == []
