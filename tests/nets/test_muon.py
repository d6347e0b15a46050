"""Muon: what it orthogonalises, and that it minimises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.nets.muon import Muon, orthogonalise


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 24), cols=st.integers(2, 24), seed=st.integers(0, 99))
def test_singular_values_are_pushed_towards_one_and_directions_kept(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, cols, generator=generator, dtype=torch.float64), full_matrices=False)
    values = 0.1 + torch.rand(min(rows, cols), generator=generator, dtype=torch.float64)
    found = orthogonalise(u * values @ vh)
    inside = u.T @ found @ vh.T
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-6)
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()


def test_a_stack_is_orthogonalised_matrix_by_matrix():
    stack = torch.randn(3, 5, 8)
    assert torch.allclose(orthogonalise(stack), torch.stack([orthogonalise(m) for m in stack]), atol=1e-5)


def test_a_stack_of_parameters_trains_as_each_matrix_alone():
    start = torch.randn(2, 4, 4)
    stack = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    together, alone = Muon([stack], lr=0.05, weight_decay=0.1), Muon(single, lr=0.05, weight_decay=0.1)
    for _ in range(5):
        for optimizer in (together, alone):
            optimizer.zero_grad()
        (stack**4).sum().backward()
        sum((matrix**4).sum() for matrix in single).backward()
        together.step()
        alone.step()
    assert torch.allclose(stack, torch.stack(list(single)), atol=1e-5)


def test_it_recovers_a_planted_matrix():
    torch.manual_seed(0)
    planted, x = torch.randn(6, 6), torch.randn(64, 6)
    w = torch.nn.Parameter(torch.zeros(6, 6))
    for step in range(200):
        optimizer = Muon([w], lr=0.2 * (1 - step / 200), momentum=0.0)
        optimizer.zero_grad()
        ((x @ w - x @ planted) ** 2).mean().backward()
        optimizer.step()
    assert (w - planted).norm() < 0.1 * planted.norm()


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
