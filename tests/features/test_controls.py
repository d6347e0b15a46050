"""Controls of dictionaries: principal components are the best linear code, random directions explain little."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.features.controls import principal_components, random_directions
from sonde.features.input_scale import Sample

pytestmark = pytest.mark.usefixtures("no_grad")


def test_principal_components_are_the_projection_with_the_least_error():
    x = torch.randn(500, 12) * torch.linspace(1, 6, 12) + 4
    made = principal_components(Sample.of(x, covariance=True), 5, site="embed")
    centred = (x - x.mean(0)).double()
    values = torch.linalg.svdvals(centred)
    error = (x - made(x)).double().square().sum()
    assert error.item() == pytest.approx(values[5:].square().sum().item(), rel=1e-4)
    assert (made.encode(x).values > 0).sum(1).tolist() == [5] * 500
    assert made.site == "embed"


def test_random_directions_keep_k_latents_around_the_mean():
    x = torch.randn(300, 12) + 4
    made = random_directions(Sample.of(x), 64, 3, seed=1)
    torch.testing.assert_close(made.b_dec, x.mean(0))
    assert (made.encode(x).values > 0).sum(1).max() <= 3
    assert not torch.equal(made.w_dec, random_directions(Sample.of(x), 64, 3, seed=2).w_dec)


def test_more_components_than_numbers_are_refused():
    with pytest.raises(SondeError, match="1 to 12 principal components"):
        principal_components(Sample.of(torch.randn(20, 12), covariance=True), 13)


def test_a_sample_without_its_covariance_has_no_components():
    with pytest.raises(ValueError, match="measure it with covariance=True"):
        principal_components(Sample.of(torch.randn(20, 12)), 3)
