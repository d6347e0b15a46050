"""Regimes, frontiers, surfaces, plans and salience: against closed forms, brute force and planted answers."""

from fractions import Fraction

import numpy as np
import pytest

from sonde.errors import SondeError
from sonde.knowledge.label_frontier import averaged, best_within, check_one_test, frontier
from sonde.knowledge.label_methods import Only, Sequential
from sonde.knowledge.label_planner import plan
from sonde.knowledge.label_regime import regime
from sonde.knowledge.label_salience import relative_salience, salience
from sonde.knowledge.label_score import LabelRun
from sonde.knowledge.label_surface import (
    PowerLaw,
    fit_gaussian_process,
    fit_power_law,
    rate_of_substitution,
    slopes,
)
from sonde.knowledge.label_sweep import accuracy_table, cells, sweep
from sonde.knowledge.planted_labels import planted_task

SHARES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
PRICES = {"weak": "1/10", "oracle": "1"}
LAW = PowerLaw(("weak", "oracle"), 0.05, 200.0, 0.9, (250.0,), (800.0,), (1.5,))


def run(weak, oracle, accuracy, *, seed=0, test="t", method="m", budget=None, share=None):
    return LabelRun(method, {"weak": weak, "oracle": oracle}, PRICES, seed, accuracy, accuracy, test, 1000, None,
                    budget, share)  # fmt: skip


def brute_force(runs):
    """The definition, run by run."""
    cost = [r.cost for r in runs]
    order = sorted(range(len(runs)), key=lambda i: (cost[i], -runs[i].accuracy, i))
    kept, best = [], float("-inf")
    for i in order:
        near = [r for j, r in enumerate(runs) if j != i and abs(cost[j] - cost[i]) <= Fraction(1, 20) * cost[i]]
        if runs[i].accuracy > best + 0.002 and all(r.accuracy <= runs[i].accuracy for r in near):
            kept.append(i)
            best = runs[i].accuracy
    return kept


def test_the_frontier_is_that_of_brute_force_on_200_random_sets_of_runs():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = rng.integers(1, 40)
        runs = [
            run(int(a), int(b), round(0.5 + 0.4 * float(x), 3))
            for a, b, x in zip(rng.integers(0, 200, n), rng.integers(0, 40, n), rng.random(n), strict=True)
        ]
        assert frontier(runs) == brute_force(runs)


def test_runs_on_different_test_rows_are_refused():
    runs = [run(1, 1, 0.6, test="first"), run(2, 2, 0.7, test="second")]
    for call in (frontier, check_one_test, lambda runs: best_within(averaged(runs), [10])):
        with pytest.raises(SondeError, match="2 different test sets"):
            call(runs)


def test_the_best_within_a_budget_costs_no_more_and_means_are_over_seeds():
    runs = [run(w, o, a + 0.01 * s, seed=s) for s in (0, 1) for w, o, a in ((10, 0, 0.6), (0, 5, 0.7), (50, 5, 0.8))]
    cells_ = averaged(runs)
    assert [round(c.accuracy, 3) for c in cells_] == [0.605, 0.705, 0.805] and cells_[0].seeds == 2
    table = best_within(cells_, [1, 5, 9.99, 10])
    found = {budget: one.accuracy for (_, _, budget), one in table.items()}
    assert found == pytest.approx({1: 0.605, 5: 0.705, 9.99: 0.705, 10: 0.805})
    assert cells_[2].money_share("weak") == 0.5


def curve(ends, peak, noise, seeds=5, seed=0):
    """Accuracies whose mean goes from one end over a peak at share .2 to the other."""
    rng = np.random.default_rng(seed)
    mean = np.interp(SHARES, [0, 0.2, 1], [ends[0], peak, ends[1]])
    return mean + noise * rng.standard_normal((seeds, len(SHARES)))


