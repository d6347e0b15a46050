import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from sonde.stats.moments import Moments
from sonde.stats.solve import Root, effective_rank, ridge, shrunk, solve_spd, spectrum, symmetric_power

quick = settings(max_examples=40, deadline=None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, rank, seed=0):
    x = normal(rank, d, seed=seed)
    return x.T @ x


@quick
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 100))
def test_definite_systems_are_solved_within_the_stated_residual(d, k, seed):
    a, b = covariance(d, 3 * d, seed), normal(d, k, seed=seed + 1)
    x = solve_spd(a, b)
    assert (a @ x - b).norm() <= 1e-10 * (a.norm() * x.norm() + b.norm())


@quick
@given(st.integers(2, 8), st.integers(0, 100))
def test_singular_systems_give_the_least_norm_solution(d, seed):
    a, b = covariance(d, d - 1, seed), normal(d, 2, seed=seed + 1)
    expected = np.linalg.pinv(a.numpy(), hermitian=True, rcond=1e-10) @ b.numpy()
    np.testing.assert_allclose(solve_spd(a, b), expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_a_singular_matrix_is_told_where_its_pivots_do_not_show_it():
    a, b = covariance(3, 2, seed=57), normal(3, 2, seed=58)  # a pivot of 1e-10 of the largest after one of 1e-6
    expected = np.linalg.pinv(a.numpy(), hermitian=True, rcond=1e-10) @ b.numpy()
    np.testing.assert_allclose(solve_spd(a, b), expected, rtol=1e-5)


def test_a_stack_mixes_definite_and_singular_matrices():
    a = torch.stack([covariance(5, 20, 1), covariance(5, 2, 2), torch.zeros(5, 5, dtype=torch.float64)])
    b = normal(3, 5, 2)
    alone = torch.stack([solve_spd(m, r) for m, r in zip(a, b, strict=True)])
    torch.testing.assert_close(solve_spd(a, b), alone)
    assert not alone[2].any()


def test_ridge_equals_sklearns_from_streamed_moments():
    x, y = normal(200, 6) + 3, normal(200, 2, seed=1)
    y = y + x @ normal(6, 2, seed=2)
    moments = Moments(6, 2).update(x[:90], y[:90]).update(x[90:], y[90:])
    alpha = 0.01 * moments.scatter.diagonal().mean().item()
    expected = Ridge(alpha=alpha).fit(x.numpy(), y.numpy()).coef_.T
    np.testing.assert_allclose(ridge(moments.scatter, moments.cross_scatter, lam=0.01), expected, rtol=1e-9)


def test_ridge_does_not_depend_on_units():
    x, y = normal(50, 4), normal(50, 3, seed=1)
    w = ridge(x.T @ x, x.T @ y, lam=0.1)
    torch.testing.assert_close(1e5 * ridge((1e5 * x).T @ (1e5 * x), (1e5 * x).T @ y, lam=0.1), w)


@quick
@given(st.integers(1, 8), st.integers(0, 100))
def test_spectrum_sums_to_the_trace_and_falls(d, seed):
    a = covariance(d, max(1, d // 2), seed)
    values = spectrum(a)
    assert values.sum() == pytest.approx(a.trace().item(), rel=1e-9)
    assert (values.diff() <= 0).all() and (values >= 0).all()


@quick
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 50))
def test_effective_rank_lies_between_one_and_the_rank(d, rank, seed):
    assert 1 - 1e-9 <= effective_rank(covariance(d, rank, seed)) <= min(d, rank) + 1e-6
    assert effective_rank(torch.eye(d)) == pytest.approx(d)


@quick
@given(st.integers(2, 7), st.integers(1, 9), st.integers(0, 50))
def test_powers_whiten_and_invert_on_the_span(d, rank, seed):
    a = covariance(d, rank, seed)
    root, inverse_root = symmetric_power(a, 0.5), symmetric_power(a, -0.5)
    torch.testing.assert_close(root @ root, a, rtol=1e-8, atol=1e-8)
    projection = inverse_root @ a @ inverse_root
    torch.testing.assert_close(projection @ projection, projection, rtol=1e-5, atol=1e-5)
    assert projection.trace() == pytest.approx(min(d, rank), abs=1e-4)


@quick
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 100), st.booleans())
def test_a_root_colours_what_it_whitens_on_the_span(d, rank, seed, imaginary):
    x = normal(rank, d, seed=seed)
    x = torch.complex(x, normal(rank, d, seed=seed + 1)) if imaginary else x
    a = x.T @ x.conj()
    root = Root(a)
    eye = torch.eye(root.rank, dtype=a.dtype)
    assert root.rank == min(d, rank)
    g = root.colour(eye)
    torch.testing.assert_close(g @ g.mH, a)
    torch.testing.assert_close(root.whiten(g), eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(root.whiten_adjoint(eye).mH, root.whiten(torch.eye(d, dtype=a.dtype)))
    torch.testing.assert_close(root.colour_adjoint(a), g.mH @ a)
    whiten = root.whiten(torch.eye(d, dtype=a.dtype))
    torch.testing.assert_close(whiten, torch.linalg.pinv(g), rtol=1e-5, atol=1e-5)


def test_a_root_is_cholesky_whatever_the_units_and_else_says_the_rank():
    a = covariance(6, 20)
    units = torch.logspace(-8, 8, 6, dtype=torch.float64)
    assert Root(a * units * units[:, None]).cholesky
    assert not Root(covariance(6, 4)).cholesky
    flat = torch.block_diag(covariance(5, 20), torch.zeros(1, 1, dtype=torch.float64))
    assert (Root(flat).cholesky, Root(flat).rank) == (False, 5)
    with pytest.raises(ValueError, match="square"):
        Root(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="nan or infinity"):
        Root(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="not a covariance"):
        Root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@quick
@given(st.integers(1, 10), st.integers(2, 14), st.integers(0, 300))
def test_shrinkage_keeps_the_trace_and_its_weight_within_bounds(d, n, seed):
    x = normal(n, d, seed=seed)
    s = (x - x.mean(0)).T @ (x - x.mean(0)) / n
    result, alpha = shrunk(s, n)
    assert 0 <= alpha <= 1
    torch.testing.assert_close(result.trace(), s.trace())
    assert torch.linalg.eigvalsh(result).min() >= torch.linalg.eigvalsh(s).min() - 1e-12


def test_shrinkage_brings_a_covariance_nearer_to_the_truth():
    truth = torch.eye(40, dtype=torch.float64) + 0.1
    x = normal(60, 40) @ torch.linalg.cholesky(truth).T
    s = torch.cov(x.T)
    result, alpha = shrunk(s, 60)
    assert 0 < alpha < 1
    assert (result - truth).norm() < 0.7 * (s - truth).norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve_spd(torch.zeros(2, 3), torch.zeros(2, 1)), "expected a square"),
        (lambda: solve_spd(torch.eye(2), torch.zeros(3, 1)), "right-hand side of shape"),
        (lambda: solve_spd(torch.eye(2), torch.full((2, 1), torch.nan)), "nan or infinity"),
        (lambda: solve_spd(torch.full((2, 2), torch.inf), torch.zeros(2, 1)), "nan or infinity"),
        (lambda: solve_spd(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2, 1)), "not symmetric"),
        (lambda: solve_spd(-torch.eye(2), torch.ones(2, 1)), "not a covariance"),
        (lambda: ridge(torch.eye(2), torch.ones(2, 1), lam=-1), "lam is -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
