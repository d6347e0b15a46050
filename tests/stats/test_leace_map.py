import pytest
import torch

from sonde.concepts.leace import LeaceEraser
from sonde.stats.leace_map import class_cross_covariance, class_means, column_basis, leace_maps


def rows(layers=3, n=300, d=8, k=3):
    g = torch.Generator().manual_seed(0)
    z = torch.arange(n) % k
    mix = torch.randn(layers, d, d, generator=g)
    return torch.randn(layers, n, d, generator=g) @ mix + 2 * torch.randn(layers, k, d, generator=g)[:, z], z


def test_every_layer_is_the_eraser_of_its_rows():
    x, z = rows()
    means, counts = class_means(x, z, 3)
    covariance = torch.stack([torch.cov(layer.double().T) for layer in x])
    left, right = leace_maps(covariance, class_cross_covariance(means, counts), n=x.shape[1])
    assert left.shape == (3, 8, 2)
    for layer in range(len(x)):
        eraser = LeaceEraser.fit(x[layer], z)
        erased = x[layer].double() - (x[layer].double() - x[layer].double().mean(0)) @ right[layer].T @ left[layer].T
        torch.testing.assert_close(erased.float(), eraser(x[layer]), rtol=1e-3, atol=1e-3)
        apart = torch.stack([erased[z == c].mean(0) for c in range(3)])
        assert float((apart - apart[0]).abs().max()) < 1e-4


def test_class_means_are_those_of_the_rows_and_empty_classes_are_zero():
    x, z = rows()
    means, counts = class_means(x, z, 4)
    torch.testing.assert_close(means[:, 1], x[:, z == 1].double().mean(1))
    assert counts.tolist() == [100, 100, 100, 0]
    assert bool((means[:, 3] == 0).all())
    assert bool((class_cross_covariance(means, counts)[..., 3] == 0).all())


def test_a_layer_of_lower_rank_is_filled_with_columns_that_take_nothing_out():
    x, z = rows()
    x[1] = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    x[1, z == 2] += 3.0
    x[1, z == 0] -= x[1, z == 0].mean(0) - x[1, z == 1].mean(0)
    means, counts = class_means(x, z, 3)
    covariance = torch.stack([torch.cov(layer.double().T) for layer in x])
    left, _ = leace_maps(covariance, class_cross_covariance(means, counts), n=300)
    assert left.shape[2] == 2
    assert bool((left[1, :, 1] == 0).all())


def test_a_tolerance_outside_of_its_range_is_refused():
    with pytest.raises(ValueError, match="tolerance is 1"):
        column_basis(torch.eye(2), tolerance=1.0)
