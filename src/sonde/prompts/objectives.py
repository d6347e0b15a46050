"""What a prompt is trained for: any function of the scored logits that gives one number a row, to be made small.

    cross-entropy           sum_t w_t (-log p(y_t)) / sum_t w_t
    KL to a reference       sum_t w_t KL(q_t || p_t) / sum_t w_t, q from another model or from a hard prompt
    token index             the loss, or 1 - p(y_k), at target token k alone
    look-ahead ramp         cross-entropy with w_t = max(0, t - (p + n + h)), t the place in the spliced row
    label shift             cross-entropy of y_{t+k} where y_t is predicted

A function of `Scored` (logits, labels, weights, slots) is an objective. One that wants few of the target tokens says
so with `wanted(scored)`, one that trains on the model's own text with `rollout`; see `sonde.prompts.rewards`.
"""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.passes import Passes, Rows, Scored
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.stats.information import kl, log_probs

Objective = Callable[[Scored], Float[Tensor, " rows"]]
Sampler = Callable[[Rows, int, float], list[list[int]]]
"""(rows, tokens, temperature) -> the model's own continuation of each row under its prompt; 0 is the likeliest."""


@runtime_checkable
class Selective(Protocol):
    """An objective that scores some of the target tokens."""

    def wanted(self, scored: int) -> Bool[Tensor, " scored"]:
        """Which of `scored` target tokens it needs logits of."""
        ...


@runtime_checkable
class OnOwnText(Protocol):
    """An objective that is scored on text that the model writes under the prompt."""

    def rollout(self, rows: Rows, sample: Sampler, passes: Passes) -> Rows:
        """The rows to score in place of `rows`, with targets from `sample`."""
        ...


def cross_entropy(scored: Scored) -> Float[Tensor, " rows"]:
    """Nats a target token: weighted mean of -log p(y_t | x, s, y_<t)."""
    return _mean(scored.nats, scored.weights)


class KLToReference:
    """KL(q || p) a target token, from the distribution q of a reference: another model, or a prompt of known words.

    Args:
        reference: the model that q is taken from; None is the same one, which then needs `prompt`.
        prompt: what stands before the target in the reference; nothing by default.

    Raises:
        SondeError: without either, and for a reference with another vocabulary.

    """

    def __init__(self, reference: LanguageModel | None = None, *, prompt: SoftPrompt | None = None) -> None:
        if reference is None and prompt is None:
            raise SondeError("a model is no reference to itself: give another model, or the prompt that q has")
        self.reference, self.prompt = reference, prompt
        self._passes: dict[Passes, Passes] = {}
        self._last: tuple[Passes, tuple[int, ...], Tensor] | None = None

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """KL a target token of each row."""
        passes, batch = scored.passes, scored.rows.batch
        if self._last is None or self._last[0] is not passes or self._last[1] != batch:
            reference = self._of(passes)
            prompt = self.prompt or SoftPrompt.empty(reference.lm)
            plain = reference.rows(batch, [len(prompt)], [prompt.position])
            with torch.no_grad():
                logits = reference.score(prompt.vectors.to(reference.lm.device), plain).logits
            self._last = (passes, batch, log_probs(logits))
        q = self._last[2]
        q = q[scored.rows.member.to(q.device)][:, scored.index.to(q.device)].to(scored.logits.device)
        return _mean(kl(q, log_probs(scored.logits)), scored.weights)

    def _of(self, passes: Passes) -> Passes:
        if passes not in self._passes:
            lm = self.reference or passes.lm
            if lm.vocab_size != passes.lm.vocab_size:
                raise SondeError(f"{lm.name} has {lm.vocab_size} tokens, {passes.lm.name} has {passes.lm.vocab_size}")
            same = lm is passes.lm
            self._passes[passes] = passes if same else Passes(lm, passes.examples, cached=passes.cached)
        return self._passes[passes]


