"""The chapters of the report on label economics; here the regimes and the frontier."""

from collections.abc import Sequence
from typing import Any

from sonde.knowledge.label_frontier import MeanRun, averaged, best_within, frontier
from sonde.knowledge.label_regime import Regime, regime
from sonde.knowledge.label_sweep import accuracy_table
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.stats.intervals import Interval
from sonde.studies.label_pilot import Pilot, above_chance, with_interval
from sonde.studies.label_plan_chapters import plan_chapter, salience_chapter, worth_chapter

_CITE = "Mallen & Belrose 2024, arXiv:2410.13215"


def all_chapters(pilot: Pilot) -> list[Chapter]:
    """In the order of the report."""
    return [
        plan_chapter(pilot),
        _regime_chapter(pilot),
        _frontier_chapter(pilot),
        worth_chapter(pilot),
        salience_chapter(pilot),
    ]


def _regime_chapter(pilot: Pilot) -> Chapter:
    decided = {
        budget: regime(*accuracy_table(pilot.runs, method=pilot.method, budget=budget)) for budget in pilot.budgets
    }
    findings = [_regime_finding(pilot, budget, one) for budget, one in decided.items()]
    name = f"{pilot.control_budget:,g}, weak labels shuffled"
    empty = regime(*accuracy_table(pilot.control, method=pilot.method, budget=pilot.control_budget))
    # From all weak to none: at that end the lines are apart, where their names stand.
    rows = [
        {"place": place, "budget": line, **above_chance(i, pilot.chance)}
        for line, one in (*((f"{budget:,g}", one) for budget, one in decided.items()), (name, empty))
        for place, i in enumerate(reversed(one.accuracy))
    ]
    verdicts = {budget: one.verdict for budget, one in decided.items()}
    chart = chart_kinds.lines(
        rows,
        x="place",
        y="points",
        series="budget",
        low="low",
        high="high",
        control=(name,),
        title=_regime_title(verdicts),
        subtitle=f"Accuracy by share of the budget for weak labels; band: 95 % over {pilot.config.seeds} seeds",
        x_title="share of the money for weak labels",
        y_title="accuracy above chance (points)",
        x_labels=[f"{share:g}" for share in reversed(decided[pilot.budgets[0]].shares)],
    )
    shares = decided[pilot.budgets[0]].shares
    return Chapter(
        id="regimes",
        question="At which budgets does quantity count, and at which quality?",
        answer=(
            f"{_regime_title(verdicts)}. Quantity is all money for weak labels, quality all for oracle labels; with "
            f"weak labels that mean nothing the verdict at {pilot.control_budget:,g} is {empty.verdict}."
        ),
        findings=findings,
        blocks=[
            Figure(id="regimes.shares", chart=chart, caption="Accuracy by share of weak labels, one line a budget."),
            Table(
                id="regimes.accuracy",
                caption=f"Mean accuracy of {pilot.method} by budget and share, over seeds",
                columns=["budget", *(Column(name=f"{share:g}") for share in shares), "regime"],
                rows=[
                    [f"{budget:,g}", *(i.estimate for i in one.accuracy), one.verdict]
                    for budget, one in decided.items()
                ]
                + [[name, *(i.estimate for i in empty.accuracy), empty.verdict]],
            ),
            Table(
                id="regimes.differences",
                caption="What the verdicts rest on: differences of accuracy with 95 % intervals",
                columns=["budget", "best mixture", "weak alone - oracle alone", "mixture - oracle alone",
                         "mixture - weak alone"],
                rows=[
                    [f"{budget:,g}", one.best_share, *map(with_interval, (one.ends, one.over_oracle, one.over_weak))]
                    for budget, one in decided.items()
                ],
            ),
        ],
        not_shown=(
            "The shares between those tried; and a regime is one of a method, a price and a task: better features or a "
            "dearer weak label move its borders."
        ),
        how=(
            f"Every cell buys from one permutation of the pool of {pilot.problem.size:,} rows, trains with "
            f"{pilot.method!r} and is scored on {len(pilot.problem.test_truth):,} other rows. The best mixture of a "
            "seed is chosen on the other seeds; differences are paired by seed. In the control the weak labels are "
            f"dealt anew among the rows. After {_CITE}."
        ),
    )  # fmt: skip


def _regime_finding(pilot: Pilot, budget: float, one: Regime) -> Finding:
    """The difference that decided: mixture over the better end, or one end over the other."""
    weak, oracle = one.accuracy[-1].estimate, one.accuracy[0].estimate
    if one.verdict == "mixed":
        measured = one.over_oracle if one.over_oracle.estimate < one.over_weak.estimate else one.over_weak
        metric = "accuracy of the best mixture less that of the better end"
    elif one.verdict == "quality":
        measured, metric = one.ends.scaled(-1), "accuracy of oracle labels alone less that of weak labels alone"
    else:
        measured, metric = one.ends, "accuracy of weak labels alone less that of oracle labels alone"
    best = max(i.estimate for i in one.accuracy)
    return Finding.of(
        measured,
        id=f"regimes.budget-{budget:g}",
        chapter="regimes",
        sentence=(
            f"At a budget of {budget:,g}, {one.words}; accuracy is {oracle:.3f} with oracle labels alone, {weak:.3f} "
            f"with weak labels alone and {best:.3f} at the best share."
        ),
        metric=metric,
        better="higher",
        control=Control("no difference", 0.0),
        command=pilot.command,
        figures=("regimes.shares",),
        tables=("regimes.accuracy", "regimes.differences"),
    )