@pytest.mark.parametrize(
    ("ends", "peak", "noise", "verdict"),
    [
        ((0.60, 0.75), 0.63, 0.01, "quantity"),
        ((0.90, 0.77), 0.88, 0.01, "quality"),
        ((0.80, 0.75), 0.85, 0.01, "mixed"),
        ((0.80, 0.80), 0.80, 0.01, "undecided"),
        ((0.70, 0.74), 0.73, 0.08, "undecided"),
    ],
)
def test_the_regime_is_the_one_that_was_planted(ends, peak, noise, verdict):
    found = [regime(curve(ends, peak, noise, seed=s), SHARES).verdict for s in range(10)]
    assert found.count(verdict) >= 8
    opposite = {"quantity": "quality", "quality": "quantity"}.get(verdict)
    assert opposite not in found


def test_noise_alone_is_rarely_called_a_mixture():
    found = [regime(curve((0.8, 0.8), 0.8, 0.02, seed=s), SHARES).verdict for s in range(60)]
    assert found.count("mixed") <= 6


@pytest.mark.parametrize(
    ("accuracy", "shares", "message"),
    [
        (np.ones((1, 3)), (0, 0.5, 1), "1 seed says nothing of the noise"),
        (np.ones((3, 2)), (0, 1), "need 0, 1 and one between"),
        (np.ones((3, 2)), (0, 0.5, 1), "expected"),
    ],
)
def test_regimes_without_noise_or_ends_are_refused(accuracy, shares, message):
    with pytest.raises(SondeError, match=message):
        regime(accuracy, shares)


def grid_runs(law=LAW, noise=0.004, seeds=3, budgets=(8, 32, 128, 512, 1500)):
    rng = np.random.default_rng(0)
    return [
        run(w, o, float(law.predict(np.array([[w, o]]))[0] + noise * rng.standard_normal()), seed=s, budget=b, share=f)
        for s in range(seeds)
        for b in budgets
        for f in SHARES
        for w, o in [(int(10 * b * f), int(b * (1 - f)))]
    ]


def test_a_planted_surface_is_found_again():
    runs = grid_runs(noise=0.0)
    counts = np.array([[r.counts["weak"], r.counts["oracle"]] for r in runs], dtype=float)
    accuracy = np.array([r.accuracy for r in runs])
    law = fit_power_law(counts, accuracy, ("weak", "oracle"))
    assert law.rmse < 1e-3
    assert law.worth[0] == pytest.approx(250, rel=0.1)
    process = fit_gaussian_process(counts, accuracy, ("weak", "oracle"))
    assert np.abs(process.predict(counts) - accuracy).max() < 0.02
    assert (process.deviation(counts) < 0.05).all()


