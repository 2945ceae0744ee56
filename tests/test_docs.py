"""What README, guide and notebook say: their commands and blocks run, their links and figures hold.

Under pytest every run takes 2 steps. `python tests/test_docs.py` runs the guide as it stands, makes
its pictures anew and lists the printed values that have changed.
"""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import minip2p
from minip2p import sample as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md"]
NOTEBOOK = ROOT / "notebooks" / "prompt_to_prompt.ipynb"
PICTURES = ROOT / "docs" / "images"
PACKAGE = sorted((ROOT / "minip2p").rglob("*.py"))

# They set up virtual environments: CI runs them in a fresh folder, not this file.
SET_UP = {
    "first picture": "python3 -m venv .venv && .venv/bin/pip install -q . && "
    ".venv/bin/python -m minip2p.sample",
    "test": "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && "
    ".venv/bin/python -m pytest",
}
WIDTH, LARGEST = 850, 140_000  # of a picture on a page: pixels, bytes
SAMPLE = "python -m minip2p.sample"


def name(page: Path) -> str:
    return page.name


def fenced(page: Path, language: str) -> list[tuple[int, str, str]]:
    """Fenced blocks: the line each begins at, an HTML comment straight before it, its text."""
    pattern = rf"(?:^<!-- (.*?) -->\n)?^```{language}\n(.*?)^```$"
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(2)) + 1, m[1] or "", m[2]) for m in matches]


def prose(page: Path) -> str:
    """A page without its fenced blocks and HTML comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    blocks = "".join(block for _, _, block in fenced(page, "sh")).replace("\\\n", " ")
    lines = (line.split("  #")[0].strip() for line in blocks.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def is_excerpt(block: str) -> bool:
    """Whether a block stands, line by line, in a file of the package."""
    lines = [line.strip() for line in block.strip().splitlines()]
    for path in PACKAGE:
        source = [line.strip() for line in path.read_text("utf-8").splitlines()]
        if any(source[i : i + len(lines)] == lines for i in range(len(source))):
            return True
    return False


def run_page(page: Path) -> list[str]:
    """Run a page's python blocks, in order, in one namespace; the lines `print(...)  # value` that
    printed another value."""
    changed: list[str] = []
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, _, block in fenced(page, "python"):
        if is_excerpt(block):
            continue
        printed = io.StringIO()
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        said = re.findall(r"^print\(.*\)  # (?:.*: )?(.*)$", block, re.MULTILINE)
        for expected, value in zip(said, printed.getvalue().splitlines(), strict=False):
            if value != expected:
                changed.append(f"{page.name}:{line} says {expected}, printed {value}")
        if not said:
            changed += [f"{page.name}:{line} printed {v}" for v in printed.getvalue().splitlines()]
    return changed


@pytest.fixture(scope="module")
def model():
    """The bundled model, which recommends 2 steps."""
    model = minip2p.load(device="cpu")
    model.defaults["num_inference_steps"] = 2
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch, model):
    """A current folder that looks like the repository, where load() takes no time."""
    for part in ("docs", "notebooks", "minip2p", "world"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for module in (minip2p, cli):
        monkeypatch.setattr(module, "load", lambda *_, **__: model)
    return tmp_path


# --- what runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_run(page, folder):
    changed = run_page(page)
    # With 2 steps figures differ, but what is said to be true is true.
    assert not [line for line in changed if " says True" in line]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_run(page, folder, capsys):
    for command in commands(page):
        if command in SET_UP.values():
            continue
        program, *arguments = shlex.split(command.removeprefix(SAMPLE).strip() or "-")
        if not command.startswith(SAMPLE):
            assert program == "python" and (ROOT / arguments[0]).is_file(), command
            continue
        argv = [] if program == "-" else [program, *arguments]
        args = cli.make_parser().parse_args(argv)
        cli.make_run(args)  # the options go together
        if args.model != "emoji":
            continue  # gigabytes of weights
        steps = [] if args.steps else ["--steps", "50" if args.explain else "2"]
        assert cli.main([*argv, *steps]) == 0, command
        printed = capsys.readouterr().out.splitlines()
        if args.explain:  # the page shows what it prints
            shown = {line.strip() for line in page.read_text("utf-8").splitlines()}
            assert {line.strip() for line in printed} <= shown
        else:
            assert printed and all(Path(line).is_file() for line in printed), command


def test_readme_sets_up_as_ci_does():
    found = {remark: block.strip() for _, remark, block in fenced(PAGES[0], "sh") if remark}
    assert {mark: found.get(mark) for mark in SET_UP} == SET_UP


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_exist(page):
    known = {option for action in cli.make_parser()._actions for option in action.option_strings}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose(page) + " ".join(commands(page))))
    assert said <= known


def test_notebook_runs(folder):
    namespace = {"__name__": "notebook"}
    for cell in notebook_cells("code"):
        exec(compile(python(cell), str(NOTEBOOK), "exec"), namespace)


# --- what is said --------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"https?://|mailto:", link)]


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=name)
def test_links_lead_somewhere(page):
    text = "\n".join(map(source, notebook_cells("markdown"))) if page == NOTEBOOK else prose(page)
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_pictures_are_small_and_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(prose(page))}
    pictures = sorted(PICTURES.iterdir())
    assert [path.name for path in pictures if path.resolve() not in shown] == []
    assert [path.name for path in pictures if path.stat().st_size > LARGEST] == []
    assert sum(path.stat().st_size for path in pictures) < 1_500_000


def notebook_cells(kind: str) -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def python(cell: dict) -> str:
    """A cell without IPython's own lines, such as %pip: here everything is installed."""
    return re.sub(r"^(\s*)[%!].*", r"\1pass", source(cell), flags=re.MULTILINE)


def test_notebook_defines_nothing():
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in notebook_cells("code"):
        assert not [node for node in ast.walk(ast.parse(python(cell))) if isinstance(node, defined)]


def test_notebook_is_executed_and_small():
    cells = notebook_cells("code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"display_data", "execute_result", "stream"}  # no error
    assert NOTEBOOK.stat().st_size < 1_000_000


# --- python tests/test_docs.py -------------------------------------------------------------------


def make_pictures() -> None:
    """Run the guide as it stands. Picture NAME.png is its out/NAME.png or out/NAME/row.png."""
    guide = PAGES[1]
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        sys.path.insert(0, str(ROOT))  # for world/
        Path("out").mkdir()
        Path("docs").symlink_to(ROOT / "docs")
        for command in [f"{SAMPLE} --out out/swap", *commands(guide)]:  # README's, the guide's
            if command.startswith(SAMPLE):
                assert cli.main(shlex.split(command.removeprefix(SAMPLE))) == 0, command
        print(*run_page(guide), sep="\n")
        for made in sorted([*Path("out").glob("*.png"), *Path("out").glob("*/row.png")]):
            picture = PICTURES / f"{made.parent.name if made.stem == 'row' else made.stem}.png"
            image = Image.open(made).convert("RGB")
            if image.width > WIDTH:
                height = round(image.height * WIDTH / image.width)
                image = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
            image.save(picture, optimize=True)
            if picture.stat().st_size > LARGEST:
                image.quantize(256).save(picture, optimize=True)
            print(picture.relative_to(ROOT), picture.stat().st_size)


if __name__ == "__main__":
    make_pictures()
