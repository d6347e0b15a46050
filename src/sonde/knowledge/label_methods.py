"""Ways to turn bought labels into a classifier: in stages, by asking about what is uncertain, and the baselines.

A `Method` decides what is bought and in which order it is used; a `Backend` is what learns: logistic regression around
the previous stage (`sonde.knowledge.label_logistic`), a head trained by gradient (`sonde.knowledge.label_head`), a
language model with adapters. Any method goes with any backend:

    Sequential()(problem, Purchase(problem, {"weak": 320, "oracle": 32}, seed=0), seed=0)
    UncertaintySampling(temperature=0.5, backend=Head(loss=LogConfidence()))(problem, purchase, seed=0)

A backend's `learner` starts untrained; `fit` is one stage and goes on from where the last stage ended; a stage without
rows is skipped. Sources are used in the order of the purchase, the dearest last. Methods of Mallen & Belrose 2024
(arXiv:2410.13215), section 3.2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.label_choice import Choice, Entropy
from sonde.knowledge.label_logistic import Logistic
from sonde.knowledge.label_problem import Method, Outcome, Problem, Purchase


class Learner(Protocol):
    """A classifier in training on one problem. K is 1 for two classes (log-odds), else C (logits)."""

    def fit(self, rows: Int[np.ndarray, " n"], labels: Float[Tensor, "n C"]) -> Sequence[str]:
        """One stage on rows of the pool, from where the last ended; returns what a reader must know."""
        ...

    def pool_scores(self, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n K"]:
        """Scores of rows of the pool."""
        ...

    def test_scores(self) -> Float[np.ndarray, "test *C"]:
        """Scores of the test rows, as an `Outcome` has them."""
        ...


class Backend(Protocol):
    """What learns. `settings` are all that decides its numbers."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the numbers, as plain values."""
        ...

    def learner(self, problem: Problem, *, seed: int) -> Learner:
        """An untrained classifier. Raises `SondeError` for a problem that it cannot read."""
        ...


@dataclass(frozen=True)
class Sequential:
    """One stage for each source, in the order of the purchase: weak labels first, the oracle's last."""

    backend: Backend = field(default_factory=Logistic)
    name: str = "sequential"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Buy the first rows of every source and fit stage by stage."""
        learner, notes = self.backend.learner(problem, seed=seed), []
        for source, count in purchase.counts.items():
            if count:
                notes += _stage(learner, problem, source, *purchase.take(source))
        return _outcome(self, learner, purchase, notes)


@dataclass(frozen=True)
class UncertaintySampling:
    """`Sequential`, whose last source is asked about the rows that the model of the stages before makes much of.

    temperature: 0 takes the rows with the largest scores, in random order; above it rows are drawn without replacement
    with weight score^(1/temperature). choice: what makes a row worth asking, by default the entropy of its prediction.
    """

    temperature: float = 0.0
    choice: Choice = field(default_factory=Entropy)
    backend: Backend = field(default_factory=Logistic)
    name: str = "uncertainty"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Fit the first stages, choose, buy and fit the last."""
        learner, notes = self.backend.learner(problem, seed=seed), []
        *earlier, last = purchase.counts
        for source in earlier:
            if purchase.counts[source]:
                notes += _stage(learner, problem, source, *purchase.take(source))
        count = purchase.counts[last]
        if count:
            candidates = purchase.candidates(last)
            features = None if problem.features is None else problem.standardised[0][torch.from_numpy(candidates)]
            chosen = self.choice.choose(
                learner.pool_scores(candidates), count, features=features, temperature=self.temperature, seed=seed
            )
            rows = candidates[chosen]
            notes += _stage(learner, problem, last, rows, purchase.buy(last, rows))
        return _outcome(self, learner, purchase, notes, temperature=self.temperature, choice=self.choice.name)


