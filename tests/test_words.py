"""Words as people write them: how they are named, exchanged, and mapped to each other.

The tables were worked out by hand from the tokens of the genuine CLIP vocabulary; nothing in them
was computed by the package.
"""

import pytest
import torch
from helpers import TOKENIZER, mapper_by_hand

from minip2p import AttentionStore, Layer, LocalBlend, Reweight, WordSwap, words
from minip2p import sample as cli
from minip2p.align import replacement, token_weights, token_windows
from minip2p.edit import bind
from minip2p.text import tokenize
from minip2p.weights.clip import load_tokenizer
from minip2p.words import swap_word

ACUTE = "\u0301"  # combining: "e" + ACUTE is é in two characters
LAYER = Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "up", True, 16, 16)


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer(TOKENIZER)


# --- which tokens of a word stand for which ------------------------------------------------------

# Source, target, and for the target's tokens whose attention each takes over: "2 3 4 <- 2/3" is a
# third of token 2 for each of three. Tokens count from 1; "1-7" are in their own place.
PAIRS = [
    # An apostrophe is a token with its s or without; a curly one is two tokens, and s another.
    ("a cat’s toy", "a hippopotamus’s toy", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5; 8 <- 6"),
    ("a cat's toy", "a hippopotamus's toy", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4"),
    ("a hippopotamus’s toy", "a cat’s toy", "1; 2 <- 2 3 4; 3 <- 5; 4 <- 6; 5 <- 7; 6 <- 8"),
    ("a cat's toy", "a hippopotamus’s toy", "1; 2 3 4 <- 2/3; 5 6 7 <- 3/3; 8 <- 4"),
    ("a hippopotamus’s toy", "a cat's toy", "1; 2 <- 2 3 4; 3 <- 5 6 7; 4 <- 8"),
    ("a dog‘s toy", "a hippopotamus＇s toy", "1; 2 3 4 <- 2/3; 5 6 7 <- 3/3 4/3; 8 <- 5; 9 <- 6"),
    ("a catʼs toy", "a cat´s toy", "1-2; 3 <- 3 4; 4 <- 5; 5 <- 6"),
    ("the dogs’ toys", "the hippopotamuses’ toys", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5"),
    ("rock’n’roll", "jazz'n'hippopotamus", "1; 2 <- 2 3; 3 <- 4; 4 <- 5 6; 5 6 7 <- 7/3"),
    ("l’été", "l'hiver", "1; 2 <- 2 3; 3 <- 4; 4 <- 5"),
    ("don’t go", "isn't go", "1; 2 <- 2 3 4; 3 <- 5"),
    ("a cat's-eye", "a hippopotamus’s-eye", "1; 2 3 4 <- 2/3; 5 6 7 <- 3/3; 8 <- 4; 9 <- 5"),
    ("cat’s", "hippopotamus", "1 2 3 <- 1/3 2/3 3/3 4/3"),  # there is no tail to align
    # Hyphens, slashes, dashes.
    ("a cat-like thing", "a hippopotamus-like thing", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5"),
    ("a cat‑like thing", "a hippopotamus-like thing", "1; 2 3 4 <- 2/3; 5 <- 3 4; 6 <- 5; 7 <- 6"),
    ("a snow-covered house", "a hippopotamus-covered house",
     "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5"),
    ("a snow-covered house", "a lasagne-drenched house",
     "1; 2 3 <- 2/2; 4 <- 3; 5 <- 4; 6 <- 5"),
    ("a well-lit room", "a well-hippopotamus room", "1-3; 4 5 6 <- 4/3; 7 <- 5"),
    ("a half-cat-half-dog", "a half-lion-half-hippopotamus", "1-7; 8 9 10 <- 8/3"),
    ("a big-cat thing", "a state-of-the-art car", "1; 2 3 4 5 6 7 8 <- 2/7 3/7 4/7; 9 <- 5"),
    ("a cat-like car", "a state-of-the-art-like car",
     "1; 2 3 4 5 6 7 8 <- 2/7; 9 <- 3; 10 <- 4; 11 <- 5"),
    ("a well-lit room", "a well-made-up room", "1-3; 4 5 6 <- 4/3; 7 <- 5"),
    ("cat/dog", "cat/hippopotamus", "1-2; 3 4 5 <- 3/3"),
    ("a cat—dog", "a hippopotamus—dog", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4"),
    ("snow_cat", "snow_hippopotamus", "1-2; 3 4 5 <- 3/3"),
    # Brackets, quotes and other punctuation, of any script.
    ("a (cat) here", "a (hippopotamus) here", "1-2; 3 4 5 <- 3/3; 6 <- 4; 7 <- 5"),
    ("a ((cat:1.2)) here", "a ((hippopotamus:1.2)) here",
     "1-2; 3 4 5 <- 3/3; 6 <- 4; 7 <- 5; 8 <- 6; 9 <- 7; 10 <- 8; 11 <- 9"),
    ("a “cat” here", 'a "hippopotamus" here', "1; 2 <- 2 3; 3 4 5 <- 4/3; 6 <- 5 6; 7 <- 7"),
    ("¿cat?", "¿hippopotamus?", "1; 2 3 4 <- 2/3; 5 <- 3"),
    ("a cat! big", "a hippopotamus!!! big", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4"),
    ("a cat. big", "a hippopotamus big", "1; 2 3 4 <- 2/3 3/3; 5 <- 4"),  # nowhere for the stop
    ("a cat big", "a hippopotamus, big", "1; 2 3 4 5 <- 2/4; 6 <- 3"),
    ("@cat’s", "@hippopotamus’s", "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5"),
    ("C++ code", "Rust code", "1 <- 1 2; 2 <- 3"),
    # Emoji, the heart in two characters.
    ("a 🐱cat", "a 🐱hippopotamus", "1-2; 3 4 5 <- 3/3"),
    ("a hippopotamus🐱", "a cat👧", "1; 2 <- 2 3 4; 3 4 <- 5/2"),
    ("a ❤️cat", "a ❤️hippopotamus", "1-2; 3 4 5 <- 3/3"),
    ("🐱🐱🐱", "🐱", "1 <- 1 2 3"),
    # Digits, each a token.
    ("a 1950s-style car", "a hippopotamus-style car",
     "1; 2 3 4 <- 2/3 3/3 4/3 5/3 6/3; 5 <- 7; 6 <- 8; 7 <- 9"),
    ("3/4", "24/7", "1 2 <- 1/2; 3 <- 2; 4 <- 3"),
    ("1,000", "12,500", "1 2 <- 1/2; 3 <- 2; 4 <- 3; 5 <- 4; 6 <- 5"),
    ("$5", "£20", "1; 2 3 <- 2/2"),
    # Chinese and Japanese: 猫 is three tokens, its comma and each bracket one.
    ("猫、", "cat、", "1 <- 1 2 3; 2 <- 4"),
    ("「猫」", "「cat」", "1; 2 <- 2 3 4; 3 <- 5"),
    # Combining accents, of Latin and of Devanagari, are letters.
    (f"a cafe{ACUTE}’s door", "a hippopotamus’s door",
     "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5; 8 <- 6"),
    ("a café's door", f"a cafe{ACUTE}’s door", "1-2; 3 4 5 <- 3/3; 6 <- 4"),
    ("crème-like", "brûlée-like", "1 2 3 4 5 <- 1/5 2/5 3/5; 6 <- 4; 7 <- 5"),
    (f"e{ACUTE}cole’s", "cat’s", "1 <- 1 2; 2 <- 3; 3 <- 4; 4 <- 5"),
    ("हिन्दी’s", "cat’s", "1 <- 1 2 3 4 5 6; 2 <- 7; 3 <- 8; 4 <- 9"),
]  # fmt: skip

BUNDLED = [  # a curly apostrophe is three tokens, a straight one is one and its s another
    ("a cat’s toy", "a car’s toy", "1-7"),
    ("a cat’s toy", "a hippopotamus’s toy",
     "1; 2 3 4 5 6 7 8 9 10 11 12 <- 2/11; 13 <- 3; 14 <- 4; 15 <- 5; 16 <- 6; 17 <- 7"),
    ("a cat's toy", "a hippopotamus’s toy",
     "1; 2 3 4 5 6 7 8 9 10 11 12 <- 2/11; 13 14 15 <- 3/3; 16 <- 4; 17 <- 5"),
    ("a cat! car", "a cat!!! car", "1-2; 3 4 5 <- 3/3; 6 <- 4"),
]  # fmt: skip


def check_pair(tokenizer, source: str, target: str, table: str) -> None:
    source, target = tokenize(tokenizer, source), tokenize(tokenizer, target)
    alignment = replacement(source, target)
    mapper, exists = mapper_by_hand(table, source.end, target.end)
    torch.testing.assert_close(alignment.mapper, mapper)
    assert torch.equal(alignment.exists, exists)


@pytest.mark.parametrize(("source", "target", "table"), PAIRS)
def test_counterparts(clip_tokenizer, source, target, table):
    check_pair(clip_tokenizer, source, target, table)


@pytest.mark.parametrize(("source", "target", "table"), BUNDLED)
def test_counterparts_of_the_bundled_vocabulary(bundled, source, target, table):
    check_pair(bundled, source, target, table)


def test_a_word_of_pieces_is_cut(clip_tokenizer):
    """The hippopotamus of "hippopotamus-like" fits: its three tokens stand for all three."""
    with pytest.warns(UserWarning, match="room for 75 tokens"):
        source = tokenize(clip_tokenizer, "very " * 72 + "cat-like thing")
        target = tokenize(clip_tokenizer, "very " * 72 + "hippopotamus-like thing")
    assert (source.end, target.end) == (76, 76)
    torch.testing.assert_close(replacement(source, target).mapper, torch.eye(77))


# --- naming them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word", "positions"),
    [
        ("the dog!!!", "!", [3, 4, 5]),
        ("the dog!!!", "!!!", [3, 4, 5]),
        ("the dog!!!", "!#2", [4]),
        ("🐱🐱 cat", "🐱", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("a cat’s toy", "cat's", [2, 3, 4, 5, 6]),
    ],
)
def test_found_in_the_bundled_vocabulary(bundled, text, word, positions):
    assert tokenize(bundled, text).find(word) == positions


@pytest.mark.parametrize("word", ["!", "!!!", "dog"])
def test_a_map_is_as_strong_as_its_tokens(clip_tokenizer, word):
    store, prompt = AttentionStore(), tokenize(clip_tokenizer, "the dog!!!")
    store.begin([prompt], (16, 16))
    probs = torch.rand(1, 2, 256, 77, generator=torch.Generator().manual_seed(0))
    store.at(0, 1, 0)(probs, LAYER)
    token = 2 if word == "dog" else 3
    assert torch.equal(store.word(word).flatten(), probs.mean(dim=1)[0, :, token])


def test_a_kept_word_answers_to_each_of_its_spellings(clip_tokenizer):
    store = AttentionStore(words=["toy", "cat's"])
    store.begin([tokenize(clip_tokenizer, "a cat’s toy")], (16, 16))
    probs = torch.rand(1, 2, 256, 77, generator=torch.Generator().manual_seed(0))
    store.at(0, 1, 0)(probs, LAYER)
    for word in ("cat's", "cat’s", "CAT'S", "cat’s#1"):
        torch.testing.assert_close(
            store.word(word).flatten(), probs.mean(dim=1)[0, :, 2:6].sum(dim=1)
        )
    with pytest.raises(ValueError, match=r"Only the words toy, cat's were kept, not 'cat'\."):
        store.word("cat")


# --- one grammar everywhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "old", "new", "swapped"),
    [
        ("a cat and a cat", "cat#2", "dog", "a cat and a dog"),
        ("a cat#2 of 3 cats", "cat#2", "dog", "a dog of 3 cats"),  # as the text has it
        ("a cat’s toy", "cat's", "dog's", "a dog's toy"),
        ("a cat‑like thing", "cat-like", "big", "a big thing"),
        ("a C and C++ book", "C++", "Rust", "a C and Rust book"),
        ("a burger, big", "«burger»", "lasagne", "a lasagne, big"),
        ("a Burger", "burger", "pizza", "a pizza"),
        ("a catapult and a cat", "cat", "dog", "a catapult and a dog"),
        ("a fluffy  cat on", "fluffy cat", "dog", "a dog on"),
        ("a 🐱", "🐱", r"\1", r"a \1"),
        ("the dog!!!", "!#2", "?", "the dog!?!"),
        (f"a cafe{ACUTE}’s", "café's", "bar's", "a bar's"),
    ],
)
def test_swapped(text, old, new, swapped):
    assert swap_word(text, old, new) == swapped


@pytest.mark.parametrize("word", ["cat#3", "cat#0", "dog", "ca", "", " "])
def test_swap_of_what_is_not_there(word):
    with pytest.raises(ValueError, match="There is no word"):
        swap_word("a cat and a cat", word, "dog")


def test_the_second_of_two_everywhere(clip_tokenizer):
    """A swap, a window, a weight, a blend and a kept map of "cat#2", and nothing of the first."""
    source, target = (
        tokenize(clip_tokenizer, text)
        for text in ("a cat and a cat", swap_word("a cat and a cat", "cat#2", "hippopotamus"))
    )  #             1 a 2 cat 3 and 4 a 5 cat                 5 hippo 6 potam 7 us
    alignment = replacement(source, target)
    windows = token_windows({"cat#2": 0.5}, source, target, alignment)
    assert [j for j in range(77) if windows[j] == (0, 0.5)] == [5, 6, 7]
    weights = token_weights({"cat#2": 2}, source, target, alignment)
    assert weights.tolist() == [1] * 5 + [2] * 3 + [1] * 69

    edit = Reweight({"cat#2": 2}, WordSwap({"cat#2": 0.5}, 0.4, LocalBlend("cat#2")))
    bound = bind(edit, [source, target], latent_size=(64, 64), coarse=(16, 16), defaults={})
    columns = bound.blends[0].columns[..., 0]
    assert [row.nonzero().flatten().tolist() for row in columns] == [[5], [5, 6, 7]]

    store = AttentionStore(words=["cat#2"])
    store.begin([source, source], (16, 16))
    assert store.columns[0, :, 0].nonzero().flatten().tolist() == [5]


def test_the_command_line_swaps_the_second_of_two(capsys):
    assert cli.main(["a cat on a cat", "--swap", "cat#2=dog", "--explain"]) == 0
    assert "Edit 1: a cat on a dog" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, word, spans",
    [
        ("一张猫骑自行车的照片", "猫", [(2, 3)]),
        ("一张猫骑自行车的照片", "自行车", [(4, 7)]),
        ("猫と犬の写真", "犬", [(2, 3)]),
        ("ภาพแมวกินปลา", "แมว", [(3, 6)]),
        ("ภาพป้าย", "ป", []),  # a letter without its vowel or tone mark is no word
        ("高级cat照片", "cat", [(2, 5)]),
        ("a cathedral", "cat", []),
        ("고양이가", "고양이", []),  # Korean has spaces
    ],
)
def test_words_of_scripts_without_spaces(text, word, spans):
    assert words.places(text, word) == spans


def test_a_swap_inside_a_script_without_spaces(clip_tokenizer):
    source = "一张猫骑自行车的照片"
    target = words.swap_word(source, "猫", "狗")
    assert target == "一张狗骑自行车的照片"
    prompts = [tokenize(clip_tokenizer, text) for text in (source, target)]
    alignment = replacement(*prompts)
    for word in ("一张", "自行车", "照片"):
        i, j = (prompt.find(word) for prompt in prompts)
        assert torch.equal(alignment.mapper[i][:, j], torch.eye(len(i)))
    cat, dog = prompts[0].find("猫"), prompts[1].find("狗")
    assert alignment.mapper[cat][:, dog].sum() == len(cat)
