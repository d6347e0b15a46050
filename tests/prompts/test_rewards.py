"""The gradient of a reward by samples against full enumeration, and that of a classifier against finite differences."""

import itertools

import families
import pytest
import torch
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.passes import Passes
from sonde.prompts.rewards import DifferentiableClassifier, Reward, on_text
from sonde.prompts.soft_prompt import embedded
from sonde.prompts.training import objective_values, score_prompts, train_prompts

VOCAB = 45


def small() -> LanguageModel:
    model = families.tiny("gpt_neox", vocab_size=VOCAB)
    model.generation_config.eos_token_id = None  # every text is of two tokens
    return LanguageModel(model, name="small")


def of_low_ids(rows) -> list[float]:
    return [float(row[0] < 15) + 0.5 * float(row[-1] % 3 == 0) for row in rows]


def gradient(lm: LanguageModel, objective: Reward) -> tuple[Tensor, Tensor]:
    """By samples, and by enumeration of all texts."""
    context = [3, 8, 20]
    passes = Passes(lm, Examples([context], [[0]]))
    bank = embedded(lm, torch.tensor([4, 11])).requires_grad_()
    rows = passes.rows([0], [2], ["suffix"])
    estimate = torch.zeros_like(bank)
    for _, values in objective_values(passes, bank, rows, objective, 0):
        estimate += torch.autograd.grad(values.sum() / objective.samples, bank)[0]
    texts = [list(text) for text in itertools.product(range(VOCAB), repeat=2)]
    every = rows.repeat(len(texts)).with_targets(texts)
    logp = -passes.score(bank, every).nats.sum(1)
    with torch.no_grad():
        plain = -passes.score(bank, every.with_prompts(offset=0, n=0)).nats.sum(1)
    rewards = torch.tensor(of_low_ids(texts)) - objective.beta * (logp.detach() - plain)
    true = torch.autograd.grad(-(logp.exp() * rewards).sum() + objective.beta * logp.exp().sum(), bank)[0]
    return estimate, true


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_gradient_by_samples_is_that_of_full_enumeration(beta: float) -> None:
    estimate, true = gradient(small(), Reward(of_low_ids, tokens=2, samples=4096, beta=beta))
    assert torch.cosine_similarity(estimate.flatten(), true.flatten(), dim=0) > 0.98
    assert estimate.norm() / true.norm() == pytest.approx(1, abs=0.15)


def test_a_prompt_learns_what_is_rewarded() -> None:
    lm = small()
    examples = Examples([[3, 8, 20], [5, 30, 7]], [[0]] * 2)
    objective = Reward(of_low_ids, tokens=2, samples=32)
    trials = train_prompts(
        lm, examples, validation=examples, lengths=(0, 2), restarts=1, lrs=(0.3,), steps=25, objective=objective
    )
    assert trials[1].validation < trials[0].validation - 0.3  # -E[R], at best -1.5


def test_a_constant_reward_is_said_to_have_no_gradient() -> None:
    lm = small()
    passes = Passes(lm, Examples([[3, 8]], [[0]]))
    bank = embedded(lm, torch.tensor([4])).requires_grad_()
    objective = Reward(lambda rows: [1.0] * len(rows), tokens=2, samples=4)
    with pytest.warns(UserWarning, match="same for all 4 samples of every example: zero gradient"):
        ((_, values),) = objective_values(passes, bank, passes.rows([0], [1], ["suffix"]), objective, 0)
    assert not torch.autograd.grad(values.sum(), bank)[0].any()


def test_a_reward_of_strings_reads_what_was_written() -> None:
    class Words:
        def decode(self, ids):
            return " ".join(map(str, ids))

    assert on_text(Words(), lambda texts: [len(t) for t in texts])([[1, 2], [3]]) == [3, 1]  # type: ignore[arg-type]


def linear(embeddings: Tensor, real: Tensor) -> Tensor:
    return (embeddings.sum(-1) * real).sum(-1)


@pytest.mark.parametrize("tokens", [None, 3])
def test_a_classifiers_gradient_through_mixtures_is_that_of_finite_differences(tokens: int | None) -> None:
    lm = families.model("llama")
    passes = Passes(lm, Examples([[3, 8, 20]], [[5, 6, 7]]))
    table = torch.randn(families.VOCAB, 4, generator=torch.Generator().manual_seed(0))
    rows = passes.rows([0], [1], ["suffix"])
    bank = embedded(lm, torch.tensor([4])).requires_grad_()
    found = {}
    for mode in ("softmax", "straight-through"):
        objective = DifferentiableClassifier(linear, table, mode=mode, tokens=tokens)  # type: ignore[arg-type]
        ((_, values),) = objective_values(passes, bank, rows, objective, 0)
        found[mode] = torch.autograd.grad(values.sum(), bank)[0]
    torch.testing.assert_close(found["softmax"], found["straight-through"])  # of a linear classifier
    step = torch.zeros_like(bank)
    step[0, 3] = 1e-2
    objective = DifferentiableClassifier(linear, table, mode="softmax", tokens=tokens)
    with torch.no_grad():
        (high,), (low,) = (
            [v.sum() for _, v in objective_values(passes, moved, rows, objective, 0)]
            for moved in (bank + step, bank - step)
        )
    assert float(found["softmax"][0, 3]) == pytest.approx(float((high - low) / 2e-2), rel=0.05, abs=1e-3)


def test_straight_through_reads_tokens_and_a_mixture_reads_mixtures() -> None:
    lm = families.model("llama")
    passes = Passes(lm, Examples([[3, 8, 20]], [[5, 6]]))
    bank = embedded(lm, torch.tensor([4]))
    scored = passes.score(bank, passes.rows([0], [1], ["suffix"]))
    one_hot = torch.eye(families.VOCAB)
    seen: list[Tensor] = []

    def keep(embeddings: Tensor, real: Tensor) -> Tensor:
        seen.append(embeddings)
        return embeddings.sum((1, 2))

    for mode in ("straight-through", "softmax"):
        DifferentiableClassifier(keep, one_hot, mode=mode)(scored)  # type: ignore[arg-type]
    torch.testing.assert_close(seen[0].argmax(-1), scored.logits.argmax(-1))
    torch.testing.assert_close(seen[0].amax(-1), torch.ones(1, 2))
    torch.testing.assert_close(seen[1], scored.logits.softmax(-1))
    with pytest.raises(SondeError, match="embedding has 12 tokens, the model 97"):
        DifferentiableClassifier(keep, torch.eye(12))(scored)


def test_rewards_without_a_baseline_or_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(SondeError, match="give 2 samples or more"):
        Reward(of_low_ids, tokens=2, samples=1)
    lm = small()
    with pytest.raises(SondeError, match=r"reward of 8 texts has shape \(1,\)"):
        score_prompts(
            Passes(lm, Examples([[3, 8]], [[0]])),
            [train_prompts(lm, Examples([[3, 8]], [[1]]), lengths=(0,), restarts=1)[0].prompt],
            Reward(lambda rows: [1.0], tokens=2),
        )
