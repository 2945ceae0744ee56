"""Kept attention maps belong to one run, and survive in a file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EMOJI
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minip2p
from minip2p import AttentionStore, LocalBlend, Reweight, WordSwap

SQUIRREL, LION = "a photo of a squirrel eating a burger", "a photo of a lion’s pizza, 🐱 x"
EDIT = Reweight({"a": 2}, WordSwap(0.8, 0.4, LocalBlend("a")))


def generate(model, store, prompts=(SQUIRREL, LION), **settings) -> minip2p.Result:
    usual = {"num_inference_steps": 2, "scheduler": "ddim", "edit": "auto", "decode": False}
    return minip2p.generate(model, list(prompts), store=store, **(usual | settings))


# --- one store, two runs -------------------------------------------------------------------------


def answers(store: AttentionStore) -> dict[str, object]:
    """Return everything that a store can be asked about its run."""
    words = store.words or store.prompts[0].words
    maps = [store.average()] + [
        store.word(word, prompt)
        for prompt in range(len(store.prompts))
        for word in words
        if store.prompts[prompt].find(word)
    ]
    if store.by_call:
        maps += [store.average(call=call) for call in range(store.calls)]
    options = store.places, store.kinds, store.max_pixels, store.before_edit, store.by_call
    run = store.prompts, store.size, store.calls, store.words, options, list(store.maps)
    return {"run": run, "maps": maps + [m.clone() for kept in store.maps.values() for m in kept]}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a["run"] == b["run"] and all(map(torch.equal, a["maps"], b["maps"]))


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({}, {"prompts": [LION, SQUIRREL]}),
        ({}, {"seed": 1}),
        ({"words": ["squirrel", "a"]}, {"prompts": ["a squirrel"], "edit": None}),
        ({"by_call": True}, {"num_inference_steps": 3}),
        ({"before_edit": True}, {"height": 128, "width": 96}),
        ({"self_attention": True, "max_pixels": 256}, {"scheduler": "pndm"}),
    ],
)
def test_a_second_run_leaves_the_first_result_its_maps(toy, options, second):
    store = AttentionStore(**options)
    first = generate(toy, store)
    before = answers(first.attention)
    again = generate(toy, store, **second)
    assert same(answers(first.attention), before)
    assert not same(answers(again.attention), before)
    assert same(answers(store), answers(again.attention))  # the store itself has the last run


def test_results_without_a_store_have_none(toy):
    for store in (False, None):
        result = generate(toy, store)
        assert result.store is None
        with pytest.raises(minip2p.UserError, match="store=True"):
            _ = result.attention


# --- in a file -----------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "every token": {},
    "words": {"words": ["a", "pizza"]},
    "words by call": {"words": ["photo"], "by_call": True},
    "before the edit": {"before_edit": True, "places": ["up"]},
    "self-attention": {"self_attention": True, "max_pixels": 256},
    "a word of another spelling": {"words": ["LION's"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_loaded_answers_as_what_was_saved(toy, tmp_path, name):
    store = generate(toy, AttentionStore(**OPTIONS[name]), edit=EDIT, width=96).attention
    path = tmp_path / "maps of a run.safetensors"
    store.save(path)
    loaded = AttentionStore.load(str(path))
    assert type(loaded) is AttentionStore
    assert same(answers(loaded), answers(store))
    if store.kinds[False]:
        assert torch.equal(loaded.average(is_cross=False), store.average(is_cross=False))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary is left

    again = generate(toy, loaded, edit=EDIT, width=96).attention  # and it works in another run
    assert same(answers(again), answers(store))


def test_a_file_is_plain_safetensors(toy, tmp_path):
    store = generate(toy, AttentionStore(places=["up"], by_call=True)).attention
    store.save(tmp_path / "maps")
    with safe_open(tmp_path / "maps", "pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["about"])
    assert metadata["format"] == "minip2p AttentionStore"
    assert [prompt["text"] for prompt in description["prompts"]] == [SQUIRREL, LION]
    tensors = load_file(tmp_path / "maps")
    assert set(tensors) == {f"{s.name} {s.height}x{s.width}" for s in store.maps}
    for layer, maps in store.maps.items():  # n b q k
        stored = tensors[f"{layer.name} {layer.height}x{layer.width}"]
        assert torch.equal(stored, torch.stack(maps))


def test_saving_replaces_a_file_whole_or_not_at_all(toy, tmp_path, monkeypatch):
    store, path = generate(toy, True).attention, tmp_path / "maps"
    with pytest.raises(ValueError, match="has seen no run yet"):
        AttentionStore().save(path)
    path.write_text("what was there")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(ValueError, match=r"^.*maps can't be written: disk full\.$"):
        store.save(path)
    assert path.read_text() == "what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["maps"]
    monkeypatch.undo()
    store.save(path)
    store.save(path)
    assert same(answers(AttentionStore.load(path)), answers(store))


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "maps"
    generate(toy, AttentionStore(places=["up"]), edit=None).attention.save(path)
    return path


def changed(path: Path, to: Path, fields=None, tensors=None, **metadata: str) -> Path:
    """Copy a file with other content."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    if fields:
        description = json.loads(header["about"])
        description |= fields(description) if callable(fields) else fields
        kept = {name: value for name, value in description.items() if value is not None}
        header["about"] = json.dumps(kept)
    stored = load_file(path)
    stored = tensors(stored) if tensors else stored
    save_file({name: t.contiguous() for name, t in stored.items()}, to, header | metadata)
    return to


