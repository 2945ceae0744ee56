"""Kept attention maps belong to one run, and survive in a file."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minip2p
from minip2p import AttentionStore, Hook, LocalBlend, Reweight, WordSwap

SQUIRREL, LION = "a photo of a squirrel eating a burger", "a photo of a lion’s pizza, 🐱 x"
EDIT = Reweight({"a": 2}, WordSwap(0.8, 0.4, LocalBlend("a")))


@pytest.fixture(scope="module")
def model():
    return minip2p.load()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The model is so small that a second thread makes it slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generate(model, store, prompts=(SQUIRREL, LION), **settings) -> minip2p.Result:
    settings = {"num_inference_steps": 2, "scheduler": "ddim", "edit": "auto", **settings}
    return minip2p.generate(model, list(prompts), store=store, **settings)


# --- one store, two runs -------------------------------------------------------------------------


def answers(store: AttentionStore) -> dict[str, object]:
    """All that a store says of its run."""
    of_layers = {layer: [m.clone() for m in maps] for layer, maps in store.maps.items()}
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
    about = store.prompts, store.size, store.calls, store.words, options, list(store.maps)
    return {"about": about, "maps": [*maps, *(m for all_ in of_layers.values() for m in all_)]}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a["about"] == b["about"] and all(map(torch.equal, a["maps"], b["maps"]))


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({}, {"prompts": [LION, SQUIRREL]}),
        ({}, {"seed": 1}),
        ({"words": ["squirrel", "a"]}, {"prompts": ["a squirrel"], "edit": None}),
        ({"by_call": True}, {"num_inference_steps": 3}),
        ({"before_edit": True}, {"height": 128, "width": 96}),
        ({"self_attention": True, "max_pixels": 64}, {"scheduler": "pndm"}),
    ],
)
def test_a_second_run_leaves_the_first_result_its_maps(model, options, second):
    store = AttentionStore(**options)
    size = (8, 8) if "max_pixels" in options else None
    first = generate(model, store)
    if size:
        first.attention.size = size
    before = answers(first.attention)
    again = generate(model, store, **second)
    if size:
        again.attention.size = store.size = size
    assert same(answers(first.attention), before)
    assert not same(answers(again.attention), before)
    assert same(answers(store), answers(again.attention))  # the store itself has the last run


def test_a_second_run_that_fails_leaves_them_too(model):
    class Stop(Hook):
        def __call__(self, probs, layer):
            raise RuntimeError("stop")

    store = AttentionStore()
    first = generate(model, store)
    before = answers(first.attention)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, store, edit=WordSwap(), hooks=[Stop()])
    with pytest.raises(ValueError, match="nothing is called"):
        generate(model, store, edit=WordSwap({"nothing is called": 1}))
    assert same(answers(first.attention), before)


def test_results_without_a_store_have_none(model):
    for store in (False, None):
        result = generate(model, store)
        assert result.store is None
        with pytest.raises(minip2p.UserError, match="store=True"):
            _ = result.attention


# --- in a file -----------------------------------------------------------------------------------

OPTIONS = {
    "every token": {},
    "words": {"words": ["a", "pizza"]},
    "by call": {"by_call": True},
    "words by call": {"words": ["photo"], "by_call": True},
    "before the edit": {"before_edit": True, "places": ["up"]},
    "self-attention": {"self_attention": True, "max_pixels": 256},
    "a word of another spelling": {"words": ["LION's"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_loaded_answers_as_what_was_saved(model, tmp_path, name):
    store = generate(model, AttentionStore(**OPTIONS[name]), edit=EDIT).attention
    path = tmp_path / "maps of a run.safetensors"
    store.save(path)
    loaded = AttentionStore.load(str(path))
    assert type(loaded) is AttentionStore
    assert same(answers(loaded), answers(store))
    if store.kinds[False]:
        assert torch.equal(loaded.average(is_cross=False), store.average(is_cross=False))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary is left

    again = generate(model, loaded, edit=EDIT).attention  # and it works in another run
    assert same(answers(again), answers(store))


def test_the_page_s_and_other_sizes_survive(model, tmp_path):
    from minip2p import show
    from minip2p.html.page import PageStore

    store = generate(model, PageStore(), height=96, width=128).attention
    store.save(tmp_path / "maps")
    loaded = AttentionStore.load(tmp_path / "maps")
    assert loaded.size == store.size == (12, 16)
    assert same(answers(loaded), answers(store))
    image = generate(model, None).images[0]
    assert show.word_maps(image, loaded).tobytes() == show.word_maps(image, store).tobytes()


def test_a_file_is_plain_safetensors(model, tmp_path):
    store = generate(model, AttentionStore(places=["up"], by_call=True)).attention
    store.save(tmp_path / "maps")
    with safe_open(tmp_path / "maps", "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    assert metadata["format"] == "minip2p AttentionStore"
    assert [prompt["text"] for prompt in about["prompts"]] == [SQUIRREL, LION]
    tensors = load_file(tmp_path / "maps")
    assert set(tensors) == {f"{s.name} {s.height}x{s.width}" for s in store.maps}
    for layer, maps in store.maps.items():  # n b q k
        stored = tensors[f"{layer.name} {layer.height}x{layer.width}"]
        assert torch.equal(stored, torch.stack(maps))


def test_saving_replaces_a_file_whole_or_not_at_all(model, tmp_path, monkeypatch):
    store, path = generate(model, True).attention, tmp_path / "maps"
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
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask  # as any file that one writes


def test_what_can_not_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="has seen no run yet"):
        AttentionStore().save(tmp_path / "maps")
    store = generate(model, True).attention
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "maps", tmp_path):
        with pytest.raises(ValueError, match=r"can't be written: .+\.$"):
            store.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "maps"
    generate(model, AttentionStore(places=["up"]), edit=None).attention.save(path)
    return path


def changed(path: Path, to: Path, fields=None, tensors=None, **metadata: str) -> Path:
    """Copy a file with other content."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    if fields:
        about["about"] = json.dumps(fields(json.loads(about["about"])))
    stored = load_file(path)
    stored = tensors(stored) if tensors else stored
    save_file({name: t.contiguous() for name, t in stored.items()}, to, about | metadata)
    return to


@pytest.mark.parametrize(
    "how",
    [
        {"fields": lambda a: {**a, "calls": 0}},
        {"tensors": lambda t: dict(list(t.items())[1:])},
        {"fields": lambda a: {k: v for k, v in a.items() if k != "prompts"}},
        {"tensors": lambda t: {name: x.half() for name, x in t.items()}},
        {"fields": lambda a: None},
    ],
)
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
    for name in ("nothing there", "."):
        with pytest.raises(ValueError, match=r"^There is no file .+\.$"):
            AttentionStore.load(tmp_path / name)
    weights = Path(minip2p.__file__).parent / "models/emoji/vae/diffusion_pytorch_model.safetensors"
    other = changed(saved, tmp_path / "other", format="minip2p Inversion")
    for path in (weights, other):
        with pytest.raises(ValueError, match="is no minip2p AttentionStore: it says that it holds"):
            AttentionStore.load(path)
    with pytest.raises(ValueError, match=r"other is no .+ that it holds 'minip2p Inversion'"):
        AttentionStore.load(other)
    with pytest.raises(ValueError, match="damaged: its description"):
        AttentionStore.load(changed(saved, tmp_path / "json", about="{no JSON"))
    with pytest.raises(ValueError, match="damaged"):
        AttentionStore.load(changed(saved, tmp_path / "deep", about='{"a":' * 50_000))
    with pytest.raises(ValueError, match="can't be read"):
        AttentionStore.load("a" * 5000)