def test_the_rate_of_substitution_is_the_closed_form_and_the_law_is_monotone():
    at = {"weak": 1000.0, "oracle": 100.0}
    weak = 250 * 1.5 / 800 * (1 + 1000 / 800) ** -2.5  # oracle labels that the next weak label is worth
    assert rate_of_substitution(LAW, at, weak="weak", oracle="oracle") == pytest.approx(1 / weak, rel=0.02)
    grid = np.stack(np.meshgrid(np.geomspace(1, 1e5, 20), np.geomspace(1, 1e4, 20)), -1)
    table = LAW.predict(grid.reshape(-1, 2)).reshape(20, 20)
    assert (np.diff(table, axis=0) > 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert table.max() < 0.95
    assert slopes(LAW, at)["oracle"] > slopes(LAW, at)["weak"]


@pytest.mark.parametrize(("budget", "verdict"), [(16, "quantity"), (512, "mixed"), (5000, "quality")])
def test_the_plan_is_nearly_the_best_purchase_of_the_true_surface(budget, verdict):
    made = plan(grid_runs(), budget=budget, prices=PRICES, resamples=20)
    assert made.cost <= budget
    truth = {f: float(LAW.predict(np.array([[10 * budget * f, budget * (1 - f)]]))[0]) for f in np.linspace(0, 1, 201)}
    bought = float(LAW.predict(np.array([[made.counts["weak"], made.counts["oracle"]]], dtype=float))[0])
    assert bought > max(truth.values()) - 0.005
    assert made.regime == verdict
    assert (made.extrapolated > 1) == (budget > 1500)
    assert f"For {budget:,g}, buy" in made.words and ("extrapolation" in made.words) == (budget > 1500)


def test_a_process_plans_about_the_same():
    made = plan(grid_runs(), budget=512, prices=PRICES, resamples=8, surface="gaussian process")
    bought = float(LAW.predict(np.array([[made.counts["weak"], made.counts["oracle"]]], dtype=float))[0])
    assert bought > 0.805 and abs(made.accuracy.estimate - bought) < 0.02


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prices": {"weak": 0, "oracle": 1}}, "'weak' are free, so no budget limits them: give a cap"),
        ({"budget": 0.05}, "budget of 0.05 is below the cheapest label"),
        ({"prices": {"oracle": 1}}, "weighs two sources"),
        ({"runs": grid_runs(seeds=1)}, "1 seed of pilot runs"),
        ({"runs": [*grid_runs(), run(1, 1, 0.5, method="other")]}, "for one method, not for 2: m, other"),
        ({"runs": [*grid_runs()[:3], run(1, 1, 0.5, seed=1)]}, "cannot fix the 6 parameters"),
        ({"surface": "spline"}, "no surface 'spline'"),
    ],
    ids=range(7),
)
def test_plans_that_cannot_be_made_are_refused(given, message):
    with pytest.raises(SondeError, match=message):
        plan(**{"runs": grid_runs(), "budget": 100, "prices": PRICES, "resamples": 2, **given})


def test_free_weak_labels_are_all_taken_up_to_their_cap():
    made = plan(
        grid_runs(), budget=50, prices={"weak": 0, "oracle": 1}, caps={"weak": 4000, "oracle": 999}, resamples=3
    )
    assert made.counts == {"weak": 4000, "oracle": 50}


def test_a_sweep_buys_within_every_budget_and_does_not_repeat_equal_purchases():
    task = planted_task(pool=900, test=300, width=30, relevant=6)
    todo = cells(task, (8, 40), (0.0, 0.02, 0.5, 1.0))
    done = []
    runs = sweep(task, [Sequential(), Only()], todo, seed=2, report=lambda n, total: done.append((n, total)))
    assert done[-1] == (16, 16) and len(runs) == 16
    assert all(r.cost <= r.budget for r in runs)
    assert all(LabelRun(**{**r.to_json(), "notes": tuple(r.to_json()["notes"])}) == r for r in runs)
    table, shares = accuracy_table(runs, method="sequential", budget=40)
    assert table.shape == (1, 4) and shares == (0.0, 0.02, 0.5, 1.0)
    with pytest.raises(SondeError, match="no run of 'magic'"):
        accuracy_table(runs, method="magic", budget=40)


def test_a_sweep_asks_for_no_more_than_the_pool_holds():
    task = planted_task(pool=300, test=300, width=30, relevant=6)
    with pytest.raises(SondeError, match=r"pool of 300 rows holds: 400 of 'weak'"):
        cells(task, (40,), (0.0, 1.0))


def test_the_concept_of_fewer_features_is_the_more_salient():
    import torch

    from sonde.knowledge.label_problem import LabelSource, Problem

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 40, generator=g)
    x[:, 0] *= 3  # standardised away: what counts is how the rule is made
    easy = (x[:, 0] > 0).long()
    hard = (x[:, 1:9].prod(1) > 0).long()  # not linear: it cannot be learned from these features
    task = Problem(
        features=x[:2000],
        test_features=x[2000:],
        test_truth=easy[2000:].numpy(),
        sources=[LabelSource.of("rule", hard[:2000], price=0.1), LabelSource.of("truth", easy[:2000], price=1)],
    )
    weak, truth = salience(task, most=400, seeds=(0, 1))
    assert truth.area.high < 0.9 < weak.area.low
    assert relative_salience(truth, weak).low > 1
    with pytest.raises(SondeError, match="at least two seeds"):
        salience(task, seeds=(0,))
