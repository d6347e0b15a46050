"""Tests of few pairs: exact values by hand, and what cannot be reached."""

import numpy as np
import pytest
from scipy.stats import permutation_test

from sonde.stats.paired_tests import holm, least_p, sign_flip


def test_pairs_that_all_go_one_way_reach_the_least_p():
    for n in (3, 5, 8, 10):
        assert sign_flip(np.arange(1, n + 1)) == least_p(n)
    assert least_p(5) == 2 / 2**5


def test_sign_flip_agrees_with_scipy():
    x = np.random.default_rng(0).normal(0.4, 1, 9)
    theirs = permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(x) == pytest.approx(theirs.pvalue)


def test_many_pairs_are_drawn_and_close_to_exact():
    x = np.random.default_rng(1).normal(0.4, 1, 16)
    with_zero = np.append(x, 0.0)  # a pair without a difference changes nothing
    assert sign_flip(with_zero) == pytest.approx(sign_flip(x), abs=0.01)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])


def test_six_questions_need_eight_pairs():
    with_seven, with_eight = (holm([least_p(n), 1, 1, 1, 1, 1])[0] for n in (7, 8))
    assert with_eight < 0.05 < with_seven


def test_what_is_no_difference_or_probability_is_refused():
    with pytest.raises(ValueError, match="finite"):
        sign_flip([])
    with pytest.raises(ValueError, match="finite"):
        sign_flip([np.nan])
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([1.2])
