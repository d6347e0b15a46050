"""Every budget, every share of weak labels, every method: the runs that regimes, frontiers and plans are made from.

A cell is a budget and how its money is shared. Cells of one seed deal one permutation of the pool, so that their
purchases are nested; methods share the stages that they have in common. A cell whose purchase equals an earlier one of
the same method (a small budget rounds several shares to the same numbers) is not fitted again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.knowledge.label_ledger import Price, affordable, exact_price
from sonde.knowledge.label_problem import Method, Outcome, Problem, Purchase
from sonde.knowledge.label_score import LabelRun

BUDGETS = (8, 32, 128, 512, 1500)
SHARES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


@dataclass(frozen=True)
class Cell:
    """A budget and what it buys. share: of the money, for all sources but the last; the last one gets the rest."""

    budget: float
    share: float
    counts: Mapping[str, int]


def cells(problem: Problem, budgets: Sequence[float], shares: Sequence[float]) -> list[Cell]:
    """All of them. With more than two sources the share is divided equally among all but the last.

    Raises `SondeError` for shares outside [0, 1], for a budget below the cheapest label, for free labels, and for more
    labels than the pool holds, with the numbers.
    """
    names = [source.name for source in problem.sources]
    if len(names) < 2:
        raise SondeError(f"{problem.name} has one label source: there is nothing to share a budget between")
    made = []
    for budget in budgets:
        for share in shares:
            exact = exact_price(share, "the share of weak labels")
            if exact > 1:
                raise SondeError(f"the share of weak labels is {share}: expected 0 to 1")
            parts: dict[str, Price] = {name: exact / (len(names) - 1) for name in names[:-1]}
            counts = affordable(budget, {**parts, names[-1]: 1 - exact}, problem.prices)
            made.append(Cell(float(budget), float(share), counts))
    for cell in made:
        Purchase(problem, cell.counts)
    return made


def sweep(
    problem: Problem,
    methods: Sequence[Method],
    todo: Sequence[Cell],
    *,
    seed: int,
    report: Callable[[int, int], None] | None = None,
) -> list[LabelRun]:
    """Run every method on every cell with one seed. `report(done, total)` is called after each."""
    runs: list[LabelRun] = []
    total = len(methods) * len(todo)
    for method in methods:
        known: dict[tuple[tuple[str, int], ...], Outcome] = {}
        for cell in todo:
            key = tuple(cell.counts.items())
            if key not in known:
                purchase = Purchase(problem, cell.counts, seed=seed, budget=Fraction(str(cell.budget)))
                known[key] = method(problem, purchase, seed=seed)
            runs.append(LabelRun.of(method.name, known[key], problem, seed=seed, budget=cell.budget, share=cell.share))
            if report is not None:
                report(len(runs), total)
    return runs


def accuracy_table(
    runs: Sequence[LabelRun], *, method: str, budget: float
) -> tuple[Float[np.ndarray, "seeds shares"], tuple[float, ...]]:
    """Accuracy by seed and share of a method at a budget, and the shares, ascending.

    Raises `SondeError` where a seed lacks a share.
    """
    own = {
        (run.seed, run.share): run.accuracy
        for run in runs
        if run.method == method and run.budget == budget and run.share is not None
    }
    seeds = sorted({seed for seed, _ in own})
    shares = sorted({share for _, share in own})
    missing = [(seed, share) for seed in seeds for share in shares if (seed, share) not in own]
    if missing or not own:
        raise SondeError(
            f"no run of {method!r} at budget {budget:g}"
            + (f", seed {missing[0][0]}, share {missing[0][1]:g}" if missing else "")
        )
    return np.array([[own[seed, share] for share in shares] for seed in seeds]), tuple(shares)
