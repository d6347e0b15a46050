"""How many prompt tokens does a behaviour take? L*(n) and success by prompt length n, and what they come to.

L*(n) is the loss on unseen contexts, in nats of the whole target, of the best of R trained prompts of n vectors; the
best is chosen on validation contexts and reported on test contexts, and the same tokens are scored for every n, with
n = 0 the bare model. Conditional distance C is the least n whose loss is at most T, or whose share of exact successes
is at least T, and infinite if none is. Saturation S is the least n with L*(n) - min L* <= 0.05 (L*(0) - min L*). After
Nordby, arXiv:2505.14943; the rule of 5 % is our own.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sonde.prompts.soft_prompt import SoftPrompt
from sonde.stats.intervals import Interval, bootstrap_mean

LENGTHS = (0, 1, 4, 16, 64)
_DRAWS = 2000


@dataclass(frozen=True)
class Threshold:
    """When a prompt works: at a mean loss of the whole target of at most `nats`, or at a share of exact successes.

    Raises `ValueError` unless exactly one of the two is given.
    """

    nats: float | None = None
    success: float | None = None

    def __post_init__(self) -> None:
        if (self.nats is None) == (self.success is None):
            raise ValueError("a threshold is either of nats or of success: give one of the two")

    def reached(self, nats: Any, success: Any) -> Any:
        """Whether means of loss and success (numbers or arrays) reach it."""
        return success >= self.success if self.nats is None else nats <= self.nats

    def __str__(self) -> str:
        return f"{self.success:.0%} exact targets" if self.nats is None else f"{self.nats:.3g} nats a target at most"


MOSTLY = Threshold(success=0.5)
"""The default: the target is written exactly on half of the contexts."""


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

    def prompt(self, n: int) -> SoftPrompt:
        """The best prompt of length `n`."""
        at, best = self._at(n), self.best(n)
        return SoftPrompt(self.vectors[at][best], self.settings[at][best][0])

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

    def conditional_distance(self, threshold: Threshold = MOSTLY) -> float:
        """C: the least length whose best prompt reaches the threshold; infinite if none does."""
        nats, success = (rows.mean(1) for rows in self._best_rows())
        return _first(self.lengths, threshold.reached(nats, success))

    def distance_interval(
        self, threshold: Threshold = MOSTLY, *, level: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """How far C moves when contexts are resampled; an end may be infinite."""
        labels, group = np.unique(self.groups, return_inverse=True)
        sizes = np.bincount(group).astype(float)
        drawn = np.random.default_rng(seed).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=_DRAWS)
        means = [
            drawn @ np.stack([np.bincount(group, weights=row) for row in rows]).T / (drawn @ sizes)[:, None]
            for rows in self._best_rows()
        ]
        found = np.sort([_first(self.lengths, reached) for reached in threshold.reached(*means)])
        tail = (1 - level) / 2
        return float(found[int(tail * (_DRAWS - 1))]), float(found[math.ceil((1 - tail) * (_DRAWS - 1))])

    def saturation(self, share: float = 0.05) -> int:
        """S: the least length after which less than `share` of what prompting gains is still to be had."""
        means = self._best_rows()[0].mean(1)
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

    def _best_rows(self) -> tuple[Float[np.ndarray, "lengths rows"], Float[np.ndarray, "lengths rows"]]:
        """Losses and successes of the best prompt of each length."""
        best = [(i, self.best(n)) for i, n in enumerate(self.lengths)]
        return np.stack([self.nats[at] for at in best]), np.stack([self.success[at] for at in best]).astype(float)

    def _mean(self, rows: np.ndarray) -> Interval:
        return bootstrap_mean(rows, self.groups)


def _first(lengths: tuple[int, ...], reached: np.ndarray) -> float:
    return float(lengths[int(np.argmax(reached))]) if reached.any() else math.inf
