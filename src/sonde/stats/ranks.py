"""Where does a value stand among others, and do two orders agree? Ties share the mean of their ranks.

Rank of a target = 1 + number of larger logits. Spearman's rho is Pearson's correlation of the mid-ranks; Kendall's tau
is tau-b. AUROC is the share of pairs (positive, negative) in which the positive scores higher, a tie counting half: the
Mann-Whitney U over n1 n0.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor


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


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x), np.asarray(y)
    if a.ndim < 1 or a.shape != b.shape or a.shape[-1] < 2:
        raise ValueError(f"arrays of shapes {a.shape} and {b.shape}: expected the same, with at least 2 values")
    return a, b
