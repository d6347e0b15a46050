import numpy as np
import pytest
import torch
from concepts.planted import DOUBLE, one_hot, planted
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.concepts.statistics import ConceptStatistics
from sonde.files import load_bundle, save_bundle

quick = settings(max_examples=25, deadline=None)
FIELDS = ("mean", "z_mean", "covariance", "cross_covariance", "z_covariance")


def same(a, b, atol=1e-9):
    for field in FIELDS:
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=0, atol=atol)


@quick
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(["pooled", "class"]))
def test_labels_give_the_moments_of_one_hot_columns(seed, k, covariance):
    x, z = planted(200, 4, k, seed=seed)
    statistics = ConceptStatistics(covariance=covariance).update(x[:70], z[:70]).update(x[70:], z[70:])
    whole = torch.cov(torch.cat([x, one_hot(z, k)], 1).T)
    torch.testing.assert_close(statistics.covariance, whole[:4, :4])
    torch.testing.assert_close(statistics.cross_covariance, whole[:4, 4:])
    torch.testing.assert_close(statistics.z_covariance, whole[4:, 4:])
    torch.testing.assert_close(statistics.mean, x.mean(0))
    same(statistics, ConceptStatistics().update(x, one_hot(z, k)))


@quick
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(0, 120), min_size=1, max_size=3),
    st.sampled_from(["labels", "values"]),
    st.sampled_from(["pooled", "class", "none"]),
)
def test_shards_merge_to_one_pass_in_any_order(seed, cuts, concept, covariance):
    x, z = planted(120, 4, 3, seed=seed)
    if concept == "values":
        z, covariance = x[:, :2] + 1, "pooled" if covariance == "class" else covariance
    shards = [
        ConceptStatistics(covariance=covariance).update(x[rows], z[rows])
        for rows in np.split(np.arange(120), sorted(cuts))
    ]
    whole = ConceptStatistics(covariance=covariance).update(x, z)
    for order in (shards, shards[::-1]):
        merged = ConceptStatistics(covariance=covariance)
        for shard in order:
            merged.merge(shard)
        assert merged.n == 120
        for field in FIELDS if covariance != "none" else ("mean", "cross_covariance", "z_covariance"):
            torch.testing.assert_close(getattr(merged, field), getattr(whole, field), rtol=0, atol=1e-9)


def test_masks_unknown_labels_and_labels_by_sequence():
    x, _ = planted(60, 4, 3)
    x = x.view(6, 10, 4)
    by_sequence = torch.tensor([0, 1, -1, 2, 0, 1])
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.7
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    keep = mask & (by_sequence >= 0)[:, None]
    expected = ConceptStatistics().update(x[keep], by_sequence[:, None].expand(6, 10)[keep])
    assert expected.n == int(keep.sum())
    same(ConceptStatistics().update(poisoned, by_sequence, mask), expected)
    same(ConceptStatistics().update(poisoned, by_sequence[:, None].expand(6, 10), mask), expected)
    values = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    same(
        ConceptStatistics().update(poisoned, values, mask),
        ConceptStatistics().update(x[mask], values[:, None].expand(6, 10, 2)[mask]),
    )
    assert ConceptStatistics().update(x, torch.full((6,), -1)).n == 0


def test_decay_weighs_every_batch_by_its_age():
    x, z = planted(400, 3, 2)
    for values in (z, x[:, :1] + 1):
        for covariance in ("pooled", "class") if values is z else ("pooled", "none"):
            fading = ConceptStatistics(decay=0.5, covariance=covariance)
            for rows in torch.arange(400).split(100):
                fading.update(x[rows], values[rows])
            weights = 0.5 ** torch.arange(3, -1, -1, dtype=DOUBLE).repeat_interleave(100)
            columns = one_hot(z) if values is z else values
            mean, z_mean = (weights @ rows / weights.sum() for rows in (x, columns))
            cross = (weights[:, None] * (x - mean)).T @ (columns - z_mean) / (weights.sum() - 1)
            assert fading.weight == pytest.approx(float(weights.sum()))
            torch.testing.assert_close(fading.mean, mean)
            torch.testing.assert_close(fading.cross_covariance, cross)
            if covariance != "none":
                pooled = (weights[:, None] * (x - mean)).T @ (x - mean) / (weights.sum() - 1)
                torch.testing.assert_close(fading.covariance, pooled)


