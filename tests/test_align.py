"""Alignments of prompts, words and windows, worked out by hand with the genuine CLIP vocabulary.

Tables say for the edited prompt's tokens whose attention each takes over: "2 3 4 <- 2/3" is a third
of the source's token 2 for each of three tokens, "2 <- 2 3" the sum of two, "2 <- own" a token
without a source. "1-7" are aligned with their own position. Positions count from 1, the begin token
is 0 and there are 77. Nothing in the tables was computed by the package; properties of random
prompts are compared with the reference, which is independent of it.
"""

import unicodedata
import warnings

import hypothesis
import pytest
import reference as ref
import torch
from helpers import mapper_by_hand
from hypothesis import strategies as st

from minip2p.align import (
    Prompt,
    calls_of,
    check_words,
    refinement,
    replacement,
    token_weights,
    token_windows,
    window,
)
from minip2p.text import tokenize

ACUTE = "\u0301"  # combining: "e" + ACUTE is é in two characters


def positions_by_word(line: str) -> dict[str, list[int]]:
    """Read "burger: 8 9; lasagne:" as {"burger": [8, 9], "lasagne": []}."""
    pairs = (part.rpartition(":") for part in line.split("; ") if part)
    return {word: [int(n) for n in numbers.split()] for word, _, numbers in pairs}


# --- word swaps and refinements ------------------------------------------------------------------

