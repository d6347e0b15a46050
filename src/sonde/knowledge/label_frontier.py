"""What is the most accuracy that each amount of money has bought? The efficient frontier, and the best within a budget.

Runs are sorted by cost (of equal cost the most accurate first). A run is on the frontier when it beats the best run on
it so far by more than 0.002 and no other run whose cost is within 5 % of its own is more accurate. Runs on different
test rows are refused. `averaged` makes one entry of the seeds of a cell first: a lucky seed is no frontier.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from sonde.errors import SondeError
from sonde.knowledge.label_ledger import total_cost
from sonde.knowledge.label_score import LabelRun
from sonde.stats.intervals import Interval, bootstrap_mean

LEAST_GAIN = 0.002
NEARBY = 0.05


class Costed(Protocol):
    """Anything with a cost, an accuracy and a test set: a `LabelRun`, a `MeanRun`."""

    @property
    def cost(self) -> Fraction:
        """What the labels cost."""
        ...

    @property
    def accuracy(self) -> float:
        """On the test rows."""
        ...

    @property
    def test(self) -> str:
        """What identifies the test rows."""
        ...


@dataclass(frozen=True)
class MeanRun:
    """A cell over its seeds: the mean accuracy, with a bootstrap interval over seeds where there are two or more."""

    method: str
    counts: Mapping[str, int]
    prices: Mapping[str, str]
    accuracy: float
    interval: Interval | None
    test: str
    seeds: int
    budget: float | None = None
    share: float | None = None

    @property
    def cost(self) -> Fraction:
        """What the labels of one seed cost."""
        return total_cost(self.counts, self.prices)

    def money_share(self, source: str) -> float:
        """Which part of the cost went to `source`; 0 where nothing was spent."""
        spent = total_cost({source: self.counts.get(source, 0)}, self.prices)
        return float(spent / self.cost) if self.cost else 0.0


def averaged(runs: Sequence[LabelRun], *, seed: int = 0) -> list[MeanRun]:
    """Runs of one method, purchase, budget and share over their seeds, in the order in which they first occur.

    Each seed may have test rows of its own (a planted task drawn anew), as long as all cells have the same ones: the
    test set of the mean is all of theirs.
    """
    cells: dict[tuple, list[LabelRun]] = {}
    for run in runs:
        key = (run.method, tuple(run.counts.items()), tuple(run.prices.items()), run.budget, run.share)
        cells.setdefault(key, []).append(run)
    made = []
    for own in cells.values():
        values = [run.accuracy for run in own]
        first = own[0]
        made.append(
            MeanRun(
                method=first.method,
                counts=first.counts,
                prices=first.prices,
                accuracy=float(np.mean(values)),
                interval=bootstrap_mean(values, seed=seed) if len(own) > 1 else None,
                test=" ".join(sorted({run.test for run in own})),
                seeds=len(own),
                budget=first.budget,
                share=first.share,
            )
        )
    return made


def frontier(runs: Sequence[Costed]) -> list[int]:
    """Places in `runs` of those on the efficient frontier, cheapest first; see the module.

    Raises `SondeError` for runs on different test rows.
    """
    check_one_test(runs)
    order = sorted(range(len(runs)), key=lambda i: (runs[i].cost, -runs[i].accuracy, i))
    costs = np.array([float(runs[i].cost) for i in order])
    accuracy = np.array([runs[i].accuracy for i in order])
    low = np.searchsorted(costs, costs * (1 - NEARBY) * (1 - 1e-12), side="left")
    high = np.searchsorted(costs, costs * (1 + NEARBY) * (1 + 1e-12), side="right")
    kept, best = [], -np.inf
    for place, number in enumerate(order):
        if accuracy[place] > best + LEAST_GAIN and accuracy[low[place] : high[place]].max() <= accuracy[place]:
            kept.append(number)
            best = accuracy[place]
    return kept


def best_within(runs: Sequence[MeanRun], budgets: Sequence[float]) -> dict[tuple[str, str, float], MeanRun]:
    """The most accurate cell that each budget pays for, by (method, prices as text, budget); of equals the cheapest.

    Raises `SondeError` for runs on different test rows.
    """
    check_one_test(runs)
    table: dict[tuple[str, str, float], MeanRun] = {}
    for budget in budgets:
        for run in sorted(runs, key=lambda run: (-run.accuracy, run.cost)):
            prices = ", ".join(f"{name} {price}" for name, price in run.prices.items())
            if run.cost <= Fraction(str(budget)):
                table.setdefault((run.method, prices, budget), run)
    return table


def check_one_test(runs: Sequence[Costed]) -> None:
    """Raise `SondeError` unless all runs were scored on the same test rows."""
    tests = {run.test for run in runs}
    if len(tests) > 1:
        raise SondeError(
            f"the runs were scored on {len(tests)} different test sets ({', '.join(sorted(tests)[:3])}): accuracies on "
            "different rows cannot be compared"
        )