def site(i: int, value: Any) -> Callable[[dict], dict]:
    """Change one part of the address of each layer."""
    return lambda old: {"sites": [[*s[:i], value, *s[i + 1 :]] for s in old["sites"]]}


def prompt(**parts: Any) -> Callable[[dict], dict]:
    """Change parts of each prompt."""
    return lambda old: {"prompts": [p | parts for p in old["prompts"]]}


DAMAGE = [
    *({"fields": {"calls": n}} for n in (0, math.inf, "x", 1.5, True)),
    *({"fields": {"size": [n, 16]}} for n in (0, -1, "x", 1.5, None)),
    *({"fields": {"options": o}} for o in ({"cross": 1}, {"words": 5}, {"colour": "red"})),
    *({"fields": {name: None}} for name in ("prompts", "sites", "options")),
    *({"fields": site(*pair)} for pair in ((1, "left"), (2, -1), (2, 1), (3, 0), (4, 2.5))),
    {"fields": prompt(ids=[1])},
    {"fields": prompt(ids=["x"] * 77)},
    {"fields": prompt(spans=[[0, 999]])},
    {"fields": prompt(cut=-1)},
    {"tensors": lambda tensors: dict(list(tensors.items())[1:])},
    {"tensors": lambda tensors: tensors | {"more": torch.ones(1)}},
    {"tensors": lambda tensors: {name: x[:, :1] for name, x in tensors.items()}},
    {"tensors": lambda tensors: {name: x[..., :5] for name, x in tensors.items()}},
    {"tensors": lambda tensors: {name: x.repeat(2, 1, 1, 1) for name, x in tensors.items()}},
    {"tensors": lambda tensors: {name: x.half() for name, x in tensors.items()}},
    {"tensors": lambda tensors: {name: (x * 9).int() for name, x in tensors.items()}},
    {"tensors": lambda tensors: {name: x * torch.nan for name, x in tensors.items()}},
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_contradicts_itself_is_damaged(saved, tmp_path, how):
    with pytest.raises(ValueError, match=r"^.*maps is damaged: .+\.$") as raised:
        AttentionStore.load(changed(saved, tmp_path / "maps", **how))
    assert "\n" not in str(raised.value)


def test_other_files_are_named_in_one_sentence(saved, tmp_path):
    content = saved.read_bytes()
    files = {
        "cut": content[:-100],
        "header cut": content[:500],
        "empty": b"",
        "text": b"a picture of a cat\n" * 9,
        "flipped": content[:8] + b"[" + content[9:],
    }
    for name, damage in files.items():
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(ValueError, match=f"{name} is damaged or no safetensors file") as raised:
            AttentionStore.load(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"^There is no file .+\.$"):
        AttentionStore.load(tmp_path / "nothing there")
    other = changed(saved, tmp_path / "other", format="minip2p Inversion")
    weights = EMOJI / "vae" / "diffusion_pytorch_model.safetensors"
    for path, kind in (other, "'minip2p Inversion'"), (weights, ""):
        with pytest.raises(ValueError, match=f"is no minip2p AttentionStore: .* holds {kind}"):
            AttentionStore.load(path)
    for description in ("{no JSON", '{"a":' * 50_000):
        with pytest.raises(ValueError, match="damaged"):
            AttentionStore.load(changed(saved, tmp_path / "deep", about=description))