# Source, edited prompt, table; and the edited prompt's tokens on which a window or weight of a word
# acts, be it a word of either prompt.
SWAPS = [
    # One token becomes two, three or five, and the other way round.
    ("a painting of a squirrel eating a burger", "a painting of a squirrel eating a lasagne",
     "1-7; 8 9 <- 8/2", "lasagne: 8 9; burger: 8 9; squirrel: 5; a: 1 4 7"),
    ("a lion eating a cake", "a hippopotamus eating a cake",
     "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5", "lion: 2 3 4; hippopotamus: 2 3 4; cake: 7"),
    ("a hippopotamus eating a cake", "a lion eating a cake",
     "1; 2 <- 2 3 4; 3 <- 5; 4 <- 6; 5 <- 7", "hippopotamus: 2; lion: 2; cake: 5"),
    ("a matchstick on a table", "a ball on a table",
     "1; 2 <- 2 3; 3 <- 4; 4 <- 5; 5 <- 6", "matchstick: 2; ball: 2; on a table: 3 4 5"),
    ("a 1950s car", "a new car", "1; 2 <- 2 3 4 5 6; 3 <- 7", "1950s: 2; car: 3"),
    ("a new car", "a 2020s car", "1; 2 3 4 5 6 <- 2/5; 7 <- 3", "new: 2 3 4 5 6; car: 7"),
    ("hippopotamus on a beach", "lion on a beach",
     "1 <- 1 2 3; 2 <- 4; 3 <- 5; 4 <- 6", "hippopotamus: 1; on: 2; beach: 4"),
    # Three tokens become four; three others, one by one.
    ("an unimaginably tall tower", "an inconceivably tall tower",
     "1; 2 3 4 5 <- 2/4 3/4 4/4; 6 <- 5; 7 <- 6",
     "unimaginably: 2 3 4 5; inconceivably: 2 3 4 5; tower: 7"),
    ("an unimaginably tall tower", "an unrealistically tall tower",
     "1-6", "unimaginably: 2 3 4; unrealistically: 2 3 4"),
    ("a squirrel eating a burger", "a lion eating a burger",
     "1-5", "squirrel: 2; lion: 2; burger: 5"),
    # Punctuation stays punctuation; case and white space do not count.
    ("a burger, oil painting", "a lasagne, oil painting",
     "1; 2 3 <- 2/2; 4 <- 3; 5 <- 4; 6 <- 5", "burger: 2 3; ,: 4; burger, oil: 2 3 4 5"),
    ("a dish (lasagne)", "a dish (burger)", "1-3; 4 <- 4 5; 5 <- 6", "lasagne: 4; (: 3; ): 5"),
    ("A Burger on a PLATE", "a PIZZA on a plate", "1-5", "burger: 2; Pizza: 2; PLATE: 5; a: 1 4"),
    ("a  squirrel   eating\ta burger ", "  a lion\n eating a  lasagne",
     "1-4; 5 6 <- 5/2", "squirrel: 2; burger: 5 6; eating a: 3 4"),
    ("a fluffy cat on a mat", "a black hippopotamus on a mat",
     "1-2; 3 4 5 <- 3/3; 6 <- 4; 7 <- 5; 8 <- 6",
     "fluffy cat: 2 3 4 5; cat: 3 4 5; black: 2; cat on: 3 4 5 6"),
    ("a cat -- a dog !!!", "a lion ... a lasagne ?",
     "1-4; 5 6 <- 5/2; 7 <- 6", "--: 3; ...: 3; !!!: 7; dog: 5 6"),
    ("a cat's toy, isn't it", "a dog's toy, isn't it",
     "1-8", "cat: 2; cat's: 2 3; dog: 2; dog's: 2 3; isn't it: 6 7 8"),
    ("a snow-covered house", "a sun-drenched house",
     "1-5", "snow: 2; covered: 4; -: 3; snow-covered: 2 3 4"),
    ("a snow-covered house", "a big house",
     "1; 2 <- 2 3 4; 3 <- 5", "snow-covered: 2; snow: 2; big: 2"),
    # Accents in one character and in two, as tokens of their own (û is two tokens); emoji.
    ("a café at night", f"a cafe{ACUTE} at night", "1-4", f"café: 2; cafe{ACUTE} at: 2 3"),
    ("a crème brûlée", "a hot tiramisu",
     "1; 2 <- 2 3 4; 3 4 5 <- 5/3 6/3 7/3 8/3 9/3", "crème: 2; brûlée: 3 4 5"),
    ("a cat 🐱 on a sofa", "a dog 🐶 on a sofa", "1-6", "🐱: 3; 🐶: 3; cat: 2; sofa: 6"),
    ("a 🐱 on a sofa", "a 👧 on a sofa",
     "1; 2 3 <- 2/2; 4 <- 3; 5 <- 4; 6 <- 5", "🐱: 2 3; 👧: 2 3; on: 4"),
    # A repeated word; if only its second place changes, its name still finds the first one.
    ("a cat and a cat", "a dog and a lasagne",
     "1-4; 5 6 <- 5/2", "cat: 2 5 6; cat#1: 2; cat#2: 5 6; a#2: 4"),
    ("a cat and a cat", "a cat and a hippopotamus",
     "1-4; 5 6 7 <- 5/3", "cat: 2; cat#2: 5 6 7; hippopotamus: 5 6 7"),
    ("a lion eating a lasagne in a cabriolet", "a hippopotamus riding a burger in a car",
     "1; 2 3 4 <- 2/3; 5 <- 3; 6 <- 4; 7 <- 5 6; 8 <- 7; 9 <- 8; 10 <- 9 10 11",
     "lion: 2 3 4; lasagne: 7; cabriolet: 10; riding: 5; a#3: 9"),
    ("a hippopotamus, big", "a hippopotamus, big", "1-6", "hippopotamus: 2 3 4; ,: 5"),
    ("", "  ", "", ""),
]  # fmt: skip

