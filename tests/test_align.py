"""Alignments worked out by hand, with the genuine CLIP vocabulary.

Each table reads: token of the edited prompt <- the tokens of the source whose attention it takes
over. Positions count from 1, the begin token is 0 and there are 77; "own" is a token without a
source. "11-75 pad <- 10-74" is sixty-five lines in one. Nothing here was computed by the package.
"""

import unicodedata
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

import pytest
import torch

from minip2p.align import (
    Alignment,
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
from minip2p.words import swap_word

ACUTE = "\u0301"  # combining: "e" + ACUTE is é in two characters


class Case(NamedTuple):
    source: str
    target: str
    in_source: dict[str, list[int]]  # word: its positions in the source prompt
    in_target: dict[str, list[int]]  # word: its positions in the edited prompt
    acts_on: dict[str, list[int]]  # word of a window or weight: positions of the edited prompt
    table: str


# --- word swaps ----------------------------------------------------------------------------------

SWAPS = {
    "the last word, one token becomes two": Case(
        "a painting of a squirrel eating a burger",
        "a painting of a squirrel eating a lasagne",
        {"burger": [8], "a": [1, 4, 7], "squirrel eating": [5, 6], "lasagne": []},
        {"lasagne": [8, 9], "a": [1, 4, 7], "burger": []},
        {"lasagne": [8, 9], "burger": [8, 9], "squirrel": [5], "a": [1, 4, 7]},
        """
         1 a        <- 1 a
         2 painting <- 2 painting
         3 of       <- 3 of
         4 a        <- 4 a
         5 squirrel <- 5 squirrel
         6 eating   <- 6 eating
         7 a        <- 7 a
         8 lasag    <- 8 burger x 1/2
         9 ne       <- 8 burger x 1/2
        10 <end>    <- 9 <end>
        11-75 pad   <- 10-74
        76 pad      <- 75 + 76
        """,
    ),
    "one token becomes three": Case(
        "a lion eating a cake",
        "a hippopotamus eating a cake",
        {"lion": [2], "eating a cake": [3, 4, 5]},
        {"hippopotamus": [2, 3, 4], "cake": [7]},
        {"lion": [2, 3, 4], "hippopotamus": [2, 3, 4], "cake": [7]},
        """
        1 a       <- 1 a
        2 hippo   <- 2 lion x 1/3
        3 potam   <- 2 lion x 1/3
        4 us      <- 2 lion x 1/3
        5 eating  <- 3 eating
        6 a       <- 4 a
        7 cake    <- 5 cake
        8 <end>   <- 6 <end>
        9-75 pad  <- 7-73
        76 pad    <- 74 + 75 + 76
        """,
    ),
    "three tokens become one": Case(
        "a hippopotamus eating a cake",
        "a lion eating a cake",
        {"hippopotamus": [2, 3, 4]},
        {"lion": [2], "cake": [5]},
        {"hippopotamus": [2], "lion": [2], "cake": [5]},
        """
        1 a       <- 1 a
        2 lion    <- 2 hippo + 3 potam + 4 us
        3 eating  <- 5 eating
        4 a       <- 6 a
        5 cake    <- 7 cake
        6 <end>   <- 8 <end>
        7-74 pad  <- 9-76
        75-76 pad <- nothing
        """,
    ),
    "two tokens become one": Case(
        "a matchstick on a table",
        "a ball on a table",
        {"matchstick": [2, 3], "match": []},
        {"ball": [2]},
        {"matchstick": [2], "ball": [2], "on a table": [3, 4, 5]},
        """
        1 a       <- 1 a
        2 ball    <- 2 match + 3 stick
        3 on      <- 4 on
        4 a       <- 5 a
        5 table   <- 6 table
        6 <end>   <- 7 <end>
        7-75 pad  <- 8-76
        76 pad    <- nothing
        """,
    ),
    "three tokens become four": Case(
        "an unimaginably tall tower",
        "an inconceivably tall tower",
        {"unimaginably": [2, 3, 4], "unimaginably tall": [2, 3, 4, 5]},
        {"inconceivably": [2, 3, 4, 5]},
        {"unimaginably": [2, 3, 4, 5], "inconceivably": [2, 3, 4, 5], "tower": [7]},
        """
        1 an      <- 1 an
        2 in      <- 2 uni x 1/4 + 3 magin x 1/4 + 4 ably x 1/4
        3 conce   <- 2 uni x 1/4 + 3 magin x 1/4 + 4 ably x 1/4
        4 iv      <- 2 uni x 1/4 + 3 magin x 1/4 + 4 ably x 1/4
        5 ably    <- 2 uni x 1/4 + 3 magin x 1/4 + 4 ably x 1/4
        6 tall    <- 5 tall
        7 tower   <- 6 tower
        8 <end>   <- 7 <end>
        9-75 pad  <- 8-74
        76 pad    <- 75 + 76
        """,
    ),
    "three tokens become three others, one by one": Case(
        "an unimaginably tall tower",
        "an unrealistically tall tower",
        {"unimaginably": [2, 3, 4]},
        {"unrealistically": [2, 3, 4]},
        {"unimaginably": [2, 3, 4], "unrealistically": [2, 3, 4]},
        """
        1 an       <- 1 an
        2 un       <- 2 uni
        3 reali    <- 3 magin
        4 stically <- 4 ably
        5 tall     <- 5 tall
        6 tower    <- 6 tower
        7 <end>    <- 7 <end>
        8-76 pad   <- 8-76
        """,
    ),
    "one token for one": Case(
        "a squirrel eating a burger",
        "a lion eating a burger",
        {"squirrel": [2]},
        {"lion": [2]},
        {"squirrel": [2], "lion": [2], "burger": [5]},
        """
        1 a       <- 1 a
        2 lion    <- 2 squirrel
        3 eating  <- 3 eating
        4 a       <- 4 a
        5 burger  <- 5 burger
        6 <end>   <- 6 <end>
        7-76 pad  <- 7-76
        """,
    ),
    "a comma stays a comma": Case(
        "a burger, oil painting",
        "a lasagne, oil painting",
        {"burger": [2], "burger,": [2], ",": [3], "burger, oil": [2, 3, 4]},
        {"lasagne": [2, 3], ",": [4]},
        {"burger": [2, 3], "lasagne": [2, 3], ",": [4], "burger, oil": [2, 3, 4, 5]},
        """
        1 a        <- 1 a
        2 lasag    <- 2 burger x 1/2
        3 ne       <- 2 burger x 1/2
        4 ,        <- 3 ,
        5 oil      <- 4 oil
        6 painting <- 5 painting
        7 <end>    <- 6 <end>
        8-75 pad   <- 7-74
        76 pad     <- 75 + 76
        """,
    ),
    "so do brackets on both sides": Case(
        "a dish (lasagne)",
        "a dish (burger)",
        {"lasagne": [4, 5], "(lasagne)": [4, 5], "(": [3], ")": [6]},
        {"burger": [4], ")": [5]},
        {"lasagne": [4], "(": [3], ")": [5]},
        """
        1 a       <- 1 a
        2 dish    <- 2 dish
        3 (       <- 3 (
        4 burger  <- 4 lasag + 5 ne
        5 )       <- 6 )
        6 <end>   <- 7 <end>
        7-75 pad  <- 8-76
        76 pad    <- nothing
        """,
    ),
    "capital letters": Case(
        "A Burger on a PLATE",
        "a PIZZA on a plate",
        {"burger": [2], "BURGER": [2], "Burger": [2], "plate": [5]},
        {"pizza": [2], "Plate": [5]},
        {"burger": [2], "Pizza": [2], "PLATE": [5], "a": [1, 4]},
        """
        1 a       <- 1 A
        2 PIZZA   <- 2 Burger
        3 on      <- 3 on
        4 a       <- 4 a
        5 plate   <- 5 PLATE
        6 <end>   <- 6 <end>
        7-76 pad  <- 7-76
        """,
    ),
    "double spaces, tabs and line breaks": Case(
        "a  squirrel   eating\ta burger ",
        "  a lion\n eating a  lasagne",
        {"squirrel": [2], "burger": [5], "squirrel eating": [2, 3], " a  burger ": [4, 5]},
        {"lion": [2], "lasagne": [5, 6], "lion eating": [2, 3]},
        {"squirrel": [2], "burger": [5, 6], "eating a": [3, 4]},
        """
        1 a       <- 1 a
        2 lion    <- 2 squirrel
        3 eating  <- 3 eating
        4 a       <- 4 a
        5 lasag   <- 5 burger x 1/2
        6 ne      <- 5 burger x 1/2
        7 <end>   <- 6 <end>
        8-75 pad  <- 7-74
        76 pad    <- 75 + 76
        """,
    ),
    "a phrase": Case(
        "a fluffy cat on a mat",
        "a black hippopotamus on a mat",
        {"fluffy cat": [2, 3], "Fluffy  CAT": [2, 3], "cat fluffy": [], "cat": [3]},
        {"black hippopotamus": [2, 3, 4, 5], "fluffy cat": []},
        {"fluffy cat": [2, 3, 4, 5], "cat": [3, 4, 5], "black": [2], "cat on": [3, 4, 5, 6]},
        """
        1 a       <- 1 a
        2 black   <- 2 fluffy
        3 hippo   <- 3 cat x 1/3
        4 potam   <- 3 cat x 1/3
        5 us      <- 3 cat x 1/3
        6 on      <- 4 on
        7 a       <- 5 a
        8 mat     <- 6 mat
        9 <end>   <- 7 <end>
        10-75 pad <- 8-73
        76 pad    <- 74 + 75 + 76
        """,
    ),
    "an accent in one character and in two": Case(
        "a café at night",
        f"a cafe{ACUTE} at night",
        {"café": [2], f"cafe{ACUTE}": [2], "CAFÉ": [2], "cafe": []},
        {"café": [2], f"cafe{ACUTE}": [2], f"CAFE{ACUTE}": [2], "cafe": []},
        {"café": [2], f"cafe{ACUTE} at": [2, 3]},
        """
        1 a       <- 1 a
        2 cafe    <- 2 café
        3 at      <- 3 at
        4 night   <- 4 night
        5 <end>   <- 5 <end>
        6-76 pad  <- 6-76
        """,
    ),
    "accents that are tokens of their own, û is two": Case(
        "a crème brûlée",
        "a hot tiramisu",
        {"crème": [2, 3, 4], "brûlée": [5, 6, 7, 8, 9], "crème brûlée": [2, 3, 4, 5, 6, 7, 8, 9]},
        {"tiramisu": [3, 4, 5]},
        {"crème": [2], "brûlée": [3, 4, 5]},
        """
        1 a       <- 1 a
        2 hot     <- 2 cr + 3 è + 4 me
        3 ti      <- 5 br x 1/3 + 6 û x 1/3 + 7 û x 1/3 + 8 l x 1/3 + 9 ée x 1/3
        4 ram     <- 5 br x 1/3 + 6 û x 1/3 + 7 û x 1/3 + 8 l x 1/3 + 9 ée x 1/3
        5 isu     <- 5 br x 1/3 + 6 û x 1/3 + 7 û x 1/3 + 8 l x 1/3 + 9 ée x 1/3
        6 <end>   <- 10 <end>
        7-72 pad  <- 11-76
        73-76 pad <- nothing
        """,
    ),
    "emoji": Case(
        "a cat 🐱 on a sofa",
        "a dog 🐶 on a sofa",
        {"🐱": [3], "cat 🐱": [2, 3], "🐶": []},
        {"🐶": [3], "dog": [2]},
        {"🐱": [3], "🐶": [3], "cat": [2], "sofa": [6]},
        """
        1 a       <- 1 a
        2 dog     <- 2 cat
        3 🐶      <- 3 🐱
        4 on      <- 4 on
        5 a       <- 5 a
        6 sofa    <- 6 sofa
        7 <end>   <- 7 <end>
        8-76 pad  <- 8-76
        """,
    ),
    "an emoji of two tokens": Case(
        "a 🐱 on a sofa",
        "a 👧 on a sofa",
        {"🐱": [2]},
        {"👧": [2, 3], "sofa": [6]},
        {"🐱": [2, 3], "👧": [2, 3], "on": [4]},
        """
        1 a       <- 1 a
        2 👧      <- 2 🐱 x 1/2
        3 👧      <- 2 🐱 x 1/2
        4 on      <- 3 on
        5 a       <- 4 a
        6 sofa    <- 5 sofa
        7 <end>   <- 6 <end>
        8-75 pad  <- 7-74
        76 pad    <- 75 + 76
        """,
    ),
    "a repeated word": Case(
        "a cat and a cat",
        "a dog and a lasagne",
        {"cat": [2, 5], "cat#1": [2], "cat#2": [5], "cat#3": [], "a cat#2": [4, 5]},
        {"a": [1, 4], "a#2": [4]},
        {"cat": [2, 5, 6], "cat#1": [2], "cat#2": [5, 6], "a#2": [4]},
        """
        1 a       <- 1 a
        2 dog     <- 2 cat
        3 and     <- 3 and
        4 a       <- 4 a
        5 lasag   <- 5 cat x 1/2
        6 ne      <- 5 cat x 1/2
        7 <end>   <- 6 <end>
        8-75 pad  <- 7-74
        76 pad    <- 75 + 76
        """,
    ),
    "the second of a repeated word: the first one is still there, under its name": Case(
        "a cat and a cat",
        "a cat and a hippopotamus",
        {"cat": [2, 5]},
        {"cat": [2], "cat#1": [2], "cat#2": []},
        {"cat": [2], "cat#2": [5, 6, 7], "hippopotamus": [5, 6, 7]},
        """
        1 a       <- 1 a
        2 cat     <- 2 cat
        3 and     <- 3 and
        4 a       <- 4 a
        5 hippo   <- 5 cat x 1/3
        6 potam   <- 5 cat x 1/3
        7 us      <- 5 cat x 1/3
        8 <end>   <- 6 <end>
        9-75 pad  <- 7-73
        76 pad    <- 74 + 75 + 76
        """,
    ),
    "an apostrophe": Case(
        "a cat's toy, isn't it",
        "a dog's toy, isn't it",
        {"cat": [2], "cat's": [2, 3], "isn't": [6, 7], "toy": [4]},
        {"dog's": [2, 3]},
        {"cat": [2], "cat's": [2, 3], "dog": [2], "dog's": [2, 3], "isn't it": [6, 7, 8]},
        """
        1 a       <- 1 a
        2 dog     <- 2 cat
        3 's      <- 3 's
        4 toy     <- 4 toy
        5 ,       <- 5 ,
        6 isn     <- 6 isn
        7 't      <- 7 't
        8 it      <- 8 it
        9 <end>   <- 9 <end>
        10-76 pad <- 10-76
        """,
    ),
    "a hyphen on both sides": Case(
        "a snow-covered house",
        "a sun-drenched house",
        {"snow-covered": [2, 3, 4], "snow": [2], "covered": [4], "-": [3], "covered house": [4, 5]},
        {"sun-drenched": [2, 3, 4], "drenched": [4]},
        {"snow": [2], "covered": [4], "-": [3], "snow-covered": [2, 3, 4]},
        """
        1 a        <- 1 a
        2 sun      <- 2 snow
        3 -        <- 3 -
        4 drenched <- 4 covered
        5 house    <- 5 house
        6 <end>    <- 6 <end>
        7-76 pad   <- 7-76
        """,
    ),
    "a hyphenated word becomes a plain one": Case(
        "a snow-covered house",
        "a big house",
        {"snow-covered": [2, 3, 4]},
        {"big": [2], "house": [3]},
        {"snow-covered": [2], "snow": [2], "big": [2]},
        """
        1 a       <- 1 a
        2 big     <- 2 snow + 3 - + 4 covered
        3 house   <- 5 house
        4 <end>   <- 6 <end>
        5-74 pad  <- 7-76
        75-76 pad <- nothing
        """,
    ),
    "digits are a token each": Case(
        "a 1950s car",
        "a new car",
        {"1950s": [2, 3, 4, 5, 6], "1950": [], "s": [], "car": [7]},
        {"new": [2]},
        {"1950s": [2], "car": [3]},
        """
        1 a       <- 1 a
        2 new     <- 2 1 + 3 9 + 4 5 + 5 0 + 6 s
        3 car     <- 7 car
        4 <end>   <- 8 <end>
        5-72 pad  <- 9-76
        73-76 pad <- nothing
        """,
    ),
    "one token becomes five": Case(
        "a new car",
        "a 2020s car",
        {"new": [2]},
        {"2020s": [2, 3, 4, 5, 6]},
        {"new": [2, 3, 4, 5, 6], "car": [7]},
        """
        1 a       <- 1 a
        2 2       <- 2 new x 1/5
        3 0       <- 2 new x 1/5
        4 2       <- 2 new x 1/5
        5 0       <- 2 new x 1/5
        6 s       <- 2 new x 1/5
        7 car     <- 3 car
        8 <end>   <- 4 <end>
        9-75 pad  <- 5-71
        76 pad    <- 72 + 73 + 74 + 75 + 76
        """,
    ),
    "the first word": Case(
        "hippopotamus on a beach",
        "lion on a beach",
        {"hippopotamus": [1, 2, 3]},
        {"lion": [1]},
        {"hippopotamus": [1], "on": [2], "beach": [4]},
        """
        1 lion    <- 1 hippo + 2 potam + 3 us
        2 on      <- 4 on
        3 a       <- 5 a
        4 beach   <- 6 beach
        5 <end>   <- 7 <end>
        6-74 pad  <- 8-76
        75-76 pad <- nothing
        """,
    ),
    "several words at once": Case(
        "a lion eating a lasagne in a cabriolet",
        "a hippopotamus riding a burger in a car",
        {"lion": [2], "lasagne": [5, 6], "cabriolet": [9, 10, 11], "a": [1, 4, 8]},
        {"hippopotamus": [2, 3, 4], "burger": [7], "car": [10], "a": [1, 6, 9]},
        {"lion": [2, 3, 4], "lasagne": [7], "cabriolet": [10], "riding": [5], "a#3": [9]},
        """
         1 a       <- 1 a
         2 hippo   <- 2 lion x 1/3
         3 potam   <- 2 lion x 1/3
         4 us      <- 2 lion x 1/3
         5 riding  <- 3 eating
         6 a       <- 4 a
         7 burger  <- 5 lasag + 6 ne
         8 in      <- 7 in
         9 a       <- 8 a
        10 car     <- 9 cab + 10 rio + 11 let
        11 <end>   <- 12 <end>
        12-75 pad  <- 13-76
        76 pad     <- nothing
        """,
    ),
    "words that are punctuation only": Case(
        "a cat -- a dog !!!",
        "a lion ... a lasagne ?",
        {"--": [3], "!!!": [6], "dog": [5]},
        {"...": [3], "?": [7]},
        {"--": [3], "...": [3], "!!!": [7], "dog": [5, 6]},
        """
        1 a       <- 1 a
        2 lion    <- 2 cat
        3 ...     <- 3 --
        4 a       <- 4 a
        5 lasag   <- 5 dog x 1/2
        6 ne      <- 5 dog x 1/2
        7 ?       <- 6 !!!
        8 <end>   <- 7 <end>
        9-75 pad  <- 8-74
        76 pad    <- 75 + 76
        """,
    ),
    "identical prompts": Case(
        "a hippopotamus, big",
        "a hippopotamus, big",
        {"hippopotamus": [2, 3, 4]},
        {"hippopotamus": [2, 3, 4], "big": [6]},
        {"hippopotamus": [2, 3, 4], ",": [5]},
        """
        1 a       <- 1 a
        2 hippo   <- 2 hippo
        3 potam   <- 3 potam
        4 us      <- 4 us
        5 ,       <- 5 ,
        6 big     <- 6 big
        7 <end>   <- 7 <end>
        8-76 pad  <- 8-76
        """,
    ),
    "no words at all": Case(
        "",
        "  ",
        {"a": [], "": []},
        {"": []},
        {},
        """
        1 <end>   <- 1 <end>
        2-76 pad  <- 2-76
        """,
    ),
}

# --- refinements: added and removed words --------------------------------------------------------

REFINEMENTS = {
    "a word of two tokens is added": Case(
        "A painting of a squirrel",
        "A neoclassical painting of a squirrel",
        {"painting": [2], "neoclassical": []},
        {"neoclassical": [2, 3], "painting": [4]},
        {"neoclassical": [2, 3], "painting": [4], "a": [1, 6]},
        """
        1 A         <- 1 A
        2 neo       <- own
        3 classical <- own
        4 painting  <- 2 painting
        5 of        <- 3 of
        6 a         <- 4 a
        7 squirrel  <- 5 squirrel
        8 <end>     <- 6 <end>
        9-76 pad    <- 9-76
        """,
    ),
    "words are added at the end": Case(
        "a house on a mountain",
        "a house on a mountain at fall",
        {"mountain": [5]},
        {"at fall": [6, 7]},
        {"at fall": [6, 7], "mountain": [5]},
        """
        1 a         <- 1 a
        2 house     <- 2 house
        3 on        <- 3 on
        4 a         <- 4 a
        5 mountain  <- 5 mountain
        6 at        <- own
        7 fall      <- own
        8 <end>     <- 6 <end>
        9-76 pad    <- 9-76
        """,
    ),
    "pea soup": Case(
        "a bowl of soup",
        "a bowl of pea soup",
        {"soup": [4]},
        {"pea soup": [4, 5]},
        {"soup": [5], "pea": [4], "pea soup": [4, 5]},
        """
        1 a       <- 1 a
        2 bowl    <- 2 bowl
        3 of      <- 3 of
        4 pea     <- own
        5 soup    <- 4 soup
        6 <end>   <- 5 <end>
        7-76 pad  <- 7-76
        """,
    ),
    "pea soup with croutons": Case(
        "a bowl of soup",
        "a bowl of pea soup with croutons",
        {"soup": [4]},
        {"croutons": [7, 8, 9], "with croutons": [6, 7, 8, 9]},
        {"croutons": [7, 8, 9], "soup": [5]},
        """
         1 a       <- 1 a
         2 bowl    <- 2 bowl
         3 of      <- 3 of
         4 pea     <- own
         5 soup    <- 4 soup
         6 with    <- own
         7 cr      <- own
         8 out     <- own
         9 ons     <- own
        10 <end>   <- 5 <end>
        11-76 pad  <- 11-76
        """,
    ),
    "words are removed: the end is still the end": Case(
        "a big red car on a road",
        "a car on a road",
        {"big red": [2, 3], "car": [4]},
        {"car": [2]},
        {"car": [2], "road": [5], "red car": [2]},
        """
        1 a       <- 1 a
        2 car     <- 4 car
        3 on      <- 5 on
        4 a       <- 6 a
        5 road    <- 7 road
        6 <end>   <- 8 <end>
        7-8 pad   <- own
        9-76 pad  <- 9-76
        """,
    ),
    "a repeated word, the first one was there before": Case(
        "a cat",
        "a cat and a dog",
        {"a": [1]},
        {"a": [1, 4]},
        {"a": [1, 4], "a#2": [4]},
        """
        1 a       <- 1 a
        2 cat     <- 2 cat
        3 and     <- own
        4 a       <- own
        5 dog     <- own
        6 <end>   <- 3 <end>
        7-76 pad  <- 7-76
        """,
    ),
    "of two equally good alignments the earliest": Case(
        "a dog",
        "a cat and a dog",
        {"dog": [2]},
        {"dog": [5]},
        {"dog": [5]},
        """
        1 a       <- 1 a
        2 cat     <- own
        3 and     <- own
        4 a       <- own
        5 dog     <- 2 dog
        6 <end>   <- 3 <end>
        7-76 pad  <- 7-76
        """,
    ),
    "a repeated word is removed": Case(
        "a cat on a mat",
        "a mat",
        {"a": [1, 4], "mat": [5]},
        {"a": [1], "mat": [2]},
        {"a": [1], "mat": [2]},
        """
        1 a       <- 1 a
        2 mat     <- 5 mat
        3 <end>   <- 6 <end>
        4-6 pad   <- own
        7-76 pad  <- 7-76
        """,
    ),
    "a word is exchanged and a style added": Case(
        "a cat on a sofa",
        "a dog on a sofa, oil painting",
        {"cat": [2]},
        {"dog": [2], "oil painting": [7, 8]},
        {"dog": [2], ",": [6], "painting": [8]},
        """
         1 a        <- 1 a
         2 dog      <- own
         3 on       <- 3 on
         4 a        <- 4 a
         5 sofa     <- 5 sofa
         6 ,        <- own
         7 oil      <- own
         8 painting <- own
         9 <end>    <- 6 <end>
        10-76 pad   <- 10-76
        """,
    ),
    "capital letters and spaces do not count": Case(
        "A  Cat",
        "a fluffy CAT",
        {"cat": [2]},
        {"fluffy cat": [2, 3]},
        {"cat": [3]},
        """
        1 a       <- 1 A
        2 fluffy  <- own
        3 CAT     <- 2 Cat
        4 <end>   <- 3 <end>
        5-76 pad  <- 5-76
        """,
    ),
    "tokens count, not words: both end in ably": Case(
        "an unimaginably tall tower",
        "an inconceivably tall tower",
        {"unimaginably": [2, 3, 4]},
        {"inconceivably": [2, 3, 4, 5]},
        {"inconceivably": [2, 3, 4, 5], "unimaginably": [5]},
        """
        1 an      <- 1 an
        2 in      <- own
        3 conce   <- own
        4 iv      <- own
        5 ably    <- 4 ably
        6 tall    <- 5 tall
        7 tower   <- 6 tower
        8 <end>   <- 7 <end>
        9-76 pad  <- 9-76
        """,
    ),
    "from nothing": Case(
        "",
        "a cat",
        {"cat": []},
        {"cat": [2]},
        {"cat": [2]},
        """
        1 a       <- own
        2 cat     <- own
        3 <end>   <- 1 <end>
        4-76 pad  <- 4-76
        """,
    ),
    "identical prompts": Case(
        "a cat's toy 🐱, 1950s",
        "a cat's toy 🐱, 1950s",
        {"1950s": [7, 8, 9, 10, 11]},
        {"🐱": [5], "🐱,": [5], ",": [6]},
        {"1950s": [7, 8, 9, 10, 11], "🐱": [5]},
        """
         1 a       <- 1 a
         2 cat     <- 2 cat
         3 's      <- 3 's
         4 toy     <- 4 toy
         5 🐱      <- 5 🐱
         6 ,       <- 6 ,
         7 1       <- 7 1
         8 9       <- 8 9
         9 5       <- 9 5
        10 0       <- 10 0
        11 s       <- 11 s
        12 <end>   <- 12 <end>
        13-76 pad  <- 13-76
        """,
    ),
}


def token(prompt: Prompt, i: int) -> str:
    text = prompt.text[slice(*prompt.spans[i - 1])] if i < prompt.end else "<end>"
    return f"{i} {text}"


def table(source: Prompt, target: Prompt, alignment: Alignment) -> list[str]:
    """Every non-zero of a mapper, as one line for each token of the target or run of paddings."""
    mapper, exists = alignment.mapper, alignment.exists
    lines = []
    for j in range(1, target.end + 1):
        parts = []
        for i in mapper[:, j].nonzero().flatten().tolist():
            part = Fraction(mapper[i, j].item()).limit_denominator(76)
            parts.append(token(source, i) + ("" if part == 1 else f" x {part}"))
        # A token without a source is one that does not exist there, and the other way round.
        assert exists[j] == (1 if parts else 0), (j, parts)
        lines.append(f"{token(target, j)} <- {' + '.join(parts) or 'own'}")

    assert exists[target.end] == 1

    def sources(j: int) -> list[int]:
        return mapper[:, j].nonzero().flatten().tolist()

    def shift(j: int) -> object:
        i = sources(j)
        return i[0] - j if len(i) == 1 else [exists[j].item(), *i]

    for _, run in groupby(range(target.end + 1, 77), key=shift):
        js = list(run)
        first, last = sources(js[0]), sources(js[-1])
        assert (mapper[first, js[0]] == 1).all()
        from_ = f"{first[0]}-{last[0]}" if first != last else " + ".join(map(str, first))
        nothing = "nothing" if exists[js[0]] else "own"
        to = f"{js[0]}-{js[-1]}" if len(js) > 1 else f"{js[0]}"
        lines.append(f"{to} pad <- {from_ or nothing}")
    return lines


def check(case: Case, tokenizer, align) -> Alignment:
    source, target = tokenize(tokenizer, case.source), tokenize(tokenizer, case.target)
    for prompt, words in ((source, case.in_source), (target, case.in_target)):
        assert {word: prompt.find(word) for word in words} == words

    alignment = align(source, target)
    hand = [" ".join(line.split()) for line in case.table.strip().splitlines()]
    assert [" ".join(line.split()) for line in table(source, target, alignment)] == hand

    # The begin token belongs to itself and the end token to the end token alone.
    mapper = alignment.mapper
    assert mapper[0].nonzero().tolist() == mapper[:, 0].nonzero().tolist() == [[0]]
    assert mapper[:, target.end].nonzero().tolist() == [[source.end]]
    assert alignment.exists[0] == 1

    for word, positions in case.acts_on.items():
        windows = token_windows({word: 0.25}, source, target, alignment)
        assert windows == [(0, 0.25) if j in positions else (0, 1) for j in range(77)], word
        weights = token_weights({word: 3}, source, target, alignment)
        assert weights.tolist() == [3 if j in positions else 1 for j in range(77)], word
    return alignment


@pytest.mark.parametrize("name", SWAPS)
def test_word_swap(clip_tokenizer, name):
    mapper = check(SWAPS[name], clip_tokenizer, replacement).mapper
    assert torch.allclose(mapper.sum(dim=1), torch.ones(77), atol=1e-6)  # nothing is lost


@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement(clip_tokenizer, name):
    alignment = check(REFINEMENTS[name], clip_tokenizer, refinement)
    assert torch.equal(alignment.mapper.sum(dim=0), alignment.exists)  # one source, or none
    assert (alignment.mapper.sum(dim=1) <= 1).all()  # and none for two


@pytest.mark.parametrize(
    ("source", "target", "end", "own"),
    [  # where padding begins that both have; which padding of the target has its own attention
        ("a cat", "a cat on a big mat", 8, []),
        ("", "a cat", 4, []),
        ("a cat on a mat", "a dog on a mat", 7, []),
        ("a cat", "a cat", 4, []),
        ("a cat on a mat", "a cat", 7, [4, 5, 6]),
        ("a cat", "", 4, [2, 3]),
    ],
    ids=["longer", "from nothing", "as long", "the same", "shorter", "to nothing"],
)
def test_refined_padding_keeps_its_place(clip_tokenizer, source, target, end, own):
    source, target = tokenize(clip_tokenizer, source), tokenize(clip_tokenizer, target)
    alignment = refinement(source, target)
    padding = range(target.end + 1, 77)
    assert [j for j in padding if not alignment.exists[j]] == own
    assert torch.equal(alignment.mapper[:, end:], torch.eye(77)[:, end:])
    assert not alignment.mapper[:, own].any()


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
    hand = {(0, 0): 1, (76, 41): 1, (75, 38): 1}  # begin, end, the half lasagne to burger 38
    hand |= {(2 * n - 1, n): 1 for n in range(1, 38)} | {(2 * n, n): 1 for n in range(1, 38)}
    assert entries(alignment.mapper) == hand
    # Burgers 39 and 40 have no counterpart that the model sees.
    assert [j for j in range(77) if not alignment.exists[j]] == [39, 40]


def test_target_is_too_long(clip_tokenizer):
    source = tokenize(clip_tokenizer, "burger " * 40)
    target = cut(clip_tokenizer, "lasagne " * 40)
    assert (source.end, target.end) == (41, 76)

    alignment = replacement(source, target)
    hand = {(0, 0): 1, (38, 75): 1}
    hand |= {(n, j): 0.5 for n in range(1, 38) for j in (2 * n - 1, 2 * n)}
    # Burgers 39 and 40 find no lasagne: to the end token, as the source's end and its padding.
    hand |= {(i, 76): 1 for i in range(39, 77)}
    assert entries(alignment.mapper) == hand
    assert alignment.exists.all()


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
    hand = {(i, i): 1 for i in range(74)} | {(76, 76): 1}
    hand |= {(74, 74): 0.5, (74, 75): 0.5}  # lion to hippo and potam
    hand |= {(75, 76): 1}  # the tail has nowhere to go but the end
    assert entries(alignment.mapper) == hand
    assert alignment.exists.all()


def test_word_near_the_end_that_still_fits(clip_tokenizer):
    source = cut(clip_tokenizer, "very " * 74 + "lion" + " tail" * 5)
    target = cut(clip_tokenizer, "very " * 74 + "hippopotamus" + " tail" * 5)
    tiger = cut(clip_tokenizer, "very " * 74 + "tiger" + " tail" * 5)
    assert source.find("lion") == tiger.find("tiger") == [75]
    assert torch.equal(replacement(source, tiger).mapper, torch.eye(77))
    assert token_windows({"tiger": 0.5}, source, tiger, replacement(source, tiger)) == (
        [(0, 1)] * 75 + [(0, 0.5)] + [(0, 1)]
    )
    # Of the hippopotamus only "hippo" fits.
    alignment = replacement(source, target)
    assert entries(alignment.mapper) == {(i, i): 1 for i in range(77)}
    with pytest.raises(ValueError, match="beyond"):
        token_windows({"hippopotamus": 0.5}, source, target, alignment)


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

WORDS = [  # prompt, word, positions
    ("a cat sat on a catapult", "cat", [2]),
    ("a concatenated cat", "cat", [6]),  # a con cat en ated cat: no part of a word
    ("Cat, CAT; cat!", "cat", [1, 3, 5]),
    ("a cat", " cat ", [2]),
    ("a cat", "«cat»", [2]),
    ("“cat” and ‘dog’", "cat", [3]),
    ("a cat", "Katze", []),
    ("a cat", "", []),
    ("a cat", "   ", []),
    ("a cat#2 of 3", "cat#2", [2, 3, 4]),  # where the text says so, that is what is meant
    ("cat cat cat", "cat#2", [2]),
    ("cat cat cat", "cat#0", []),
    ("cat cat cat", "cat#4", []),
    ("big cat, big dog, big cat", "big cat#2", [7, 8]),
    ("two cats", "cat", []),
    ("it's a dog's life", "dog", [4]),
    ("the dogs' toys", "dogs", [2]),
    ("rock'n'roll", "rock'n'roll", [1, 2, 3, 4, 5]),
    ("a well-lit room", "lit", [4]),
    ("a well-lit room", "lit room", [4, 5]),
    ("photo of a 1950s car!!!", "car", [9]),
    ("photo of a 1950s car!!!", "!!!", [10]),
    ("photo of a 1950s car!!!", "car!!!", [9]),  # surrounding punctuation does not count
    ("1,000 cats", "1,000", [1, 2, 3, 4, 5]),
    ("1,000 cats", "000", [3, 4, 5]),
    ("日本 🐱 cat", "日本", [1, 2, 3]),
    ("日本 🐱 cat", "日", [1]),
    ("日本 🐱 cat", "🐱 cat", [4, 5]),
    ("i ❤️ cats", "❤️", [2]),
    ("i ❤️ cats", "❤", [2]),
    (f"e{ACUTE}cole", "école", [1, 2]),
    (f"e{ACUTE}cole", "cole", []),  # a mark is no border of a word
    ("école", "cole", []),
    ("école", f"E{ACUTE}COLE", [1, 2]),
    ("naïve café", unicodedata.normalize("NFD", "naïve café"), [1, 2, 3, 4]),
    (unicodedata.normalize("NFD", "naïve café"), "naïve café", [1, 2, 3, 4]),
    ("a \u0958 here", "\u0958", [2, 3, 4]),  # Devanagari qa, which NFC takes apart
    ("_cat_ and dog", "cat", [2]),
]


@pytest.mark.parametrize(("text", "word", "positions"), WORDS)
def test_find(clip_tokenizer, text, word, positions):
    assert tokenize(clip_tokenizer, text).find(word) == positions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A painting of a squirrel,  (eating) a burger!", "A painting of a squirrel eating burger"),
        ("a cat's toy -- isn't it?", "a cat's toy -- isn't it"),
        ("a snow-covered house, 1950s", "a snow-covered house 1950s"),
        ("日本 🐱 cat", "日本 🐱 cat"),
        (f"a cafe{ACUTE}, naïve", f"a cafe{ACUTE} naïve"),
        ("_cat_ and \u0958", "cat and \u0958"),
        ("", ""),
    ],
)
def test_every_word_that_is_listed_can_be_named(clip_tokenizer, text, words):
    prompt = tokenize(clip_tokenizer, text)
    assert prompt.words == words.split()
    assert all(prompt.find(word) for word in prompt.words)


