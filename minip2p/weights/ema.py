"""Choose between the two UNets of a single file: the model's own, and its average over training.

SD 1.x was published with both, and the folders made of it hold the average (EMA). Mixtures of two
models mix the models' own weights, and keep the average of one of them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .files import Tensors, WeightsError, opened

# The least mean correlation of a model with its average. Weights of 0.025 that walk at random by
# 1e-4 a step, as SD was trained, would keep 0.96 with their average over 10,000 steps; half of an
# unrelated model keeps 0.71. Mixtures of near relatives are not told apart by this.
LEAST_CORRELATION = 0.95


def takes_average(file: Tensors, averages: dict[str, str], merged: bool, ema: bool | None) -> bool:
    """Tell whether to take the averaged UNet. Warn if the two differ and nobody chose.

    averages: from the names of the model's own tensors to those of their averages.
    merged: the file says that it was mixed of several models. ema: the caller's choice, or None.
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
    weights, average = first_rows(file, list(averages)), first_rows(file, list(averages.values()))
    if len(weights) == len(average) and all(map(torch.equal, weights, average)):
        return True
    reason = why_not_ema(weights, average, merged)
    if reason:
        choice = f"the model's own is taken, because its average (EMA) {reason}: ema=True (--ema)"
    else:
        choice = (
            "its average over training (EMA) is taken, as in SD's folders: ema=False (--no-ema)"
        )
    warnings.warn(f"{file.path} has two UNets, and {choice} takes the other.", stacklevel=4)
    return not reason


def why_not_ema(weights: list[Tensor], average: list[Tensor], merged: bool) -> str:
    """Return why the average is not to be taken, or "" if it is."""
    if [row.shape for row in weights] != [row.shape for row in average]:
        return "has other shapes"
    if is_empty(average):
        return "is zero or not a number"
    if is_empty(weights):
        return ""
    if merged:
        return "is of one of the models that it was mixed of"
    pairs = [torch.stack(pair) for pair in zip(weights, average, strict=True)]
    # Rows without variance have no correlation: it counts as 1 if they are equal, else as 0.
    correlations = [
        1.0 if torch.equal(*pair) else torch.corrcoef(pair)[0, 1].nan_to_num().item()
        for pair in pairs
    ]
    mean = sum(correlations) / len(correlations)
    return "" if mean >= LEAST_CORRELATION else f"is not near to it (they correlate by {mean:.2f})"


def first_rows(file: Tensors, names: list[str]) -> list[Tensor]:
    """Read the first row of each matrix or kernel: a few MB, but of every block."""
    with opened(file.path) as stored:
        return [
            stored.get_slice(file[name].key)[:1].float().flatten()
            for name in names
            if len(file[name].shape) > 1
        ]


def is_empty(rows: list[Tensor]) -> bool:
    """Tell whether all numbers are 0, or one is infinite or nan."""
    return not all(row.isfinite().all() for row in rows) or not any(row.any() for row in rows)
