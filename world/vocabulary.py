"""A CLIP tokenizer for the world: byte-pair encoding with about a thousand tokens.

Common words are one token; some nouns stay two or three, so that edits meet words of unequal length
as they do with CLIP's own vocabulary.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from .scenes import FULL

PIECES = {  # words of several tokens
    "motorcycle": ["motor", "cycle"],
    "watermelon": ["water", "melon"],
    "skateboard": ["skate", "board"],
    "strawberry": ["straw", "berry"],
    "sandwich": ["sand", "wich"],
    "penguin": ["pen", "guin"],
    "spaghetti": ["spa", "ghet", "ti"],
    "watercolour": ["water", "col", "our"],
}
OTHERS = (  # than the world's: so that other prompts are not cut into letters
    """
    the and with without to from by for is are it its this that two three four five six one no not
    his her their who man woman boy girl child people person horse cow sheep duck fish bee house
    city street mountain river lake sea sky sun moon star cloud garden park room kitchen door window
    road bridge castle flower grass leaf stone fire water wood gold silver glass paper iron
    black white grey brown orange pink purple yellow dark light bright old young new long short tall
    little tiny huge happy sad funny cute beautiful standing running sleeping playing holding
    wearing looking flying jumping walking drinking hat shirt shoe bag ball book cup bottle box
    toy phone lamp train boat ship plane truck bread soup salad rice tea coffee milk egg fruit
    pie pear ham morning evening day summer winter spring autumn under over behind front near
    inside outside top left right very drawing picture image portrait style digital art oil cartoon
""".split()  # noqa: SIM905
)
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """Map every byte to one printable character, as CLIP does: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(0x100 + n) for n in range(0x100 - len(printable)))]


def learn_merges() -> list[tuple[str, str]]:
    """The merges that make one token of every common word and of every piece of the others."""
    words: Counter[tuple[str, ...]] = Counter()
    for word in [*FULL.words, *OTHERS]:
        pieces = PIECES.get(word, [word])
        for i, piece in enumerate(pieces):
            ending = "</w>" if i == len(pieces) - 1 else ""
            words[(*piece[:-1], piece[-1] + ending)] += 100 if word in FULL.words else 1
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for symbols, count in words.items():
            merged[merge(symbols, best)] += count
        words = merged


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def save_tokenizer(folder: Path) -> int:
    """Write the files of a CLIP tokenizer; return the size of the vocabulary."""
    from transformers import CLIPTokenizerFast

    merges = learn_merges()
    symbols = byte_symbols()
    joined = dict.fromkeys(a + b for a, b in merges)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *joined, START, END]
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        **names,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "vocab.json": {token: i for i, token in enumerate(tokens)},
        "tokenizer_config.json": config,
        "special_tokens_map.json": names,
    }.items():
        text = json.dumps(content, indent=None if name == "vocab.json" else 2, ensure_ascii=False)
        (folder / name).write_text(text + "\n")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    # tokenizer.json, which loads without being converted
    CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return len(tokens)
