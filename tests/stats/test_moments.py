import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.files import load_bundle, save_bundle
from sonde.stats.moments import Moments

quick = settings(max_examples=40, deadline=None)


def rows(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@quick
@given(st.integers(2, 60), st.integers(1, 6), st.integers(1, 4), st.floats(-1e6, 1e6))
def test_covariances_equal_numpys_also_far_from_zero(n, d, k, offset):
    x, y = rows(n, d).double() + offset, rows(n, k, 1).double()
    moments = Moments(d, k)
    for part in torch.arange(n).tensor_split(3):
        moments.update(x[part], y[part])
    whole = np.cov(torch.cat([x, y], dim=1).numpy().T)
    np.testing.assert_allclose(moments.covariance, np.atleast_2d(whole)[:d, :d], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(moments.cross_covariance, whole[:d, d:], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.other_mean, y.mean(0), rtol=1e-9, atol=1e-12)


@quick
@given(st.integers(0, 20), st.integers(0, 20), st.integers(2, 20))
def test_shards_merge_to_the_whole_in_any_order(a, b, c):
    x = rows(a + b + c, 4)
    parts = [Moments(4).update(part) for part in x.split([a, b, c])]
    forward = Moments(4).merge(parts[0]).merge(parts[1]).merge(parts[2])
    backward = Moments(4).merge(parts[2]).merge(parts[1]).merge(parts[0])
    whole = Moments(4).update(x)
    for merged in (forward, backward):
        assert merged.n == whole.n
        torch.testing.assert_close(merged.mean, whole.mean)
        torch.testing.assert_close(merged.covariance, whole.covariance)


def test_masked_rows_count_for_nothing_even_when_nan():
    x, mask = rows(12, 3).view(3, 4, 3), torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(Moments(3).update(poisoned, mask=mask).covariance, Moments(3).update(x[mask]).covariance)
    assert Moments(3).update(poisoned, mask=torch.zeros(3, 4, dtype=torch.bool)).n == 0


def test_a_large_mean_costs_no_digits():
    x = rows(20_000, 2).double() + 1e8
    expected = torch.cov((x - 1e8).T)
    torch.testing.assert_close(Moments(2).update(x).covariance, expected, rtol=1e-7, atol=1e-7)


def test_half_precision_rows_accumulate_in_float64():
    x = rows(30_000, 2, dtype=torch.bfloat16) + 100
    moments = Moments(2).update(x)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(x.double().T), rtol=1e-10, atol=0)


def test_state_continues_with_the_same_bits(tmp_path):
    x = rows(40, 3)
    y = rows(40, 2, 1)
    straight = Moments(3, 2).update(x[:25], y[:25])
    save_bundle(tmp_path / "moments", straight.state())
    resumed = Moments.from_state(load_bundle(tmp_path / "moments"))
    for moments in (straight, resumed):
        moments.update(x[25:], y[25:])
    assert torch.equal(straight.covariance, resumed.covariance)
    assert torch.equal(straight.cross_covariance, resumed.cross_covariance)
    assert straight.n == resumed.n == 40


@quick
@given(st.integers(1, 700), st.integers(0, 100))
def test_the_halved_product_is_the_whole_one(d, seed):
    x = rows(5, d, seed).double()
    torch.testing.assert_close(Moments(d).update(x).covariance, torch.cov(x.T).reshape(d, d))


def test_products_in_float32_keep_sums_in_float64():
    x = rows(20_000, 6) + 300
    quick_moments, exact = Moments(6, precision=torch.float32), Moments(6)
    for part in x.split(9000):
        quick_moments.update(part)
        exact.update(part)
    torch.testing.assert_close(quick_moments.mean, exact.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(quick_moments.covariance, exact.covariance, rtol=0, atol=1e-5)


def test_complex_rows_have_a_hermitian_covariance():
    z = torch.complex(rows(50, 3).double(), rows(50, 3, 1).double())
    moments = Moments(3, 2).update(z[:20], z[:20, :2]).update(z[20:], z[20:, :2])
    torch.testing.assert_close(moments.covariance, torch.cov(z.T))
    torch.testing.assert_close(moments.cross_covariance, torch.cov(z.T)[:, :2])
    merged = Moments(3).update(z.real).merge(Moments(3).update(z))
    torch.testing.assert_close(merged.covariance, torch.cov(torch.cat([z.real.to(z.dtype), z]).T))


def test_faded_rows_count_for_less():
    x, y = rows(30, 2).double(), rows(20, 2, 1).double() + 4
    moments = Moments(2).update(x).fade(0.1).update(y)
    weights = torch.cat([torch.full((30,), 0.1), torch.ones(20)]).double()
    both = torch.cat([x, y])
    mean = weights @ both / weights.sum()
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.scatter, (weights[:, None] * (both - mean)).T @ (both - mean))
    assert moments.weight == pytest.approx(23)
    with pytest.raises(ValueError, match="faded to the weight"):
        Moments(2).update(x).fade(1e-3).covariance  # noqa: B018
    with pytest.raises(ValueError, match="a factor of 2"):
        moments.fade(2)
    with pytest.raises(ValueError, match="products in"):
        Moments(2, precision=torch.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments(0), "at least 1"),
        (lambda: Moments(2).update(torch.zeros(4, 3)), "expected"),
        (lambda: Moments(2).update(torch.zeros(4, 2), torch.zeros(4, 2)), "y is given"),
        (lambda: Moments(2, 1).update(torch.zeros(4, 2)), "y is not given"),
        (lambda: Moments(2, 1).update(torch.zeros(4, 2), torch.zeros(3, 1)), "expected"),
        (lambda: Moments(2).update(torch.zeros(4, 2), mask=torch.ones(3, dtype=torch.bool)), "mask of shape"),
        (lambda: Moments(2).update(torch.full((4, 2), torch.nan)), "4 of 4 rows hold nan"),
        (lambda: Moments(2).merge(Moments(3)), "cannot take in"),
        (lambda: Moments(2).mean, "at least 1 needed"),
        (lambda: Moments(2).update(torch.zeros(1, 2)).covariance, "at least 2 needed"),
        (lambda: Moments(2).update(torch.zeros(3, 2)).cross_covariance, "without other"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
