"""Robust training: every kind does what its formula says, and a shaken prompt of noise training loses less."""

from typing import Any

import pytest
import torch
from families import tiny

import sonde
from sonde.data.markov_language import contexts, trigger_ids
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.fragility import fragility
from sonde.prompts.objectives import TokenIndex, cross_entropy
from sonde.prompts.passes import Passes
from sonde.prompts.robust import (
    NoisyPasses,
    Penalised,
    SharpPasses,
    hull_penalty,
    nearest_in_hull,
    norm_penalty,
    train_robust,
)
from sonde.prompts.soft_prompt import SoftPrompt, embedded, embedding_rms
from sonde.prompts.training import train_prompts

PAYLOAD = trigger_ids()[1]
TRAIN, TEST = (Examples(contexts(n, seed=seed), [PAYLOAD] * n) for n, seed in ((32, 1), (16, 3)))
SMALL: dict[str, Any] = {"lengths": (1,), "restarts": 1, "lrs": (1.0,), "steps": 40, "batch": 8, "validation": TEST}


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"))


@pytest.fixture(scope="module")
def examples(lm):
    ids = torch.randint(lm.vocab_size, (4, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return Examples([row[:4] for row in ids], [row[4:] for row in ids])


@pytest.fixture(scope="module")
def toy():
    return sonde.load("organism:markov-backdoor", check=False)


def rise(toy, prompt):
    return fragility(toy, prompt, TEST, rhos=(3.0,)).rise(3.0).estimate


def bank_and_rows(lm, passes):
    bank = embedded(lm, torch.tensor([3, 7, 9])).requires_grad_()
    return bank, passes.rows(range(len(passes.examples)), [1, 2], ["suffix", "suffix"])


def test_noise_and_ascent_act_under_a_gradient_alone(lm, examples):
    for passes in (NoisyPasses(lm, examples, rho=1.0), SharpPasses(lm, examples, rho=1.0)):
        plain = Passes(lm, examples)
        bank, rows = bank_and_rows(lm, passes)
        with torch.no_grad():
            assert torch.equal(passes.score(bank, rows).logits, plain.score(bank, rows).logits)
        moved = passes.score(bank, rows)
        assert not torch.allclose(moved.logits, plain.score(bank, rows).logits)
        again = passes.score(bank, rows)
        assert torch.equal(moved.logits, again.logits)  # the same vectors, the same noise: runs can be resumed
        moved.nats.sum().backward()
        assert bank.grad is not None and bank.grad.abs().sum(1).min() > 0


def test_ascent_goes_up_by_radius_times_gradient(lm, examples):
    rho = 1e-2
    passes, plain = SharpPasses(lm, examples, rho=rho), Passes(lm, examples)
    bank, rows = bank_and_rows(lm, passes)
    rest = cross_entropy(plain.score(bank, rows))
    (gradient,) = torch.autograd.grad(rest.sum(), bank)
    climbed = (cross_entropy(passes.score(bank, rows)) - rest).view(2, -1).sum(1)
    for i, own in enumerate((gradient[:1], gradient[1:])):
        expected = rho * embedding_rms(lm) * own.numel() ** 0.5 * own.norm()
        assert climbed[i].item() == pytest.approx(expected.item(), rel=0.1)


def test_penalties_are_of_each_prompt_and_keep_what_the_objective_asks_for(lm, examples):
    passes = Passes(lm, examples)
    bank, rows = bank_and_rows(lm, passes)
    scored = passes.score(bank, rows)
    penalty = norm_penalty(lm)
    added = Penalised(cross_entropy, penalty, 2.0)(scored) - cross_entropy(scored)
    expected = torch.stack([penalty(bank[:1]), penalty(bank[1:])]).repeat_interleave(4) * 2
    torch.testing.assert_close(added, expected)
    assert Penalised(TokenIndex(1), penalty, 1.0).wanted(2).tolist() == [False, True]
    assert not hasattr(Penalised(cross_entropy, penalty, 1.0), "wanted")


def test_the_nearest_point_of_a_triangle_is_found():
    table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    vectors = torch.tensor([[0.5, 0.5], [2.0, 2.0], [-1.0, 1.0], [3.0, -1.0]])
    expected = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    torch.testing.assert_close(nearest_in_hull(vectors, table), expected, atol=0.05, rtol=0)


def test_rows_of_the_embedding_are_in_its_hull_and_what_is_far_is_not(lm):
    penalty, rows = hull_penalty(lm), embedded(lm, torch.tensor([3, 7]))
    assert float(penalty(rows)) == pytest.approx(0, abs=1e-9)
    assert float(penalty(rows.mean(0, keepdim=True))) < 1e-2
    assert float(penalty(10 * rows)) > 10


def test_a_prompt_of_noise_training_loses_less_than_a_plain_one(toy):
    plain = train_prompts(toy, TRAIN, **SMALL)[0].prompt
    robust = train_robust(toy, TRAIN, "noise", 3.0, **SMALL)[0].prompt
    assert rise(toy, robust) < 0.8 * rise(toy, plain)


@pytest.mark.parametrize(("kind", "strength"), [("norm", 0.1), ("hull", 1.0)])
def test_penalised_prompts_are_nearer_to_tokens_and_still_work(toy, kind, strength):
    penalty = {"norm": norm_penalty, "hull": hull_penalty}[kind](toy)
    options: dict[str, Any] = SMALL | {"steps": 20}
    plain = train_prompts(toy, TRAIN, **options)[0]
    robust = train_robust(toy, TRAIN, kind, strength, **options)[0]
    assert penalty(robust.prompt.vectors) < 0.9 * penalty(plain.prompt.vectors)
    assert robust.validation < 1


def test_another_kind_and_no_strength_are_refused(lm, examples):
    for kind, strength in (("luck", 1.0), ("noise", 0.0)):
        with pytest.raises(SondeError, match=f"{kind!r} of strength {strength}: give one of noise, sam, norm, hull"):
            train_robust(lm, examples, kind, strength, validation=examples)  # type: ignore[arg-type]


def test_an_empty_prompt_has_no_penalty(lm, examples):
    passes = Passes(lm, examples)
    nothing = SoftPrompt.empty(lm)
    scored = passes.score(nothing.vectors, passes.rows(range(4), [0], ["suffix"]))
    found = Penalised(cross_entropy, norm_penalty(lm), 1.0)(scored)
    torch.testing.assert_close(found, cross_entropy(scored))
