"""A chain of layers: what does not follow from the layer before is strange, and only there."""

import numpy as np
import pytest
import torch

from sonde.stats.abstraction import Abstraction
from sonde.stats.gaussian_novelty import Mahalanobis


def chain(n: int, *, seed: int, broken: bool = False) -> torch.Tensor:
    """Three layers of four features, each a fixed map of the one before; at layer 1 the map may be another."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(99))

    def noise() -> torch.Tensor:
        return 0.1 * torch.randn(n, 4, generator=generator)

    first = torch.randn(n, 4, generator=generator)
    second = first @ (maps[2] if broken else maps[0]) + noise()
    return torch.stack([first, second, second @ maps[1] + noise()])


def test_another_mechanism_is_strange_at_the_layer_where_it_works():
    detector = Abstraction().fit(chain(400, seed=0))
    normal, strange = detector.score(chain(200, seed=1)), detector.score(chain(200, seed=2, broken=True))
    assert np.median(strange[1]) > 20 * np.median(normal[1])
    for layer in (0, 2):
        assert np.median(strange[layer]) < 2 * np.median(normal[layer])


def test_scores_are_squared_distances_of_what_the_layer_before_does_not_tell():
    normal = Abstraction().fit(chain(4000, seed=0)).score(chain(4000, seed=1))
    assert normal.mean(1) == pytest.approx([4, 4, 4], rel=0.1)


def test_of_one_layer_it_is_the_mahalanobis_distance():
    trusted, rows = torch.randn(60, 5), torch.randn(20, 5)
    np.testing.assert_allclose(Abstraction().fit(trusted).score(rows), Mahalanobis().fit(trusted).score(rows))