@pytest.mark.parametrize(
    ("text", "old", "new", "swapped"),
    [
        ("a burger, please", "burger", "lasagne", "a lasagne, please"),
        ("a Burger", "burger", "pizza", "a pizza"),
        ("a cat and a cat", "cat", "dog", "a dog and a dog"),
        ("a catapult and a cat", "cat", "dog", "a catapult and a dog"),
        ("a fluffy  cat on", "fluffy cat", "dog", "a dog on"),
        ("a cat's toy", "cat", "dog", "a dog's toy"),
        (f"a cafe{ACUTE}", "café", "bar", "a bar"),
        ("a 🐱", "🐱", r"\1", r"a \1"),
    ],
)
def test_swap_word(text, old, new, swapped):
    assert swap_word(text, old, new) == swapped


def test_swap_word_that_is_not_there():
    with pytest.raises(ValueError, match=r"no word 'cat' in 'a catapult'\.$"):
        swap_word("a catapult", "cat", "dog")


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
        (0.59, 51, range(0, 30)),
        (0.99, 51, range(0, 50)),
        (1.0, 51, range(0, 51)),
        (1, 50, range(0, 50)),
        (0, 50, range(0, 0)),
        (0.01, 50, range(0, 0)),  # half a call is none
        ((0.2, 0.5), 50, range(10, 25)),
        ([0.2, 0.5], 51, range(10, 25)),  # 10.2 to 25.5
        ((0.5, 0.5), 50, range(25, 25)),
        ((0.9, 1), 10, range(9, 10)),
        (0.29, 100, range(0, 29)),  # 28.999999999999996 in binary
        (0.7, 10, range(0, 7)),  # 7.000000000000001
        (1 / 3, 3, range(0, 1)),
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
            both = [*calls_of((0.0, middle), calls), *calls_of((middle, 1.0), calls)]
            assert both == list(range(calls))


