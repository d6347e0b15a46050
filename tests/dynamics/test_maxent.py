"""Samples have the moments that were asked for, and are otherwise random."""

import pytest
import torch

from sonde.data.digits import digits
from sonde.dynamics.maxent import Statistics, log_distance, sample_maxent, third_moments
from sonde.errors import SondeError


def skewed(n=400, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(n, d, generator=generator, dtype=torch.float64)
    return (z**2 + z.roll(1, 1) ** 3) / 2


def test_the_first_order_has_the_means_and_nothing_else():
    statistics = Statistics.of(skewed())
    made = sample_maxent(statistics, 20_000, order=1)
    assert (made.x.mean(0) - statistics.mean).abs().max() < 1.5 / 20_000**0.5
    assert torch.corrcoef(made.x.T).fill_diagonal_(0).abs().max() < 0.03
    assert set(made.errors) == {1}


def test_the_gaussian_has_mean_and_covariance_of_any_rank():
    x = skewed()
    x[:, 0] = x[:, 1]
    statistics = Statistics.of(x)
    assert statistics.rank == 5
    made = sample_maxent(statistics, 50_000, order=2, box=False)
    assert made.errors[1] < 0.01 and made.errors[2] < 0.03
    torch.testing.assert_close(made.x[:, 0], made.x[:, 1])


def test_particles_in_the_box_have_the_moments_of_digits():
    data = digits()
    statistics = Statistics.of(data.train_x[data.train_y == 3])
    made = sample_maxent(statistics, 500, order=2)
    assert made.x.min() >= 0 and made.x.max() <= 1
    assert made.errors[1] < 1e-3
    assert made.errors[2] < 0.015
    still = statistics.covariance.diagonal() == 0
    assert still.any() and torch.equal(made.x[:, still], statistics.mean[still].expand(500, -1))


def test_the_entropy_keeps_particles_apart(monkeypatch):
    statistics = Statistics.of(skewed(d=3))
    once = sample_maxent(statistics, 60, order=2).x
    clumped = once[torch.arange(60) // 2]
    assert log_distance(once + 1e-9) > log_distance(clumped + 1e-6 * torch.rand(60, 3))
    assert len(once.round(decimals=6).unique(dim=0)) == 60
    monkeypatch.setattr("sonde.dynamics.maxent._ENTROPY", 0.0)
    assert log_distance(once) > log_distance(sample_maxent(statistics, 60, order=2).x) + 0.05


def test_the_third_order_is_matched_on_all_slices():
    statistics = Statistics.of(skewed())
    second = sample_maxent(statistics, 300, order=2)
    third = sample_maxent(statistics, 300, order=3, slices=3, steps=600)
    assert third.errors[3] < 0.1
    all_slices = torch.arange(6)
    target = statistics.coskewness(all_slices)
    before = third_moments(second.x - second.x.mean(0), all_slices)
    assert third.errors[3] < 0.2 * float((before - target).norm() / target.norm())
    assert third.errors[2] < 0.05
    assert third.x.min() >= 0 and third.x.max() <= 1


def test_third_moments_are_the_definition():
    x = torch.randn(7, 4, dtype=torch.float64)
    by_hand = torch.einsum("ni,nj,nk->ijk", x, x, x) / 7
    torch.testing.assert_close(third_moments(x, torch.tensor([2, 0])), by_hand[[2, 0]])


def test_what_has_no_sample_is_named():
    with pytest.raises(SondeError, match=r"class 4 has 1 row\(s\)"):
        Statistics.of(torch.zeros(1, 3), name="class 4")
    with pytest.raises(SondeError, match="nan or infinity"):
        Statistics.of(torch.tensor([[0.0], [float("nan")]]))
    wide = Statistics.of(torch.tensor([[0.0, 2.0], [0.5, 0.5], [-1.0, 1.0]]))
    with pytest.raises(SondeError, match=r"2 values lie outside \[0, 1\]: they go from -1 to 2"):
        sample_maxent(wide, 10, order=1)
    impossible = Statistics(torch.tensor([0.5, 0.1]).double(), torch.diag(torch.tensor([0.2, 0.2])).double())
    with pytest.raises(SondeError, match=r"above m \(1 - m\) at 1$"):
        sample_maxent(impossible, 10, order=2)
    possible = Statistics(torch.tensor([0.5, 0.5]).double(), torch.diag(torch.tensor([0.05, 0.05])).double())
    with pytest.raises(SondeError, match="say nothing of third moments"):
        sample_maxent(possible, 10, order=3)
    with pytest.raises(SondeError, match="order 1 without a box"):
        sample_maxent(wide, 10, order=1, box=False)
    with pytest.raises(SondeError, match="1 rows have no moments"):
        sample_maxent(possible, 1, order=2)