def _regime_title(verdicts: dict[float, str]) -> str:
    parts: dict[str, list[str]] = {}
    for budget, verdict in verdicts.items():
        parts.setdefault(verdict, []).append(f"{budget:,g}")
    words = {
        "quantity": "Quantity counts",
        "quality": "quality",
        "mixed": "a mixture is best",
        "undecided": "undecided",
    }
    title = ", ".join(f"{words[verdict]} at {', '.join(found)}" for verdict, found in parts.items())
    return title[0].upper() + title[1:]


def _frontier_chapter(pilot: Pilot) -> Chapter:
    cells = averaged(pilot.runs)
    kept = [cells[i] for i in frontier(cells)]
    weak, oracle = pilot.sources
    within = best_within(cells, pilot.budgets)
    only = {
        "weak labels alone": [c for c in cells if c.method == pilot.method and c.share == 1.0],
        "oracle labels alone": [c for c in cells if c.method == pilot.method and c.share == 0.0],
    }
    rows = []
    for (method, _, budget), cell in within.items():
        rows.append(_point(pilot, budget, cell, method))
    for name, own in only.items():
        rows += [_point(pilot, budget, _within(own, budget), name) for budget in pilot.budgets]
    top = kept[-1]
    chart = chart_kinds.lines(
        rows,
        x="place",
        y="points",
        series="method",
        low="low",
        high="high",
        control=tuple(only),
        title=f"The most accurate purchase reaches {top.accuracy:.3f} for {float(top.cost):g}",
        subtitle="The best mean accuracy within each budget, by method; band: 95 % over seeds",
        x_title="budget",
        y_title="accuracy above chance (points)",
        x_labels=[f"{budget:,g}" for budget in pilot.budgets],
    )
    gains = [cell for cell in kept if 0 < cell.money_share(weak) < 1]
    return Chapter(
        id="frontier",
        question="What is the most accuracy that each amount of money has bought?",
        answer=(
            f"{len(kept)} of {len(cells)} purchases are on the frontier, from {kept[0].accuracy:.3f} for "
            f"{float(kept[0].cost):g} to {top.accuracy:.3f} for {float(top.cost):g}; {len(gains)} of them mix."
        ),
        blocks=[
            Figure(id="frontier.within", chart=chart, caption="Best accuracy within each budget, by method."),
            Table(
                id="frontier.kept",
                caption="The efficient frontier",
                columns=["cost", "accuracy", "low", "high", "method", f"{weak} labels", f"{oracle} labels",
                         "share for weak labels"],
                rows=[
                    [float(c.cost), c.accuracy, *(c.interval.bounds if c.interval else (None, None)), c.method,
                     c.counts.get(weak, 0), c.counts.get(oracle, 0), c.money_share(weak)]
                    for c in kept
                ],
            ),
            Table(
                id="frontier.best",
                caption="Best within budget, by method: accuracy, and the share of the money for weak labels",
                columns=["method", *(f"{budget:,g}" for budget in pilot.budgets)],
                rows=[
                    [method, *(f"{own[b].accuracy:.3f} ({own[b].money_share(weak):.2f})" for b in pilot.budgets)]
                    for method, own in _by_method(within).items()
                ],
            ),
        ],
        not_shown=(
            "The best of many means is a little too good: the same purchase again would on average score lower."
        ),
        how=(
            "Means over seeds, sorted by cost; kept if better than the best so far by more than 0.002 and if none "
            "within 5 % of the cost is better. Labels are counted once however often they are used, held-out ones too."
        ),
    )  # fmt: skip


def _within(cells: Sequence[MeanRun], budget: float) -> MeanRun:
    return max((cell for cell in cells if float(cell.cost) <= budget + 1e-9), key=lambda cell: cell.accuracy)


def _by_method(within: dict[tuple[str, str, float], MeanRun]) -> dict[str, dict[float, MeanRun]]:
    found: dict[str, dict[float, MeanRun]] = {}
    for (method, _, budget), cell in within.items():
        found.setdefault(method, {})[budget] = cell
    return found


def _point(pilot: Pilot, budget: float, cell: MeanRun, name: str) -> dict[str, Any]:
    exact = Interval(cell.accuracy, cell.accuracy, cell.accuracy, cell.seeds)
    shown = above_chance(cell.interval or exact, pilot.chance)
    return {"place": pilot.budgets.index(budget), "method": name, **shown}
