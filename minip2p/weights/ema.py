"""Which UNet of a single file is meant: the model's own, or its average over training (EMA).

SD 1.x was published with both, and the folders that were made of it hold the average. Whoever mixes
two models mixes their own weights, and leaves the first one's average beside them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .files import Tensors, WeightsError, opened

# How alike they must be, as the mean of their tensors' correlations. Weights of 0.025 that walk at
# random by 1e-4 a step, as SD was trained, would keep 0.96 with their average over 10,000 steps;
# half of an unrelated model keeps 0.71. Mixtures of near relatives are not told apart by this.
ALIKE = 0.95


def takes_average(file: Tensors, averages: dict[str, str], merged: bool, ema: bool | None) -> bool:
    """Whether to take the averaged UNet. Where nobody decided and it matters, a warning says so.

    averages: from the names of the model's own tensors to those of their averages.
    merged: whether the file says that it was mixed of several models.
    Raises WeightsError if `ema` asks for an average that is not there.
    """
    lacking = [average for average in averages.values() if average not in file]
    if ema and lacking:
        raise WeightsError(
            f"{file.path} has no averaged UNet, or not all of it (such as {lacking[0]}): load it "
            "without ema=True (--ema)."
        )
    if ema is not None or lacking:
        return bool(ema)
    own, average = first_rows(file, list(averages)), first_rows(file, list(averages.values()))
    if len(own) == len(average) and all(map(torch.equal, own, average)):
        return True
    reason = why_not(own, average, merged)
    if reason:
        taken = f"the model's own is taken, because its average (EMA) {reason}: ema=True (--ema)"
    else:
        taken = "its average over training (EMA) is taken, as in SD's folders: ema=False (--no-ema)"
    warnings.warn(f"{file.path} has two UNets, and {taken} takes the other.", stacklevel=4)
    return not reason


def why_not(own: list[Tensor], average: list[Tensor], merged: bool) -> str:
    """Why the average is not meant; nothing if it is."""
    if [row.shape for row in own] != [row.shape for row in average]:
        return "has other shapes"
    if is_empty(average):
        return "is zero or not a number"
    if is_empty(own):
        return ""
    if merged:
        return "is of one of the models that it was mixed of"
    alike = likeness(own, average)
    return "" if alike >= ALIKE else f"is not near to it (they correlate by {alike:.2f})"


def first_rows(file: Tensors, names: list[str]) -> list[Tensor]:
    """The first row of each matrix or kernel: some MB of all the GB, but of every block."""
    with opened(file.path) as stored:
        return [
            stored.get_slice(file[name].key)[:1].float().flatten()
            for name in names
            if len(file[name].shape) > 1
        ]


def is_empty(rows: list[Tensor]) -> bool:
    return not all(row.isfinite().all() for row in rows) or not any(row.any() for row in rows)


def likeness(own: list[Tensor], average: list[Tensor]) -> float:
    """The mean of the rows' correlations: 0 for strangers, and for rows without variance."""
    total = 0.0
    for a, b in zip(own, average, strict=True):
        if torch.equal(a, b):
            total += 1
        else:
            total += torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num().item()
    return total / len(own)
