"""Where does a value stand among others, and do two orders agree? Ties share the mean of their ranks.

Rank of a target = 1 + number of larger logits. Spearman's rho is Pearson's correlation of the mid-ranks; Kendall's tau
is tau-b. AUROC is the share of pairs (positive, negative) in which the positive scores higher, a tie counting half: the
Mann-Whitney U over n1 n0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.stats.intervals import Interval, percentile_interval

_CHUNK = 1 << 22  # resampled rows held at once


def rank_of(logits: Float[Tensor, "... vocab"], target: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Rank of the target among the logits: 1 is the top; tokens that tie with it do not push it down.

    Raises `ValueError` for targets of another shape.
    """
    if logits.shape[:-1] != target.shape:
        raise ValueError(f"targets of shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}")
    own = logits.gather(-1, target[..., None].long())
    return 1 + (logits > own).sum(-1)


def midranks(x: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    """Ranks from 1 over the last axis; ties share their mean rank. Raises `ValueError` for nan, which has no rank."""
    from scipy.stats import rankdata

    x = np.asarray(x)
    if x.dtype.kind == "f" and np.isnan(x).any():
        raise ValueError(f"{np.isnan(x).sum()} of {x.size} values are nan and have no rank")
    return rankdata(x, axis=-1)


def spearman(x: ArrayLike, y: ArrayLike) -> Float[np.ndarray, "..."]:
    """Spearman's rank correlation over the last axis of `x` and `y [..., n]`; nan where one of them is constant.

    Raises `ValueError` for different lengths, fewer than two values or nan.
    """
    a, b = _pair(x, y)
    a, b = midranks(a), midranks(b)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of `x` and `y [n]`; nan where one of them is constant. Raises `ValueError` as `spearman` does."""
    from scipy.stats import kendalltau

    a, b = _pair(x, y)
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("nan has no rank")
    return float(np.asarray(kendalltau(a, b))[0])


def auroc(scores: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, "..."]:
    """Area under the ROC curve over the last axis of `scores` and `labels [..., n]`; labels are 0 and 1 or bool.

    0.5 is chance. Raises `ValueError` when a class is missing, for other labels, and for scores that are nan.
    """
    s, y = _pair(scores, labels)
    positive: Bool[np.ndarray, "... n"] = y.astype(bool)
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be 0 and 1: which class is the positive one?")
    ones = positive.sum(-1)
    zeros = positive.shape[-1] - ones
    if not (np.all(ones) and np.all(zeros)):
        raise ValueError(f"AUROC needs both classes: given {np.min(ones)} positive and {np.min(zeros)} negative")
    larger = (midranks(s) * positive).sum(-1) - ones * (ones + 1) / 2
    return larger / (ones * zeros)


def auroc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """AUROC of `scores` and `labels [n]` with its bootstrap interval; rows of one group are drawn together.

    Raises `ValueError` as `auroc` does: where a class is missing there is no AUROC, not one of 0.5.
    """
    return auroc_intervals(np.asarray(scores)[None], labels, groups=groups, draws=draws, seed=seed, level=level)[0]


def auroc_intervals(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """`auroc_interval` of every row of `scores [k, n]` (layers, say), with the same resamples for all of them.

    Rows are sorted once. A resample counts how often each unit was drawn, and its AUROC is a cumulative sum of counts
    in the order of the scores. Raises `ValueError` as `auroc` does, and where more than 5 % of the resamples lack a
    class, as they do with few groups.
    """
    s, y = np.asarray(scores), np.asarray(labels)
    if s.ndim != 2 or y.ndim != 1:
        raise ValueError(f"scores of shape {s.shape} and labels of shape {y.shape}: expected (k, n) and (n)")
    estimates = auroc(s, np.broadcast_to(y, (len(s), len(y))) if len(y) == s.shape[1] else y)
    units, unit = len(y), np.arange(len(y))
    if groups is not None:
        given = np.asarray(groups)
        if given.shape != y.shape:
            raise ValueError(f"groups of shape {given.shape} for {len(y)} rows: expected one for each")
        kinds, unit = np.unique(given, return_inverse=True)
        units = len(kinds)
    if units < 2:
        raise ValueError(f"{units} independent unit(s): a bootstrap interval needs at least 2 rows or groups")
    ordered = [_Ordered.of(row, y.astype(bool)) for row in s]
    rng = np.random.default_rng(seed)
    values = np.empty((len(s), draws))
    step = max(1, _CHUNK // max(units, len(y)))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = rng.multinomial(units, np.full(units, 1 / units), size=size)[:, unit].astype(np.float64)
        for place, order in enumerate(ordered):
            values[place, start : start + size] = order.auroc(drawn)
    return [percentile_interval(float(e), v, units, level) for e, v in zip(estimates, values, strict=True)]


def resampled_auroc(
    scores: ArrayLike, labels: ArrayLike, counts: Float[np.ndarray, "draws n"]
) -> Float[np.ndarray, " draws"]:
    """AUROC of `scores` and `labels [n]` with every row counted so often, for each row of `counts`.

    nan where a class is counted nowhere. Rows are sorted once.
    """
    return _Ordered.of(np.asarray(scores), np.asarray(labels).astype(bool)).auroc(counts)


@dataclass(frozen=True)
class _Ordered:
    """Rows in the order of their scores: the negative ones, and below how many (and up to how many) a positive is."""

    negative: Int[np.ndarray, " zeros"]
    positive: Int[np.ndarray, " ones"]
    below: Int[np.ndarray, " ones"]
    upto: Int[np.ndarray, " ones"]

    @staticmethod
    def of(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> "_Ordered":
        zeros = np.flatnonzero(~positive)
        zeros = zeros[np.argsort(scores[zeros], kind="stable")]
        ones = np.flatnonzero(positive)
        sides = (np.searchsorted(scores[zeros], scores[ones], side=side) for side in ("left", "right"))
        return _Ordered(zeros, ones, *sides)

    def auroc(self, counts: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        """AUROC with every row counted so often; nan where a class was not drawn."""
        sums = np.cumsum(counts[:, self.negative], axis=1)
        sums = np.concatenate([np.zeros((len(counts), 1)), sums], axis=1)
        ones = counts[:, self.positive]
        larger = (ones * (sums[:, self.below] + sums[:, self.upto])).sum(1) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return larger / (ones.sum(1) * sums[:, -1])


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x), np.asarray(y)
    if a.ndim < 1 or a.shape != b.shape or a.shape[-1] < 2:
        raise ValueError(f"arrays of shapes {a.shape} and {b.shape}: expected the same, with at least 2 values")
    return a, b
