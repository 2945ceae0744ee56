"""Count what a reader has to read: python tests/count.py [calls]

The reading path is `generate` and every module of minip2p that its import needs, but weights/,
which loads a model and may be taken for granted. After it come the lines of the package and of the
tests; then, in every file, long functions, docstrings without a verb, and names that say nothing.

With `calls`: the files and functions of the package that Python enters for one swap, one inversion
and one sweep. PYTHONPATH chooses another edition.
"""

import ast
import re
import runpy
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minip2p"
TOP_LEVEL = "minip2p"

LONGEST = 60  # lines of a function
NOUN_CLAUSE = re.compile(r"(What|Whose|Which|Whether|Of|Who|Where|That|Its?|Those|These)\b")
DEMONSTRATIVES = {
    *("found", "given", "own", "one", "said", "about", "made", "asked", "some", "there", "both"),
    *("more", "those", "told", "beside", "crew", "heard", "hand"),
}


def modules() -> dict[str, Path]:
    """Return every module of the package: "minip2p.weights.clip" → its file."""
    paths = {path: path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return {
        ".".join(name.parts).removesuffix(".__init__"): path for path, name in sorted(paths.items())
    }


def imports(name: str, path: Path, inside: bool = False) -> set[str]:
    """Return the names that a module imports, as "minip2p.edit" or "torch.nn".

    inside: also those that functions import when they are called, and that types alone need.
    """
    tree = ast.parse(path.read_text("utf-8"))
    nodes = ast.walk(tree) if inside else iter(tree.body)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    targets: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
            targets |= {f"{base}.{alias.name}" for alias in node.names}
    return targets


def graph(inside: bool = False) -> dict[str, set[str]]:
    """Return, for every module, the modules of the package that it imports."""
    known = modules()

    def module(target: str) -> str | None:
        """Return the module that "minip2p.edit.bind" means: minip2p.edit."""
        while target and target not in known:
            target = target.rpartition(".")[0]
        return target or None

    return {
        name: {t for t in map(module, imports(name, path, inside)) if t and t != name}
        for name, path in known.items()
    }


def reading_path() -> list[str]:
    """Return the modules that `generate` needs, without weights/ and the list of public names."""
    edges, seen, queue = graph(), set(), [f"{TOP_LEVEL}.pipeline"]
    while queue:
        name = queue.pop()
        if name not in seen and name != TOP_LEVEL and not name.startswith(f"{TOP_LEVEL}.weights"):
            seen.add(name)
            queue += edges[name]
    return sorted(seen)


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def remarks(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what a reader would stumble over: the kind, and where it stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST:
                yield "long functions", f"{where} {node.name} ({length} lines)"
        documented = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        if documented and NOUN_CLAUSE.match(ast.get_docstring(node) or ""):
            yield "docstrings without a verb", where
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id
        argument = isinstance(node, ast.arg) and node.arg
        if (stored or argument) in DEMONSTRATIVES:
            yield "demonstratives as names", f"{where} {stored or argument}"


def main() -> None:
    files, path = modules(), reading_path()
    for name in path:
        print(f"{lines(files[name]):6} {name}")
    print(f"{sum(lines(files[name]) for name in path):6} the reading path, {len(path)} files")
    print(f"{sum(map(lines, files.values())):6} the package, {len(files)} files")
    print(f"{sum(map(lines, (ROOT / 'tests').rglob('*.py'))):6} the tests")
    places: dict[str, list[str]] = {}
    folders = "tests", "benchmarks", "world", "docs"
    others = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    for file in (*files.values(), *others):
        for kind, place in remarks(file):
            places.setdefault(kind, []).append(place)
    for kind, rows in places.items():
        print(f"\n{len(rows)} {kind}:", *rows, sep="\n    ")


# --- what one use of a program enters -------------------------------------------------------------

PROMPT = "a photo of a cat riding a bicycle"
STUDY = f'prompt = "{PROMPT}"\nswap = "cat=dog"\nnum_inference_steps = 2\n'


def entered(module: str, *arguments: str) -> set[tuple[str, str]]:
    """Run a program and return the (file, function) pairs of the package that Python enters."""
    functions: set[tuple[str, str]] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        _, in_package, file = frame.f_code.co_filename.rpartition("/minip2p/")
        name = frame.f_code.co_name
        if event == "call" and in_package and not name.startswith("<"):
            functions.add((file, name))

    sys.argv = [module, *arguments]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # None ends it
    return functions


def count_calls() -> None:
    with tempfile.TemporaryDirectory() as folder:
        steps = "--steps", "2", "--out", f"{folder}/out"
        uses = {"swap": entered("minip2p.sample", PROMPT, "--swap", "cat=dog", *steps)}
        photo = "--image", f"{folder}/out/source.png"
        uses["inversion"] = entered("minip2p.sample", PROMPT, *photo, "--swap", "cat=dog", *steps)
        Path(f"{folder}/study.toml").write_text(STUDY)
        uses["sweep"] = entered("minip2p.sweep", f"{folder}/study.toml", "--out", f"{folder}/sweep")
    for use, functions in uses.items():
        print(f"{use}: {len({file for file, _ in functions})} files, {len(functions)} functions")


if __name__ == "__main__":
    count_calls() if sys.argv[1:] == ["calls"] else main()
