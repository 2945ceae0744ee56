"""Make what the documents show: pictures, the notebook's outputs, the example page.

    python docs/make.py guide       run the guide, and make its pictures
    python docs/make.py recipes     run the recipes, and make their pictures
    python docs/make.py notebook    run the notebook, and store its outputs
    python docs/make.py page        make docs/example.html

Each lists the printed values that differ from those that the document shows. Run it from the
repository, on a quiet machine: guide and notebook take some minutes each.
"""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = ROOT / "notebooks" / "prompt_to_prompt.ipynb"
PACKAGE = sorted((ROOT / "minip2p").rglob("*.py"))
SAMPLE = "python -m minip2p.sample"
WIDTH, LARGEST = 850, 140_000  # of a picture in a page: pixels, bytes
PAGE_ARGUMENTS = (
    '"a painting of a squirrel eating a burger" --swap squirrel=lion --seed 11 --steps 20 '
    "--html example.html --out example"
)


# --- pages ---------------------------------------------------------------------------------------


def fenced(page: Path, language: str) -> list[tuple[int, str, str]]:
    """List the fenced blocks of a page: first line, HTML comment straight before it, text."""
    pattern = rf"(?:^<!-- (.*?) -->\n)?^```{language}\n(.*?)^```$"
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(2)) + 1, m[1] or "", m[2]) for m in matches]


def commands(page: Path) -> list[str]:
    """List the shell commands of a page, each on a line of its own."""
    blocks = "".join(block for _, _, block in fenced(page, "sh")).replace("\\\n", " ")
    lines = (line.split("  #")[0].strip() for line in blocks.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def is_excerpt(block: str) -> bool:
    """Tell whether a block stands, line by line, in a file of the package."""
    lines = [line.strip() for line in block.strip().splitlines()]
    for path in PACKAGE:
        source = [line.strip() for line in path.read_text("utf-8").splitlines()]
        if any(source[i : i + len(lines)] == lines for i in range(len(source))):
            return True
    return False


LONG = "takes minutes"  # the HTML comment before a block that shows no values and takes so long


def run_page(page: Path, with_long: bool = True) -> list[str]:
    """Run a page's Python blocks in order, in one namespace. Return the values that changed.

    A line `print(...)  # value` shows its value, and in a loop `value, then value`. Other printed
    lines are returned, too. with_long: run the blocks that are marked as LONG, too.
    """
    changed: list[str] = []
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, comment, block in fenced(page, "python"):
        if is_excerpt(block) or (comment == LONG and not with_long):
            continue
        printed = io.StringIO()
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        comments = re.findall(r"^ *print\(.*\)  # (?:.*: )?(.*)$", block, re.MULTILINE)
        shown = [value for comment in comments for value in comment.split(", then ")]
        for expected, value in zip(shown, printed.getvalue().splitlines(), strict=False):
            if value != expected:
                changed.append(f"{page.name}:{line} says {expected}, printed {value}")
        if not shown:
            changed += [f"{page.name}:{line} printed {v}" for v in printed.getvalue().splitlines()]
    return changed


# --- pictures ------------------------------------------------------------------------------------


def keep(source: Path, name: str) -> None:
    """Store a picture in docs/images, small enough for a page."""
    picture = DOCS / "images" / f"{name}.png"
    image = Image.open(source).convert("RGB")
    if image.width > WIDTH:
        height = round(image.height * WIDTH / image.width)
        image = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
    image.save(picture, optimize=True)
    if picture.stat().st_size > LARGEST:
        image.quantize(256).save(picture, optimize=True)
    print(picture.relative_to(ROOT), picture.stat().st_size)


def make_pictures(page: Path, more_commands: list[str]) -> None:
    """Run a page as it stands, and keep its out/NAME.png or out/NAME/row.png as NAME.png."""
    sys.path.insert(0, str(ROOT))  # for world/
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("docs").symlink_to(DOCS)
        for command in [*more_commands, *commands(page)]:
            if command.startswith(SAMPLE):
                run_sample(command.removeprefix(SAMPLE))
        print(*run_page(page), sep="\n")
        for picture in sorted(Path("out").glob("*.png")):
            keep(picture, picture.stem)
        for picture in sorted(Path("out").glob("*/row.png")):
            keep(picture, picture.parent.name)


def run_sample(arguments: str) -> None:
    """Run the command line in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "minip2p.sample", *shlex.split(arguments)]
    subprocess.run(argv, check=True, env=environment)


# --- the notebook --------------------------------------------------------------------------------


def python(source: str) -> str:
    """Return a cell without IPython's own lines, such as %pip."""
    return re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE)


def run_cell(source: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell and return its outputs, as Jupyter stores them."""
    import ast

    tree = ast.parse(python(source))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(NOTEBOOK), "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data: dict[str, Any] = {"text/plain": [repr(value)]}
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.convert("RGB").save(file, "JPEG", quality=85)
            data["image/jpeg"] = base64.b64encode(file.getvalue()).decode() + "\n"
        outputs.append({"output_type": "execute_result", "metadata": {}, "data": data})
    return outputs


def make_notebook() -> None:
    """Run the notebook in order and store its outputs."""
    os.chdir(NOTEBOOK.parent)
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    start, count = time.perf_counter(), 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"] = run_cell("".join(cell["source"]), namespace)
            cell["execution_count"] = count
            for output in cell["outputs"]:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = count
                else:
                    print(*output["text"], sep="", end="")
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    seconds = time.perf_counter() - start
    print(f"{count} cells in {seconds:.0f} s, {NOTEBOOK.stat().st_size} bytes")


# --- the example page ----------------------------------------------------------------------------


def make_page() -> None:
    """Make the interactive page of a word swap."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run_sample(PAGE_ARGUMENTS)
        page = Path("example.html").read_bytes()
    (DOCS / "example.html").write_bytes(page)
    print("docs/example.html", len(page))


if __name__ == "__main__":
    makers = {
        "guide": lambda: make_pictures(DOCS / "guide.md", [f"{SAMPLE} --out out/swap"]),
        "recipes": lambda: make_pictures(DOCS / "recipes.md", []),
        "notebook": make_notebook,
        "page": make_page,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in makers:
        sys.exit(__doc__)
    makers[sys.argv[1]]()