REFINEMENTS = [
    ("A painting of a squirrel", "A neoclassical painting of a squirrel",
     "1; 2 3 <- own; 4 <- 2; 5 <- 3; 6 <- 4; 7 <- 5", "neoclassical: 2 3; painting: 4; a: 1 6"),
    ("a house on a mountain", "a house on a mountain at fall",
     "1-5; 6 7 <- own", "at fall: 6 7; mountain: 5"),
    ("a bowl of soup", "a bowl of pea soup",
     "1-3; 4 <- own; 5 <- 4", "soup: 5; pea: 4; pea soup: 4 5"),
    ("a bowl of soup", "a bowl of pea soup with croutons",
     "1-3; 4 <- own; 5 <- 4; 6 7 8 9 <- own", "croutons: 7 8 9; soup: 5"),
    ("a big red car on a road", "a car on a road",
     "1; 2 <- 4; 3 <- 5; 4 <- 6; 5 <- 7", "car: 2; road: 5; red car: 2"),
    # Of a repeated word the one that was there before; of two equal alignments the earliest.
    ("a cat", "a cat and a dog", "1-2; 3 4 5 <- own", "a: 1 4; a#2: 4"),
    ("a dog", "a cat and a dog", "1; 2 3 4 <- own; 5 <- 2", "dog: 5"),
    ("a cat on a mat", "a mat", "1; 2 <- 5", "a: 1; mat: 2"),
    ("a cat on a sofa", "a dog on a sofa, oil painting",
     "1; 2 <- own; 3-5; 6 7 8 <- own", "dog: 2; ,: 6; painting: 8"),
    ("A  Cat", "a fluffy CAT", "1; 2 <- own; 3 <- 2", "cat: 3"),
    # Tokens are aligned, not words: both end in the token "ably".
    ("an unimaginably tall tower", "an inconceivably tall tower",
     "1; 2 3 4 <- own; 5 <- 4; 6 <- 5; 7 <- 6", "inconceivably: 2 3 4 5; unimaginably: 5"),
    ("", "a cat", "1 2 <- own", "cat: 2"),
    ("a cat", "", "", ""),
    # A curly and a straight apostrophe are different tokens.
    ("a cat's", "a big cat’s", "1; 2 <- own; 3 <- 2; 4 5 6 <- own", "cat: 3"),
    ("a cat's toy 🐱, 1950s", "a cat's toy 🐱, 1950s", "1-11", "1950s: 7 8 9 10 11; 🐱: 5"),
]  # fmt: skip


def check_alignment(tokenizer, align, source, target, table, acts_on):
    source, target = tokenize(tokenizer, source), tokenize(tokenizer, target)
    alignment = align(source, target)
    mapper, exists = mapper_by_hand(table, source.end, target.end, refine=align is refinement)
    torch.testing.assert_close(alignment.mapper * alignment.exists, mapper)
    assert torch.equal(alignment.exists, exists)
    for word, positions in positions_by_word(acts_on).items():
        windows = token_windows({word: 0.25}, source, target, alignment)
        assert windows == [(0, 0.25) if j in positions else (0, 1) for j in range(77)], word
        weights = token_weights({word: 3}, source, target, alignment)
        assert weights.tolist() == [3 if j in positions else 1 for j in range(77)], word


@pytest.mark.parametrize(("source", "target", "table", "acts_on"), SWAPS)
def test_word_swap(clip_tokenizer, source, target, table, acts_on):
    check_alignment(clip_tokenizer, replacement, source, target, table, acts_on)


@pytest.mark.parametrize(("source", "target", "table", "acts_on"), REFINEMENTS)
def test_refinement(clip_tokenizer, source, target, table, acts_on):
    check_alignment(clip_tokenizer, refinement, source, target, table, acts_on)


# --- random prompts ------------------------------------------------------------------------------

# Of one to four tokens. Two share the token "ably".
PLAIN = ["a", "cat", "on", "in", "snow", "burger", "lasagne", "hippopotamus", "cabriolet"]
PLAIN += ["unimaginably", "inconceivably", "👧"]
ODD = [*PLAIN, "cat,", "(lasagne)", "snow-covered", "cat's", "hippopotamus’s", "1950s", "...", "é!"]
plain_words = st.lists(st.sampled_from(PLAIN), max_size=12)
odd_words = st.lists(st.sampled_from(ODD), max_size=90)


