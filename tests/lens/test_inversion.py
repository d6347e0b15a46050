"""Distributions that an unembedding can make lead back to states that make them."""

import math

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lens.inversion import GaussianPrior, invert
from sonde.lm.model import LanguageModel
from sonde.stats.moments import Moments


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"), name="tiny")


def reachable(lm: LanguageModel, n: int = 4) -> torch.Tensor:
    hidden = 3 * torch.randn(n, lm.d_model)
    return lm.unembed(hidden).double().log_softmax(-1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "cohere", "rwkv", "xlstm"])
def test_what_the_unembedding_made_is_recovered(family):
    lm = LanguageModel(tiny(family), name=family)
    log_p = reachable(lm)
    found = invert(lm.unembedding, log_p)
    assert found.hidden.shape == (4, lm.d_model)
    assert found.kl.max() < 1e-6
    again = lm.unembed(found.hidden.to(lm.dtype)).double().log_softmax(-1)
    assert torch.allclose(again.exp(), log_p.exp(), atol=2e-4)


def test_a_prediction_of_the_model_is_recovered():
    import sonde

    lm = sonde.load("organism:pebble", check=False)
    with lm.reading("logits") as acts, torch.no_grad():
        lm("The wolf looked at")
    assert invert(lm.unembedding, acts["logits"][0, -1:].log_softmax(-1)).kl.max() < 1e-6


def test_what_cannot_be_made_gets_the_nearest(lm):
    """For a distribution out of reach no state nearby, nor a random one, does better."""
    log_p = torch.randn(3, lm.vocab_size).double().mul(3).log_softmax(-1)
    found = invert(lm.unembedding, log_p, evaluations=150)
    assert found.kl.min() > 1e-3
    for other in (found.hidden + 0.05 * torch.randn_like(found.hidden), torch.randn_like(found.hidden)):
        logq = lm.unembed(other.float()).double().log_softmax(-1)
        kl = (log_p.exp() * (log_p - logq)).sum(-1)
        assert (kl >= found.kl - 1e-6).all()


def test_excluded_tokens_count_as_probability_zero(lm):
    log_p = torch.full((1, lm.vocab_size), -math.inf)
    log_p[0, 7] = 0
    found = invert(lm.unembedding, log_p, evaluations=60, descents=1)
    assert found.hidden.isfinite().all()
    assert lm.unembed(found.hidden.float()).argmax() == 7


def test_a_heavy_prior_leads_to_its_mean(lm):
    log_p = reachable(lm, 2)
    states = lm.unembedding.normed(torch.randn(500, lm.d_model)).detach()
    moments = Moments(lm.d_model).update(states)
    far = GaussianPrior.of(moments, weight=0.0)
    distance = []
    for prior in (None, GaussianPrior.of(moments, weight=0.01), GaussianPrior.of(moments, weight=1.0)):
        found = invert(lm.unembedding, log_p, prior=prior, evaluations=100, descents=1).hidden.float()
        distance.append(far.energy(lm.unembedding.normed(found).double()).mean())
    assert distance[0] > distance[1] > distance[2]


def test_the_prior_is_a_gaussian_up_to_its_constant():
    rows = torch.randn(200, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    moments = Moments(3).update(rows)
    normal = torch.distributions.MultivariateNormal(moments.mean, moments.covariance)
    gap = -normal.log_prob(rows) - GaussianPrior.of(moments).energy(rows)
    assert torch.allclose(gap, gap[0].expand_as(gap))


@pytest.mark.parametrize(
    ("log_p", "words"),
    [
        (torch.zeros(2, 5), "expected log-probabilities"),
        (torch.zeros(97), "expected log-probabilities"),
        (torch.zeros(2, 97), "must sum to 1"),
        (torch.full((2, 97), math.nan), "must sum to 1"),
    ],
)
def test_what_is_no_distribution_over_the_vocabulary_is_refused(lm, log_p, words):
    with pytest.raises(SondeError, match=words):
        invert(lm.unembedding, log_p)


def test_starts_and_weights_that_make_no_sense_are_refused(lm):
    with pytest.raises(SondeError, match="starts of shape"):
        invert(lm.unembedding, reachable(lm), start=torch.zeros(1, 3))
    with pytest.raises(SondeError, match="must not be negative"):
        GaussianPrior(torch.zeros(3), torch.eye(3), weight=-1.0)
