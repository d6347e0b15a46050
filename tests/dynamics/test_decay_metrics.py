"""Numbers of decay on curves whose answer is known, and score matrices by hand."""

import numpy as np
import pytest
import torch

from sonde.dynamics.decay_metrics import (
    area_under_decay,
    compare_budgets,
    fits,
    forgetting_matrix,
    half_life,
    plasticity,
    reached,
    savings,
    skill,
    stability_gap,
)
from sonde.errors import SondeError
from sonde.nets.loop import log_steps
from sonde.nets.transformer import Transformer, TransformerShape

GRID = log_steps(2048, per_octave=2)


@pytest.mark.parametrize("tau", [5.0, 30.0, 200.0, 1000.0])
def test_the_half_life_of_a_known_decay_is_recovered_to_two_percent(tau):
    found = half_life(GRID, 2 ** (-np.array(GRID) / tau))
    assert found.value == pytest.approx(tau, rel=0.02)
    assert not found.censored and found.crossings == 1


def test_a_curve_that_stays_above_is_censored_and_says_so():
    found = half_life(GRID, np.full(len(GRID), 0.9))
    assert found.censored and str(found) == ">2048"
    assert found.time == 2048


def test_several_crossings_give_the_first_and_a_flag():
    found = half_life([0, 1, 3, 7, 15], [1.0, 0.25, 0.75, 0.25, 0.1])
    assert found.crossings == 2
    assert found.value == pytest.approx(2 ** (2 / 3) - 1)
    assert "first of 2 crossings" in str(found)


def test_a_skill_that_was_never_there_cannot_decay():
    with pytest.raises(SondeError, match="decay of a skill the model does not have"):
        skill([3.0, 4.0], floor=2.5)
    with pytest.raises(SondeError, match="decay of a skill the model does not have"):
        half_life([0, 1], [0.2, 0.1])


def test_skill_runs_from_one_to_below_zero_unclipped():
    np.testing.assert_allclose(skill([1.0, 2.0, 3.0, 5.0], floor=3.0), [1.0, 0.5, 0.0, -1.0])


def test_area_under_decay_by_hand():
    assert area_under_decay(GRID, np.ones(len(GRID))) == pytest.approx(1.0)
    assert area_under_decay([0, 1, 3], [1.0, 0.5, 0.0]) == pytest.approx(0.5)  # log2(1 + t) is 0, 1, 2


def test_savings_and_their_bounds():
    assert savings(500, 4, scratch_until=900, revival_until=64) == (125.0, "=")
    assert savings(500, None, scratch_until=900, revival_until=50) == (10.0, "<")
    assert savings(None, 9, scratch_until=900, revival_until=64) == (100.0, ">")
    assert savings(300, 0, scratch_until=900, revival_until=64) == (300.0, "=")
    with pytest.raises(SondeError, match="there is no ratio"):
        savings(None, None, scratch_until=900, revival_until=64)


def test_the_criterion_needs_tokens_and_rows():
    assert reached({"accuracy": 0.95, "exact": 0.5})
    assert not reached({"accuracy": 0.94, "exact": 0.9})
    assert not reached({"accuracy": 0.99, "exact": 0.4})


@pytest.mark.parametrize("law", ["power", "exponential"])
def test_the_law_that_made_a_curve_fits_its_held_out_points_best(law):
    t = np.array(GRID)
    noise = np.random.default_rng(0).normal(0, 0.002, len(t))
    s = {"power": (1 + t / 20) ** -0.7, "exponential": 0.8 * np.exp(-t / 90) + 0.2}[law] + noise
    best, other = fits(GRID, s)
    assert best.law == law and best.held_out_error < other.held_out_error / 3
    assert best.parameters["tau"] == pytest.approx({"power": 20, "exponential": 90}[law], rel=0.1)


def test_the_score_matrix_gives_the_hand_values():
    matrix = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.7, 1.0]]
    found = forgetting_matrix(matrix, before=[0.1, 0.1, 0.1])
    assert found.average == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert found.backward == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.forward == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert found.forgetting == pytest.approx((0.4, 0.1))


def test_forgetting_counts_from_the_best_that_ever_was():
    found = forgetting_matrix([[0.5, 0.0, 0.0], [0.8, 0.9, 0.0], [0.2, 0.9, 0.9]], before=[0, 0, 0])
    assert found.forgetting == pytest.approx((0.6, 0.0))


def test_the_stability_gap_is_the_worst_soon_after_the_switch():
    times, values = [0, 1, 2, 32, 64, 128], [1.0, 0.7, 0.4, 0.9, 1.0, 0.0]
    assert stability_gap(times, values) == pytest.approx(0.6)


def test_dead_units_are_counted_and_speed_is_relative_to_solo():
    net = Transformer(TransformerShape(12, width=8, heads=2, layers=1, context=8))
    with torch.no_grad():
        net.blocks[0].mlp_in.bias[:16] = -1e3
    left = plasticity(net, torch.randint(12, (4, 8)), steps=200, solo=100)
    assert left.dead == pytest.approx(0.5)
    assert left.speed == 0.5
    assert 1 <= left.rank <= 8 and left.norm > 1e3


def test_other_budgets_are_refused_unless_forced():
    with pytest.raises(SondeError, match="read 100 and 200 tokens"):
        compare_budgets(100, 200)
    compare_budgets(100, 200, forced=True)
    compare_budgets(100, 100)


def test_curves_that_are_no_curves_are_refused():
    for times, values in (([0], [1.0]), ([0, 1], [1.0]), ([1, 0], [1.0, 1.0])):
        with pytest.raises(SondeError, match="times increasing"):
            half_life(times, values)
    with pytest.raises(SondeError, match="8 steps or more"):
        fits([0, 1, 2], [1, 1, 1])
    with pytest.raises(SondeError, match="one row and column"):
        forgetting_matrix([[1.0]], before=[0.0])