def tokenize_quietly(tokenizer, words: list[str]) -> Prompt:
    """Tokenize a prompt that may be too long, without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(tokenizer, " ".join(words))


@hypothesis.given(st.lists(st.tuples(*[st.sampled_from(PLAIN)] * 2), max_size=12))
def test_a_random_swap_is_the_reference_s(clip_tokenizer, reference_tokenizer, pairs):
    source, target = (" ".join(pair[i] for pair in pairs) for i in (0, 1))
    alignment = replacement(tokenize(clip_tokenizer, source), tokenize(clip_tokenizer, target))
    mapper, takes_part = ref.replace(reference_tokenizer, source, target)
    torch.testing.assert_close(alignment.mapper, mapper.float())
    assert torch.equal(alignment.exists.bool(), takes_part)


@hypothesis.given(plain_words, plain_words)
def test_a_random_refinement_is_the_reference_s(
    clip_tokenizer, reference_tokenizer, source, target
):
    """Any of equally long alignments is right, so their tokens are counted and compared."""
    source, target = " ".join(source), " ".join(target)
    x, y = tokenize(clip_tokenizer, source), tokenize(clip_tokenizer, target)
    alignment = refinement(x, y)
    mapper, takes_part = ref.refine(reference_tokenizer, source, target)
    assert alignment.mapper.sum() == mapper.sum()
    assert alignment.exists.sum() == takes_part.sum()
    pairs = alignment.mapper[1 : x.end, 1 : y.end].nonzero().tolist()
    assert all(x.ids[i + 1] == y.ids[j + 1] for i, j in pairs)
    assert pairs == sorted(pairs, key=lambda pair: pair[1])  # neither prompt's order changes
    assert torch.equal(alignment.mapper[:, y.end :], mapper[:, y.end :].float())


@hypothesis.given(st.lists(st.tuples(*[st.sampled_from(ODD)] * 2), max_size=90))
def test_a_random_swap_loses_no_attention(clip_tokenizer, pairs):
    """Every row of the mapper sums to 1, also of prompts that are too long."""
    source, target = (tokenize_quietly(clip_tokenizer, [p[i] for p in pairs]) for i in (0, 1))
    mapper = replacement(source, target).mapper
    torch.testing.assert_close(mapper.sum(dim=1), torch.ones(77))
    assert mapper[0].nonzero().tolist() == mapper[:, 0].nonzero().tolist() == [[0]]
    assert mapper[source.end, target.end] == 1


@hypothesis.given(odd_words, odd_words)
def test_a_random_refinement_uses_no_token_twice(clip_tokenizer, source, target):
    source, target = (tokenize_quietly(clip_tokenizer, words) for words in (source, target))
    alignment = refinement(source, target)
    assert torch.equal(alignment.mapper.sum(dim=0), alignment.exists)  # one source, or none
    assert (alignment.mapper.sum(dim=1) <= 1).all()


@hypothesis.given(odd_words)
def test_equal_prompts_have_the_identity(clip_tokenizer, words):
    prompt = tokenize_quietly(clip_tokenizer, words)
    for align in (replacement, refinement):
        alignment = align(prompt, prompt)
        assert torch.equal(alignment.mapper, torch.eye(77))
        assert alignment.exists.all()


@hypothesis.given(odd_words)
def test_every_word_that_is_listed_is_found(clip_tokenizer, words):
    prompt = tokenize_quietly(clip_tokenizer, words)
    assert all(prompt.find(word) for word in prompt.words)


# --- longer than 77 tokens -----------------------------------------------------------------------


def entries(mapper: torch.Tensor) -> dict[tuple[int, int], float]:
    return {(i, j): mapper[i, j].item() for i, j in mapper.nonzero().tolist()}


def cut(tokenizer, text: str) -> Prompt:
    with pytest.warns(UserWarning, match="room for 75 tokens"):
        return tokenize(tokenizer, text)


def test_source_is_too_long(clip_tokenizer):
    """40 words lasagne are 80 tokens, lasag ne lasag ne ..., of which 37 and a half words fit."""
    source = cut(clip_tokenizer, "lasagne " * 40)
    target = tokenize(clip_tokenizer, "burger " * 40)
    assert (source.end, target.end) == (76, 41)
    assert source.find("lasagne") == list(range(1, 75))  # the half one is no lasagne
    assert source.find("lasagne#37") == [73, 74]
    assert target.find("burger#38") == [38]

    alignment = replacement(source, target)
    expected = {(0, 0): 1, (76, 41): 1, (75, 38): 1}  # begin, end, the half lasagne to burger 38
    expected |= {(2 * n - 1, n): 1 for n in range(1, 38)} | {(2 * n, n): 1 for n in range(1, 38)}
    assert entries(alignment.mapper) == expected
    # Burgers 39 and 40 have no counterpart that the model sees.
    assert [j for j in range(77) if not alignment.exists[j]] == [39, 40]


def test_both_are_too_long(clip_tokenizer):
    """... very lion tail | tail tail ... becomes ... very hippo potam | us tail tail ..."""
    source = cut(clip_tokenizer, "very " * 73 + "lion" + " tail" * 6)
    target = cut(clip_tokenizer, "very " * 73 + "hippopotamus" + " tail" * 6)
    assert source.find("lion") == [74]
    assert source.find("tail") == [75]  # those that are cut are not there
    for word in ("hippopotamus", "tail", "tail#2"):
        with pytest.raises(ValueError, match=f"{word}.* is beyond the 77 tokens"):
            target.find(word)

    alignment = replacement(source, target)
    expected = {(i, i): 1 for i in range(74)} | {(76, 76): 1}
    expected |= {(74, 74): 0.5, (74, 75): 0.5}  # lion to hippo and potam
    expected |= {(75, 76): 1}  # the tail has nowhere to go but the end
    assert entries(alignment.mapper) == expected
    assert alignment.exists.all()


def test_prompt_that_just_fits(clip_tokenizer, recwarn):
    prompt = tokenize(clip_tokenizer, "very " * 74 + "lion")  # 75 tokens
    assert not recwarn
    assert prompt.end == 76
    assert prompt.find("lion") == [75]
    assert torch.equal(replacement(prompt, prompt).mapper, torch.eye(77))
    assert torch.equal(refinement(prompt, prompt).mapper, torch.eye(77))


def test_refinement_that_is_too_long(clip_tokenizer):
    source = tokenize(clip_tokenizer, "a cat")
    target = cut(clip_tokenizer, "a " + "very " * 78 + "cat")
    alignment = refinement(source, target)
    assert entries(alignment.mapper) == {(0, 0): 1, (1, 1): 1, (3, 76): 1}
    assert [j for j in range(77) if alignment.exists[j]] == [0, 1, 76]

    alignment = refinement(target, source)  # the other way round: its cat is cut off
    assert entries(alignment.mapper) == {(0, 0): 1, (1, 1): 1, (76, 3): 1}
    # Its own: the cat, and the padding where the source has words and its end.
    assert [j for j in range(77) if not alignment.exists[j]] == [2, *range(4, 77)]


def test_warning_names_what_falls_off(clip_tokenizer):
    with pytest.warns(UserWarning) as warned:
        prompt = tokenize(clip_tokenizer, "very " * 74 + "Fluffy  cat, oil painting")
    assert "'cat, oil painting'" in str(warned[0].message)
    assert prompt.words == ["very", "Fluffy"]


def test_half_a_word_cannot_be_named(clip_tokenizer):
    prompt = cut(clip_tokenizer, "very " * 74 + "hippopotamus")  # "hippo" fits
    assert prompt.words == ["very"]
    assert prompt.find("hippo") == []
    with pytest.raises(ValueError, match="beyond"):
        prompt.find("hippopotamus")


# --- finding words -------------------------------------------------------------------------------

FOUND = [  # prompt, and the positions of words in it
    ("a painting of a squirrel eating a burger", "burger: 8; a: 1 4 7; pizza:"),
    ("a hippopotamus eating a cake", "hippopotamus: 2 3 4; cake: 7; eating a cake: 5 6 7; hippo:"),
    ("an unimaginably tall tower", "unimaginably: 2 3 4; unimaginably tall: 2 3 4 5"),
    ("a burger, oil painting", "burger: 2; burger,: 2; ,: 3; burger, oil: 2 3 4"),
    ("a dish (lasagne)", "lasagne: 4 5; (lasagne): 4 5; (: 3; ): 6"),
    ("a  squirrel   eating\ta burger ", "squirrel: 2; squirrel eating: 2 3;  a  burger : 4 5"),
    ("a fluffy cat on a mat", "fluffy cat: 2 3; Fluffy  CAT: 2 3; cat fluffy:; cat: 3"),
    (f"a cafe{ACUTE} at night", f"café: 2; cafe{ACUTE}: 2; CAFÉ: 2; cafe:"),
    ("a crème brûlée", "crème: 2 3 4; brûlée: 5 6 7 8 9; crème brûlée: 2 3 4 5 6 7 8 9"),
    ("a cat 🐱 on a sofa", "🐱: 3; cat 🐱: 2 3; 🐶:"),
    ("a cat and a cat", "cat: 2 5; cat#1: 2; cat#2: 5; cat#3:; a cat#2: 4 5"),
    ("a cat's toy, isn't it", "cat: 2; cat's: 2 3; isn't: 6 7; toy: 4"),
    ("a snow-covered house", "snow-covered: 2 3 4; snow: 2; -: 3; covered house: 4 5"),
    ("a 1950s car", "1950s: 2 3 4 5 6; 1950:; s:; car: 7"),
    ("a cat -- a dog !!!", "--: 3; !!!: 6; dog: 5"),
    ("a concatenated cat", "cat: 6"),  # a con cat en ated cat: no part of a word
    ("Cat, CAT; cat!", "cat: 1 3 5"),
    ("a cat", " cat : 2; «cat»: 2; Katze:; :;    :"),
    ("“cat” and ‘dog’", "cat: 3"),
    ("a cat#2 of 3", "cat#2: 2 3 4"),  # where the text says so, that is what is meant
    ("cat cat cat", "cat#2: 2; cat#0:; cat#4:"),
    ("big cat, big dog, big cat", "big cat#2: 7 8"),
    ("it's a dog's life", "dog: 4"),
    ("rock'n'roll", "rock'n'roll: 1 2 3 4 5"),
    ("a well-lit room", "lit: 4; lit room: 4 5"),
    ("photo of a 1950s car!!!", "car: 9; !!!: 10; car!!!: 9"),  # punctuation around it is ignored
    ("1,000 cats", "1,000: 1 2 3 4 5; 000: 3 4 5"),
    ("日本 🐱 cat", "日本: 1 2 3; 日: 1; 🐱 cat: 4 5"),
    ("i ❤️ cats", "❤️: 2; ❤: 2"),
    (f"e{ACUTE}cole", "école: 1 2; cole:"),  # a mark is no border of a word
    ("école", f"cole:; E{ACUTE}COLE: 1 2"),
    ("naïve café", unicodedata.normalize("NFD", "naïve café") + ": 1 2 3 4"),
    (unicodedata.normalize("NFD", "naïve café"), "naïve café: 1 2 3 4"),
    ("a \u0958 here", "\u0958: 2 3 4"),  # Devanagari qa, which NFC takes apart
    ("_cat_ and dog", "cat: 2"),
    ("", "a:; :"),
    # A token is counted once, however often the word stands in it.
    ("the dog!!!", "!: 3; !#2: 3"),
    ("?!?! cat", "?: 1"),
    ("❤️❤️ cat", "❤️: 1"),
    ("🐱🐱🐱 cat", "🐱: 1 2 3; 🐱#2: 2"),
    # Apostrophes and hyphens of all kinds.
    ("a cat’s toy", "cat's: 2 3 4 5"),
    ("a cat's toy", "cat’s: 2 3"),
    ("a CAT’S and a cat's toy", "cat's: 2 3 4 5 8 9; cat's#2: 8 9"),
    (f"a cafe{ACUTE}’s door", "café's door: 2 3 4 5 6"),
    ("a cat‑like thing", "cat-like: 2 3 4 5"),
    ("a cat-like thing", "cat‐like: 2 3 4"),
    # Punctuation around it counts only where the prompt has both spellings.
    ("a C and C++ book", "C++: 4 5; C: 2 4; C++#1: 4 5; C++#2:"),
    ("the dogs’ toys and dogs", "dogs': 2 3 4; dogs: 2 7"),
    ("the dogs' toys", "dogs’: 2; dogs: 2"),
    ("a cat, a cat", "cat,: 2 3; “cat”: 2 5"),
    # Punctuation of any script is none of the word's; accents of any script are.
    ("「日本」 cat", "日本: 2 3 4"),
    ("日本、 cat", "日本！: 1 2 3"),
    ("हिन्दी cat", "हिन्दी: 1 2 3 4 5 6; हिन:"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), FOUND)
def test_find(clip_tokenizer, text, words):
    prompt = tokenize(clip_tokenizer, text)
    positions = positions_by_word(words)
    assert {word: prompt.find(word) for word in positions} == positions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A painting of a squirrel,  (eating) a burger!", "A painting of a squirrel eating burger"),
        ("a cat's toy -- isn't it?", "a cat's toy -- isn't it"),
        ("a snow-covered house, 1950s", "a snow-covered house 1950s"),
        ("「日本」、 —cat— dog！ 🐱 …", "日本 cat dog 🐱 …"),  # punctuation of any script
        (f"a cafe{ACUTE}, naïve", f"a cafe{ACUTE} naïve"),
        ("_cat_ and \u0958", "cat and \u0958"),
        ("", ""),
    ],
)
def test_every_word_that_is_listed_can_be_named(clip_tokenizer, text, words):
    prompt = tokenize(clip_tokenizer, text)
    assert prompt.words == words.split()
    assert all(prompt.find(word) for word in prompt.words)


def test_check_words(clip_tokenizer):
    prompts = [tokenize(clip_tokenizer, text) for text in ("a Cat, big", "a lasagne")]
    check_words(["cat", "LASAGNE", "big", "a"], prompts)
    check_words([], prompts)
    with pytest.raises(ValueError, match=r"no word 'dog' .*: a, Cat, big, lasagne\.$"):
        check_words(["cat", "dog"], prompts)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "calls", "inside"),
    [
        (0.8, 50, range(0, 40)),
        (0.8, 51, range(0, 40)),  # 50 steps of PNDM are 51 calls: 40.8
        (0.4, 51, range(0, 20)),  # 20.4
        (1.0, 51, range(0, 51)),
        (0, 50, range(0, 0)),
        (0.01, 50, range(0, 0)),  # half a call is none
        ((0.2, 0.5), 50, range(10, 25)),
        ((0.5, 0.5), 50, range(25, 25)),
        (0.29, 100, range(0, 29)),  # 28.999999999999996 in binary
        (0.7, 10, range(0, 7)),  # 7.000000000000001
        (0.1 + 0.2, 10, range(0, 3)),
        (0.5, 1, range(0, 0)),
        (1.0, 1, range(0, 1)),
    ],
)
def test_calls_of(value, calls, inside):
    assert list(calls_of(value, calls)) == list(inside)


def test_adjoining_windows_share_no_call_and_leave_none_out():
    for calls in (1, 7, 50, 51):
        for middle in (0.0, 0.1, 1 / 3, 0.59, 1.0):
            joined = [*calls_of((0.0, middle), calls), *calls_of((middle, 1.0), calls)]
            assert joined == list(range(calls))


@pytest.mark.parametrize("value", [0.5, (0, 0.5), [0, 0.5], torch.tensor([0, 0.5])])
def test_window(value):
    assert window(value) == (0, 0.5)
