import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.metrics import roc_auc_score

from sonde.stats.intervals import bootstrap
from sonde.stats.ranks import auroc, auroc_interval, auroc_intervals, kendall, midranks, rank_of, spearman

quick = settings(max_examples=80, deadline=None)
tied = st.integers(2, 25).flatmap(lambda n: hnp.arrays(np.float64, (2, n), elements=st.integers(-4, 4).map(float)))


@quick
@given(tied)
def test_correlations_equal_scipys_with_ties(xy):
    x, y = xy
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y)[0], abs=1e-12)


@quick
@given(tied, st.data())
def test_auroc_equals_sklearns_with_ties(xy, data):
    scores = xy[0]
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    assume(0 < labels.sum() < len(labels))
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-12)


@quick
@given(tied)
def test_monotone_maps_change_no_rank(xy):
    x = xy[0]
    np.testing.assert_array_equal(midranks(x), midranks(np.exp(x)))
    assert midranks(x).sum() == pytest.approx(len(x) * (len(x) + 1) / 2)


def test_batches_equal_rows():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(2, 6, 20))
    labels = rng.permuted(np.tile([0, 1], (6, 10)), axis=1)
    np.testing.assert_allclose(spearman(x, y), [spearman(a, b) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(auroc(x, labels), [auroc(a, b) for a, b in zip(x, labels, strict=True)])


def test_rank_counts_the_larger_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])
    assert rank_of(logits, torch.tensor([1, 0])).tolist() == [3, 2]
    assert rank_of(logits, logits.argmax(-1)).tolist() == [1, 1]


@given(st.integers(0, 5))
def test_ranks_of_distinct_logits_are_a_permutation(seed):
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed)).expand(9, 9)
    assert sorted(rank_of(logits, torch.arange(9)).tolist()) == list(range(1, 10))


def test_correlation_with_a_constant_is_nan():
    assert np.isnan(spearman([1, 2, 3], [5, 5, 5]))
    assert np.isnan(kendall([1, 2, 3], [5, 5, 5]))


def test_bootstrapped_auroc_holds_the_true_one():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [150, 50])
    scores = rng.normal(size=200) + labels
    interval = bootstrap(auroc, scores, labels, strata=labels, draws=500)
    assert interval.contains(float(stats.norm.cdf(1 / np.sqrt(2))))
    assert 0.1 < interval.high - interval.low < 0.2


def scored(n=240, layers=3):
    rng = np.random.default_rng(2)
    labels = rng.random(n) < 0.4
    return np.round(rng.normal(size=(layers, n)) + labels, 1), labels


def test_interval_without_sorting_is_the_bootstraps():
    scores, labels = scored()
    ours = auroc_intervals(scores, labels, draws=1000)
    for row, interval in zip(scores, ours, strict=True):
        plain = bootstrap(auroc, row, labels, draws=1000, seed=1)
        assert interval.estimate == pytest.approx(roc_auc_score(labels, row), abs=1e-12)
        assert interval.bounds == pytest.approx(plain.bounds, abs=0.012)
        assert interval.n == 240


def test_resampled_auroc_is_that_of_the_repeated_rows():
    from sonde.stats.ranks import _Ordered

    scores, labels = scored(30, 1)
    counts = np.random.default_rng(0).integers(0, 3, size=(5, 30)).astype(float)
    found = _Ordered.of(scores[0], labels).auroc(counts)
    for own, value in zip(counts.astype(int), found, strict=True):
        rows = np.repeat(np.arange(30), own)
        assert value == pytest.approx(roc_auc_score(labels[rows], scores[0][rows]), abs=1e-12)


def test_rows_that_come_in_groups_widen_the_interval():
    scores, labels = scored()
    groups = np.repeat(np.arange(240), 4)
    copied, alike = np.repeat(scores[0], 4), np.repeat(labels, 4)
    plain = auroc_interval(scores[0], labels)
    grouped, blind = auroc_interval(copied, alike, groups=groups), auroc_interval(copied, alike)
    assert grouped.bounds == pytest.approx(plain.bounds, abs=0.01)
    assert blind.high - blind.low < 0.6 * (grouped.high - grouped.low)
    assert grouped.n == 240


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([0.1, 0.2], [1, 1]), "needs both classes"),
        (lambda: auroc([0.1, 0.2], [1, 2]), "must be 0 and 1"),
        (lambda: auroc([0.1, np.nan], [1, 0]), "1 of 2 values are nan"),
        (lambda: auroc([0.1, 0.2, 0.3], [1, 0]), "expected the same"),
        (lambda: auroc_interval([0.1, 0.2], [1, 1]), "needs both classes"),
        (lambda: auroc_interval([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], groups=[0, 0, 0, 0]), "1 independent unit"),
        (lambda: auroc_interval([0.1, 0.2], [1, 0], groups=[0]), "expected one for each"),
        (lambda: auroc_interval([0.1, 0.2], [1, 0], draws=200), "undefined on"),
        (lambda: spearman([1.0], [2.0]), "at least 2 values"),
        (lambda: kendall([1.0, np.nan], [2.0, 3.0]), "nan has no rank"),
        (lambda: rank_of(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), "targets of shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