@dataclass(frozen=True)
class MostConfident:
    """`Sequential` on the `keep` most confident share of the weak labels; those left out were bought and count.

    Nobody knows how confident a label is who has not paid for it. Raises `SondeError` for a share outside (0, 1].
    """

    keep: float = 0.5
    backend: Backend = field(default_factory=Logistic)
    name: str = "most confident"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise SondeError(f"keep is {self.keep}: expected a share of the weak labels above 0 and up to 1")

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Buy all, fit on what is confident, then on the last source whole."""
        learner, notes = self.backend.learner(problem, seed=seed), []
        last = list(purchase.counts)[-1]
        for source, count in purchase.counts.items():
            if not count:
                continue
            rows, labels = purchase.take(source)
            if source != last:
                kept = torch.argsort(labels.amax(1), descending=True, stable=True)[: max(1, round(self.keep * count))]
                kept = kept.sort().values
                rows, labels = rows[kept.numpy()], labels[kept]
            notes += _stage(learner, problem, source, rows, labels)
        return _outcome(self, learner, purchase, notes, keep=self.keep)


@dataclass(frozen=True)
class Only:
    """Baseline: labels of one source alone, whatever else was ordered. By default the last source, the oracle."""

    source: str | None = None
    backend: Backend = field(default_factory=Logistic)

    @property
    def name(self) -> str:
        """Such as "oracle only"."""
        return f"{self.source or 'oracle'} only"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """One stage."""
        source = self.source or problem.oracle
        learner, notes = self.backend.learner(problem, seed=seed), []
        if purchase.counts.get(source):
            notes += _stage(learner, problem, source, *purchase.take(source))
        return _outcome(self, learner, purchase, notes)


@dataclass(frozen=True)
class Pooled:
    """Baseline: all labels in one stage, as if they were equally good (a probe on frozen activations)."""

    backend: Backend = field(default_factory=Logistic)
    name: str = "pooled"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """One stage on everything."""
        learner = self.backend.learner(problem, seed=seed)
        bought = [purchase.take(source) for source, count in purchase.counts.items() if count]
        notes: Sequence[str] = ()
        if bought:
            notes = learner.fit(
                np.concatenate([rows for rows, _ in bought]), torch.cat([labels for _, labels in bought])
            )
        return _outcome(self, learner, purchase, notes)


@dataclass(frozen=True)
class GivenScores:
    """Baseline that buys nothing: scores of the test rows from elsewhere, such as a language model's zero-shot."""

    scores: tuple[float, ...]
    name: str = "zero-shot"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """The scores as they are."""
        return Outcome.of(np.array(self.scores), purchase)


@dataclass(frozen=True)
class RandomScores:
    """Baseline that buys nothing: normal noise."""

    name: str = "random"

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Noise of `seed`."""
        count = len(problem.classes)
        shape = (len(problem.test_truth),) if count == 2 else (len(problem.test_truth), count)
        return Outcome.of(np.random.default_rng(seed).standard_normal(shape), purchase)


def method_named(name: str, backend: Backend | None = None) -> Method:
    """A method from what a user types: one of `METHODS`. Raises `SondeError` for another name."""
    if name not in METHODS:
        raise SondeError(f"there is no method {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name](backend or Logistic())


def _log_confidence(backend: Backend) -> Method:
    from sonde.knowledge.label_head import Head
    from sonde.knowledge.label_losses import LogConfidence

    return Sequential(Head(loss=LogConfidence()), name="log-confidence")


def _gradient(backend: Backend) -> Method:
    from sonde.knowledge.label_head import Head

    return Sequential(Head(), name="head")


METHODS: dict[str, Callable[[Backend], Method]] = {
    "sequential": lambda backend: Sequential(backend),
    "uncertainty": lambda backend: UncertaintySampling(backend=backend),
    "most-confident": lambda backend: MostConfident(backend=backend),
    "pooled": lambda backend: Pooled(backend),
    "oracle-only": lambda backend: Only(backend=backend),
    "head": _gradient,
    "log-confidence": _log_confidence,
    "random": lambda backend: RandomScores(),
}
"""By the name that a user types; each makes the method with a backend."""


def _stage(
    learner: Learner, problem: Problem, source: str, rows: Int[np.ndarray, " n"], labels: Float[Tensor, "n C"]
) -> list[str]:
    """Fit one stage and say what is odd about it."""
    notes = [f"{source}: {note}" for note in learner.fit(rows, labels)]
    seen = labels.argmax(1).unique()
    if len(seen) == 1:
        notes.append(f"all {len(rows)} labels of {source!r} are of class {problem.classes[int(seen)]!r}")
    return notes


def _outcome(method: Any, learner: Learner, purchase: Purchase, notes: Sequence[str], **settings: Any) -> Outcome:
    backend = method.backend
    return Outcome.of(
        learner.test_scores(), purchase, notes=notes, settings={"backend": backend.name, **backend.settings, **settings}
    )
