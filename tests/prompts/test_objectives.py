"""Objectives against their formulas, worked out by hand from the logits."""

import families
import pytest
import torch

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.generation import generate
from sonde.prompts.objectives import KLToReference, LabelShift, LookAhead, Objective, TokenIndex, cross_entropy
from sonde.prompts.passes import Passes, Scored
from sonde.prompts.soft_prompt import SoftPrompt, embedded
from sonde.prompts.training import score_prompts, train_prompts

N = 2


def examples(length: int = 6) -> Examples:
    ids = families.tokens(3, 12, seed=2).tolist()
    return Examples([row[:4] for row in ids], [row[4 : 4 + length] for row in ids])


def scored(lm: LanguageModel) -> Scored:
    passes = Passes(lm, examples())
    rows = passes.rows([0, 1, 2], [N], ["suffix"])
    with torch.no_grad():
        return passes.score(embedded(lm, torch.tensor([9, 30])), rows)


def value(objective: Objective, lm: LanguageModel) -> torch.Tensor:
    return score_prompts(Passes(lm, examples()), [SoftPrompt.from_tokens(lm, [9, 30])], objective)[0]


def test_every_objective_is_its_formula() -> None:
    lm = families.model("llama")
    s = scored(lm)
    logp = s.logits.log_softmax(-1)
    nats = -logp.gather(-1, s.labels[..., None])[..., 0]
    torch.testing.assert_close(value(cross_entropy, lm), nats.mean(1))
    torch.testing.assert_close(value(TokenIndex(3), lm), nats[:, 3])
    torch.testing.assert_close(value(TokenIndex(3, measure="accuracy"), lm), 1 - (-nats[:, 3]).exp())
    ramp = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0])  # target token i is at i places behind the prompt
    torch.testing.assert_close(value(LookAhead(2), lm), (nats * ramp).sum(1) / ramp.sum())
    ahead = -logp[:, :4].gather(-1, s.labels[:, 2:, None])[..., 0]
    torch.testing.assert_close(value(LabelShift(2), lm), ahead.mean(1))
    torch.testing.assert_close(value(LabelShift(0), lm), nats.mean(1))


def test_a_users_function_is_an_objective_and_others_are_refused() -> None:
    lm = families.model("llama")
    torch.testing.assert_close(value(lambda s: s.nats.amax(1), lm), scored(lm).nats.amax(1))
    with pytest.raises(SondeError, match=r"one number a row, \(3,\), not \(3, 6\)"):
        value(lambda s: s.nats, lm)


def test_weights_of_target_tokens_count() -> None:
    lm, given = families.model("llama"), examples()
    weighted = Examples(given.contexts, given.targets, weights=[[0, 2, 0, 1, 0, 0.0]] * 3)
    found = score_prompts(Passes(lm, weighted), [SoftPrompt.from_tokens(lm, [9, 30])])[0]
    nats = scored(lm).nats
    torch.testing.assert_close(found, (2 * nats[:, 1] + nats[:, 3]) / 3)


def test_divergence_from_a_prompt_of_known_words_is_zero_at_those_words() -> None:
    lm = families.model("llama")
    hard = SoftPrompt.from_tokens(lm, [9, 30])
    assert value(KLToReference(prompt=hard), lm).abs().max() < 1e-6
    assert value(KLToReference(prompt=SoftPrompt.from_tokens(lm, [30, 9], "prefix")), lm).min() > 1e-3


def test_divergence_from_another_model_is_its_formula() -> None:
    lm, other = families.model("llama"), LanguageModel(families.tiny("llama", seed=5))
    given = examples()
    found = value(KLToReference(other), lm)
    whole = other(torch.tensor([c + t for c, t in zip(given.contexts, given.targets, strict=True)])).logits
    assert whole is not None
    q = whole[:, 3:-1].log_softmax(-1)
    p = scored(lm).logits.log_softmax(-1)
    torch.testing.assert_close(found, (q.exp() * (q - p)).sum(-1).mean(1))
    narrow = LanguageModel(families.tiny("llama", vocab_size=90), name="narrow")
    with pytest.raises(SondeError, match="narrow has 90 tokens, llama has 97"):
        value(KLToReference(narrow), lm)
    with pytest.raises(SondeError, match="no reference to itself"):
        KLToReference()


def test_a_free_running_token_is_scored_after_the_models_own_words() -> None:
    lm, given = families.model("llama"), examples()
    prompt = SoftPrompt.from_tokens(lm, [9, 30])
    own = generate(lm, prompt, given.contexts, max_new_tokens=2)
    forced = Examples(given.contexts, [o + t[2:] for o, t in zip(own, given.targets, strict=True)])
    found = score_prompts(Passes(lm, given), [prompt], TokenIndex(2, free_running=True))
    torch.testing.assert_close(found, score_prompts(Passes(lm, forced), [prompt], TokenIndex(2)))


def test_a_model_is_driven_to_the_words_of_another_prompt() -> None:
    lm = families.model("llama")
    hard = SoftPrompt.from_tokens(lm, [9, 30])
    given, objective = examples(), KLToReference(prompt=hard)
    trials = train_prompts(
        lm, given, validation=given, lengths=(0, 2), restarts=1, lrs=(0.3,), steps=60, objective=objective
    )
    assert trials[1].validation < 0.1 * trials[0].validation


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TokenIndex(6), "index 6 is outside targets of 6 tokens"),
        (LookAhead(8), "no scored tokens: a target ends within 8 tokens"),
        (LabelShift(6), "no scored tokens: a target has no token 6 places"),
    ],
)
def test_objectives_without_a_token_to_score_are_refused(objective: Objective, message: str) -> None:
    with pytest.raises(SondeError, match=message):
        value(objective, families.model("llama"))