class TokenIndex:
    """Be right at target token `k` (from 0); nothing else counts.

    Args:
        k: which target token.
        measure: "nats" is -log p(y_k), "accuracy" is 1 - p(y_k), whose mean is the expected error rate.
        free_running: put the model's own tokens before k in place of the target's.

    """

    def __init__(self, k: int, *, measure: Literal["nats", "accuracy"] = "nats", free_running: bool = False) -> None:
        if k < 0 or measure not in ("nats", "accuracy"):
            raise SondeError(f"token {k} and measure {measure!r}: give a place from 0, and nats or accuracy")
        self.k, self.measure = k, measure
        if free_running:
            self.rollout = self._rollout

    def wanted(self, scored: int) -> Bool[Tensor, " scored"]:
        """Token k alone."""
        if self.k >= scored:
            raise SondeError(f"no scored tokens: index {self.k} is outside targets of {scored} tokens")
        return torch.arange(scored) == self.k

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """Nats or error at token k; 0 for a row whose target ends before."""
        nats = scored.nats[:, scored.index.tolist().index(self.k)]
        real = (scored.rows.target > self.k).to(nats.device)
        return torch.where(real, nats if self.measure == "nats" else 1 - (-nats).exp(), 0.0)

    def _rollout(self, rows: Rows, sample: Sampler, passes: Passes) -> Rows:
        if not self.k:
            return rows
        own = sample(rows, self.k, 0.0)
        text, given = rows.text.tolist(), rows.context.tolist()
        targets = [row[c : c + int(n)] for row, c, n in zip(text, given, rows.target, strict=True)]
        # a row that ended early goes on with the target's own tokens
        return rows.with_targets(
            [[*o[: len(t)], *t[len(o) :]][: self.k] + t[self.k :] for o, t in zip(own, targets, strict=True)]
        )


class LookAhead:
    """Cross-entropy that grows with the distance behind the prompt: w_t = max(0, t - (p + n + h)).

    Under teacher forcing this is a reweighting and nothing more.
    """

    def __init__(self, h: int = 8) -> None:
        self.h = h

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """Nats a token under the ramp; `SondeError` where no target token is beyond it."""
        first = scored.slots.sum(1)[:, None] + self.h
        weights = scored.weights * (scored.columns - first).clamp(min=0)
        if not bool(weights.any(1).all()):
            raise SondeError(f"no scored tokens: a target ends within {self.h} tokens of the prompt")
        return _mean(scored.nats, weights)


class LabelShift:
    """Cross-entropy of the token `k` places after the one that is predicted; k = 0 is an ordinary language model."""

    def __init__(self, k: int) -> None:
        if k < 0:
            raise SondeError(f"a label shift of {k} looks back: give 0 or more")
        self.k = k

    def __call__(self, scored: Scored) -> Float[Tensor, " rows"]:
        """Nats a token; `SondeError` where a target has no token that far ahead."""
        k, n = self.k, scored.labels.shape[1]
        weights = scored.weights[:, k:]
        if k >= n or not bool(weights.any(1).all()):
            raise SondeError(f"no scored tokens: a target has no token {k} places after its first")
        logp = log_probs(scored.logits[:, : n - k])
        return _mean(-logp.gather(-1, scored.labels[:, k:, None])[..., 0], weights)


def wanted_by(objective: Objective, scored: int) -> Bool[Tensor, " scored"] | None:
    """The target tokens that an objective needs, or None for all."""
    return objective.wanted(scored) if isinstance(objective, Selective) else None


def on_own_text(objective: Objective) -> OnOwnText | None:
    """The objective, where it is scored on text that the model writes."""
    return objective if isinstance(objective, OnOwnText) else None


def _mean(values: Float[Tensor, "rows scored"], weights: Float[Tensor, "rows scored"]) -> Float[Tensor, " rows"]:
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def checked(values: Tensor, n: int) -> Float[Tensor, " rows"]:
    """What an objective returned for n rows; `SondeError` unless it is one number for each."""
    if not isinstance(values, Tensor) or values.shape != (n,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise SondeError(f"an objective gives one number a row, ({n},), not {got}")
    return values
