"""Matrix-free spectra against matrices whose spectrum is known."""

import pytest
import torch

from sonde.dynamics.jacobian_operators import matrix, membership, minus_identity, spectral_density, top_singular
from sonde.errors import SondeError


def planted(sigma, seed=0):
    n = len(sigma)
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)).Q
        for i in (0, 1)
    )
    return u @ torch.diag(sigma) @ v.T


FALLING = torch.cat([torch.logspace(1.5, 0.2, 20), torch.ones(60), torch.logspace(-0.5, -6, 40)]).double()


def test_the_largest_singular_values_and_vectors():
    j = planted(FALLING)
    found = top_singular(matrix(j), 8)
    torch.testing.assert_close(found.sigma, FALLING[:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(j @ found.v, found.u * found.sigma, rtol=1e-4, atol=1e-4)


def test_all_of_them_where_the_basis_fills_the_space():
    j = planted(FALLING[:12])
    torch.testing.assert_close(top_singular(matrix(j), 12).sigma, FALLING[:12])


def test_what_training_changes_is_the_top_of_the_jacobian_minus_identity():
    w = torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64)).Q
    j = torch.eye(50, dtype=torch.float64) + w @ torch.diag(torch.tensor([7.0, 2.0, -0.5]).double()) @ w.T
    found = top_singular(minus_identity(matrix(j)), 4)
    torch.testing.assert_close(found.sigma, torch.tensor([7.0, 2.0, 0.5, 0.0]).double(), atol=1e-9, rtol=1e-9)


def test_the_density_has_the_share_of_each_cluster():
    sigma = torch.cat([torch.full((30,), 6.0), torch.ones(90), torch.full((60,), 0.1)]).double()
    found = spectral_density(matrix(planted(sigma)), nodes=6, starts=40)
    torch.testing.assert_close(found.weight.sum(1), torch.ones(40, dtype=torch.float64))
    for low, high, share in ((5.9, 6.1, 1 / 6), (0.9, 1.1, 1 / 2), (0.0, 0.2, 1 / 3)):
        measured = found.fraction(low, high)
        assert measured.contains(share) or abs(measured.estimate - share) < 0.02
    bins = found.histogram(torch.tensor([0.0, 0.5, 2.0, 10.0]).double()).mean(0)
    torch.testing.assert_close(bins, torch.tensor([1 / 3, 1 / 2, 1 / 6]).double(), atol=0.02, rtol=0)


def test_membership_is_how_far_a_direction_is_moved():
    j = torch.diag(torch.tensor([1.0, 1.0, 3.0])).double()
    v = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 5.0, 2.0]]).double()
    torch.testing.assert_close(membership(matrix(j), v), torch.tensor([0.0, 2.0, 2**0.5]).double())


def test_sizes_that_make_no_sense_are_refused():
    j = matrix(torch.eye(4))
    for k in (0, 5):
        with pytest.raises(SondeError, match=f"k is {k} .* give 1 to 4"):
            top_singular(j, k)
    with pytest.raises(SondeError, match="5 nodes and 10 starts"):
        spectral_density(j, nodes=5)
    with pytest.raises(SondeError, match="1 starts"):
        spectral_density(j, nodes=2, starts=1)
