"""Words in a text: where one stands, what it is exchanged for, and the pieces that it consists of.

One grammar for everything that names a word, be it a swap, a window, a weight, a blend or a map:
any case, any white space, accents in one character or two, apostrophes straight or curly. A phrase
is a word, too, a repeated word means all its places, and "cat#2" is the second "cat".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

from .errors import check

# Of any script, and the ASCII signs that Unicode counts as symbols. Not emoji.
PUNCTUATION = "$+<=>^`|~" + "".join(
    c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "P"
)
ALIKE = ("'’‘ʼ＇´`′", "-‐‑")  # apostrophes, and hyphens, as keyboards and typesetters have them
_ANY = {c: f"[{re.escape(group)}]" for group in ALIKE for c in group}
_FIRST = str.maketrans({c: group[0] for group in ALIKE for c in group})


def is_letter(character: str) -> bool:
    """Whether it is part of a word in the narrow sense: a letter, a digit or an accent of one."""
    is_accent = unicodedata.category(character) in ("Mn", "Mc")
    is_emoji_style = "\ufe00" <= character <= "\ufe0f"
    return (character.isalnum() or (is_accent and not is_emoji_style)) and character not in _ANY


def bare(word: str) -> str:
    """`word` without the punctuation around it, unless it is nothing else."""
    return word.strip().strip(PUNCTUATION).strip() or word.strip()


def places(text: str, word: str) -> list[tuple[int, int]]:
    """Where `word` stands in `text`: from which character to before which; [] if nowhere.

    Punctuation around it counts only where `text` has it both with and without: "C++" beside "C".
    """
    exact = list(_places(text, word))
    numbered = re.fullmatch(r"(.+)#([1-9]\d*)", word.strip())
    if numbered and not exact:
        n = int(numbered[2])
        return places(text, numbered[1])[n - 1 : n]
    found = list(_places(text, bare(word)))
    return exact if 0 < len(exact) < len(found) else found


def _places(text: str, word: str) -> Iterator[tuple[int, int]]:
    """Where `word`, exactly with its punctuation, stands as a whole and not inside of another."""
    forms = sorted({word, *(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))})
    body = "|".join(map(_spellings, forms)) or "(?!)"  # which is found nowhere
    end = 0
    for match in re.finditer(f"(?=({body}))", text, re.IGNORECASE):
        start, stop = match.span(1)
        inside = any(
            0 < edge < len(text) and is_letter(text[edge - 1]) and is_letter(text[edge])
            for edge in (start, stop)
        )
        if start >= end and not inside:
            yield start, stop
            end = stop


def _spellings(word: str) -> str:
    """A regular expression: any white space, any kind of apostrophe or hyphen."""
    parts = ("".join(_ANY.get(c, re.escape(c)) for c in part) for part in word.split())
    return r"\s+".join(parts)


def swap_word(text: str, old: str, new: str) -> str:
    """`text` with every `old`, a word or phrase, exchanged for `new`. Raises ValueError if none.

    Here punctuation counts if `text` has it, too: it is exchanged with the word.
    """
    found = list(_places(text, old)) or places(text, old)
    check(found, f"There is no word {old!r} in {text!r}.")
    for start, stop in reversed(found):
        text = text[:start] + new + text[stop:]
    return text


def folded(text: str) -> str:
    """The same for all spellings of a word: in case, accents, apostrophes and hyphens."""
    return unicodedata.normalize("NFC", text.casefold()).translate(_FIRST)


# --- the pieces of a word -------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a word: a run of letters or a run of none, as "snow", "-" and "covered"."""

    text: str
    tokens: list[int]  # positions of those that begin in it: "'s" may be one, across two pieces


def pieces(text: str, spans: Sequence[tuple[int, int]], start: int, stop: int) -> list[Piece]:
    """The word text[start:stop], taken apart. spans: of each token of the text, from position 1."""
    inner = (i for i in range(start + 1, stop) if is_letter(text[i - 1]) != is_letter(text[i]))
    found = []
    for a, b in pairwise([start, *inner, stop]):
        tokens = [i for i, (first, _) in enumerate(spans, 1) if a <= first < b]
        found.append(Piece(folded(text[a:b]), tokens))
    return found


def counterparts(old: list[Piece], new: list[Piece]) -> list[tuple[list[int], list[int]]]:
    """Which tokens of a source's word stand for which of the target's.

    The comma of "burger," is the comma of "lasagne,", not a share of the lasagne. Words that are
    made alike, of as many pieces of the same kinds, are mapped piece by piece. Of others the equal
    pieces at both ends are, and all that is between as one.
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
    """How many pieces at the beginning are the same."""
    same = (a.text == b.text for a, b in zip(old[:most], new[:most], strict=True))
    return sum(takewhile(bool, same))


def _join_middle(word: list[Piece], head: int, tail: int) -> list[Piece]:
    end = len(word) - tail
    tokens = [i for piece in word[head:end] for i in piece.tokens]
    return [*word[:head], Piece("", tokens), *word[end:]]
