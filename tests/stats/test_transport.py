"""Optimal transport of Gaussians: the maps arrive, the barycentre is in the middle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.stats.solve import Root
from sonde.stats.transport import barycentre, transport

DOUBLE = torch.float64
quick = settings(max_examples=20, deadline=None)


def covariances(k, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(k, d, d, generator=g, dtype=DOUBLE) / d**0.5 + torch.eye(d, dtype=DOUBLE)
    return a @ a.mT


@quick
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_the_barycentre_is_the_fixed_point_and_the_cheapest_target(seed, k):
    found = covariances(k, 5, seed)
    weights = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) + 0.1
    weights /= weights.sum()
    centre, _ = barycentre(found, weights)
    mean_map = sum(w * transport(Root(centre), s) for w, s in zip(weights, found, strict=True))
    torch.testing.assert_close(mean_map, torch.eye(5, dtype=DOUBLE), rtol=0, atol=1e-7)

    def cost(target):
        maps = [transport(Root(s), target) for s in found]
        moves = [torch.trace((t - torch.eye(5)) @ s @ (t - torch.eye(5))) for t, s in zip(maps, found, strict=True)]
        return float(weights @ torch.stack(moves))

    other = covariances(1, 5, seed + 1)[0]
    assert cost(centre) <= min(cost(0.9 * centre + 0.1 * other), cost(1.01 * centre)) + 1e-12


@quick
@given(st.integers(0, 10_000))
def test_transport_maps_are_symmetric_positive_and_arrive(seed):
    source, target = covariances(2, 6, seed)
    t = transport(Root(source), target)
    torch.testing.assert_close(t, t.T)
    torch.testing.assert_close(t @ source @ t, target)
    assert torch.linalg.eigvalsh(t).min() > 0


def test_two_classes_in_closed_form_are_the_fixed_point():
    found = covariances(2, 8)
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    closed, steps = barycentre(found, weights)
    assert steps == 0
    tripled = torch.cat([found, found[:1]])
    iterated, _ = barycentre(tripled, torch.tensor([0.1, 0.7, 0.2], dtype=DOUBLE))
    torch.testing.assert_close(closed, iterated, rtol=0, atol=1e-8)


def test_weights_must_be_shares():
    with pytest.raises(ValueError, match="must not be negative"):
        barycentre(covariances(2, 3), torch.tensor([-1.0, 2.0]))
