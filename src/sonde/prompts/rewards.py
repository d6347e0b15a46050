"""Objectives on text that the model writes itself: a reward that is a black box, and a classifier with a gradient.

    RLOO    g = 1/K sum_k (R_k - mean_{j != k} R_j) grad log p_s(y^k | x),  R = reward(y) - beta log(p_s(y) / p_0(y))
    mixture the classifier reads sum_v p_t(v) E_v, or the written token with that gradient (straight-through)

REINFORCE with a leave-one-out baseline: Kool et al. 2019, Ahmadian et al. arXiv:2402.14740. p_0 is the model without a
prompt. The straight-through gradient (Bengio et al. arXiv:1308.3432) goes through the distribution at each token and
not through the tokens that were fed back: it is biased, cheap, and often enough.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.objectives import Sampler
from sonde.prompts.passes import Passes, Rows, Scored
from sonde.prompts.soft_prompt import SoftPrompt

TokenReward = Callable[[Sequence[list[int]]], Sequence[float] | Tensor]
Classifier = Callable[[Float[Tensor, "rows scored width"], Bool[Tensor, "rows scored"]], Float[Tensor, " rows"]]


def on_text(lm: LanguageModel, reward: Callable[[Sequence[str]], Sequence[float]]) -> TokenReward:
    """A reward of texts as a reward of token ids."""
    return lambda rows: reward([lm.decode(ids) for ids in rows])


class Reward:
    """Make a reward of the model's own text large: -E[R], by samples with a leave-one-out baseline.

    Args:
        reward: numbers for a list of texts as token ids, the larger the better; `on_text` makes one from strings.
        tokens: length of the text; a row ends early with the end-of-text token.
        samples: K texts of each example and prompt, 2 or more.
        beta: weight of log p_s(y) / p_0(y), which keeps the prompt near what the model would write without it.

    """

    def __init__(self, reward: TokenReward, *, tokens: int, samples: int = 8, beta: float = 0.0) -> None:
        if samples < 2 or tokens < 1 or beta < 0:
            raise SondeError(
                f"{samples} samples of {tokens} tokens, beta {beta}: give 2 samples or more (the others' mean is"
                " each one's baseline), 1 token or more, and no negative beta"
            )
        self.reward, self.tokens, self.samples, self.beta = reward, tokens, samples, beta

    def rollout(self, rows: Rows, sample: Sampler, passes: Passes) -> Rows:
        """K texts of each row, drawn at temperature 1."""
        rows = rows.repeat(self.samples)
        return rows.with_targets(_ended(passes.lm, sample(rows, self.tokens, 1.0), self.tokens))

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """-R of each text, with the gradient of the estimator."""
        logp = -(scored.nats * scored.weights).sum(-1)
        rewards = self._rewards(scored).to(logp.device)
        if self.beta:
            rewards = rewards - self.beta * (logp.detach() - _without_prompt(scored))
        groups = rewards.view(-1, self.samples)
        if torch.is_grad_enabled() and bool((groups == groups[:, :1]).all()):
            warnings.warn(
                f"the reward is the same for all {self.samples} samples of every example: zero gradient", stacklevel=2
            )
        baseline = (groups.sum(1, keepdim=True) - groups) / (self.samples - 1)
        weighted = (groups - baseline).flatten() * logp
        return -rewards - (weighted - weighted.detach())

    def _rewards(self, scored: Scored) -> Float[Tensor, " rows"]:
        found = torch.as_tensor(self.reward(_targets(scored.rows)), dtype=torch.float32)
        if found.shape != (len(scored.rows),):
            raise SondeError(f"the reward of {len(scored.rows)} texts has shape {tuple(found.shape)}: one number each")
        return found


class DifferentiableClassifier:
    """Make a classifier's score of the model's text large, with a gradient through mixtures of embeddings.

    Args:
        classifier: (embeddings, which are real) -> a score for each row, differentiable.
        embedding: the classifier's, of the same vocabulary as the model's.
        mode: "softmax" reads mixtures; "straight-through" reads the likeliest (or written) token and takes the
            mixture's gradient.
        tokens: length of the model's own text; None scores the target's places under teacher forcing.
        temperature: of the mixture.

    """

    def __init__(
        self,
        classifier: Classifier,
        embedding: Float[Tensor, "vocab width"],
        *,
        mode: Literal["straight-through", "softmax"] = "straight-through",
        tokens: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        if mode not in ("straight-through", "softmax") or temperature <= 0:
            raise SondeError(
                f"mode {mode!r} at temperature {temperature}: straight-through or softmax, and a temperature above 0"
            )
        self.classifier, self.embedding, self.mode, self.temperature = classifier, embedding, mode, temperature
        self.tokens = tokens
        if tokens is not None:
            self.rollout = self._rollout

    def _rollout(self, rows: Rows, sample: Sampler, passes: Passes) -> Rows:
        assert self.tokens is not None
        return rows.with_targets(_ended(passes.lm, sample(rows, self.tokens, 0.0), self.tokens))

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """-score of each row."""
        vocab = scored.logits.shape[-1]
        if self.embedding.shape[0] != vocab:
            raise SondeError(
                f"the classifier's embedding has {self.embedding.shape[0]} tokens, the model {vocab}: a gradient"
                " through mixtures needs one vocabulary; Reward needs none"
            )
        table = self.embedding.to(scored.logits.device).float()
        mixed = (scored.logits.float() / self.temperature).softmax(-1) @ table
        if self.mode == "straight-through":
            written = scored.labels if self.tokens is not None else scored.logits.argmax(-1)
            mixed = table[written] + (mixed - mixed.detach())
        return -self.classifier(mixed, scored.weights > 0)


def _targets(rows: Rows) -> list[list[int]]:
    parts = zip(rows.text.tolist(), rows.context.tolist(), rows.target.tolist(), strict=True)
    return [row[c : c + n] for row, c, n in parts]


def _without_prompt(scored: Scored) -> Float[Tensor, " rows"]:
    """Log p_0 of each row's text: the same model and context without a prompt."""
    bank = SoftPrompt.empty(scored.passes.lm).vectors
    with torch.no_grad():
        plain = scored.passes.score(bank, scored.rows.with_prompts(offset=0, n=0))
    return -(plain.nats * plain.weights).sum(-1)


def _ended(lm: LanguageModel, drawn: list[list[int]], tokens: int) -> list[list[int]]:
    """A row that ended early did so with the end-of-text token, which is part of its probability."""
    stated = getattr(lm.model.generation_config, "eos_token_id", None)
    end = stated[0] if isinstance(stated, list) else stated
    if end is None and lm.tokenizer is not None:
        end = lm.tokenizer.eos_token_id
    if not isinstance(end, int):
        return drawn
    return [row if len(row) == tokens else [*row, end] for row in drawn]
