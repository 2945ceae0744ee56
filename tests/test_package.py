"""The package as a whole: which modules import which, and how much there is to read."""

import re

import count
import pytest

import minip2p

ENTRY_POINTS = {"minip2p.sample", "minip2p.sweep.__main__", "minip2p.studio.__main__"}


def test_imports():
    """They run one way, programs are imported by nobody, and no other diffusion library is used."""
    edges = count.graph()
    ordered: list[str] = []
    while len(ordered) < len(edges):
        free = [n for n in edges if n not in ordered and edges[n] <= {*ordered, "minip2p"}]
        assert free, f"these import each other: {sorted(edges.keys() - set(ordered))}"
        ordered += free

    everywhere = count.graph(inside=True)
    for name, targets in everywhere.items():
        assert not targets & ENTRY_POINTS or name == "minip2p.__main__", name
    for name, path in count.modules().items():
        libraries = {target.split(".")[0] for target in count.imports(name, path, inside=True)}
        assert "diffusers" not in libraries, path


def test_the_reading_path_is_short():
    """Everything that `generate` imports but weights/, which loads a model."""
    files = count.modules()
    assert sum(count.lines(files[name]) for name in count.reading_path()) <= 2777


def test_the_version_is_in_the_changelog():
    changelog = (count.ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## \[(.*?)\]", changelog, re.MULTILINE)[1] == minip2p.__version__
    citation = (count.ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {minip2p.__version__}\n" in citation


@pytest.mark.parametrize("name", minip2p.__all__)
def test_public_names_are_there_and_explained(name):
    value = getattr(minip2p, name)
    assert value.__doc__, name


def test_types_are_published():
    assert (count.PACKAGE / "py.typed").is_file()
