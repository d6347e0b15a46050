"""How good is a classifier that labels have bought? Accuracy, AUROC and accuracy at the base rate, with intervals.

Accuracy counts rows with log-odds above 0; calibrated accuracy puts the threshold at the quantile of the scores that
leaves as many rows above it as are truly of class 1, so that a wrong offset costs nothing. With C classes: the largest
logit, and the mean over classes of one-against-rest AUROC. A `LabelRun` is what is kept of one run: what was bought, at
which price, by which method with which settings and seed, scored on which test rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sonde.errors import SondeError
from sonde.knowledge.label_ledger import total_cost
from sonde.knowledge.label_problem import Outcome, Problem
from sonde.stats.intervals import Interval, bootstrap, wilson
from sonde.stats.ranks import auroc

_DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """Accuracy (Wilson), AUROC (bootstrap over rows) and calibrated accuracy (Wilson; None for more than two classes).

    The intervals are over test rows alone: seeds vary more, see `sonde.knowledge.label_regime`.
    """

    accuracy: Interval
    auroc: Interval
    calibrated: Interval | None


@dataclass(frozen=True)
class LabelRun:
    """One method on one purchase.

    counts: distinct labels by source. prices: as text, such as "1/10". share: of the money that was meant for the weak
    labels, or None. auroc, accuracy, calibrated: on the test rows that `test` identifies. settings: all that decides
    the numbers.
    """

    method: str
    counts: Mapping[str, int]
    prices: Mapping[str, str]
    seed: int
    accuracy: float
    auroc: float
    test: str
    test_rows: int
    calibrated: float | None = None
    budget: float | None = None
    share: float | None = None
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> Fraction:
        """What the labels cost, exactly."""
        return total_cost(self.counts, self.prices)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `LabelRun(**them)` is the same run."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def of(
        cls,
        method: str,
        outcome: Outcome,
        problem: Problem,
        *,
        seed: int,
        budget: float | None = None,
        share: float | None = None,
    ) -> "LabelRun":
        """What is kept of an outcome. Raises `SondeError` for scores that do not fit the test rows."""
        right, area, calibrated = rates(outcome.scores, problem.test_truth)
        return cls(
            method=method,
            counts={name: len(rows) for name, rows in outcome.bought.items()},
            prices={name: str(price) for name, price in problem.prices.items()},
            seed=seed,
            accuracy=right,
            auroc=area,
            calibrated=calibrated,
            test=problem.test_hash,
            test_rows=len(problem.test_truth),
            budget=budget,
            share=share,
            notes=outcome.notes,
            settings=dict(outcome.settings),
        )


def score(scores: Float[np.ndarray, "test *C"], truth: Int[np.ndarray, " test"], *, seed: int = 0) -> Score:
    """Accuracy, AUROC and calibrated accuracy with 95 % intervals. Raises `SondeError` for shapes that do not fit."""
    _check(scores, truth)
    n = len(truth)
    return Score(
        wilson(int(_right(scores, truth).sum()), n),
        bootstrap(_area, scores, truth, strata=truth, draws=_DRAWS, seed=seed),
        None if scores.ndim > 1 else wilson(int(_calibrated(scores, truth).sum()), n),
    )


def rates(scores: Float[np.ndarray, "test *C"], truth: Int[np.ndarray, " test"]) -> tuple[float, float, float | None]:
    """Accuracy, AUROC and calibrated accuracy without intervals. Raises `SondeError` as `score` does."""
    _check(scores, truth)
    calibrated = None if scores.ndim > 1 else float(_calibrated(scores, truth).mean())
    return float(_right(scores, truth).mean()), _area(scores, truth), calibrated


def _check(scores: np.ndarray, truth: np.ndarray) -> None:
    if scores.ndim not in (1, 2) or len(scores) != len(truth) or (scores.ndim == 2 and scores.shape[1] <= truth.max()):
        raise SondeError(f"scores of shape {scores.shape} for {len(truth)} test rows: expected [test] or [test, C]")


def _right(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return (scores > 0) == truth if scores.ndim == 1 else scores.argmax(1) == truth


def _area(scores: np.ndarray, truth: np.ndarray) -> float:
    if scores.ndim == 1:
        return float(auroc(scores, truth))
    rest = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return float(np.mean([auroc(rest[:, c], truth == c) for c in np.unique(truth)]))


def _calibrated(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    ones = int(truth.sum())
    predicted = np.zeros(len(truth), dtype=bool)
    predicted[np.argsort(-scores, kind="stable")[:ones]] = True
    return predicted == truth
