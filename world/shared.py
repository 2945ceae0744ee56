"""EmojiBench's items shared out among the workers of a Ray cluster, as a sweep's runs are.

The same items with the same figures as in one process, each judged once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minip2p
from minip2p.errors import UserError
from minip2p.sweep.ray import cluster
from minip2p.sweep.results import Files, Row

from .bench import ITEMS, Bench
from .detector import load
from .figures import Facts, Table, tell
from .parts import PARTS

SHARES = 64  # of a part, at most: so many workers find work, and the last ones wait for little
WHOLE = ("captions", "sharpness", "maps")  # one share: items compared, or noised, with each other


@dataclass(frozen=True)
class Share:
    """Every n-th item of a part, from the i-th."""

    row: Row  # part, i, n


class Judge:
    """A model and the detector, in a process of its own: minip2p.sweep.worker.Worker's like."""

    def __init__(self, model: str, quick: bool, steps: int, folder: Path | None):
        self.bench = Bench(minip2p.load(model), load(), quick, steps, folder)

    def describe(self) -> dict[str, Any]:
        return {"id": self.bench.model.identity()}

    def run(self, shares: Sequence[Share]) -> list[tuple[Row, Files]]:
        """Return the notes on a share's items, or the error."""
        row = shares[0].row
        self.bench.shard = row["i"], row["n"]
        try:
            facts = PARTS[row["part"]](self.bench)
        except Exception as error:
            return [(row | {"error": f"{type(error).__name__}: {error}"}, {})]
        return [(row | {"facts": {name: dict(columns) for name, columns in facts.items()}}, {})]


def shared_out(
    parts: Sequence[str], settings: tuple[Any, ...], workers: int | None, address: str | None
) -> dict[str, Table]:
    """Return the tables of the parts. settings: Judge's. Raises UserError if a share fails."""
    _, quick, *_ = settings
    # Some parts take half of their items of either kind: no share is to be without any.
    items = {part: ITEMS[part][2 if quick else 1] // 2 for part in parts}
    of = {part: 1 if part in WHOLE else min(SHARES, max(1, n)) for part, n in items.items()}
    shares = [[Share({"part": part, "i": i, "n": n})] for part, n in of.items() for i in range(n)]
    facts: dict[str, dict[int, dict]] = {part: {} for part in parts}
    tables, began = {}, time.time()
    with cluster(Judge, settings, None, workers, address) as (_, work):
        for results in work(shares):
            for row, _ in results:
                if "error" in row:
                    which = f"{row['part']}, share {row['i'] + 1} of {row['n']}"
                    raise UserError(f"{which}: {row['error']}")
                facts[row["part"]][row["i"]] = row["facts"]
                if len(facts[row["part"]]) == row["n"]:
                    tables[row["part"]] = joined(facts[row["part"]]).table()
                    tell(row["part"], tables[row["part"]], time.time() - began)
    return tables


def joined(shares: dict[int, dict[str, dict[str, list]]]) -> Facts:
    """Join the shares' notes in the order of the shares, whichever came first."""
    facts = Facts()
    for i in sorted(shares):
        for row, columns in shares[i].items():
            for name, values in columns.items():
                facts[row][name].extend(values)
    return facts
