"""The Dirichlet that made the data is found again, from its mean log-probability alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.files import load_bundle, save_bundle
from sonde.stats.dirichlet import MeanLogProbs, fit_dirichlet, log_likelihood


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 300), spread=st.floats(0.1, 2.5), level=st.floats(-3, 3), seed=st.integers(0, 99))
def test_the_parameters_follow_from_the_exact_mean(size, spread, level, seed):
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alpha = (level + spread * noise).exp()
    exact = torch.digamma(alpha) - torch.digamma(alpha.sum())
    assert torch.allclose(fit_dirichlet(exact), alpha, rtol=1e-5)


def test_a_sample_gives_the_parameters_back():
    alpha = torch.tensor([0.3, 1.0, 4.0, 0.05, 2.0], dtype=torch.float64)
    p = torch.distributions.Dirichlet(alpha).sample((50000,))
    found = MeanLogProbs(5).update(p.log()).fit()
    assert torch.allclose(found, alpha, rtol=0.03)


def test_no_other_parameters_are_more_likely():
    p = torch.distributions.Dirichlet(torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)).sample((100,))
    mean = p.log().mean(0)
    best = fit_dirichlet(mean)
    for _ in range(50):
        other = best * (0.1 * torch.randn(3, dtype=torch.float64)).exp()
        assert log_likelihood(other, mean) <= log_likelihood(best, mean)


@pytest.mark.peer
def test_the_likelihood_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    alpha = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    p = torch.distributions.Dirichlet(alpha).sample((20,))
    theirs = stats.dirichlet.logpdf(p.numpy().T, alpha.numpy()).mean()
    assert log_likelihood(alpha, p.log().mean(0)) == pytest.approx(theirs, rel=1e-10)


def test_parts_and_masks_count_like_the_whole(tmp_path):
    logits = torch.randn(6, 4, 9)
    mask = torch.rand(6, 4) < 0.7
    whole = MeanLogProbs(9).update(logits, mask)
    first, second = MeanLogProbs(9).update(logits[:2], mask[:2]), MeanLogProbs(9).update(logits[2:], mask[2:])
    save_bundle(tmp_path / "state", first.state())
    merged = MeanLogProbs.from_state(load_bundle(tmp_path / "state")).merge(second)
    assert merged.n == whole.n == int(mask.sum())
    assert torch.allclose(merged.mean, whole.mean)
    assert torch.allclose(whole.mean, logits.log_softmax(-1)[mask].double().mean(0), atol=1e-6)


def test_what_no_dirichlet_fits_is_refused():
    with pytest.raises(ValueError, match="one fixed prediction"):
        fit_dirichlet(torch.tensor([0.25, 0.75]).log())
    with pytest.raises(ValueError, match="nan or infinity"):
        fit_dirichlet(torch.tensor([0.0, 1.0]).log())
    with pytest.raises(ValueError, match="two outcomes"):
        fit_dirichlet(torch.zeros(1))
    with pytest.raises(ValueError, match="probability 0"):
        MeanLogProbs(2).update(torch.tensor([0.0, 1.0]).log())
    with pytest.raises(ValueError, match="expected 3"):
        MeanLogProbs(3).update(torch.zeros(2))
    with pytest.raises(ValueError, match="expected 3"):
        MeanLogProbs(3).merge(MeanLogProbs(2))
    with pytest.raises(ValueError, match="no prediction"):
        MeanLogProbs(3).fit()
