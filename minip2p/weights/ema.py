"""Choose between the two UNets of a single file: the model's own, and its average over training.

SD 1.x was published with both, and the folders made of it hold the average (EMA). Mixtures of two
models mix the models' own weights, and keep the average of one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from .files import Tensors, WeightsError, opened

# The least correlation of a model with its average. Weights of 0.025 that walk at random by 1e-4 a
# step, as SD was trained, would keep 0.96 with their average over 10,000 steps; half of an
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
    weights, average = first_rows(file, averages), first_rows(file, averages.values())
    if torch.equal(weights, average):
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


def why_not_ema(weights: Tensor, average: Tensor, merged: bool) -> str:
    """Return why the average is not to be taken, or "" if it is."""
    if weights.shape != average.shape:
        return "has other shapes"
    if merged:
        return "is of one of the models that it was mixed of"
    # Zeros and what is not finite have no correlation: nan, which is not near.
    correlation = torch.corrcoef(torch.stack([weights, average]))[0, 1].item()
    is_near = correlation >= LEAST_CORRELATION
    return "" if is_near else f"is not near to it (they correlate by {correlation:.2f})"


def first_rows(file: Tensors, names: Iterable[str]) -> Tensor:
    """Read the first row of each matrix or kernel: a few MB, but of every block. → one vector"""
    rows = [torch.empty(0)]  # a damaged file may have no matrix
    with opened(file.path) as stored:
        for name in names:
            if len(file[name].shape) > 1:
                rows.append(stored.get_slice(file[name].key)[:1].float().flatten())
    return torch.cat(rows)
