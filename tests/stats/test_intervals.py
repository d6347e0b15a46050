import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sonde.stats.intervals import (
    Interval,
    bootstrap,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_ratio,
    exact,
    paired_difference,
    wilson,
)

shares = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(shares, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_solves_the_score_equation(share, level):
    k, n = share
    z = stats.norm.ppf((1 + level) / 2)
    centre, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    interval = wilson(k, n, level=level)
    assert interval.low == pytest.approx(max(0, centre - half), abs=1e-12)
    assert interval.high == pytest.approx(min(1, centre + half), abs=1e-12)
    assert (interval.estimate, interval.n, interval.method) == (k / n, n, "wilson")


@given(shares)
def test_exact_bounds_leave_half_the_error_in_each_tail(share):
    k, n = share
    interval = exact(k, n)
    if k > 0:
        assert stats.binom.sf(k - 1, n, interval.low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert stats.binom.cdf(k, n, interval.high) == pytest.approx(0.025, rel=1e-6)
    assert interval.contains(k / n)


def test_exact_is_never_below_its_level():
    n = 20
    intervals = [exact(k, n) for k in range(n + 1)]
    for p in np.linspace(0.02, 0.98, 25):
        covered = sum(stats.binom.pmf(k, n, p) for k in range(n + 1) if intervals[k].contains(p))
        assert covered >= 0.95


@pytest.mark.parametrize("n", [6, 40])
def test_bootstrap_covers_a_normal_mean_as_often_as_students_t(n):
    rng = np.random.default_rng(0)
    hits, students = 0, 0
    for i in range(400):
        x = rng.normal(3, 2, n)
        hits += bootstrap_mean(x, draws=600, seed=i).contains(3)
        students += abs(x.mean() - 3) <= stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n)
    assert abs(hits - students) / 400 <= 0.03


def test_cluster_bootstrap_covers_where_the_row_bootstrap_does_not():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(25), 20)
    by_cluster, by_row = 0, 0
    for i in range(100):
        x = rng.normal(0, 1, 25)[clusters] + rng.normal(0, 0.3, 500)
        by_cluster += bootstrap_mean(x, clusters, draws=300, seed=i).contains(0)
        by_row += bootstrap_mean(x, draws=300, seed=i).contains(0)
    assert by_cluster >= 88
    assert by_row <= 60


def test_width_follows_the_central_limit_also_beyond_the_grouping_limit():
    x = np.random.default_rng(2).gamma(2, size=60_000)
    interval = bootstrap_mean(x, draws=3000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(len(x)), rel=0.06)
    assert interval.estimate == pytest.approx(x.mean(), rel=1e-12)
    assert interval.n == 60_000


def test_half_a_million_rows_take_seconds():
    x = np.random.default_rng(3).normal(size=(500_000, 6))
    start = time.process_time()
    bootstrap_means(x)
    assert time.process_time() - start < 20


def test_clusters_keep_the_token_weighted_mean():
    x, clusters = np.array([1.0, 1, 1, 5]), np.array(["a", "a", "a", "b"])
    interval = bootstrap_mean(x, clusters)
    assert interval.estimate == 2
    assert interval.n == 2


def test_ratio_of_sums_of_clusters_is_the_mean_over_their_rows():
    rng = np.random.default_rng(4)
    clusters = rng.integers(30, size=400)
    x = rng.normal(size=400)
    sums, sizes = np.bincount(clusters, x), np.bincount(clusters)
    a, b = bootstrap_mean(x, clusters, seed=5), bootstrap_ratio(sums, sizes, seed=5)
    assert a.bounds == pytest.approx(b.bounds, rel=1e-12)
    assert a.estimate == pytest.approx(b.estimate, rel=1e-12)


def test_columns_share_their_resamples():
    x = np.random.default_rng(5).normal(size=(50, 3))
    for column, interval in zip(x.T, bootstrap_means(x, seed=7), strict=True):
        assert interval.bounds == pytest.approx(bootstrap_mean(column, seed=7).bounds, rel=1e-12)


