"""Chapters of the report on label economics that rest on a fitted surface, and the one on salience."""

from typing import Any

import numpy as np

from sonde.knowledge.label_planner import Plan, plan
from sonde.knowledge.label_salience import relative_salience
from sonde.knowledge.label_surface import fit_gaussian_process, fit_power_law, rate_of_substitution, slopes, table_of
from sonde.runs import chart_kinds
from sonde.runs.blocks import Chapter, Column, Figure, Table
from sonde.runs.finding import Control, Finding
from sonde.studies.label_pilot import Pilot, above_chance, in_words, with_interval


def plan_chapter(pilot: Pilot) -> Chapter:
    """What to buy, with the accuracy of every share."""
    made = plan(
        pilot.own,
        budget=str(pilot.config.budget),
        prices=pilot.prices,
        caps=pilot.caps,
        chance=pilot.chance,
        seed=pilot.config.seed,
    )
    ends = {"weak": made.by_share[-1][1], "oracle": made.by_share[0][1]}
    better = max(ends, key=lambda name: ends[name].estimate)
    what = "weak labels alone" if better == "weak" else "oracle labels alone"
    finding = Finding.of(
        made.accuracy,
        id="plan.accuracy",
        chapter="plan",
        sentence=made.words,
        metric="predicted accuracy of the recommended purchase",
        better="higher",
        control=Control.of(f"predicted for {what}", ends[better]),
        command=pilot.command,
        figures=("plan.shares",),
        tables=("plan.offers",),
    )
    rows = [{"share": share, "what": "predicted", **above_chance(i, pilot.chance)} for share, i in made.by_share]
    rows += [{"share": share, "what": what, **above_chance(ends[better], pilot.chance)} for share in (0.0, 1.0)]
    bought = ", ".join(f"{count:,} {name}" for name, count in made.counts.items())
    chart = chart_kinds.lines(
        rows,
        x="share",
        y="points",
        series="what",
        low="low",
        high="high",
        control=(what,),
        title=f"For {made.budget:,g}, buy {bought} labels",
        subtitle="Accuracy by share of the money for weak labels, from the fitted surface; band: 95 % over seeds",
        x_title="share of the money for weak labels",
        y_title="accuracy above chance (points)",
    )
    step = max(1, len(made.by_share) // 10)
    weak, oracle = pilot.sources
    offers = []
    for share, i in made.by_share[::step]:
        n_weak = int(made.budget * share / float(pilot.prices[weak]) + 1e-9)
        n_oracle = int(made.budget * (1 - share) / float(pilot.prices[oracle]) + 1e-9)
        offers.append([share, n_weak, n_oracle, i.estimate, i.low, i.high])
    chances = ", ".join(f"{name} {chance:.2f}" for name, chance in made.chances.items())
    return Chapter(
        id="plan",
        question=f"What should {made.budget:,g} buy, when a weak label costs {pilot.prices[weak]} and a true one "
        f"{pilot.prices[oracle]}?",
        answer=made.words,
        findings=[finding],
        blocks=[
            Figure(id="plan.shares", chart=chart, caption="Predicted accuracy by share of the money for weak labels."),
            Table(
                id="plan.offers",
                caption=f"Purchases for {made.budget:,g} and what the surface predicts",
                columns=["share for weak labels", f"{weak} labels", f"{oracle} labels", "accuracy", "low", "high"],
                rows=offers,
            ),
        ],
        not_shown=(
            "The interval is over seeds of the pilot, not over forms of the surface: a later chapter says how well "
            "that fits. A plan is for the method and the features of the pilot; another model learns at another pace."
        ),
        how=(
            f"A saturating power law through {len(pilot.own)} runs of the method {pilot.method!r}, fitted anew to 100 "
            f"resamples of their {pilot.config.seeds} seeds; the share is sought on a grid of 41. Chances of the "
            f"regimes: {chances}. The range of the best share buys from {in_words(made.fewest_weak)} to "
            f"{in_words(made.most_weak)}."
        ),
    )


def worth_chapter(pilot: Pilot) -> Chapter:
    """What one label is worth in others."""
    weak, oracle = pilot.sources
    counts, accuracy = table_of(pilot.own, pilot.sources)
    law = fit_power_law(counts, accuracy, pilot.sources, chance=pilot.chance)
    process = fit_gaussian_process(counts, accuracy, pilot.sources)
    spread = float(np.sqrt(np.mean((process.predict(counts) - accuracy) ** 2)))
    ratio = float(pilot.prices[oracle] / pilot.prices[weak])
    plans: dict[float, Plan] = {
        budget: plan(pilot.own, budget=str(budget), prices=pilot.prices, seed=pilot.config.seed, resamples=20)
        for budget in pilot.budgets
    }
    rows = []
    for budget, made in plans.items():
        slope = slopes(law, made.counts)
        rows.append([
            f"{budget:,g}", made.counts[weak], made.counts[oracle], made.accuracy.estimate,
            1e4 * slope[weak], 1e4 * slope[oracle], made.substitution,
            rate_of_substitution(process, made.counts, weak=weak, oracle=oracle), ratio,
        ])  # fmt: skip
    grid = [np.geomspace(1, counts[:, k].max() + 1, 9).round() - 1 for k in range(2)]
    table = np.array([[a, b] for b in grid[1] for a in grid[0]])
    heat = chart_kinds.heat(
        [{"weak": i % 9, "oracle": i // 9, "accuracy": float(value)} for i, value in enumerate(law.predict(table))],
        x="weak",
        y="oracle",
        value="accuracy",
        title=f"All weak labels there are would be worth {law.worth[0]:,.0f} oracle labels",
        subtitle="Accuracy by numbers of labels, from the fitted power law",
        x_title=f"{weak} labels",
        y_title=f"{oracle} labels",
        x_labels=[f"{n:,.0f}" for n in grid[0]],
        y_labels=[f"{n:,.0f}" for n in grid[1]],
    )
    return Chapter(
        id="worth",
        question="How many weak labels is an oracle label worth?",
        answer=(
            f"In the fitted surface weak labels are together never worth more than {law.worth[0]:,.0f} oracle labels. "
            f"An oracle label costs {ratio:g} weak ones: it is the better buy where it is worth more than that."
        ),
        blocks=[
            Figure(id="worth.surface", chart=heat, caption="Predicted accuracy by numbers of weak and oracle labels."),
            Table(
                id="worth.substitution",
                caption="What further labels add at the purchase recommended for each budget",
                columns=["budget", weak, oracle, "accuracy",
                         Column(name="100 more weak", unit="points"), Column(name="100 more oracle", unit="points"),
                         "rate, power law", "rate, Gaussian process", "ratio of prices"],
                rows=rows,
            ),
        ],
        not_shown="Slopes are those of a fitted surface: where it fits badly, so do they.",
        how=(
            f"Power law: root mean square error {law.rmse:.3f} over {len(accuracy)} runs; Gaussian process on log "
            f"counts: {spread:.3f}. The rate is (dA/dn_oracle) / (dA/dn_weak). Without a number the surface sees no "
            "use in a further weak label there."
        ),
    )  # fmt: skip


def salience_chapter(pilot: Pilot) -> Chapter:
    """How soon each concept is learned."""
    weak, truth = pilot.curves
    ratio = relative_salience(truth, weak)
    chance = float(np.log(len(pilot.problem.classes)))
    rows: list[dict[str, Any]] = []
    for curve in pilot.curves:
        rows += [
            {"place": i, "kl": one.estimate, "low": one.low, "high": one.high, "concept": f"{curve.concept} labels"}
            for i, one in enumerate(curve.divergence)
        ]
    rows += [
        {"place": i, "kl": chance, "low": chance, "high": chance, "concept": "chance"} for i in (0, len(weak.rows) - 1)
    ]
    sooner = "the truth" if ratio.low > 1 else "the weak rule" if ratio.high < 1 else "neither"
    finding = Finding.of(
        ratio,
        id="salience.ratio",
        chapter="salience",
        sentence=f"From the same number of labels {sooner} is learned sooner.",
        metric="area under the learning curve of the weak rule over that of the truth",
        control=Control("equal salience", 1.0),
        command=pilot.command,
        figures=("salience.curves",),
    )
    chart = chart_kinds.lines(
        rows,
        x="place",
        y="kl",
        series="concept",
        low="low",
        high="high",
        control=("chance",),
        title=f"Learned sooner: {sooner}",
        subtitle="Divergence from the concept on held-out rows by number of its labels; band: 95 % over seeds",
        x_title="labels",
        y_title="KL divergence (nats)",
        x_labels=[f"{n:,}" for n in weak.rows],
    )
    return Chapter(
        id="salience",
        question="Is the truth easier to learn here than the weak labeller's rule?",
        answer=f"{finding.sentence} The ratio of the areas is {with_interval(ratio)}.",
        findings=[finding],
        blocks=[Figure(id="salience.curves", chart=chart, caption="Learning curves of the weak rule and the truth.")],
        not_shown="Salience alone is no plan: prices and the weak labels' errors decide too.",
        how=(
            "Both concepts as hard labels, logistic regression from nothing, areas over the log of the number of "
            "labels as a share of chance. This reads labels of the pool without paying: a diagnosis of the pilot."
        ),
    )
