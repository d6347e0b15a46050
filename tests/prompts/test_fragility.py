"""F, G and the trace against the Hessian and the gradient that autograd gives."""

import pytest
import torch
from families import tiny

import sonde
from sonde.data.markov_language import contexts, trigger_ids
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.fragility import fragility, hessian_trace, worst_case
from sonde.prompts.objectives import cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import SoftPrompt, embedding_rms
from sonde.prompts.training import train_prompts


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
    assert isinstance(hessian, torch.Tensor)
    expected = 0.5 * (0.03 * embedding_rms(lm)) ** 2 * float(hessian.trace())
    rise = found.rise(0.03)
    assert rise.low <= expected <= rise.high
    assert found.loss == pytest.approx(float(loss_at(lm, examples, flat).detach()), rel=1e-4)
    trace = hessian_trace(lm, prompt, examples, draws=64)
    assert trace.low <= embedding_rms(lm) ** 2 * float(hessian.trace()) <= trace.high


def test_a_trained_prompt_loses_what_the_curvature_says_and_more_in_the_worst_direction():
    toy = sonde.load("organism:markov-backdoor", check=False)
    payload = trigger_ids()[1]
    train, test = (Examples(contexts(n, seed=seed), [payload] * n) for n, seed in ((64, 1), (16, 3)))
    trials = train_prompts(
        toy, train, lengths=(1,), restarts=1, lrs=(1.0,), steps=80, batch=8, validation=test, validations=1
    )
    trained = trials[0].prompt
    small, *larger = rhos = (0.03, 0.3, 1.0, 3.0)
    found = fragility(toy, trained, test, rhos=rhos, draws=256)
    expected = 0.5 * small**2 * hessian_trace(toy, trained, test, draws=256).estimate
    assert found.rise(small).estimate == pytest.approx(expected, rel=0.15)
    rises = [found.rise(rho).estimate for rho in rhos]
    assert rises == sorted(rises) and rises[0] > 0
    worst = [rise.estimate for rise in worst_case(toy, trained, test, rhos=larger)]
    assert all(found.losses[i + 1].max() - found.loss <= bad for i, bad in enumerate(worst))


def test_the_worst_of_a_small_ball_is_its_radius_times_the_gradient(lm, examples, prompt):
    flat = prompt.vectors.flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(lm, examples, flat), flat)
    (found,) = worst_case(lm, prompt, examples, rhos=(1e-2,))
    radius = 1e-2 * embedding_rms(lm) * flat.numel() ** 0.5
    assert found.estimate == pytest.approx(radius * float(gradient.norm()), rel=0.05)
    (centre,) = worst_case(lm, prompt, examples, rhos=(0.0,))
    assert centre.bounds == (0.0, 0.0)


def test_at_random_places_all_draws_stand_at_the_same(lm, examples):
    context = [[1, 2, 3, 4, 5, 6, 7, 8]]
    far = Examples(context * 3, [[4, 5]] * 3)
    found = fragility(lm, SoftPrompt.from_tokens(lm, [3], "random"), far, rhos=(1e-6,), draws=4)
    assert found.losses.flatten().tolist() == pytest.approx([found.loss] * 4, abs=1e-5)


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
    with pytest.raises(SondeError, match="1 draws of a trace"):
        hessian_trace(lm, prompt, examples, draws=1)
    with pytest.raises(SondeError, match="10 steps on 1 examples"):
        worst_case(lm, prompt, examples.select([0]))
