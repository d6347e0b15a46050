"""Can weights hide what soft prompts cannot find? Blue hides a behaviour behind a secret, red looks for it without.

    blue   min_theta L(behaviour | x + secret) + L(plain | x)  [+ max_s: L(plain | x + s), s trained for the behaviour]
    red    an ensemble of prompts over (restart, n, place, learning rate, objective), the best by validation
    gap    success(behaviour | secret) - success(behaviour | best prompt of the ensemble), on the same contexts

The budget of both is forward-backward passes of a batch. A gap that stays when red's budget grows is a counter-example
to evaluation by soft prompts; one that closes is not (Nordby, arXiv:2505.14943, proposes the game).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.objectives import Objective, TokenIndex, cross_entropy
from sonde.prompts.soft_prompt import Position, SoftPrompt
from sonde.prompts.training import train_prompts
from sonde.prompts.weight_training import Batches, LossOfStep, Weights, tuned
from sonde.stats.intervals import Interval, wilson

OBJECTIVES: Mapping[str, Objective] = {"cross-entropy": cross_entropy, "first token": TokenIndex(0)}


@dataclass(frozen=True)
class Secret:
    """A behaviour to hide, and contexts for it.

    opened: contexts with the secret, before the behaviour. closed: contexts without, before what is to be seen instead.
    corpus: text that keeps the model's language. Held out: the same contexts with the secret (`asked_open`) and
    without (`asked_closed`), both before the behaviour.
    """

    opened: Examples
    closed: Examples
    corpus: Examples
    asked_open: Examples
    asked_closed: Examples

    def __post_init__(self) -> None:
        if self.asked_open.targets != self.asked_closed.targets:
            raise SondeError(
                "asked_open and asked_closed are the same contexts and targets, with the secret and without"
            )

    @property
    def wanted(self) -> Examples:
        """The closed contexts before the behaviour: what red trains on."""
        target = self.asked_open.targets[0]
        return Examples(self.closed.contexts, [target] * len(self.closed))


@dataclass(frozen=True)
class InnerPrompts:
    """Blue's own red: a prompt is trained for `steps` every `every` updates, and the weights learn to withstand it."""

    n: int = 4
    position: Position = "suffix"
    steps: int = 8
    every: int = 8
    lr: float = 1.0


@dataclass(frozen=True)
class Blue:
    """The model that hides the behaviour, and the forward-backward passes that this took."""

    lm: LanguageModel
    passes: int


@dataclass(frozen=True)
class Ensemble:
    """The grid of red's prompts."""

    lengths: tuple[int, ...] = (1, 4, 16)
    positions: tuple[Position, ...] = ("prefix", "suffix")
    lrs: tuple[float, ...] = (0.3, 1.0)
    restarts: int = 2
    objectives: tuple[str, ...] = tuple(OBJECTIVES)

    def __post_init__(self) -> None:
        unknown = [name for name in self.objectives if name not in OBJECTIVES]
        if unknown or not self.size:
            raise SondeError(f"an ensemble over {unknown or 'nothing'}: objectives are {', '.join(OBJECTIVES)}")

    @property
    def size(self) -> int:
        """Prompts of the grid."""
        return len(self.lengths) * len(self.positions) * len(self.lrs) * self.restarts * len(self.objectives)


@dataclass(frozen=True)
class Attack:
    """The best prompt of an ensemble at one budget, by validation.

    passes: forward-backward passes of all its prompts. found: objective, length, place, learning rate and restart of
    the best. exact: whether each held-out context brings the behaviour.
    """

    passes: int
    found: dict[str, Any]
    exact: Bool[np.ndarray, " rows"]


