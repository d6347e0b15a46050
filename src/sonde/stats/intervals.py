"""How far may a reported number be off? An estimate, its 95 % interval and the number of independent units behind it.

Shares of a count get Wilson's interval or the exact one (Clopper & Pearson 1934). Means, ratios of sums and any other
statistic get the percentile bootstrap over independent units: rows, or clusters (documents) of rows that depend on each
other. A token-weighted mean is the ratio sum of x / sum of tokens, both sums resampled together. The percentiles are
widened from a/2 to Phi(-sqrt(n / (n - 1)) t_{a/2, n-1}), because the plain bootstrap is too narrow for few units
(Hesterberg 2015, "What teachers should know about the bootstrap", section 4.3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

_CHUNK = 1 << 20  # resampled rows held at once
_GROUPS = 8192
_UNDEFINED = 0.05  # share of resamples on which a statistic may be undefined


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it, in the unit of the estimate.

    `n` counts the independent units: rows, or clusters where rows were clustered. Raises `ValueError` when a number is
    not finite, when `low <= estimate <= high` does not hold, when `n < 1` or when `level` is not between 0 and 1.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: Literal["bootstrap", "wilson", "exact", "bayes"] = "bootstrap"

    def __post_init__(self) -> None:
        if not np.isfinite([self.estimate, self.low, self.high]).all():
            raise ValueError(f"an interval needs finite numbers, not {self.low} <= {self.estimate} <= {self.high}")
        if not self.low <= self.estimate <= self.high:
            raise ValueError(f"the estimate {self.estimate} is outside its interval [{self.low}, {self.high}]")
        if self.n < 1:
            raise ValueError(f"an interval needs at least one unit, not n = {self.n}")
        _check_level(self.level)
        if self.method not in ("bootstrap", "wilson", "exact", "bayes"):
            raise ValueError(f"method {self.method!r} is none of bootstrap, wilson, exact, bayes")

    @property
    def bounds(self) -> tuple[float, float]:
        """`(low, high)`."""
        return self.low, self.high

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the closed interval."""
        return self.low <= value <= self.high

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two closed intervals share a point."""
        return self.low <= other.high and other.low <= self.high

    def scaled(self, factor: float) -> "Interval":
        """The interval in another unit, such as `1 / log(2)` from nats to bits. A negative factor swaps the ends."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.estimate * factor, low, high, self.n, self.level, self.method)


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share of `n` independent yes-or-no answers: right on average, also near 0 and 1.

    Raises `ValueError` unless `0 <= successes <= n` and `n >= 1`.
    """
    return _proportion(successes, n, level, "wilson")


def exact(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Clopper and Pearson's interval for a share of `n`: never below its level, so wider than Wilson's.

    Raises `ValueError` unless `0 <= successes <= n` and `n >= 1`.
    """
    return _proportion(successes, n, level, "exact")


def bootstrap_mean(
    x: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of `x [n]` with its bootstrap interval; `clusters [n]` (any labels) are resampled whole.

    With clusters this is still the mean over rows: a longer document weighs more. Raises `ValueError` for values that
    are not finite and for fewer than two units.
    """
    x = _rows(x, 1)
    return _ratios(x[:, None], np.ones((len(x), 1)), clusters, draws, seed, level)[0]


def bootstrap_means(
    x: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """`bootstrap_mean` of every column of `x [n, k]` (layers, say) with the same resamples for all of them."""
    x = _rows(x, 2)
    return _ratios(x, np.ones((len(x), 1)), clusters, draws, seed, level)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Ratio of sums `sum(numerator) / sum(denominator)`, both `[n]`, such as nats of a document and its bytes.

    Denominators are not negative and some are above 0. Raises `ValueError` as `bootstrap_mean` does.
    """
    top, bottom = _rows(numerator, 1), _rows(denominator, 1)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} numerators and {len(bottom)} denominators: expected as many")
    if (bottom < 0).any() or not bottom.any():
        raise ValueError("denominators must not be negative, and some must be above 0")
    return _ratios(top[:, None], bottom[:, None], clusters, draws, seed, level)[0]


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of `a - b`, both `[n]`, over pairs from the same unit. Raises `ValueError` as `bootstrap_mean` does."""
    a, b = _rows(a, 1), _rows(b, 1)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    return bootstrap_mean(a - b, clusters, draws=draws, seed=seed, level=level)


def bootstrap(
    statistic: Callable[..., Any],
    *arrays: ArrayLike,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    batched: bool = False,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Bootstrap interval of `statistic(*arrays)`; the arrays `[n, ...]` are resampled together along their first axis.

    Raises `ValueError` for arrays of different lengths, for fewer than two units, for `clusters` combined with `strata`
    or `batched`, and for a statistic that is undefined too often. The interval is stretched to hold the estimate where
    the statistic is so biased that its resamples do not.

    Args:
        statistic: from resampled arrays to a number; nan where it is undefined (at most 5 % of the resamples).
        arrays: one or more, of the same length.
        clusters: labels `[n]`; rows with the same label are drawn together.
        strata: labels `[n]`; rows are drawn within each label, so that no class of an AUROC disappears.
        batched: call `statistic` once with the arrays and then with arrays `[draws, n, ...]`; it returns `[draws]`.
        draws: number of resamples.
        seed: of the resamples.
        level: of the interval.

    """
    _check_level(level)
    data = [_array(a) for a in arrays]
    n = len(data[0]) if data else 0
    if any(len(a) != n for a in data):
        raise ValueError(f"arrays of different lengths: {[len(a) for a in data]}")
    if clusters is not None and (strata is not None or batched):
        raise ValueError("clusters cannot be combined with strata or batched: resamples have different lengths")
    estimate = float(statistic(*data))
    rng = np.random.default_rng(seed)
    if clusters is not None:
        label, units = _labels(clusters, n)
        order = np.argsort(label, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(label))[:-1])
        _check_units(units)
        values = np.empty(draws)
        for i in range(draws):
            rows = np.concatenate([parts[j] for j in rng.integers(units, size=units)])
            values[i] = statistic(*(a[rows] for a in data))
        return percentile_interval(estimate, values, units, level)
    _check_units(n)
    groups = [np.arange(n)]
    if strata is not None:
        label, _ = _labels(strata, n)
        groups = [np.flatnonzero(label == value) for value in range(label.max() + 1)]
    found = []
    for size in _chunks(draws, n):
        rows = np.concatenate([g[rng.integers(len(g), size=(size, len(g)))] for g in groups], axis=1)
        resampled = (
            [statistic(*(a[rows] for a in data))] if batched else [statistic(*(a[r] for a in data)) for r in rows]
        )
        found.append(np.asarray(resampled, dtype=np.float64).reshape(size))
    return percentile_interval(estimate, np.concatenate(found), n, level)


