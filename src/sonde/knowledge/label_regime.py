"""Is money better spent on many weak labels, on few good ones, or on both? With "undecided" as an answer.

At one budget, accuracy A(f) by the share f of the money that goes to weak labels, for several seeds:

    quantity    all of it: A(1) is clearly above A(0), and no mixture gains on A(1)
    quality     none of it: A(0) is clearly above A(1), and no mixture gains on A(0)
    mixed       the best mixture is clearly above both ends
    undecided   anything else: the intervals overlap where it matters

"Clearly": the 95 % bootstrap interval over seeds of the paired difference is above 0. The best mixture of a seed is
chosen on the other seeds, because the largest of several noisy means would always seem to gain. No mixture gains when
the estimated gain is below the tolerance and not clearly above 0. Regimes of Mallen & Belrose 2024 (arXiv:2410.13215).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.stats.intervals import Interval, bootstrap_mean, bootstrap_means

Verdict = Literal["quantity", "quality", "mixed", "undecided"]
TOLERANCE = 0.01
"""Accuracy that is not worth a second kind of label."""

WORDS: dict[Verdict, str] = {
    "quantity": "quantity counts: spend all on weak labels",
    "quality": "quality counts: spend all on oracle labels",
    "mixed": "a mixture is best: spend on both",
    "undecided": "undecided: the seeds do not tell the mixtures from the ends",
}


@dataclass(frozen=True)
class Regime:
    """The verdict and what it rests on.

    best_share: the mixture with the best mean. ends: A(1) - A(0). over_oracle, over_weak: the best mixture less A(0),
    less A(1). accuracy: by share, over seeds.
    """

    verdict: Verdict
    shares: tuple[float, ...]
    accuracy: tuple[Interval, ...]
    best_share: float
    ends: Interval
    over_oracle: Interval
    over_weak: Interval

    @property
    def words(self) -> str:
        """The verdict as a sentence's part."""
        return WORDS[self.verdict]


def regime(
    accuracy: Float[np.ndarray, "seeds shares"],
    shares: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Regime:
    """Decide from accuracies of every seed at every share. Shares include 0, 1 and at least one between.

    Raises `SondeError` for fewer than two seeds, shares without an end or a mixture, and shapes that do not fit.
    """
    table = np.asarray(accuracy, dtype=np.float64)
    given = tuple(float(share) for share in shares)
    if table.ndim != 2 or table.shape[1] != len(given):
        raise SondeError(f"accuracies of shape {table.shape} for {len(given)} shares: expected [seeds, shares]")
    if len(table) < 2:
        raise SondeError(f"{len(table)} seed says nothing of the noise: the regime needs at least 2, better 5")
    inside = [i for i, share in enumerate(given) if 0 < share < 1]
    if 0.0 not in given or 1.0 not in given or not inside:
        raise SondeError(f"the regime compares mixtures with both ends: shares {given} need 0, 1 and one between")
    zero, one = given.index(0.0), given.index(1.0)
    mixtures = table[:, inside]
    others = (mixtures.sum(0) - mixtures) / (len(table) - 1)
    best = mixtures[np.arange(len(table)), others.argmax(1)]
    ends = bootstrap_mean(table[:, one] - table[:, zero], seed=seed)
    over_oracle = bootstrap_mean(best - table[:, zero], seed=seed)
    over_weak = bootstrap_mean(best - table[:, one], seed=seed)
    return Regime(
        verdict=_verdict(ends, over_oracle, over_weak, tolerance),
        shares=given,
        accuracy=tuple(bootstrap_means(table, seed=seed)),
        best_share=given[inside[int(mixtures.mean(0).argmax())]],
        ends=ends,
        over_oracle=over_oracle,
        over_weak=over_weak,
    )


def _verdict(ends: Interval, over_oracle: Interval, over_weak: Interval, tolerance: float) -> Verdict:
    if over_oracle.low > 0 and over_weak.low > 0:
        return "mixed"
    if ends.low > 0 and over_weak.low <= 0 and over_weak.estimate < tolerance:
        return "quantity"
    if ends.high < 0 and over_oracle.low <= 0 and over_oracle.estimate < tolerance:
        return "quality"
    return "undecided"
