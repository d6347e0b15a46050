"""Learning from features in stages: logistic regression whose prior mean is the stage before.

    W_s = argmin sum_i CE(y_i, x_i W) + lambda_s/2 ||W - W_(s-1)||²,   W_0 = 0

lambda_s is the one with the smallest cross-entropy on a fifth of the stage's rows (at least 2), fitted on the others;
then all rows are fitted with it. The held-out rows are labels like the others: bought, paid for and used. This is the
method of the small-scale acceptance of label economics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.knowledge.label_fit import (
    PENALTIES,
    cross_entropy,
    fit_path,
    logits_of,
    principal_axes,
    refit,
    targets_of,
)
from sonde.knowledge.label_problem import Problem

HELD_OUT = 0.2
_LEAST = 2
_MIDDLE = 1.0  # the penalty where there are too few rows to choose one


@dataclass
class StageMemory:
    """Fitted stages, so that methods and cells that begin with the same labels fit them once. Of one problem at a time.

    hits, fits: how often a stage was found here, and how often it was fitted.
    """

    hits: int = 0
    fits: int = 0
    _problem: Problem | None = None
    _weights: dict[bytes, tuple[Float[Tensor, "K d"], tuple[str, ...]]] = field(default_factory=dict)

    def of(self, problem: Problem) -> dict[bytes, tuple[Float[Tensor, "K d"], tuple[str, ...]]]:
        """The stages of `problem`; those of another one are forgotten."""
        if self._problem is not problem:
            self._problem, self._weights = problem, {}
        return self._weights


@dataclass(frozen=True)
class Logistic:
    """The backend; see the module.

    penalties: to choose among, in units of the mean square of a row. tolerance: nats a row that the loss may be off.
    memory: stages that were fitted before, or None.
    """

    penalties: tuple[float, ...] = PENALTIES
    tolerance: float = 1e-6
    memory: StageMemory | None = field(default=None, compare=False, repr=False)
    name: str = "logistic"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Penalties, tolerance and the share that is held out."""
        return {"penalties": list(self.penalties), "tolerance": self.tolerance, "held_out": HELD_OUT}

    def learner(self, problem: Problem, *, seed: int) -> "LogisticLearner":
        """An untrained classifier of standardised features. Raises `SondeError` for a problem without features."""
        return LogisticLearner(self, problem, seed)


class LogisticLearner:
    """The classifier; `weights` are `[K d + 1]` in standardised features, the offset last."""

    def __init__(self, backend: Logistic, problem: Problem, seed: int) -> None:
        self.problem = problem
        self._backend, self._seed = backend, seed
        self._pool, self._test = problem.standardised
        columns = 1 if len(problem.classes) == 2 else len(problem.classes)
        self.weights: Float[Tensor, "K d"] = self._pool.new_zeros(columns, self._pool.shape[1])
        self._past = str(seed).encode()

    def fit(self, rows: Int[np.ndarray, " n"], labels: Float[Tensor, "n C"]) -> Sequence[str]:
        """One stage; see the module."""
        if not len(rows):
            return ()
        memory = self._backend.memory
        self._past += b"|" + rows.tobytes() + labels.numpy().tobytes()
        known = {} if memory is None else memory.of(self.problem)
        if self._past in known:
            assert memory is not None
            memory.hits += 1
            self.weights, notes = known[self._past]
            return notes
        x = self._pool[torch.from_numpy(rows)]
        self.weights, notes = fit_stage(
            x,
            labels,
            self.weights,
            penalties=self._backend.penalties,
            tolerance=self._backend.tolerance,
            seed=self._seed,
        )
        if memory is not None:
            memory.fits += 1
            known[self._past] = self.weights, notes
        return notes

    def pool_scores(self, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n K"]:
        """Log-odds or logits of rows of the pool."""
        return (self._pool[torch.from_numpy(rows)] @ self.weights.T).double()

    def test_scores(self) -> Float[np.ndarray, "test *C"]:
        """Log-odds `[test]`, or logits `[test C]`."""
        scores = (self._test @ self.weights.T).double().numpy()
        return scores[:, 0] if scores.shape[1] == 1 else scores


def fit_stage(
    x: Float[Tensor, "n d"],
    labels: Float[Tensor, "n C"],
    prior: Float[Tensor, "K d"],
    *,
    penalties: Sequence[float] = PENALTIES,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> tuple[Float[Tensor, "K d"], tuple[str, ...]]:
    """Coefficients of one stage with the penalty that the held-out fifth prefers, and what a reader must know."""
    n, d = x.shape
    held = max(_LEAST, round(HELD_OUT * n))
    if n - held < _LEAST:
        # With 2 or 3 rows there is nothing to hold out.
        weights = fit_path(x, labels, prior=prior, penalties=[_MIDDLE], tolerance=tolerance)[0]
        return weights, (f"{n} rows are too few to hold any out, so the penalty was not chosen",)
    order = torch.from_numpy(np.random.default_rng([seed, n]).permutation(n))
    out, kept = order[:held], order[held:]
    axes = principal_axes(x[kept])
    path = fit_path(x[kept], labels[kept], prior=prior, penalties=penalties, tolerance=tolerance, axes=axes)
    losses = cross_entropy(logits_of(path, x[out]), targets_of(labels[out]).to(x))
    best = int(losses.argmin())
    if n - held < d:
        return fit_path(x, labels, prior=prior, penalties=[penalties[best]], tolerance=tolerance)[0], ()
    weights = refit(x, labels, prior=prior, penalty=penalties[best], start=path[best], axes=axes, tolerance=tolerance)
    return weights, ()
