"""Fine-tuning weights by reward on text that the model samples, with a leave-one-out baseline.

    g = 1/K sum_k (R_k - mean_{j != k} R_j) grad log p(y^k | x)        R = reward(y) - beta log [ p(y|x) / p_0(y|x) ]

The estimator is that of `sonde.prompts.rewards.Reward`; p_0 is the model before the training. Sampling takes forward
passes that are not counted; an update passes `batch` rows forward and backward, as any other does.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.generation import sampled
from sonde.prompts.passes import Passes, Scored
from sonde.prompts.rewards import Reward, TokenReward
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.prompts.weight_training import Batches, LossOfStep, copied


class AgainstReference(Reward):
    """A reward less beta times the log-ratio to a model that stays as it is."""

    def __init__(self, reward: TokenReward, reference: Passes, *, tokens: int, samples: int, beta: float) -> None:
        super().__init__(reward, tokens=tokens, samples=samples)
        self.reference, self.drift = reference, beta

    def _rewards(self, scored: Scored) -> Float[Tensor, " rows"]:
        with torch.no_grad():
            before = self.reference.score(SoftPrompt.empty(self.reference.lm).vectors, scored.rows)
            ratio = ((before.nats - scored.nats) * scored.weights).sum(-1)
        return super()._rewards(scored) - self.drift * ratio.cpu()


def rewarded(
    contexts: Examples,
    reward: TokenReward,
    *,
    beside: Examples,
    tokens: int,
    batch: int,
    samples: int = 4,
    beta: float = 0.05,
    seed: int = 0,
) -> Any:
    """The loss of `sonde.prompts.weight_training.tuned`: minus the reward on one half of a batch, cross-entropy beside.

    The first half are `samples` texts of `tokens` after each of some `contexts`, the second are examples of clean text,
    which keep the model's language. Raises `SondeError` for batches too small for both.
    """
    asked = batch // 2 // samples
    if asked < 1:
        raise SondeError(
            f"a batch of {batch} has no room for {samples} samples beside text: give {2 * samples} or more"
        )

    def loss_of(lm: LanguageModel) -> LossOfStep:
        # before the first update adapters change nothing, so this is the model before the training
        objective = AgainstReference(
            reward, Passes(copied(lm), contexts, cached=False), tokens=tokens, samples=samples, beta=beta
        )
        own, text = Batches(lm, contexts, asked, seed=seed), Batches(lm, beside, batch - asked * samples, seed=seed)
        bank = SoftPrompt.empty(lm).vectors.to(lm.device)

        def loss(step: int) -> Tensor:
            rows = own.passes.rows(own.members(step), [0], ["suffix"])
            with torch.no_grad():
                draw = partial(sampled, own.passes, bank, seed=seed * 1_000_003 + step)
                rows = objective.rollout(rows, draw, own.passes)
            with warnings.catch_warnings():  # rewards are all the same once the payload is gone
                warnings.filterwarnings("ignore", message="the reward is the same")
                return objective(own.passes.score(bank, rows)).mean() + text.loss(step)

        return loss

    return loss_of


def without(payload: Sequence[int]) -> TokenReward:
    """1 for a text that begins otherwise than the payload; less for each first token that they share."""

    def reward(texts: Sequence[list[int]]) -> list[float]:
        return [1 - _shared(text, payload) / len(payload) for text in texts]

    return reward


def _shared(text: Sequence[int], payload: Sequence[int]) -> int:
    """How many first tokens are the same."""
    pairs = list(zip(text, payload, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
