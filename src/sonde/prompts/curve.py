"""How many prompt tokens does a behaviour take? L*(n) and success by prompt length n, and what they come to.

L*(n) is the loss on unseen contexts, in nats of the whole target, of the best of R trained prompts of n vectors; the
best is chosen on validation contexts and reported on test contexts, and the same tokens are scored for every n, with
n = 0 the bare model. Conditional distance C is the least n with L*(n) <= T (infinite if none is); saturation S the
least n with L*(n) - min L* <= 0.05 (L*(0) - min L*). After Nordby, arXiv:2505.14943; the rule of 5 % is our own.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sonde.stats.intervals import Interval, bootstrap_mean

LENGTHS = (0, 1, 4, 16, 64)
HALF = math.log(2.0)
"""Nats of a target that is given half of the probability: the default threshold T."""
_DRAWS = 2000


@dataclass(frozen=True)
class Curve:
    """Losses and successes of trained prompts by length, on test rows.

    lengths: ascending, 0 first. nats, success: of every test row under every prompt; success is the exact target,
    free-running. validation: mean nats on the validation rows, by which the best restart is chosen. tokens: scored
    tokens of each test row. groups: the context of each test row; intervals are over contexts.
    settings: (position, learning rate) that validation chose for each length and restart.
    vectors: the prompts themselves, one array [restarts, n, d] for each length.
    """

    lengths: tuple[int, ...]
    nats: Float[np.ndarray, "lengths restarts rows"]
    success: Bool[np.ndarray, "lengths restarts rows"]
    validation: Float[np.ndarray, "lengths restarts"]
    tokens: Int[np.ndarray, " rows"]
    groups: Int[np.ndarray, " rows"]
    settings: tuple[tuple[tuple[Any, float], ...], ...]
    vectors: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        shape = (len(self.lengths), self.validation.shape[1], len(self.tokens))
        if list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] != 0:
            raise ValueError(f"the lengths of a curve ascend from 0, not {self.lengths}")
        if self.nats.shape != shape or self.success.shape != shape:
            raise ValueError(f"losses of shape {self.nats.shape} and {self.success.shape}: expected {shape}")

    @property
    def n_restarts(self) -> int:
        """Prompts trained at each length."""
        return self.validation.shape[1]

    def best(self, n: int) -> int:
        """The restart with the least loss on validation contexts at length `n`."""
        return int(np.argmin(self.validation[self._at(n)]))

    def loss(self, n: int, *, per_token: bool = False) -> Interval:
        """L*(n): mean nats of the whole target (or of a token) under the best prompt of length `n`."""
        rows = self.nats[self._at(n), self.best(n)]
        return self._mean(rows / self.tokens if per_token else rows)

    def rate(self, n: int) -> Interval:
        """Share of test rows whose target is written exactly, free-running, under the best prompt of length `n`."""
        return self._mean(self.success[self._at(n), self.best(n)].astype(float))

    def median_loss(self, n: int) -> float:
        """Median over restarts of the mean nats of the whole target."""
        return float(np.median(self.nats[self._at(n)].mean(-1)))

    def median_rate(self, n: int) -> float:
        """Median over restarts of the share of exact targets."""
        return float(np.median(self.success[self._at(n)].mean(-1)))

    def conditional_distance(self, *, nats: float | None = None, success: float | None = None) -> float:
        """C: the least length whose best prompt loses `nats` at most or succeeds on that share; infinite if none does.

        Raises `ValueError` unless one of the two thresholds is given.
        """
        means, reached = self._means(nats, success)
        return _first(self.lengths, reached(means))

    def distance_interval(
        self, *, nats: float | None = None, success: float | None = None, level: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """How far C moves when contexts are resampled; an end may be infinite."""
        rows, reached = self._means(nats, success, mean=False)
        labels, counts = np.unique(self.groups, return_inverse=True)
        sums = np.stack([np.bincount(counts, weights=row, minlength=len(labels)) for row in rows])
        sizes = np.bincount(counts, minlength=len(labels)).astype(float)
        drawn = np.random.default_rng(seed).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=_DRAWS)
        resampled = (drawn @ sums.T) / (drawn @ sizes)[:, None]
        found = np.sort([_first(self.lengths, reached(means)) for means in resampled])
        tail = (1 - level) / 2
        return float(found[int(tail * (_DRAWS - 1))]), float(found[math.ceil((1 - tail) * (_DRAWS - 1))])

    def saturation(self, share: float = 0.05) -> int:
        """S: the least length after which less than `share` of what prompting gains is still to be had."""
        means, _ = self._means(HALF, None)
        left = means - means.min()
        return int(self.lengths[int(np.argmax(left <= share * max(left[0], 0.0)))])

    def rows(self) -> list[dict[str, float]]:
        """The curve as a table: a row for each length."""
        table = []
        for n in self.lengths:
            loss, rate = self.loss(n), self.rate(n)
            table.append(
                {"n": n, "nats": loss.estimate, "low": loss.low, "high": loss.high, "median": self.median_loss(n)}
                | {"success": rate.estimate, "success_low": rate.low, "success_high": rate.high}
                | {"median_success": self.median_rate(n)}
            )
        return table

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        return {
            "lengths": list(self.lengths),
            "nats": torch.from_numpy(self.nats),
            "success": torch.from_numpy(self.success),
            "validation": torch.from_numpy(self.validation),
            "tokens": torch.from_numpy(self.tokens),
            "groups": torch.from_numpy(self.groups),
            "settings": [[list(one) for one in restarts] for restarts in self.settings],
            "vectors": list(self.vectors),
        }

    @classmethod
    def from_state(cls, tree: dict[str, Any]) -> "Curve":
        """What `state` gave."""
        arrays = {name: tree[name].numpy() for name in ("nats", "success", "validation", "tokens", "groups")}
        settings = tuple(tuple((place, rate) for place, rate in restarts) for restarts in tree["settings"])
        return cls(tuple(tree["lengths"]), **arrays, settings=settings, vectors=tuple(tree["vectors"]))

    def _at(self, n: int) -> int:
        if n not in self.lengths:
            raise ValueError(f"the curve has no length {n}: it has {', '.join(map(str, self.lengths))}")
        return self.lengths.index(n)

    def _means(self, nats: float | None, success: float | None, *, mean: bool = True) -> tuple[np.ndarray, Any]:
        """Losses or successes of the best prompts, [lengths] or [lengths, rows], and the test of the threshold."""
        if (nats is None) == (success is None):
            raise ValueError("a conditional distance has one threshold: give nats or success")
        values = self.nats if nats is not None else self.success.astype(float)
        rows = np.stack([values[i, self.best(n)] for i, n in enumerate(self.lengths)])
        found = rows.mean(1) if mean else rows
        return found, (lambda means: means <= nats) if nats is not None else (lambda means: means >= success)

    def _mean(self, rows: np.ndarray) -> Interval:
        return bootstrap_mean(rows, self.groups)


def _first(lengths: tuple[int, ...], reached: np.ndarray) -> float:
    return float(lengths[int(np.argmax(reached))]) if reached.any() else math.inf
