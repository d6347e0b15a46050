import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from sonde.stats.calibration import ece, reliability, sweep_ece

answers = st.lists(st.tuples(st.integers(0, 20).map(lambda i: i / 20), st.booleans()), min_size=1, max_size=60)
quick = settings(max_examples=60, deadline=None)


@quick
@given(answers, st.integers(1, 20))
def test_ece_is_the_weighted_gap_of_each_bin(pairs, bins):
    p, y = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs], dtype=float)
    bin_of = np.clip(np.ceil(p * bins).astype(int) - 1, 0, None)
    expected = sum(abs((y - p)[bin_of == b].mean()) * (bin_of == b).mean() for b in set(bin_of))
    assert ece(p, y, bins=bins) == pytest.approx(expected, abs=1e-12)


@quick
@given(answers, st.randoms(use_true_random=False))
def test_the_order_of_the_answers_does_not_matter(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    for error in (ece, sweep_ece):
        a, b = (error([p for p, _ in x], [y for _, y in x]) for x in (pairs, shuffled))
        assert a == pytest.approx(b, abs=1e-12)
        assert 0 <= a <= 1


@quick
@given(answers)
def test_no_binning_reports_less_than_the_overall_gap(pairs):
    p, y = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs], dtype=float)
    for error in (ece(p, y), sweep_ece(p, y), sweep_ece(p, y, norm=2)):
        assert error >= abs((y - p).mean()) - 1e-12


def sample(n, seed, bend=0.0):
    rng = np.random.default_rng(seed)
    p = rng.beta(2, 1, n)
    return p, rng.random(n) < np.clip(p - bend, 0, 1)


def test_a_planted_overconfidence_is_measured():
    p, y = sample(40_000, 0, bend=0.1)
    truth = np.minimum(p, 0.1).mean()
    assert ece(p, y) == pytest.approx(truth, abs=0.01)
    assert sweep_ece(p, y) == pytest.approx(truth, abs=0.01)


def test_the_sweep_is_less_biased_than_fixed_bins_on_few_calibrated_answers():
    fixed, sweep = zip(*((ece(*sample(200, i)), sweep_ece(*sample(200, i))) for i in range(60)), strict=True)
    assert np.mean(sweep) < 0.8 * np.mean(fixed)


def test_all_answers_correct_end_at_the_most_bins():
    p = np.random.default_rng(1).random(5000)
    assert sweep_ece(p, np.ones(5000)) == pytest.approx((1 - p).mean())


def test_the_table_equals_sklearns_curve():
    p, y = sample(3000, 2)
    table = reliability(p, y, bins=10)
    accuracy, confidence = calibration_curve(y, p, n_bins=10)
    np.testing.assert_allclose([b.accuracy.estimate for b in table], accuracy)
    np.testing.assert_allclose([b.confidence for b in table], confidence)
    assert sum(b.n for b in table) == 3000
    assert sum(b.n * abs(b.confidence - b.accuracy.estimate) for b in table) / 3000 == pytest.approx(ece(p, y, bins=10))


def test_tensors_are_taken():
    p, y = sample(50, 3)
    assert ece(torch.from_numpy(p), torch.from_numpy(y)) == ece(p, y)


def test_a_softmax_rounded_above_one_counts_as_one():
    assert ece([1 + 1e-7], [1]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ece([], []), "expected one of each"),
        (lambda: ece([0.5], [1, 0]), "expected one of each"),
        (lambda: ece([1.5], [1]), "expected probabilities"),
        (lambda: ece([np.nan], [1]), "expected probabilities"),
        (lambda: ece([0.5], [2]), "0 .wrong. or 1"),
        (lambda: ece([0.5], [1], bins=0), "0 bins"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
