import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sonde.dynamics.fourier import (
    basis,
    block_directions,
    by_frequency,
    frequencies,
    gini,
    row_norms,
    sum_directions,
)
from sonde.errors import SondeError


@given(st.integers(2, 40))
def test_the_basis_is_orthonormal(modulus):
    f = basis(modulus)
    assert (f @ f.T - torch.eye(modulus, dtype=torch.float64)).abs().max() < 1e-12


@given(st.integers(5, 30))
def test_directions_on_the_grid_are_orthonormal_and_sums_lie_in_the_blocks(modulus):
    ks = list(frequencies(modulus))
    sums, blocks = sum_directions(modulus, ks), block_directions(modulus, ks)
    assert (sums.T @ sums - torch.eye(2 * len(ks), dtype=torch.float64)).abs().max() < 1e-12
    assert (blocks.T @ blocks - torch.eye(8 * len(ks), dtype=torch.float64)).abs().max() < 1e-12
    assert (blocks @ (blocks.T @ sums) - sums).abs().max() < 1e-12


def test_sum_directions_are_functions_of_the_sum():
    p, k = 11, 3
    columns = sum_directions(p, [k]).view(p, p, 2)
    for a, b in ((2, 5), (10, 9)):
        angle = torch.tensor(2 * math.pi * k * (a + b) / p, dtype=torch.float64)
        expected = torch.stack([angle.cos(), angle.sin()]) * math.sqrt(2) / p
        torch.testing.assert_close(columns[a, b], expected)


def test_a_cosine_has_one_frequency():
    p, k = 13, 4
    t = torch.arange(p, dtype=torch.float64)
    wave = (2 * math.pi * k * t / p + 0.3).cos()[:, None]
    norms = by_frequency(p, row_norms(p, wave))
    assert int(norms.argmax()) + 1 == k
    assert gini(norms) == pytest.approx(1 - 1 / len(norms))


def test_gini_of_equal_numbers_is_zero():
    assert gini(torch.ones(7)) == pytest.approx(0)
    assert gini(torch.zeros(3)) == 0


def test_a_frequency_that_does_not_exist_is_named():
    with pytest.raises(SondeError, match="frequency 6 does not exist modulo 11: it has 1 to 5"):
        sum_directions(11, [2, 6])
