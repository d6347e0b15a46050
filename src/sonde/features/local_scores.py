"""Scores of an explanation that rank windows: a number for each window, larger where it should be active.

The score is the area under the ROC curve of the windows in which the latent fires against those in which it is silent:
0.5 is chance, whatever the share of each.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sonde.stats.intervals import Interval
from sonde.stats.ranks import auroc, auroc_interval

_FEWEST = 8  # windows that an interval is drawn from


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a scorer gave each window, and whether the latent fires in it.

    Attributes:
        values: Float[np.ndarray, "n"], positives first, in the order of `LatentExamples.test` and `.negatives`.
        labels: Bool[np.ndarray, "n"].

    """

    values: Float[np.ndarray, " n"]
    labels: Bool[np.ndarray, " n"]

    @property
    def reason(self) -> str | None:
        """Why there is no score, or None."""
        if not self.labels.any() or self.labels.all():
            return "no window is " + ("silent" if self.labels.any() else "active")
        return None if np.isfinite(self.values).all() else "a window's value is not finite"

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve; None where `reason` says why not."""
        return None if self.reason else float(auroc(self.values, self.labels))

    def interval(self, *, seed: int = 0) -> Interval | None:
        """The same with its bootstrap interval over windows; None also where there are too few windows."""
        if self.reason or len(self.labels) < _FEWEST:
            return None
        return auroc_interval(self.values, self.labels, seed=seed)


def ranking(positives: Float[np.ndarray, " p"], negatives: Float[np.ndarray, " n"]) -> Ranking:
    """The ranking of two groups of values."""
    values = np.concatenate([positives, negatives]).astype(np.float64)
    return Ranking(values, np.arange(len(values)) < len(positives))
