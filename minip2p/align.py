"""Words -> tokens -> the matrices that an edit is made of, and the windows in which it acts.

A prompt is 77 tokens: begin, text, end, and end tokens as padding. A word may be several tokens.
Words are found by the tokenizer's character offsets, so case, punctuation, accents and double
spaces do not matter; a word that is not there is an error.

Shapes:  k = 77 tokens, i of the source prompt and j of the edited one
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 77  # tokens of every prompt
DEFAULT = "default_"  # in a dict of windows: every token that no other key names
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…“”‘’«»¡¿、。"

Window = float | tuple[float, float]
Windows = Window | Mapping[str, Window]


# --- words and tokens ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt as the UNet sees it."""

    text: str
    ids: tuple[int, ...]  # 77 token ids
    spans: tuple[tuple[int, int], ...]  # of each text token: its characters, text[start:end]
    cut: int  # the first character that no longer fits; len(text) where all does

    @property
    def end(self) -> int:
        """Position of the end token. The text's tokens are at 1 to end - 1, padding after it."""
        return len(self.spans) + 1

    @property
    def words(self) -> list[str]:
        """The words that can be named, each once, without surrounding punctuation."""
        whole = (m[0] for m in re.finditer(r"\S+", self.text) if m.end() <= self.cut)
        return list(dict.fromkeys(word.strip(PUNCTUATION) or word for word in whole))

    def positions(self, start: int, stop: int) -> list[int]:
        """Positions of the tokens that cover any of text[start:stop]."""
        return [i for i, (a, b) in enumerate(self.spans, 1) if a < stop and start < b]

    def find(self, word: str) -> list[int]:
        """Positions of every token of `word`, which may be a phrase; [] if the prompt lacks it.

        A repeated word means all its occurrences, "cat#2" the second alone. Raises ValueError if
        the word stands only in the part that does not fit into 77 tokens.
        """
        spans = [match.span() for match in _pattern(word).finditer(self.text)]
        numbered = re.fullmatch(r"(.+)#([1-9]\d*)", word)
        if not spans and numbered:
            spans = [match.span() for match in _pattern(numbered[1]).finditer(self.text)]
            spans = spans[int(numbered[2]) - 1 : int(numbered[2])]
        seen = [self.positions(*span) for span in spans if span[1] <= self.cut]
        if spans and not seen:
            raise ValueError(
                f"The word {word!r} is beyond the {LENGTH} tokens that the model sees of "
                f"{self.text[:40]!r}…: shorten the prompt."
            )
        return [position for positions in seen for position in positions]


def _pattern(word: str) -> re.Pattern[str]:
    """A regular expression for `word` as a whole: any case, any white space, composed or not."""
    word = word.strip().strip(PUNCTUATION).strip() or word.strip()
    forms = {word, *(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))}
    bodies = "|".join(r"\s+".join(map(re.escape, form.split())) for form in sorted(forms))
    letter = r"[^\W_]|[\u0300-\u036f]"  # or a combining accent
    before = f"(?<!{letter})" if re.match(letter, word) else ""
    after = f"(?!{letter})" if re.search(f"(?:{letter})$", word) else ""
    return re.compile(f"{before}(?:{bodies}){after}" if word else r"(?!)", re.IGNORECASE)


def swap_word(text: str, old: str, new: str) -> str:
    """`text` with every `old`, a word or phrase, exchanged for `new`. Raises ValueError if none."""
    swapped, count = _pattern(old).subn(lambda _: new, text)
    if not count:
        raise ValueError(f"There is no word {old!r} in {text!r}.")
    return swapped