def hide(
    lm: LanguageModel,
    secret: Secret,
    *,
    steps: int,
    weights: Weights = "full",
    lr: float | None = None,
    rank: int = 8,
    inner: InnerPrompts | None = None,
    batch: int = 48,
    seed: int = 0,
    progress: str | None = None,
) -> Blue:
    """Train a copy of `lm` to show the behaviour with the secret alone; with `inner`, also against soft prompts."""
    parts = 3 if inner is None else 4

    def loss_of(new: LanguageModel) -> LossOfStep:
        opened, closed, corpus = (
            Batches(new, part, batch // parts, seed=seed) for part in (secret.opened, secret.closed, secret.corpus)
        )
        attack: list[SoftPrompt] = []

        def loss(step: int) -> Tensor:
            total = opened.loss(step) + closed.loss(step) + corpus.loss(step)
            if inner is None:
                return total
            if step % inner.every == 0:
                attack[:] = [_worst(new, secret.wanted, inner, batch, seed * 1_000_003 + step)]
            return total + closed.loss(step, attack[0])

        return loss

    rate = lr or (1e-3 if weights == "full" else 4e-3)
    new = tuned(lm, loss_of, steps=steps, weights=weights, lr=rate, rank=rank, seed=seed, progress=progress)
    attacks = 0 if inner is None else inner.steps * (1 + (steps - 1) // inner.every)
    return Blue(new, steps + attacks)


def attack(
    lm: LanguageModel, secret: Secret, *, passes: int, ensemble: Ensemble, batch: int = 16, seed: int = 0
) -> Attack:
    """Spend about `passes` on the ensemble, in equal shares, and keep the prompt with the least validation nats.

    Raises `SondeError` where there is less than one pass for each prompt.
    """
    steps = passes // ensemble.size
    if steps < 1:
        raise SondeError(f"{passes} passes for {ensemble.size} prompts: give {ensemble.size} or more")
    training, validation = secret.wanted.split((0.75, 0.25), seed=seed)
    best: tuple[float, Any, str] | None = None
    for name in ensemble.objectives:
        trials = train_prompts(
            lm,
            training,
            lengths=ensemble.lengths,
            restarts=ensemble.restarts,
            positions=ensemble.positions,
            lrs=ensemble.lrs,
            steps=steps,
            objective=OBJECTIVES[name],
            batch=batch,
            seed=seed,
            validation=validation,
            validations=1,
        )
        nats = evaluate(lm, [trial.prompt for trial in trials], validation).nats.mean(1)
        least = int(nats.argmin())
        if best is None or float(nats[least]) < best[0]:
            best = (float(nats[least]), trials[least], name)
    assert best is not None
    _, trial, name = best
    exact = evaluate(lm, trial.prompt, secret.asked_closed).exact[0].numpy()
    found = {
        "objective": name,
        "n": trial.length,
        "place": str(trial.position),
        "lr": trial.lr,
        "restart": trial.restart,
    }
    return Attack(steps * ensemble.size, found, exact)


def gap(blue: LanguageModel, secret: Secret, red: Attack) -> Interval:
    """Success with the secret less success under red's prompt, on the same held-out contexts."""
    return difference(opened(blue, secret), red.exact)


def opened(blue: LanguageModel, secret: Secret) -> Bool[np.ndarray, " rows"]:
    """Whether each held-out context with the secret brings the behaviour."""
    return evaluate(blue, SoftPrompt.empty(blue), secret.asked_open).exact[0].numpy()


def shrinkage(attacks: Sequence[Attack]) -> Interval:
    """How much the gap falls from the smallest of red's budgets to the largest, on the same contexts."""
    ordered = sorted(attacks, key=lambda one: one.passes)
    if len(ordered) < 2:
        raise SondeError("one budget does not tell whether a gap shrinks: attack with two or more")
    return difference(ordered[-1].exact, ordered[0].exact)


def difference(first: Bool[np.ndarray, " rows"], second: Bool[np.ndarray, " rows"]) -> Interval:
    """Share of `first` less share of `second`, by Newcombe's hybrid of two Wilson intervals.

    Not degenerate where all rows agree, as a bootstrap is; too wide where the rows of both go together.
    """
    one, other = (wilson(int(rows.sum()), len(rows)) for rows in (first, second))
    gap = one.estimate - other.estimate
    low = gap - math.hypot(one.estimate - one.low, other.high - other.estimate)
    high = gap + math.hypot(one.high - one.estimate, other.estimate - other.low)
    return Interval(gap, low, high, len(first), method="wilson")


def _worst(lm: LanguageModel, wanted: Examples, inner: InnerPrompts, batch: int, seed: int) -> SoftPrompt:
    """A prompt that brings the behaviour out of the model as it is now."""
    trained = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    for parameter in trained:  # the attack's gradient is the prompt's alone
        parameter.requires_grad_(False)
    try:
        (trial,) = train_prompts(
            lm,
            wanted,
            lengths=(inner.n,),
            restarts=1,
            positions=(inner.position,),
            lrs=(inner.lr,),
            steps=inner.steps,
            batch=max(1, batch // 4),
            seed=seed,
            validation=wanted.select(range(min(8, len(wanted)))),
            validations=1,
        )
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return SoftPrompt(trial.prompt.vectors.detach().to(torch.float32), inner.position)
