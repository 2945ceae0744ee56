"""Figures with their intervals, and the tables that they stand in.

Intervals are 95 %: Wilson's for shares, the bootstrap over items for means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Figure(NamedTuple):
    value: float
    low: float | None  # of the 95 % interval
    high: float | None
    n: int
    unit: str

    def __str__(self) -> str:
        factor, digits = (100, 1) if self.unit == "%" else (1, 1 if self.unit else 2)
        value, low, high = (f"{(x or 0) * factor:.{digits}f}" for x in self[:3])
        interval = "" if self.low is None else f" ({low}–{high})"
        return f"{value} {self.unit}".strip() + interval


Table = dict[str, dict[str, Figure]]  # row → column → figure


def share(values: Sequence[bool]) -> Figure:
    """Compute the share of true values, with Wilson's interval (1927)."""
    n, z = len(values), 1.96
    p = sum(values) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(p, max(0.0, middle - half), min(1.0, middle + half), n, "%")


def mean(values: Sequence[float], unit: str = "") -> Figure:
    """Compute the mean, with the percentile bootstrap's interval (Efron & Tibshirani 1993)."""
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) == 1:
        return Figure(float(known[0]), None, None, 1, unit)
    rng = np.random.default_rng(0)
    means = known[rng.integers(len(known), size=(2000, len(known)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(known.mean()), float(low), float(high), len(known), unit)


def together(of: Callable[..., float], *values: Tensor, unit: str = "") -> Figure:
    """Compute a figure of all items together, `of(*values)`, with the bootstrap's interval.

    The interval is 1.96 deviations over resampled items (Efron & Tibshirani 1993, 12.5).
    values: n ... each.
    """
    n, rng = len(values[0]), torch.Generator().manual_seed(0)
    drawn = [torch.randint(n, (n,), generator=rng) for _ in range(200)]
    half = 1.96 * float(np.std([of(*(v[rows] for v in values)) for rows in drawn]))
    value = of(*values)
    return Figure(value, value - half, value + half, n, unit)


UNITS = {  # of numbers that have one
    **{"PSNR": "dB", "gain": "dB", "chance": "%"},
    **dict.fromkeys(("row 0", "background", "to truth", "in the thing"), "dB"),
}


class Facts(defaultdict[str, defaultdict[str, list]]):
    """The notes on every item: row → column → bools or floats."""

    def __init__(self) -> None:
        super().__init__(lambda: defaultdict(list))

    def table(self) -> Table:
        return {
            row: {name: figure(name, v) for name, v in columns.items() if known(v)}
            for row, columns in self.items()
        }


def known(values: Sequence) -> bool:
    return isinstance(values[0], Figure) or not all(map(math.isnan, values))


def figure(name: str, values: Sequence) -> Figure:
    """Compute the figure of a column's notes; a figure of all items stays as it is."""
    if isinstance(values[0], Figure):
        return values[0]
    return share(values) if isinstance(values[0], bool) else mean(values, UNITS.get(name, ""))


def written(table: Table) -> str:
    names = list(dict.fromkeys(name for columns in table.values() for name in columns))
    lines = [["", "n", *names]]
    for row, columns in table.items():
        n = max(figure.n for figure in columns.values())
        lines.append([row, str(n), *(str(columns.get(name, "")) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def tell(part: str, table: Table, seconds: float) -> None:
    print(f"\n{part}, {seconds:.0f} s\n{written(table)}", flush=True)