def _proportion(successes: int, n: int, level: float, method: Literal["wilson", "exact"]) -> Interval:
    from scipy.stats import binomtest  # a second of import that no other function here needs

    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share: expected 0 <= successes <= n and n >= 1")
    successes, n = int(successes), int(n)
    bounds = binomtest(successes, n).proportion_ci(confidence_level=level, method=method)
    share = successes / n
    # the bounds of a share of 0 or 1 may miss it by one rounding
    return Interval(share, min(float(bounds.low), share), max(float(bounds.high), share), n, level, method)


def _ratios(
    top: Float[np.ndarray, "n k"],
    bottom: Float[np.ndarray, "n 1"],
    clusters: ArrayLike | None,
    draws: int,
    seed: int,
    level: float,
) -> list[Interval]:
    _check_level(level)
    rng = np.random.default_rng(seed)
    label, units = (None, len(top)) if clusters is None else _labels(clusters, len(top))
    _check_units(units)
    estimates = top.sum(0) / bottom.sum()
    table = np.concatenate([top, bottom], axis=1)
    if label is not None:
        table = _sums(table, label, units)
    if units > _GROUPS:
        # units dealt at random into equal groups: the same variance, known to 1 / sqrt(2 * 8192) = 0.8 %
        table = _sums(table, rng.permutation(units) % _GROUPS, _GROUPS)
    size = len(table)
    values = []
    for rows in _chunks(draws, size):
        picked = rng.integers(size, size=(rows, size), dtype=np.int32) + size * np.arange(rows)[:, None]
        counts = np.bincount(picked.ravel(), minlength=rows * size).reshape(rows, size)
        sums = counts.astype(np.float64) @ table
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(sums[:, :-1] / sums[:, -1:])
    drawn = np.concatenate(values)
    return [percentile_interval(float(e), drawn[:, i], units, level) for i, e in enumerate(estimates)]


def _sums(table: Float[np.ndarray, "n k"], label: Int[np.ndarray, " n"], groups: int) -> Float[np.ndarray, "groups k"]:
    return np.stack([np.bincount(label, weights=column, minlength=groups) for column in table.T], axis=1)


def percentile_interval(estimate: float, values: Float[np.ndarray, " draws"], n: int, level: float = 0.95) -> Interval:
    """The interval of an estimate from its values on resamples of `n` units; nan where they are undefined.

    Raises `ValueError` where more than 5 % of them are.
    """
    defined = values[np.isfinite(values)]
    if len(defined) < (1 - _UNDEFINED) * len(values):
        raise ValueError(
            f"the statistic is undefined on {len(values) - len(defined)} of {len(values)} resamples of {n} units: "
            "more units are needed"
        )
    tail = float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2)))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), n, level, "bootstrap")


def _chunks(draws: int, row: int) -> Iterator[int]:
    if draws < 1:
        raise ValueError(f"draws is {draws}: expected at least 1")
    step = max(1, _CHUNK // row)
    return (min(step, draws - start) for start in range(0, draws, step))


def _labels(labels: ArrayLike, n: int) -> tuple[Int[np.ndarray, " n"], int]:
    labels = _array(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels of shape {labels.shape} for {n} rows: expected one label a row")
    values, label = np.unique(labels, return_inverse=True)
    return label, len(values)


def _array(x: ArrayLike | torch.Tensor) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
        return x.numpy()
    return np.asarray(x)


def _rows(x: ArrayLike, ndim: int) -> Float[np.ndarray, "..."]:
    rows = _array(x).astype(np.float64)
    if rows.ndim != ndim:
        raise ValueError(f"an array of shape {rows.shape}: expected {ndim} dimension{'s' * (ndim > 1)}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{np.size(rows) - np.isfinite(rows).sum()} of {rows.size} values are not finite")
    return rows


def _check_units(units: int) -> None:
    if units < 2:
        raise ValueError(f"{units} independent unit(s): a bootstrap interval needs at least 2 rows or clusters")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
