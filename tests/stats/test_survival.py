"""Survival with censoring: hand values, and scipy's own log-rank where it has one."""

import numpy as np
import pytest

from sonde.stats.survival import kaplan_meier, log_rank

# remission in weeks, 6-MP against placebo (Freireich et al. 1963), the textbook's example
DRUG = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
DRUG_CENSORED = [0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]


def test_the_textbook_curve_and_median():
    curve = kaplan_meier(DRUG, DRUG_CENSORED)
    assert curve.at(6) == pytest.approx(0.857, abs=1e-3)
    assert curve.at(22) == pytest.approx(0.538, abs=1e-3)
    assert curve.median == 23
    assert kaplan_meier(PLACEBO, [0] * 21).median == 8


def test_the_textbook_log_rank():
    statistic, p = log_rank(DRUG, DRUG_CENSORED, PLACEBO, [0] * 21)
    assert statistic == pytest.approx(16.79, abs=0.01)
    assert p < 1e-4


def test_log_rank_agrees_with_scipy():
    from scipy.stats import CensoredData, logrank

    rng = np.random.default_rng(0)
    a, b = rng.exponential(1, 40).round(1), rng.exponential(2, 30).round(1)
    ca, cb = rng.random(40) < 0.3, rng.random(30) < 0.3
    theirs = logrank(CensoredData.right_censored(a, ca), CensoredData.right_censored(b, cb))
    statistic, p = log_rank(a, ca, b, cb)
    assert statistic == pytest.approx(theirs.statistic**2)
    assert p == pytest.approx(theirs.pvalue)


def test_where_fewer_than_half_had_the_event_there_is_no_median():
    curve = kaplan_meier([5, 9, 9, 9], [False, True, True, True])
    assert curve.median is None
    assert curve.at(4) == 1.0
    assert curve.at(9) == 0.75


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="all times are censored"):
        log_rank([3, 4], [True, True], [5], [True])
    with pytest.raises(ValueError, match="0 or more"):
        kaplan_meier([-1], [False])
    with pytest.raises(ValueError, match="give one or more"):
        kaplan_meier([], [])
