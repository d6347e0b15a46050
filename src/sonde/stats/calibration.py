"""Does a confidence of 70 % come true seven times in ten?

Expected calibration error: sort the answers into bins by confidence and average |share correct - mean confidence| over
the bins, weighted by their size (Naeini et al. 2015). Its value depends on the number of bins. The sweep takes bins of
equal mass, as many as keep the share correct from falling from one bin to the next, which a calibrated model's never
does (Roelofs et al. 2012.08668, algorithm 1): the least biased of the binned estimators.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike

from sonde.stats.intervals import Interval, wilson

_MOST_BINS = 2000
_ROUNDING = 1e-6  # a softmax in float32 may end this far above 1


@dataclass(frozen=True)
class Bin:
    """One row of a reliability table: answers with confidence in (`low`, `high`]."""

    low: float
    high: float
    n: int
    confidence: float
    """Mean confidence."""
    accuracy: Interval
    """Share correct, with Wilson's interval."""


def ece(confidence: ArrayLike | torch.Tensor, correct: ArrayLike | torch.Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of `confidence [n]` in [0, 1] and `correct [n]` (0 or 1), over bins of equal width.

    Raises `ValueError` for different lengths, no answer, values outside these ranges or fewer than one bin.
    """
    p, y = _answers(confidence, correct)
    return _gap(p, y, np.bincount(_equal_width(p, bins), minlength=bins), 1)


def sweep_ece(confidence: ArrayLike | torch.Tensor, correct: ArrayLike | torch.Tensor, *, norm: float = 1) -> float:
    """Sweep calibration error: equal-mass bins, the largest number of them that keeps accuracy rising, at most 2000.

    Takes what `ece` takes and raises as it does. Answers with the same confidence share their mean correctness, so that
    the order of the input does not matter. `norm` is p in `(sum_b n_b / n |accuracy_b - confidence_b|^p)^(1/p)`: 1
    compares with `ece`, 2 weighs large gaps more.
    """
    p, y = _answers(confidence, correct)
    values, group = np.unique(p, return_inverse=True)
    p = values[group]
    y = (np.bincount(group, weights=y) / np.bincount(group))[group]
    below = np.concatenate([[0], np.cumsum(y)])
    sizes = np.array([len(p)])
    for bins in range(2, min(len(p), _MOST_BINS) + 1):
        edges = np.arange(bins + 1) * len(p) // bins
        accuracy = np.diff(below[edges]) / np.diff(edges)
        if (np.diff(accuracy) < -1e-12).any():
            break
        sizes = np.diff(edges)
    return _gap(p, y, sizes, norm)


def reliability(
    confidence: ArrayLike | torch.Tensor, correct: ArrayLike | torch.Tensor, *, bins: int = 15
) -> list[Bin]:
    """The table behind a reliability diagram: bins of equal width that hold an answer. Raises as `ece` does."""
    p, y = _answers(confidence, correct)
    which = _equal_width(p, bins)
    n = np.bincount(which, minlength=bins)
    hits = np.bincount(which, weights=y, minlength=bins)
    sums = np.bincount(which, weights=p, minlength=bins)
    return [
        Bin(i / bins, (i + 1) / bins, int(n[i]), float(sums[i] / n[i]), wilson(round(hits[i]), int(n[i])))
        for i in np.flatnonzero(n)
    ]


def _gap(p: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], sizes: np.ndarray, norm: float) -> float:
    """Weighted norm of the gaps of consecutive bins of sorted answers."""
    sizes = sizes[sizes > 0]
    starts = np.cumsum(sizes) - sizes
    gaps = np.abs(np.add.reduceat(y - p, starts)) / sizes
    return float((sizes / len(p) @ gaps**norm) ** (1 / norm))


def _equal_width(p: Float[np.ndarray, " n"], bins: int) -> np.ndarray:
    if bins < 1:
        raise ValueError(f"{bins} bins: expected at least 1")
    return np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)


def _answers(
    confidence: ArrayLike | torch.Tensor, correct: ArrayLike | torch.Tensor
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Both as float64, sorted by confidence."""
    p, y = (
        (x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64))
        for x in (confidence, correct)
    )
    if p.ndim != 1 or p.shape != y.shape or not len(p):
        raise ValueError(f"confidences of shape {p.shape} and answers of shape {y.shape}: expected one of each, [n]")
    if not ((p >= 0) & (p <= 1 + _ROUNDING)).all():
        raise ValueError(f"confidences from {p.min()} to {p.max()}: expected probabilities")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("answers must be 0 (wrong) or 1 (correct)")
    order = np.argsort(p, kind="stable")
    return p[order].clip(max=1), y[order]
