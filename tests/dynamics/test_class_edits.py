"""Edited rows have the statistics of the class that they were moved to."""

import pytest
import torch

from sonde.data.digits import digits
from sonde.dynamics.class_edits import ClassEdits, Transport
from sonde.dynamics.maxent import Statistics
from sonde.errors import SondeError


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def edits(data):
    return ClassEdits(data.train_x, data.train_y)


def of_class(data, c):
    rows = data.train_x[data.train_y == c]
    return rows, torch.full((len(rows),), c)


def test_transport_arrives_at_mean_and_covariance_though_the_ranks_differ(data, edits):
    x, y = of_class(data, 1)
    move = edits.map(1, 8)
    first, second = edits.classes[1], edits.classes[8]
    assert first.rank < 64
    eye = move.ridge * torch.eye(64, dtype=torch.float64)
    arrived = move.matrix @ (first.covariance + eye) @ move.matrix
    torch.testing.assert_close(arrived, second.covariance + eye, rtol=0, atol=1e-8)
    moved = edits.transport(x, y, torch.full_like(y, 8))
    torch.testing.assert_close(moved.mean(0), second.mean)


def test_without_a_ridge_a_singular_covariance_is_refused(data):
    with pytest.raises(SondeError, match=r"the covariance of class 1 has rank \d+ of 64: give a ridge"):
        ClassEdits(data.train_x, data.train_y, ridge=0).map(1, 8)


def test_few_rows_in_many_dimensions_are_moved_in_their_span():
    generator = torch.Generator().manual_seed(0)
    first = Statistics.of(torch.randn(7, 40, generator=generator, dtype=torch.float64))
    second = Statistics.of(torch.randn(9, 40, generator=generator, dtype=torch.float64) * 2 + 1)
    small = Transport(first, second)
    assert small.basis is not None and small.basis.shape == (40, 16)
    whole = Transport(Statistics(first.mean, first.covariance), Statistics(second.mean, second.covariance))
    assert whole.basis is None
    new = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(small(new), whole(new), rtol=0, atol=1e-5)


def test_quantiles_give_each_coordinate_the_distribution_of_the_target(data, edits):
    x, y = of_class(data, 0)
    moved = edits.quantiles(x, y, torch.full_like(y, 7))
    target = data.train_x[data.train_y == 7].double()
    for level in (0.2, 0.5, 0.9):
        off = moved.quantile(level, 0) - target.quantile(level, 0)
        assert off.abs().mean() < 0.03
    assert set(moved.unique().tolist()) <= set(target.unique().tolist())


def test_a_mean_shift_reaches_the_mean_inside_the_box(data, edits):
    x, y = of_class(data, 2)
    moved = edits.mean_shift(x, y, torch.full_like(y, 5))
    torch.testing.assert_close(moved.mean(0), edits.classes[5].mean, rtol=0, atol=1e-5)
    assert moved.min() >= 0 and moved.max() <= 1
    assert torch.cov(moved.T).trace() < torch.cov(x.double().T).trace()  # what the box takes


def test_a_mean_outside_the_box_is_not_reached():
    x = torch.cat([torch.rand(5, 2), torch.rand(5, 2) + 3]).double()
    y = torch.arange(10) // 5
    with pytest.raises(SondeError, match="the mean of class 1 was not reached in 10,000 rounds"):
        ClassEdits(x, y).mean_shift(x[:5], y[:5], torch.ones(5, dtype=torch.long))


def test_independent_rows_keep_marginals_and_lose_the_rest(data, edits):
    y = torch.full((4000,), 4)
    made = edits.independent(y)
    own = data.train_x[data.train_y == 4].double()
    assert (made.mean(0) - own.mean(0)).abs().max() < 0.03
    assert torch.cov(made.T).fill_diagonal_(0).abs().mean() < 0.3 * torch.cov(own.T).fill_diagonal_(0).abs().mean()


def test_targets_are_other_classes_by_their_shares():
    edits = ClassEdits(torch.rand(40, 2), torch.arange(40) % 4)
    y = torch.arange(4).repeat(3000)
    target = edits.other_classes(y)
    assert (target != y).all()
    assert ((target == 2)[y == 0].double().mean() - 1 / 3).abs() < 0.03


def test_a_class_of_one_row_is_named():
    with pytest.raises(SondeError, match=r"class 1 has 1 row\(s\)"):
        ClassEdits(torch.rand(4, 2), torch.tensor([0, 0, 0, 1]))
