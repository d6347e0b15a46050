"""How much of the way from the untrusted answer to the truth does a transferred probe go? Performance gap recovered.

    PGR = (AUROC - floor) / (ceiling - floor)

The ceiling is what a logistic probe at the last layer reads where labels are trusted (A -> A; A -> AH for transfers to
hard rows), the floor what one reads that learned the untrusted labels (B -> B or B -> BH), both scored on the truth
(Mallen et al. 2023, arXiv:2312.01037, section 4.2). Over several models or sets, AUROCs are averaged before the ratio:
a mean of ratios is ruled by the smallest gap. Where ceiling - floor < 0.05 there is no gap to recover.

The three AUROCs share base rows, which are resampled together: by counts, so that scores are sorted once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from sonde.errors import SondeError
from sonde.stats.intervals import Interval, percentile_interval
from sonde.stats.ranks import resampled_auroc

LEAST_GAP = 0.05


@dataclass(frozen=True)
class ScoredRows:
    """Scores of rows, larger for true, with their truth and the base row that each belongs to.

    Raises `SondeError` for other lengths, scores that are nan, and rows of one class.
    """

    scores: Float[np.ndarray, " n"]
    truth: Bool[np.ndarray, " n"]
    bases: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if not len(self.scores) == len(self.truth) == len(self.bases):
            raise SondeError(f"{len(self.scores)} scores, {len(self.truth)} truths and {len(self.bases)} base rows")
        if np.isnan(self.scores).any():
            raise SondeError(f"{int(np.isnan(self.scores).sum())} of {len(self.scores)} scores are nan")
        if len(np.unique(self.truth)) < 2:
            raise SondeError(f"all {len(self.truth)} rows are {bool(self.truth[:1].any())}: AUROC needs both classes")


def recovered_gap(auroc: ArrayLike, floor: ArrayLike, ceiling: ArrayLike) -> float:
    """PGR of AUROCs `[models ...]`, averaged before the ratio.

    Raises `SondeError` where the mean ceiling is less than 0.05 above the mean floor, `ValueError` for other shapes.
    """
    values = [np.asarray(one, dtype=np.float64) for one in (auroc, floor, ceiling)]
    if len({one.shape for one in values}) != 1:
        raise ValueError(f"AUROCs of shapes {', '.join(str(one.shape) for one in values)}: expected the same")
    top, low, high = (float(one.mean()) for one in values)
    _require_gap(low, high)
    return (top - low) / (high - low)


def recovered_gap_interval(
    models: Sequence[tuple[ScoredRows, ScoredRows, ScoredRows]],
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """PGR over models, each given as (transferred probe, floor, ceiling), with a bootstrap interval over base rows.

    A base row that occurs in several of a model's three is drawn into all of them. `n` counts base rows. The interval
    is about rows, not about what other models would give.

    Raises `SondeError` for no models and for a gap below 0.05.
    """
    if not models:
        raise SondeError("no models: a recovered gap needs at least one")
    top, low, high = _draws(models, draws, seed)
    _require_gap(low[0], high[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (top - low) / (high - low)
    return _interval(ratios, models, level)


def mean_auroc(models: Sequence[ScoredRows], *, draws: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """AUROC, averaged over models, with a bootstrap interval over the base rows of each.

    Raises `SondeError` for no models, and for so few base rows that many resamples lack a class.
    """
    if not models:
        raise SondeError("no models: an AUROC needs at least one")
    three = [(one,) for one in models]
    values = _draws(three, draws, seed)[0]
    return _interval(values, three, level)


def _draws(models: Sequence[Sequence[ScoredRows]], draws: int, seed: int) -> Float[np.ndarray, "k draws"]:
    """AUROCs of the rows as they are and of `draws` resamples of their base rows, averaged over models."""
    rng = np.random.default_rng(seed)
    found = []
    for parts in models:
        names = np.unique(np.concatenate([one.bases for one in parts]))
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
        counts = np.concatenate([np.ones((1, len(names))), drawn])
        each = [resampled_auroc(one.scores, one.truth, counts[:, np.searchsorted(names, one.bases)]) for one in parts]
        found.append(np.stack(each))
    return np.mean(found, axis=0)


def _interval(values: Float[np.ndarray, " draws"], models: Sequence[Sequence[ScoredRows]], level: float) -> Interval:
    """Of a value and those of its resamples."""
    units = sum(len(np.unique(np.concatenate([one.bases for one in parts]))) for parts in models)
    try:
        return percentile_interval(float(values[0]), values[1:], max(units, 2), level)
    except ValueError as error:
        raise SondeError(str(error)) from error


def _require_gap(floor: float, ceiling: float) -> None:
    if ceiling - floor < LEAST_GAP:
        raise SondeError(
            f"the ceiling ({ceiling:.3f}) is less than {LEAST_GAP} above the floor ({floor:.3f}): there is no gap to "
            "recover, since the untrusted labels are as good as the trusted ones"
        )