def test_a_large_mean_costs_no_digits():
    x, z = planted(1000, 4, 2)
    same(ConceptStatistics().update(x + 1e7, z), _shifted(ConceptStatistics().update(x, z), 1e7), atol=1e-6)


def _shifted(statistics, by):
    statistics._means = statistics._means + by
    return statistics


def test_class_means_of_half_precision_rows_are_summed_in_double():
    x, z = planted(20_000, 4, 2, dtype=torch.bfloat16)
    means = ConceptStatistics().update(x, z).class_means
    torch.testing.assert_close(means[0], x[z == 0].double().mean(0), rtol=1e-12, atol=1e-12)


def test_state_continues_with_the_same_numbers(tmp_path):
    x, z = planted(200, 4, 3)
    for covariance in ("pooled", "class", "none"):
        straight = ConceptStatistics(covariance=covariance, decay=0.9).update(x[:100], z[:100])
        save_bundle(tmp_path / "statistics", straight.state())
        resumed = ConceptStatistics.from_state(load_bundle(tmp_path / "statistics"))
        for statistics in (straight, resumed):
            statistics.update(x[100:], z[100:])
        assert torch.equal(straight.cross_covariance, resumed.cross_covariance)
        assert torch.equal(straight.class_means, resumed.class_means)
        assert (straight.n, straight.weight) == (resumed.n, resumed.weight)


def test_numbers_that_look_like_labels_are_warned_of():
    x, z = planted(50, 3, 3)
    with pytest.warns(UserWarning, match="look categorical; pass categorical=True"):
        assert not ConceptStatistics().update(x, z.double()).categorical
    statistics = ConceptStatistics(categorical=True).update(x, z.double()[:, None])
    same(statistics, ConceptStatistics().update(x, z))
    assert not ConceptStatistics().update(x, (z > 0).double()).categorical
    assert ConceptStatistics().update(x, z > 0).categorical


X, Z = planted(12, 3, 2)
HOLE = X.clone()
HOLE[5, 1] = torch.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConceptStatistics().update(HOLE, Z), ValueError, "row 5 of x holds nan or infinity"),
        (lambda: ConceptStatistics().update(HOLE.half(), Z), ValueError, "row 5 of x holds nan"),
        (lambda: ConceptStatistics().update(X, HOLE[:, 1]), ValueError, "row 5 of z holds nan"),
        (lambda: ConceptStatistics().update(HOLE, Z, torch.arange(12) > 3), ValueError, "row 5 of x"),
        (lambda: ConceptStatistics().update(X, Z[:9]), ValueError, r"z has the shape \(9,\) for x of shape \(12, 3\)"),
        (lambda: ConceptStatistics().update(X, Z).update(X[:, :2], Z), ValueError, "width 2: those before had 3"),
        (lambda: ConceptStatistics().update(X, X).update(X, X[:, :2]), ValueError, "z of width 2"),
        (lambda: ConceptStatistics().update(X, Z - 3), ValueError, "a label of -3: expected 0 and up, or -1"),
        (lambda: ConceptStatistics(categorical=True).update(X, X[:, 0]), ValueError, "whole numbers"),
        (lambda: ConceptStatistics().update(X, np.array(["a"] * 12)), TypeError, "labels as integers"),
        (lambda: ConceptStatistics().update(X[0], Z), ValueError, "expected rows"),
        (lambda: ConceptStatistics().update(X, Z, torch.ones(3, dtype=torch.bool)), ValueError, "a mask of shape"),
        (lambda: ConceptStatistics().mean, ValueError, "at least 1"),
        (lambda: ConceptStatistics().dim, ValueError, "no data yet"),
        (lambda: ConceptStatistics().update(X[:1], Z[:1]).covariance, ValueError, "at least 2"),
        (lambda: ConceptStatistics(covariance="none").update(X, Z).covariance, ValueError, "covariance='none'"),
        (lambda: ConceptStatistics().update(X, Z).class_covariances, ValueError, "not 'class'"),
        (lambda: ConceptStatistics(covariance="class").update(X, X), ValueError, "need labels"),
        (lambda: ConceptStatistics().update(X, X).class_means, ValueError, "classes need labels"),
        (lambda: ConceptStatistics(covariance="all"), ValueError, "use pooled, class or none"),
        (lambda: ConceptStatistics(decay=0.0), ValueError, "decay is 0.0"),
        (lambda: ConceptStatistics().update(X, Z).merge(ConceptStatistics().update(X, X)), ValueError, "take in"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