def test_generic_bootstrap_agrees_with_the_fast_mean():
    x = np.random.default_rng(6).normal(size=80)
    fast = bootstrap_mean(x, draws=3000)
    slow = bootstrap(np.mean, x, draws=3000)
    batch = bootstrap(lambda a: a.mean(-1), x, draws=3000, batched=True)
    assert slow.bounds == pytest.approx(batch.bounds, abs=1e-12)
    assert slow.bounds == pytest.approx(fast.bounds, abs=0.03)


def test_generic_cluster_bootstrap_agrees_with_the_fast_one():
    rng = np.random.default_rng(7)
    clusters = rng.integers(20, size=200)
    x = rng.normal(size=20)[clusters] + rng.normal(size=200)
    fast, slow = bootstrap_mean(x, clusters), bootstrap(np.mean, x, clusters=clusters)
    assert slow.bounds == pytest.approx(fast.bounds, abs=0.05)
    assert slow.n == fast.n == 20


def test_strata_keep_every_class():
    labels = np.array([0] * 30 + [1] * 2)
    interval = bootstrap(lambda y: y.sum(), labels, strata=labels, draws=100)
    assert interval.bounds == (2, 2)


def test_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(8)
    shared = rng.normal(size=200)
    a, b = shared + 0.1 + rng.normal(0, 0.05, 200), shared
    difference, alone = paired_difference(a, b), bootstrap_mean(a)
    assert difference.contains(0.1)
    assert difference.high - difference.low < (alone.high - alone.low) / 5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.integers(0, 3))
def test_same_seed_same_interval_and_the_estimate_is_inside(x, seed):
    interval = bootstrap_mean(x, draws=50, seed=seed)
    assert interval == bootstrap_mean(x, draws=50, seed=seed)
    assert interval.contains(interval.estimate)


def test_tensors_are_taken_in_any_float_type():
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    assert bootstrap_mean(x) == bootstrap_mean([1.0, 2.0, 4.0])


def test_scaling_by_a_negative_factor_swaps_the_ends():
    assert Interval(1, 0.5, 2, 10).scaled(-2) == Interval(-2, -4, -1, 10)


def test_overlap_is_symmetric_and_closed():
    a, b, c = Interval(1, 0, 2, 5), Interval(3, 2, 4, 5), Interval(3, 2.1, 4, 5)
    assert a.overlaps(b) and b.overlaps(a)
    assert not a.overlaps(c) and not c.overlaps(a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Interval(3, 0, 1, 5), "outside its interval"),
        (lambda: Interval(math.nan, 0, 1, 5), "finite"),
        (lambda: Interval(0.5, 0, 1, 0), "at least one unit"),
        (lambda: Interval(0.5, 0, 1, 5, level=95), "level 95"),
        (lambda: Interval(0.5, 0, 1, 5, method="guess"), "none of"),  # pyright: ignore[reportArgumentType]
        (lambda: wilson(5, 3), "5 of 3"),
        (lambda: exact(0, 0), "0 of 0"),
        (lambda: bootstrap_mean([1.0]), "at least 2"),
        (lambda: bootstrap_mean([1.0, 2.0], [7, 7]), "at least 2"),
        (lambda: bootstrap_mean([1.0, math.nan]), "1 of 2 values are not finite"),
        (lambda: bootstrap_mean([1.0, 2.0], [1, 2, 3]), "one label a row"),
        (lambda: bootstrap_mean([[1.0, 2.0]]), "expected 1 dimension"),
        (lambda: bootstrap_mean([1.0, 2.0], draws=0), "draws is 0"),
        (lambda: bootstrap_ratio([1.0, 2.0], [1.0]), "as many"),
        (lambda: bootstrap_ratio([1.0, 2.0], [0.0, 0.0]), "above 0"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "paired"),
        (lambda: bootstrap(np.mean, [1.0, 2.0], [1.0]), "different lengths"),
        (lambda: bootstrap(np.mean, [1.0, 2.0], clusters=[0, 1], batched=True), "combined"),
        (lambda: bootstrap(lambda x: np.nan if x.std() == 0 else x.mean(), [1.0, 2.0]), "undefined on"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
