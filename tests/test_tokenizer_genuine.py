"""The tokenizer against ids known from elsewhere, and against transformers' CLIPTokenizerFast."""

import json
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import transformers
from helpers import TOKENIZER

from minip2p.text import tokenize
from minip2p.weights import WeightsError
from minip2p.weights.clip import load_tokenizer

START, END = 49406, 49407

KNOWN_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a painting of a squirrel eating a burger": [320, 3086, 539, 320, 14004, 4371, 320, 6548],
    "a painting of a lion eating a burger": [320, 3086, 539, 320, 5567, 4371, 320, 6548],
    "a photo of an astronaut riding a horse on mars": (
        [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]
    ),
    "a cat's toy, isn't it?": [320, 2368, 568, 5988, 267, 2923, 713, 585, 286],
    "photo of a 1950s car!!!": [1125, 539, 320, 272, 280, 276, 271, 338, 1615, 995],
    "": [],
}


@pytest.mark.parametrize("prompt", KNOWN_IDS)
def test_known_ids(clip_tokenizer, prompt):
    ids = [START, *KNOWN_IDS[prompt], END]
    assert list(tokenize(clip_tokenizer, prompt).ids) == ids + [END] * (77 - len(ids))


def test_sizes(clip_tokenizer):
    assert len(clip_tokenizer) == len(clip_tokenizer.get_vocab()) == 49408
    assert (clip_tokenizer.begin, clip_tokenizer.end, clip_tokenizer.pad) == (START, END, END)


# --- against transformers -------------------------------------------------------------------------

PIECES = [
    *"abcxyzABCXYZ0123456789 ",
    *"  \t\n\r\x00\x07\x1b\u00a0\u2028\u200b\ufeff",
    *".,;:!?'\"()[]<>|#-_/\\%&@",
    *"äöüßéñçøåİıſ", *"e\u0301 a\u0308 \u0915\u094d\u0937", *"ЖЯщΩλאبجد",
    *"日本語一张猫狗ネコねこ한국어", *"🐱🐶👩\u200d🚀🏳\ufe0f\u200d🌈",
    "a photo of", " cat", " squirrel", " eating a ", "burger", "snow-covered", "it's", "don't",
    "&amp;", "<|endoftext|>", "<|startoftext|>", "<cat-toy>", "unimaginably",
    "ﬁ", "½", "\U0001f9ff",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 3, 8, 20, 60, 150))))


@pytest.fixture(scope="module", params=["bundled", "vocab.json", "tokenizer.json", "padding"])
def folder(request, clip_tokenizer_dir, tmp_path_factory) -> Path:
    """The bundled tokenizer, or CLIP's in two files, or in one file with a token added."""
    if request.param == "bundled":
        return TOKENIZER
    if request.param == "vocab.json":
        return clip_tokenizer_dir
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = transformers.CLIPTokenizerFast.from_pretrained(clip_tokenizer_dir)
    theirs.add_tokens("<cat-toy>")
    theirs.save_pretrained(folder)
    if request.param == "padding":  # which a tokenizer that was called with them saves
        content = json.loads((folder / "tokenizer.json").read_text())
        content["truncation"] = {"direction": "Right", "max_length": 5, "stride": 0}
        content["truncation"]["strategy"] = "LongestFirst"
        content["padding"] = {"strategy": {"Fixed": 77}, "direction": "Right", "pad_id": END}
        content["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "!"}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("number", [125, pytest.param(2500, marks=pytest.mark.slow)])
def test_ids_and_offsets_are_those_of_transformers(folder, number):
    ours, theirs = load_tokenizer(folder), transformers.CLIPTokenizerFast.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    special = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert (ours.begin, ours.end, ours.pad) == special
    rng = random.Random(number)
    for text in ["", " ", *(random_text(rng) for _ in range(number))]:
        truth = theirs(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        ids, spans = ours.encode(text)
        assert ids == truth.input_ids, text
        assert spans == [tuple(span) for span in truth.offset_mapping], text
        whole = theirs(text, padding="max_length", max_length=77, truncation=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert list(tokenize(ours, text).ids) == whole.input_ids, text
        assert bool(caught) == (len(ids) > 75 and spans[75][0] < len(text))


# --- files that are no tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer.json", "{}", "can't be read"),
        ("tokenizer.json", "[" * 100_000, "can't be read"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token = 5 where"),
        ("tokenizer_config.json", '{"pad_token": {"content": []}}', r"pad_token = \[\] where"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "no token '</s>'"),
        ("tokenizer_config.json", "[]", "not a table"),
        ("special_tokens_map.json", "{", "not JSON"),
    ],
)
def test_broken_tokenizers(tmp_path, file, content, message):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TOKENIZER / name).read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [(MemoryError(), MemoryError, None), (RuntimeError("so."), WeightsError, r"read: so\.$")],
)
def test_running_out_of_memory_is_not_called_a_broken_file(monkeypatch, error, kind, sentence):
    def fail(path: str):
        raise error

    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_file=fail))
    with pytest.raises(kind, match=sentence):
        load_tokenizer(TOKENIZER)
