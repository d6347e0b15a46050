"""The recovered gap is a ratio of means, refused without a gap, and its interval covers the truth."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sonde.errors import SondeError
from sonde.knowledge.recovered_gap import ScoredRows, recovered_gap, recovered_gap_interval


def planted(mean: float, n: int = 400, seed: int = 0) -> ScoredRows:
    """Scores of true rows are `mean` above those of false ones, both of variance 1."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    return ScoredRows(rng.standard_normal(n) + mean * truth, truth, np.arange(n) // 2)


def test_aurocs_are_averaged_before_the_ratio():
    assert recovered_gap([0.7, 0.9], [0.5, 0.3], [0.6, 1.0]) == pytest.approx((0.8 - 0.4) / (0.8 - 0.4))
    assert recovered_gap(0.9, 0.5, 1.0) == pytest.approx(0.8)


def test_a_gap_below_a_twentieth_is_refused():
    assert recovered_gap(0.5, 0.5, 0.551) == pytest.approx(0)
    for call in (
        lambda: recovered_gap([0.9, 0.9], [0.9, 0.5], [0.5, 0.94]),
        lambda: recovered_gap_interval([(planted(1), planted(1), planted(1))]),
    ):
        with pytest.raises(SondeError, match=r"less than 0.05 above the floor .* there is no gap to recover"):
            call()


def test_the_interval_holds_what_was_planted_and_the_plain_ratio():
    from scipy.stats import norm

    three = (1.2, -1.0, 2.5)
    true = [norm.cdf(mean / np.sqrt(2)) for mean in three]
    rows = tuple(planted(mean, seed=i) for i, mean in enumerate(three))
    found = recovered_gap_interval([rows])
    assert found.contains(recovered_gap(*true))
    assert found.estimate == pytest.approx(recovered_gap(*(roc_auc_score(r.truth, r.scores) for r in rows)))
    assert found.n == 200 and found.high - found.low < 0.2


def test_what_the_three_share_cancels_in_the_interval():
    """A probe that is the ceiling recovers all of the gap in every resample."""
    top, low = planted(2.0), planted(-2.0, seed=1)
    found = recovered_gap_interval([(top, low, top)])
    assert (found.low, found.estimate, found.high) == (1, 1, 1)


def test_two_models_count_the_base_rows_of_both():
    three = (planted(1.0), planted(-1.0, seed=1), planted(2.0, seed=2))
    assert recovered_gap_interval([three, three], draws=50).n == 400


def test_rows_of_one_class_and_no_models_are_refused():
    with pytest.raises(SondeError, match="all 4 rows are True"):
        ScoredRows(np.arange(4.0), np.ones(4, dtype=bool), np.arange(4))
    with pytest.raises(SondeError, match="1 of 2 scores are nan"):
        ScoredRows(np.array([0, np.nan]), np.array([True, False]), np.arange(2))
    with pytest.raises(SondeError, match="no models"):
        recovered_gap_interval([])
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(\), \(\)"):
        recovered_gap([0.5, 0.6], 0.5, 0.9)
