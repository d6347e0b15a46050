"""Regions, overlaps and displacement of spectra that are known."""

import pytest
import torch

from sonde.dynamics.jacobian_spectrum import Regions, Spectrum, overlap, overlaps
from sonde.errors import SondeError


def orthogonal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def planted(sigma, seed=0):
    """J with these singular values, whose left and right vectors are one where σ is 1."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    v = orthogonal(len(sigma), seed)
    u = v.clone()
    off = sigma != 1
    u[:, off] = u[:, off] @ orthogonal(int(off.sum()), seed + 1)
    return u @ torch.diag(sigma) @ v.T, v


def test_planted_regions_are_counted():
    j, _ = planted([9.0, 3.0, 1.0, 1.0, 1.0, 1.005, 0.95, 0.1])
    found = Spectrum.of(j)
    assert found.regions(0.1) == Regions(2, 5, 1)
    assert found.regions(1e-3) == Regions(3, 3, 2)
    assert found.fraction(1e-2) == 0.5


def test_a_planted_bulk_is_found_and_aligned():
    j, v = planted([9.0, 3.0, *[1.0] * 6, 0.5, 0.1])
    found = Spectrum.of(j)
    assert overlap(found.directions("bulk", 6), v[:, 2:8]) == pytest.approx(1)
    assert overlap(found.directions("complement", 4), v[:, [0, 1, 8, 9]]) == pytest.approx(1)
    assert overlap(found.directions("chaotic", 1), v[:, :1]) == pytest.approx(1)
    assert overlap(found.directions("stable", 1), v[:, 9:]) == pytest.approx(1)
    torch.testing.assert_close(found.alignment()[found.order[:6]], torch.ones(6, dtype=torch.float64))


def test_random_subspaces_overlap_by_k_over_n():
    draws = [overlap(orthogonal(40, s)[:, :10], orthogonal(40, s + 100)[:, :10]) for s in range(30)]
    assert sum(draws) / 30 == pytest.approx(0.25, abs=0.02)


def test_overlaps_of_all_sizes_are_those_one_by_one():
    a, b = (Spectrum.of(planted([4.0, 1.2, 1.0, 0.9, 0.3], seed)[0]) for seed in (0, 5))
    counts = [1, 2, 3, 5]
    expected = [overlap(a.directions("bulk", k), b.directions("bulk", k)) for k in counts]
    assert overlaps(a, b, counts) == pytest.approx(expected)
    assert overlaps(a, b, [5]) == pytest.approx([1])


def test_displacement_is_where_training_went():
    j, v = planted([9.0, 1.0, 1.0, 1.0, 0.1])
    found = Spectrum.of(j)
    start = torch.zeros(5, dtype=torch.float64)
    assert found.displaced_share(start, 3 * v[:, 0], 3) == pytest.approx(0, abs=1e-20)
    assert found.displaced_share(start, v[:, 1] - v[:, 3], 3) == pytest.approx(1)
    assert found.displacement(start, 3 * v[:, 0])[0] == pytest.approx(3)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    found = Spectrum.of(planted([2.0, 1.0])[0])
    found.save(tmp_path / "j.safetensors")
    again = Spectrum.load(tmp_path / "j.safetensors")
    assert again.u.equal(found.u) and again.sigma.equal(found.sigma) and again.v.equal(found.v)


def test_what_cannot_be_compared_or_counted_is_refused():
    found, other = Spectrum.of(planted([2.0, 1.0, 1.0])[0]), Spectrum.of(planted([2.0, 1.0])[0])
    for k in (0, 4):
        with pytest.raises(SondeError, match=f"k is {k}: give 1 to 3"):
            found.directions("bulk", k)
    with pytest.raises(SondeError, match="Jacobians of 3 and of 2 parameters"):
        overlaps(found, other, [1])
    with pytest.raises(SondeError, match=r"subspaces of \(3, 1\) and \(2, 1\)"):
        overlap(found.v[:, :1], other.v[:, :1])
    with pytest.raises(SondeError, match="1e-09 cannot be counted in float32"):
        Spectrum.of(torch.eye(3)).regions(1e-9)
    with pytest.raises(SondeError, match="give a square one with finite entries"):
        Spectrum.of(torch.full((2, 2), torch.nan))
