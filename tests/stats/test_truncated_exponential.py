"""Most random on [0, 1] with a given mean."""

import pytest
import torch

from sonde.stats.truncated_exponential import draw, mean, rate_of


def test_the_rate_is_the_inverse_of_the_mean():
    means = torch.linspace(0.003, 0.997, 400, dtype=torch.float64)
    torch.testing.assert_close(mean(rate_of(means)), means, rtol=0, atol=1e-9)
    rates = torch.tensor([-300.0, -2.0, -1e-5, 0.0, 1e-5, 2.0, 300.0])
    torch.testing.assert_close(mean(-rates), 1 - mean(rates))
    assert mean(torch.tensor(0.01)).item() == pytest.approx(0.5 - 0.01 / 12, abs=1e-8)


def test_samples_have_the_mean_and_stay_in_the_box():
    n = 20_000
    wanted = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    x = draw(rate_of(wanted), n, seed=1)
    assert x.min() >= 0 and x.max() <= 1
    assert (x.mean(0) - wanted).abs().max() < 1.5 / n**0.5
    assert torch.equal(x, draw(rate_of(wanted), n, seed=1))


def test_the_density_falls_as_said():
    x = draw(torch.tensor([3.0]), 200_000)[:, 0]
    edges = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    expected = (1 - torch.exp(-3 * edges)) / (1 - torch.exp(torch.tensor(-3.0)))
    found = torch.stack([(x < edge).double().mean() for edge in edges])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.005)


def test_means_outside_the_box_are_counted():
    with pytest.raises(ValueError, match=r"2 of 3 means lie outside \[0, 1\]"):
        rate_of(torch.tensor([-0.1, 0.5, 1.2]))
