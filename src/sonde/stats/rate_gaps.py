"""Does a classifier find the members of a class equally often in every group? True-positive-rate gaps.

    gap_t = P(given = t | truth = t, group = 1) - P(given = t | truth = t, group = 0)

(Hardt, Price & Srebro 2016, equality of opportunity; De-Arteaga et al. 2019). Over classes it is summarised by the root
of the mean square, which is above 0 even for a fair classifier, by sampling alone: groups dealt anew within each class
show by how much.
"""

import numpy as np
from jaxtyping import Float, Int

from sonde.stats.intervals import Interval, bootstrap

_PERMUTATIONS = 200


def rate_gaps(
    given: Int[np.ndarray, " n"],
    truth: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    *,
    classes: int | None = None,
    groups: int | None = None,
) -> Float[np.ndarray, " classes"]:
    """The gap of every class 0, 1, …: of group 1 less group 0, or, with more groups, of the largest less the smallest.

    nan where a group has no rows of a class. Raises `ValueError` for columns of different lengths.
    """
    if not len(given) == len(truth) == len(group):
        raise ValueError(f"{len(given)} answers for {len(truth)} rows and {len(group)} groups: expected as many")
    n, k = classes or int(truth.max()) + 1, groups or int(group.max()) + 1
    cell = truth * k + group
    total = np.bincount(cell, minlength=n * k).reshape(n, k)
    right = np.bincount(cell, weights=given == truth, minlength=n * k).reshape(n, k)
    rate = np.where(total > 0, right / np.maximum(total, 1), np.nan)
    return rate[:, 1] - rate[:, 0] if k == 2 else rate.max(1) - rate.min(1)


def rms_gap(
    given: Int[np.ndarray, " n"],
    truth: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    *,
    draws: int = 500,
    seed: int = 0,
) -> tuple[Interval, Interval]:
    """Root mean square gap over classes (bootstrap over rows), and that of groups dealt anew within each class.

    Raises `ValueError` where no class has rows of every group.
    """
    classes, groups = int(truth.max()) + 1, int(group.max()) + 1

    def rms(given: np.ndarray, truth: np.ndarray, group: np.ndarray) -> float:
        found = rate_gaps(given, truth, group, classes=classes, groups=groups)
        found = found[np.isfinite(found)]
        return float(np.sqrt(np.mean(found**2))) if len(found) else np.nan

    if not np.isfinite(rms(given, truth, group)):
        raise ValueError("no class has rows of every group: there is no gap to measure")
    measured = bootstrap(rms, given, truth, group, draws=draws, seed=seed)
    rng = np.random.default_rng(seed)
    by_class = np.argsort(truth, kind="stable")
    dealt = np.empty(_PERMUTATIONS)
    for i in range(_PERMUTATIONS):
        shuffled = group.copy()
        shuffled[by_class] = group[np.lexsort((rng.random(len(truth)), truth))]
        dealt[i] = rms(given, truth, shuffled)
    low, high = np.quantile(dealt, [0.025, 0.975])
    return measured, Interval(float(np.median(dealt)), float(low), float(high), _PERMUTATIONS)
