"""F and G against the Hessian and the gradient that autograd gives."""

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.fragility import fragility
from sonde.prompts.objectives import cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import SoftPrompt, embedding_rms


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"))


@pytest.fixture(scope="module")
def examples(lm):
    ids = torch.randint(lm.vocab_size, (5, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return Examples([row[:4] for row in ids], [row[4:] for row in ids])


@pytest.fixture(scope="module")
def prompt(lm):
    return SoftPrompt.from_tokens(lm, [3])


def loss_at(lm, examples, flat):
    passes = Passes(lm, examples, cached=False)
    rows = passes.rows(range(len(examples)), [1], ["suffix"])
    return cross_entropy(passes.score(flat.view(1, -1), rows)).mean()


def test_the_rise_under_small_noise_is_the_trace_of_the_hessian(lm, examples, prompt):
    found = fragility(lm, prompt, examples, rhos=(0.03,), draws=256)
    flat = prompt.vectors.flatten().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda v: loss_at(lm, examples, v), flat)
    expected = 0.5 * (0.03 * embedding_rms(lm)) ** 2 * float(hessian.trace())
    rise = found.rise(0.03)
    assert rise.low <= expected <= rise.high
    assert found.loss == pytest.approx(float(loss_at(lm, examples, flat).detach()), rel=1e-4)


def test_the_gradient_at_rest_is_that_of_the_loss(lm, examples, prompt):
    found = fragility(lm, prompt, examples, rhos=(1e-4, 1.0), draws=4)
    flat = prompt.vectors.flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(lm, examples, flat), flat)
    assert found.at_rest == pytest.approx(float(gradient.norm()) * embedding_rms(lm), rel=1e-3)
    assert found.gradient(1e-4).estimate == pytest.approx(found.at_rest, rel=1e-2)
    assert found.losses.shape == found.gradients.shape == (2, 4)


def test_no_vectors_and_odd_draws_are_refused(lm, examples, prompt):
    with pytest.raises(SondeError, match="3 draws of a prompt of 1 vectors"):
        fragility(lm, prompt, examples, draws=3)
    with pytest.raises(SondeError, match="prompt of 0 vectors"):
        fragility(lm, SoftPrompt.empty(lm), examples)
