"""README, docs, the notebook and the other pages: their blocks and commands run, their links hold.

By default every run takes 2 steps of a toy model. Slow tests run guide and notebook as they stand.
`docs/make.py` makes the pictures, the notebook's outputs and the example page.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import minip2p

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import make  # noqa: E402
from make import NOTEBOOK, SAMPLE, commands, fenced, python, run_page  # noqa: E402

README, GUIDE, RECIPES = ROOT / "README.md", ROOT / "docs/guide.md", ROOT / "docs/recipes.md"
PAGES = [
    README,
    *(p for part in ("docs", "world", "benchmarks") for p in sorted((ROOT / part).glob("*.md"))),
]
PICTURES = ROOT / "docs" / "images"

# They set up virtual environments: CI runs them in a fresh folder, not this file.
SET_UP = {
    "first picture": "python3 -m venv .venv && .venv/bin/pip install -q . && "
    ".venv/bin/python -m minip2p.sample",
    "test": "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && "
    ".venv/bin/python -m pytest",
}

# Public names of google/prompt-to-prompt: ptp_utils.py, seq_aligner.py and the notebooks.
GOOGLE = """
    text_under_image view_images diffusion_step latent2image init_latent text2image_ldm
    text2image_ldm_stable register_attention_control get_word_inds update_alpha_time_word
    get_time_words_attention_alpha ScoreParams get_matrix get_traceback_matrix global_align
    get_aligned_sequences get_mapper get_refinement_mapper get_replacement_mapper_
    get_replacement_mapper LocalBlend get_mask EmptyControl AttentionControl step_callback
    between_steps num_uncond_att_layers SpatialReplace AttentionStore get_empty_store
    get_average_attention AttentionControlEdit replace_self_attention replace_cross_attention
    AttentionReplace AttentionRefine AttentionReweight get_equalizer aggregate_attention
    make_controller show_cross_attention show_self_attention_comp run_and_display load_512
    NullInversion prev_step next_step get_noise_pred get_noise_pred_single image2latent init_prompt
    ddim_loop ddim_inversion null_optimization invert MY_TOKEN LOW_RESOURCE NUM_DIFFUSION_STEPS
    NUM_DDIM_STEPS GUIDANCE_SCALE MAX_NUM_WORDS ldm_stable device tokenizer DDSLoss
    image_optimization
"""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Return a page without its fenced blocks and HTML comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """Enter a folder that has what a fresh clone has, and nothing that a run has made."""
    for part in ("docs", "notebooks", "minip2p", "world"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # for world/
    return tmp_path


class Fixed(dict):
    """Settings that a page can't change: it may ask for more steps than a quick test takes."""

    def __setitem__(self, key, value):
        pass


@pytest.fixture
def quick(clone, monkeypatch, toy) -> None:
    """Let minip2p.load return a toy that recommends 2 steps."""
    short = replace(toy, defaults={**toy.defaults, "num_inference_steps": 2})
    short.defaults = Fixed(short.defaults)
    monkeypatch.setattr(minip2p, "load", lambda *_, **__: short)


# --- what runs -----------------------------------------------------------------------------------


def in_time(page: Path) -> Any:
    """Mark the recipes as slow: test_recipes.py runs their definitions."""
    return pytest.param(page, marks=pytest.mark.slow) if page == RECIPES else page


@pytest.mark.parametrize("page", [in_time(p) for p in PAGES if p.name != "sweep.md"], ids=name)
def test_python_blocks_run(page, quick):
    run_page(page)  # sweep.md's block reads the results of a study


@pytest.mark.slow
def test_printed_values_are_those_of_the_guide(clone):
    assert not [line for line in run_page(GUIDE, with_long=False) if " says " in line]


@pytest.mark.slow
def test_sample_commands_of_the_guide_run(clone):
    for command in commands(GUIDE):
        if not command.startswith(SAMPLE) or "--model" in command:  # gigabytes of weights
            continue
        words = shlex.split(re.sub(r"--steps \d+", "", command))[1:]
        steps = [] if "--explain" in command else ["--steps", "2"]
        argv = [sys.executable, *words, *steps]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, (command, run.stderr)
        if "--explain" in command:  # the page shows what it prints
            shown = {line.strip() for line in GUIDE.read_text("utf-8").splitlines()}
            assert {line.strip() for line in run.stdout.splitlines()} <= shown


def notebook_cells(kind: str) -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


class WithoutAsserts(ast.NodeTransformer):
    """Leave out what a notebook asserts of its pictures, which a toy does not make."""

    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()


def test_notebook_runs(quick):
    namespace = {"__name__": "notebook"}
    for cell in notebook_cells("code"):
        tree = ast.fix_missing_locations(WithoutAsserts().visit(ast.parse(python(source(cell)))))
        exec(compile(tree, str(NOTEBOOK), "exec"), namespace)


@pytest.mark.slow
def test_notebook_shows_what_it_says(clone):
    namespace = {"__name__": "notebook"}
    for cell in notebook_cells("code"):
        exec(compile(python(source(cell)), str(NOTEBOOK), "exec"), namespace)


# --- what is said --------------------------------------------------------------------------------


def test_readme_sets_up_as_ci_does():
    blocks = {remark: block.strip() for _, remark, block in fenced(README, "sh") if remark}
    assert {mark: blocks.get(mark) for mark in SET_UP} == SET_UP


def known_options() -> set[str]:
    """List every option that a program of the repository has."""
    files = [
        path for part in ("minip2p", "world", "benchmarks") for path in (ROOT / part).rglob("*.py")
    ]
    text = "\n".join(path.read_text("utf-8") for path in files)
    return {*re.findall(r'"(--[a-z][a-z-]*)"', text), "--help", "--no-ema"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_programs_and_options_exist(page):
    for command in commands(page):
        if match := re.search(r"python -m ([\w.]+)", command):
            assert match[1] in ("venv", "pytest") or importlib.util.find_spec(match[1]), command
        elif match := re.match(r"(?:\S*/)?python (\S+\.py)", command):
            assert (ROOT / match[1]).is_file(), command
    options = re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose(page) + " ".join(commands(page)))
    assert set(options) <= known_options()


def anchors(page: Path) -> set[str]:
    """List GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


def links(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in targets if not re.match(r"https?://|mailto:", link)]


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
    assert [path.name for path in pictures if path.stat().st_size > make.LARGEST] == []
    recipes = [path for path in pictures if path.name.startswith("recipe-")]
    assert sum(path.stat().st_size for path in recipes) < 1_000_000
    assert sum(path.stat().st_size for path in pictures) < 2_500_000


def test_readme_and_example_page_are_short():
    assert len(README.read_text("utf-8")) <= 9_000
    assert (ROOT / "docs" / "example.html").stat().st_size < 1_500_000


def test_every_name_of_googles_code_is_answered():
    text = (ROOT / "docs" / "coming-from-elsewhere.md").read_text("utf-8")
    assert [word for word in GOOGLE.split() if not re.search(rf"\b{word}\b", text)] == []


def test_notebook_defines_nothing_and_is_executed():
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    cells = notebook_cells("code")
    for cell in cells:
        assert not [
            node for node in ast.walk(ast.parse(python(source(cell)))) if isinstance(node, defined)
        ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"display_data", "execute_result", "stream"}  # no error
    assert NOTEBOOK.stat().st_size < 900_000