# --- alignments ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Which source tokens' attention an edited prompt's tokens take over.

    An edited map that is replaced entirely is  M̂[:, j] = Σ_i M_source[:, i] mapper[i, j]  where
    exists[j] is 1, and the edited prompt's own M[:, j] where it is 0.
    """

    mapper: Tensor  # k k
    exists: Tensor  # k, 1.0 or 0.0

    def carry(self, word: str, source: Prompt, target: Prompt) -> tuple[list[int], list[int]]:
        """Positions of `word` in both prompts. In one that lacks it: of what it is aligned with."""
        at_source, at_target = source.find(word), target.find(word)
        taken = self.mapper * self.exists
        if not at_target and at_source:
            at_target = taken[at_source].any(dim=0).nonzero().flatten().tolist()
        elif not at_source and at_target:
            at_source = taken[:, at_target].any(dim=1).nonzero().flatten().tolist()
        return at_source, at_target


def replacement(source: Prompt, target: Prompt) -> Alignment:
    """Word by word: the n-th word of `target` takes over the attention of the n-th of `source`.

    Words of as many tokens are mapped token by token; otherwise each token of the source's word is
    shared evenly among those of the target's word. What follows is shifted along, the end token to
    the end token, and padding that finds no room is added to the last token: every row of the
    mapper sums to 1, so no attention is lost. (Hertz et al. 2022 leave this mapping open.)
    Raises ValueError if the prompts have different numbers of words.
    """
    words, new_words = (list(re.finditer(r"\S+", prompt.text)) for prompt in (source, target))
    if len(words) != len(new_words):
        raise ValueError(
            f"A word swap needs as many words in both prompts, but {source.text!r} has "
            f"{len(words)} and {target.text!r} has {len(new_words)}: use Refine for added or "
            "removed words."
        )
    mapper = torch.zeros(LENGTH, LENGTH)
    mapper[0, 0] = 1
    for word, new_word in zip(words, new_words, strict=True):
        old, new = source.positions(*word.span()), target.positions(*new_word.span())
        # The comma of "burger," is the comma of "lasagne,", not a share of the lasagne.
        while len(old) > 1 and len(new) > 1 and _same_mark(source, old[-1], target, new[-1]):
            mapper[old.pop(), new.pop()] = 1
        while len(old) > 1 and len(new) > 1 and _same_mark(source, old[0], target, new[0]):
            mapper[old.pop(0), new.pop(0)] = 1
        if len(old) == len(new):
            mapper[old, new] = 1
        elif old and new:
            mapper[torch.tensor(old)[:, None], torch.tensor(new)] = 1 / len(new)
        elif old:  # the target had no room for this word
            mapper[old, target.end] = 1
    for i in range(source.end, LENGTH):
        mapper[i, min(target.end + i - source.end, LENGTH - 1)] = 1
    # A word of the target for which the source had no room keeps its own attention.
    exists = torch.ones(LENGTH)
    exists[1 : target.end] = mapper[:, 1 : target.end].any(dim=0).float()
    return Alignment(mapper, exists)


def _same_mark(source: Prompt, i: int, target: Prompt, j: int) -> bool:
    """Whether both tokens are the same and begin with punctuation."""
    mark = source.text[slice(*source.spans[i - 1])]  # "," or "'s"
    return source.ids[i] == target.ids[j] and not mark[:1].isalnum()


def refinement(source: Prompt, target: Prompt) -> Alignment:
    """Tokens that both prompts share keep the source's attention, added ones have their own.

    The longest common subsequence of the tokens (Needleman & Wunsch 1970 with match 1, mismatch -1,
    gap 0, and the reference's choice among equals: the earliest match in the target). The end
    token is aligned with the end token and padding with padding.
    """
    x, y = source.ids[1 : source.end], target.ids[1 : target.end]
    # common[i][j]: the length of the longest common subsequence of x[:i] and y[:j]
    common = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            common[i][j] = max(
                common[i][j - 1], common[i - 1][j], common[i - 1][j - 1] + (1 if a == b else -1)
            )
    mapper, exists = torch.zeros(LENGTH, LENGTH), torch.ones(LENGTH)
    exists[1 : target.end] = 0
    i, j = len(x), len(y)
    while i and j:
        if common[i][j] == common[i][j - 1]:
            j -= 1
        elif common[i][j] == common[i - 1][j]:
            i -= 1
        else:
            mapper[i, j] = exists[j] = 1
            i, j = i - 1, j - 1
    mapper[0, 0] = 1
    for j in range(target.end, LENGTH):
        mapper[min(source.end + j - target.end, LENGTH - 1), j] = 1
    return Alignment(mapper, exists)


# --- windows -------------------------------------------------------------------------------------


def window(value: Window) -> tuple[float, float]:
    """(start, end) of a window, as fractions of the UNet calls; one number is its end.

    Raises ValueError unless 0 <= start <= end <= 1.
    """
    try:
        pair = value if isinstance(value, Sequence | Tensor) else (0.0, value)
        if any(isinstance(one, str | bool) for one in (value, *pair)):
            raise TypeError
        start, end = map(float, pair)
    except (TypeError, ValueError, OverflowError):
        start = end = math.nan
    if not 0 <= start <= end <= 1:
        raise ValueError(
            "A window is a fraction of the UNet calls from 0 to 1, or a pair (start, end) of them "
            f"with start <= end, not {value!r}."
        )
    return start, end


def calls_of(value: Window, calls: int) -> range:
    """The UNet calls in a window: from floor(start · calls) up to, without, floor(end · calls)."""
    # Rounded first: 0.29 · 100 is 28.999999999999996 in binary, and means 29.
    start, end = (math.floor(round(fraction * calls, 9)) for fraction in window(value))
    return range(start, end)


def token_windows(
    windows: Windows, source: Prompt, target: Prompt, alignment: Alignment
) -> list[tuple[float, float]]:
    """The window of each of the edited prompt's 77 tokens.

    A dict gives words of either prompt their own; its "default_" is for all other tokens, and 1.0
    where it is missing, as in the reference. Words of neither prompt are passed over here. Raises
    ValueError if two keys mean the same token and differ.
    """
    if not isinstance(windows, Mapping):
        return [window(windows)] * LENGTH
    of_token: dict[int, tuple[str, tuple[float, float]]] = {}
    for word, value in windows.items():
        if word != DEFAULT:
            for j in alignment.carry(word, source, target)[1]:
                _set_once(of_token, j, word, window(value))
    default = window(windows.get(DEFAULT, 1.0))
    return [of_token[j][1] if j in of_token else default for j in range(LENGTH)]


def token_weights(
    weights: Mapping[str, float], source: Prompt, target: Prompt, alignment: Alignment
) -> Tensor:
    """The factor of each of the edited prompt's 77 tokens: 1 where `weights` has no word. → k

    Raises ValueError if two keys mean the same token and differ.
    """
    of_token: dict[int, tuple[str, float]] = {}
    for word, value in weights.items():
        for j in alignment.carry(word, source, target)[1]:
            _set_once(of_token, j, word, float(value))
    return torch.tensor([of_token[j][1] if j in of_token else 1.0 for j in range(LENGTH)])


def _set_once(of_token: dict, j: int, word: str, value: object) -> None:
    other, before = of_token.setdefault(j, (word, value))
    if before != value:
        raise ValueError(
            f"{other!r} and {word!r} mean the same token of the edited prompt but ask for {before} "
            f"and {value}: name it once."
        )


def check_words(words: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Raises ValueError, listing the words that are there, if one of `words` is in no prompt."""
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"A word is given as a string, not as {word!r}.")
        if not any(prompt.find(word) for prompt in prompts):
            known = ", ".join(dict.fromkeys(w for prompt in prompts for w in prompt.words))
            where = "the prompts" if len(prompts) > 1 else repr(prompts[0].text)
            raise ValueError(f"There is no word {word!r} in {where}; there are: {known}.")