@pytest.mark.parametrize("value", [0.5, (0, 0.5), [0, 0.5], torch.tensor([0, 0.5])])
def test_window(value):
    assert window(value) == (0, 0.5)


BURGER, LASAGNE = "a squirrel eating a burger", "a lion eating a lasagne"


@pytest.mark.parametrize(
    ("windows", "default", "own"),
    [
        (0.8, (0, 0.8), {}),
        ((0.1, 0.8), (0.1, 0.8), {}),
        ({}, (0, 1), {}),  # as in the reference
        ({"default_": 0.8}, (0, 0.8), {}),
        ({"lion": 0.4}, (0, 1), {2: (0, 0.4)}),
        ({"default_": 0.8, "lion": 0.4}, (0, 0.8), {2: (0, 0.4)}),
        ({"lion": 0.4, "default_": (0.1, 1)}, (0.1, 1), {2: (0, 0.4)}),
        ({"default_": 0.8, "squirrel": 0.4}, (0, 0.8), {2: (0, 0.4)}),  # the source's word
        ({"lasagne": (0.2, 0.5)}, (0, 1), {5: (0.2, 0.5), 6: (0.2, 0.5)}),
        ({"burger": 0.2, "lion eating": 0.3}, (0, 1),
         {2: (0, 0.3), 3: (0, 0.3), 5: (0, 0.2), 6: (0, 0.2)}),
        ({"a": 0.1, "LION": 0}, (0, 1), {1: (0, 0.1), 2: (0, 0), 4: (0, 0.1)}),
        ({"a#2": 0.1}, (0, 1), {4: (0, 0.1)}),
        ({"lion": 0.4, "squirrel": 0.4}, (0, 1), {2: (0, 0.4)}),  # twice the same
    ],
)  # fmt: skip
def test_token_windows(clip_tokenizer, windows, default, own):
    """The tokens are 1 a, 2 lion, 3 eating, 4 a, 5 lasag, 6 ne, 7 <end>."""
    source, target = tokenize(clip_tokenizer, BURGER), tokenize(clip_tokenizer, LASAGNE)
    found = token_windows(windows, source, target, replacement(source, target))
    assert found == [own.get(j, default) for j in range(77)]


@pytest.mark.parametrize(
    ("weights", "own"),
    [
        ({}, {}),
        ({"lion": 2}, {2: 2}),
        ({"squirrel": -1.5}, {2: -1.5}),
        ({"lasagne": 3, "a": 0}, {1: 0, 4: 0, 5: 3, 6: 3}),  # every token of a word
        ({"eating a": 0.5}, {3: 0.5, 4: 0.5}),
    ],
)
def test_token_weights(clip_tokenizer, weights, own):
    source, target = tokenize(clip_tokenizer, BURGER), tokenize(clip_tokenizer, LASAGNE)
    found = token_weights(weights, source, target, replacement(source, target))
    assert found.tolist() == [own.get(j, 1) for j in range(77)]
