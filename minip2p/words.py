"""Words in a text: where they stand, how they are exchanged, and which pieces they consist of.

Swaps, windows, weights, blends and maps name words in one grammar: any case, any white space,
accents in one character or two, apostrophes straight or curly. A phrase is a word, too. A repeated
word means all its places, and "cat#2" is the second "cat". In scripts without spaces, such as
Chinese, Japanese or Thai, a word may begin and end between any two letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

from .errors import check

# Letters of scripts without spaces: Thai, Lao, Burmese, Khmer, kana and Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
ALIKE = ("'’‘ʼ＇´`′", "-‐‑")  # apostrophes, and hyphens, as keyboards and typesetters have them
_ANY = {c: f"[{re.escape(group)}]" for group in ALIKE for c in group}
_FIRST = str.maketrans({c: group[0] for group in ALIKE for c in group})


def is_letter(character: str) -> bool:
    """Tell whether it is a letter, a digit or an accent of one, and no apostrophe or hyphen."""
    is_accent = unicodedata.category(character) in ("Mn", "Mc")
    is_emoji_style = "\ufe00" <= character <= "\ufe0f"
    return (character.isalnum() or (is_accent and not is_emoji_style)) and character not in _ANY


def is_border(text: str, i: int, between_signs: bool = True) -> bool:
    """Tell whether a word may begin or end before text[i].

    between_signs: count the place between two signs of punctuation as a border.
    """
    if i in (0, len(text)):
        return True
    before, after = text[i - 1], text[i]
    if is_letter(before) != is_letter(after):
        return True
    if not is_letter(before):
        return between_signs
    is_unspaced = UNSPACED.match(before) or UNSPACED.match(after)
    return bool(is_unspaced) and unicodedata.category(after)[0] != "M"


def is_sign(character: str) -> bool:
    """Tell whether it is white space or punctuation of any script, but no emoji."""
    is_punctuation = unicodedata.category(character)[0] == "P" or character in "$+<=>^`|~"
    return is_punctuation or character.isspace()


def bare(word: str) -> str:
    """Strip the punctuation around `word`, unless it is nothing else."""
    word = word.strip()
    kept = [i for i, character in enumerate(word) if not is_sign(character)]
    return word[kept[0] : kept[-1] + 1] if kept else word


def places(text: str, word: str) -> list[tuple[int, int]]:
    """Return the (start, stop) characters of every place of `word` in `text`.

    Punctuation around it counts only where `text` has it both with and without: "C++" beside "C".
    """
    exact = list(_places(text, word))
    numbered = re.fullmatch(r"(.+)#([1-9]\d*)", word.strip())
    if numbered and not exact:
        n = int(numbered[2])
        return places(text, numbered[1])[n - 1 : n]
    places_without = list(_places(text, bare(word)))
    return exact if 0 < len(exact) < len(places_without) else places_without


def _places(text: str, word: str) -> Iterator[tuple[int, int]]:
    """Yield the places where `word`, with its punctuation, stands and not inside another word."""
    forms = sorted({word, *(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))})
    body = "|".join(map(_spellings, forms)) or "(?!)"  # which matches nowhere
    end = 0
    for match in re.finditer(f"(?=({body}))", text, re.IGNORECASE):
        start, stop = match.span(1)
        is_whole = all(is_border(text, edge) for edge in (start, stop))
        if start >= end and is_whole:
            yield start, stop
            end = stop


def _spellings(word: str) -> str:
    """Return a regular expression for any white space and any kind of apostrophe or hyphen."""
    parts = ("".join(_ANY.get(c, re.escape(c)) for c in part) for part in word.split())
    return r"\s+".join(parts)


def swap_word(text: str, old: str, new: str) -> str:
    """Exchange every `old`, a word or phrase, for `new`. Raises UserError if there is none.

    Punctuation around `old` is exchanged with the word where `text` has it too.
    """
    spans = list(_places(text, old)) or places(text, old)
    check(spans, f"There is no word {old!r} in {text!r}.")
    for start, stop in reversed(spans):
        text = text[:start] + new + text[stop:]
    return text


def folded(text: str) -> str:
    """Fold the spellings of a word into one: case, accents, apostrophes and hyphens."""
    return unicodedata.normalize("NFC", text.casefold()).translate(_FIRST)


# --- the pieces of a word -------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a word: a run of letters or a run of none, as "snow", "-" and "covered"."""

    text: str
    tokens: list[int]  # positions of those that begin in it: "'s" may be one, across two pieces


def pieces(text: str, spans: Sequence[tuple[int, int]], start: int, stop: int) -> list[Piece]:
    """Take the word text[start:stop] apart. spans: of each token of the text, from position 1."""
    inner = (i for i in range(start + 1, stop) if is_border(text, i, between_signs=False))
    word = []
    for a, b in pairwise([start, *inner, stop]):
        tokens = [i for i, (first, _) in enumerate(spans, 1) if a <= first < b]
        word.append(Piece(folded(text[a:b]), tokens))
    return word


def counterparts(old: list[Piece], new: list[Piece]) -> list[tuple[list[int], list[int]]]:
    """Pair the tokens of a source's word with those of the target's word that take their place.

    The comma of "burger," is the comma of "lasagne,", not a share of the lasagne. Two words with as
    many pieces of the same kinds are mapped piece by piece. Of other words the equal pieces at both
    ends are mapped, and everything between as one piece.
    """
    kinds, new_kinds = ([is_letter(piece.text[0]) for piece in word] for word in (old, new))
    if kinds != new_kinds:
        room = min(len(old), len(new)) - 1  # something is left between
        tail = _equal(old[::-1], new[::-1], room)
        head = _equal(old, new, room - tail)
        old, new = _join_middle(old, head, tail), _join_middle(new, head, tail)
    pairs: list[tuple[list[int], list[int]]] = []
    for (_, i), (_, j) in zip(old, new, strict=True):
        if pairs and not (i and j):  # no tokens of its own: it belongs to what is before it
            i, j = pairs[-1][0] + i, pairs.pop()[1] + j
        pairs.append((i, j))
    return pairs


def _equal(old: list[Piece], new: list[Piece], most: int) -> int:
    """Count the pieces at the beginning that are the same."""
    same = (a.text == b.text for a, b in zip(old[:most], new[:most], strict=True))
    return sum(takewhile(bool, same))


def _join_middle(word: list[Piece], head: int, tail: int) -> list[Piece]:
    end = len(word) - tail
    tokens = [i for piece in word[head:end] for i in piece.tokens]
    return [*word[:head], Piece("", tokens), *word[end:]]
