"""Ranks and back."""

import torch

from sonde.stats.quantiles import dithered_rank, quantile


def test_ranks_are_uniform_however_many_ties():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (40_000, 2), generator=generator).double()
    rank = dithered_rank(x, x)
    for level in (0.1, 0.5, 0.77):
        assert ((rank < level).double().mean(0) - level).abs().max() < 0.01


def test_a_column_keeps_its_order_and_comes_back():
    x = torch.randn(500, 3, dtype=torch.float64)
    rank = dithered_rank(x, x, seed=4)
    assert torch.equal(rank.argsort(0), x.argsort(0))
    torch.testing.assert_close(quantile(rank, x), x)


def test_one_sample_gets_the_distribution_of_the_other():
    x = torch.randint(5, (20_000, 1)).double()
    y = torch.tensor([[0.0], [0.0], [7.0], [9.0]])
    moved = quantile(dithered_rank(x, x), y)
    shares = [(moved == value).double().mean().item() for value in (0.0, 7.0, 9.0)]
    assert all(abs(share - wanted) < 0.01 for share, wanted in zip(shares, (0.5, 0.25, 0.25), strict=True))


def test_the_ends_are_the_ends():
    sample = torch.tensor([[1.0], [2.0], [3.0]])
    assert quantile(torch.tensor([[0.0], [1.0]], dtype=torch.float64), sample).flatten().tolist() == [1.0, 3.0]
