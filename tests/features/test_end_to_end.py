"""The loss of a model that a dictionary is spliced into, and its gradients."""

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.end_to_end import LOSSES, end_to_end_loss
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch
from sonde.stats.information import cross_entropy, entropy, log_probs

SITES = ("resid_post.0", "resid_pre.2", "mlp_out.1")


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "mamba"])
def lm(request):
    return LanguageModel(tiny(request.param), name=request.param)


def batch_of(lm, *, pads=False):
    tokens = torch.randint(3, 60, (3, 10))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if pads:
        mask[1, 6:] = False
    sites = [site for site in SITES if site in lm.sites]
    with torch.no_grad(), lm.reading(*sites, "logits") as acts:
        lm(tokens, mask)
    none = torch.zeros(3, dtype=torch.long)
    return Batch(tokens, mask, 0, none, none, none, acts=dict(acts))


def dictionary_of(lm, kind="topk"):
    k = 6 if kind == "topk" else None
    return Dictionary.initialised(Design(kind, lm.d_model, 48, k=k), seed=1).train()


@pytest.mark.parametrize("site", SITES)
def test_without_a_change_the_divergence_is_0_and_the_cross_entropy_the_models_own(lm, site):
    if site not in lm.sites:
        pytest.skip("a family without this site")
    batch = batch_of(lm)
    found = {loss: end_to_end_loss(lm, lambda x: x, batch, batch.mask, site=site, loss=loss).item() for loss in LOSSES}
    own = cross_entropy(log_probs(batch.acts["logits"][:, :-1]), batch.tokens[:, 1:]).mean()
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    assert found["ce"] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_gradients_are_those_of_a_whole_pass_under_the_edit(lm, site):
    if site not in lm.sites:
        pytest.skip("a family without this site")
    batch = batch_of(lm)
    ours, theirs = dictionary_of(lm), dictionary_of(lm)
    loss = end_to_end_loss(lm, ours, batch, batch.mask, site=site)
    loss.backward()
    with lm.editing({site: theirs}):
        logp = log_probs(lm(batch.tokens).logits[:, :-1])
    clean = log_probs(batch.acts["logits"][:, :-1])
    soft = -(clean.exp() * logp).sum(-1) - entropy(clean)  # cross-entropy less the clean prediction's own entropy
    soft.mean().backward()
    assert loss.item() == pytest.approx(soft.mean().item(), rel=1e-4)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad.norm() > 0, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_tokens_that_are_not_taken_and_pads_keep_their_activations(lm):
    batch = batch_of(lm, pads=True)
    taken = batch.mask.clone()
    taken[:, 0] = False
    seen = []

    def zeros(x):
        seen.append(x)
        return torch.zeros_like(x)

    loss = end_to_end_loss(lm, zeros, batch, taken, site="resid_post.0")
    assert len(seen[0]) == int(taken.sum())
    with torch.no_grad(), lm.editing({"resid_post.0": torch.zeros_like}, positions=slice(1, None)):
        logits = lm(batch.tokens, batch.mask).logits
    here = batch.mask[:, 1:]
    clean, other = (log_probs(x[:, :-1][here]) for x in (batch.acts["logits"], logits))
    assert loss.item() == pytest.approx((clean.exp() * (clean - other)).sum(-1).mean().item(), rel=1e-4)


def test_what_cannot_be_is_refused():
    lm = LanguageModel(tiny("gpt_neox"), name="tiny")
    batch = batch_of(lm)
    with pytest.raises(SondeError, match="kl or ce"):
        end_to_end_loss(lm, lambda x: x, batch, batch.mask, site="resid_post.0", loss="mse")
    with pytest.raises(SondeError, match=r"writes width 5, and resid_post.0 has width 32"):
        end_to_end_loss(lm, lambda x: x[:, :5], batch, batch.mask, site="resid_post.0")
