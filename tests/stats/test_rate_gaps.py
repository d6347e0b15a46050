"""Gaps of true-positive rates: by hand, for a fair classifier, and for a planted one."""

import numpy as np
import pytest

from sonde.stats.rate_gaps import rate_gaps, rms_gap


def test_gaps_are_differences_of_rates_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    group = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    given = np.array([0, 1, 0, 0, 1, 1, 0, 1])
    assert rate_gaps(given, truth, group).tolist() == [0.5, -0.5]
    assert rate_gaps(given, truth, np.array([0, 1, 2, 2, 0, 1, 2, 2])).tolist() == [1.0, 0.5]
    assert np.isnan(rate_gaps(given, truth, np.array([0, 0, 0, 0, 0, 0, 1, 1]))[0])


def test_a_fair_classifier_has_the_gap_of_chance_and_an_unfair_one_more():
    rng = np.random.default_rng(0)
    truth, group = rng.integers(5, size=4000), rng.integers(2, size=4000)
    fair = np.where(rng.random(4000) < 0.8, truth, (truth + 1) % 5)
    measured, chance = rms_gap(fair, truth, group)
    assert chance.overlaps(measured)
    unfair = np.where(rng.random(4000) < np.where(group == 1, 0.9, 0.6), truth, (truth + 1) % 5)
    measured, chance = rms_gap(unfair, truth, group)
    assert measured.contains(0.3)
    assert measured.low > 3 * chance.high


def test_what_has_no_gap_is_refused():
    with pytest.raises(ValueError, match="expected as many"):
        rate_gaps(np.zeros(2, int), np.zeros(3, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="no class has rows of every group"):
        rms_gap(np.array([0, 1]), np.array([0, 1]), np.array([0, 1]))
