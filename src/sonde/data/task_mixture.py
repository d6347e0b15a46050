"""Tasks as token buffers, and mixtures of them: the batch of a step is a function of the seed and the step alone.

A task is rows to train on and items to be held against: rows that are not trained on, the right token at each place,
and which places are scored (the first state of a run cannot be known and is not). A mixture gives each task its share
of the batch; taking tasks out leaves the size of the batch, and their share goes to the others in proportion.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sonde.errors import SondeError

_LEAST = 2  # tokens of a row: one to read and one to predict


@dataclass(frozen=True, eq=False)
class Task:
    """Rows to train on, and items that it is scored by.

    Attributes:
        name: of the task.
        rows: token ids that are trained on; `pad` fills the ends.
        held: token ids of the items, none of which is among `rows`.
        answers: the right token at each place of `held`; it differs from `held` only where chance decides.
        scored: which places are scored; the first never is.
        alphabet: tokens of the readout that is limited to the task; None for all tokens.
        pad: the token that is neither trained on nor scored; None where there is none.

    Raises `SondeError` for items among the rows, with their count, and for items without a scored place.

    """

    name: str
    rows: Int[Tensor, "n pos"]
    held: Int[Tensor, "m pos"]
    answers: Int[Tensor, "m pos"]
    scored: Bool[Tensor, "m pos"]
    alphabet: tuple[int, ...] | None = None
    pad: int | None = 0

    def __post_init__(self) -> None:
        if self.rows.shape[1] != self.held.shape[1] or self.rows.shape[1] < _LEAST:
            raise SondeError(
                f"task {self.name!r}: rows of {self.rows.shape[1]} and items of {self.held.shape[1]} tokens; "
                f"give both the same length, {_LEAST} or more"
            )
        if not self.held.shape == self.answers.shape == self.scored.shape:
            raise SondeError(f"task {self.name!r}: answers and scored places need the shape of the items")
        if self.scored[:, 0].any() or not self.scored.any(1).all():
            raise SondeError(f"task {self.name!r}: each item needs a scored place, and the first place is never scored")
        if count := overlap(self.rows, self.held):
            raise SondeError(
                f"task {self.name!r}: {count} of {len(self.held)} evaluation items are trained on; draw others"
            )

    @classmethod
    def of_text(cls, name: str, windows: Int[Tensor, "n pos"], *, held: int = 32) -> "Task":
        """Windows of text: the last `held` of them are the items, all their tokens scored."""
        if not 1 <= held < len(windows):
            raise SondeError(f"task {name!r}: {held} of {len(windows)} windows cannot be held out")
        items = windows[-held:]
        known = {tuple(row) for row in items.tolist()}
        rows = windows[:-held]
        fresh = torch.tensor([tuple(row) not in known for row in rows.tolist()])
        scored = torch.ones_like(items, dtype=torch.bool)
        scored[:, 0] = False
        return cls(name, rows[fresh], items, items, scored, pad=None)


def overlap(rows: Int[Tensor, "n pos"], held: Int[Tensor, "m pos"]) -> int:
    """How many of `held` are among `rows`."""
    known = {tuple(row) for row in rows.tolist()}
    return sum(tuple(row) in known for row in held.tolist())


@dataclass(frozen=True, eq=False)
class Mixture:
    """Tasks and their shares of the batch, which sum to 1. A task with share 0 is scored and never trained on.

    Raises `SondeError` for a mixture that trains on nothing, for tasks of different lengths and for two of one name.
    """

    tasks: tuple[Task, ...]
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise SondeError(f"two tasks have the same name among {', '.join(names)}")
        if len({task.rows.shape[1] for task in self.tasks}) > 1:
            raise SondeError("tasks of one mixture have rows of the same length")
        self._known(self.shares)
        if min(self.shares.values(), default=0.0) < 0 or sum(self.shares.values()) <= 0:
            raise SondeError("the mixture is empty: no task has a share of the batch")
        total = sum(self.shares.values())
        object.__setattr__(self, "shares", {name: self.shares.get(name, 0.0) / total for name in names})

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks, trained on or not."""
        return tuple(task.name for task in self.tasks)

    @property
    def trained(self) -> tuple[str, ...]:
        """Tasks with a share of the batch."""
        return tuple(name for name in self.names if self.shares[name] > 0)

    def task(self, name: str) -> Task:
        """The task of that name. Raises `SondeError` with the names there are."""
        self._known([name])
        return self.tasks[self.names.index(name)]

    def without(self, *dropped: str) -> "Mixture":
        """The mixture with `dropped` no longer trained on: their share goes to the others in proportion.

        Raises `SondeError` for unknown tasks, and where nothing would be left to train on.
        """
        self._known(dropped)
        return self.shared({name: 0.0 if name in dropped else share for name, share in self.shares.items()}, dropped)

    def only(self, *kept: str) -> "Mixture":
        """The mixture with nothing but `kept` trained on, in their proportions (equal where none had a share)."""
        self._known(kept)
        own = {name: self.shares[name] for name in kept}
        return self.shared(own if any(own.values()) else dict.fromkeys(kept, 1.0))

    def with_share(self, share: float, *names: str) -> "Mixture":
        """The mixture in which `names` together have `share` of the batch, the others the rest in proportion."""
        self._known(names)
        if not 0 <= share < 1:
            raise SondeError(f"a share of {share}: give one from 0 to below 1")
        rest = {name: 0.0 if name in names else own for name, own in self.shares.items()}
        total = sum(rest.values())
        if not total:
            raise SondeError(f"nothing is left to train on beside {', '.join(names)}")
        scaled = {name: own / total * (1 - share) for name, own in rest.items()}
        return self.shared(scaled | dict.fromkeys(names, share / max(1, len(names))))

    def shared(self, shares: Mapping[str, float], dropped: Sequence[str] = ()) -> "Mixture":
        """The same tasks with other shares."""
        if sum(shares.values()) <= 0:
            raise SondeError(
                f"dropping {', '.join(dropped) or 'all tasks'} leaves an empty mixture: "
                f"keep one of {', '.join(self.trained)}"
            )
        return replace(self, shares=shares)

    def plus(self, *tasks: Task, share: float) -> "Mixture":
        """The mixture with more tasks, which together have `share` of the batch."""
        everything = Mixture((*self.tasks, *tasks), dict(self.shares))
        return everything.with_share(share, *(task.name for task in tasks))

    def batch(self, step: int, size: int, *, seed: int) -> Int[Tensor, "size pos"]:
        """The rows of a step: a task for each by the shares, then one of its rows."""
        rng = np.random.default_rng((seed, step))
        chosen = self._bounds.searchsorted(rng.random(size), side="right")
        place = (rng.random(size) * self._sizes[chosen]).astype(np.int64)
        return self._rows[torch.from_numpy(self._starts[chosen] + place)].long()

    @cached_property
    def _rows(self) -> Tensor:
        return torch.cat([task.rows for task in self.tasks]).int()

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([len(task.rows) for task in self.tasks])

    @cached_property
    def _starts(self) -> np.ndarray:
        return self._sizes.cumsum() - self._sizes

    @cached_property
    def _bounds(self) -> np.ndarray:
        sums = np.array([self.shares[name] for name in self.names]).cumsum()
        last = max(i for i, name in enumerate(self.names) if self.shares[name] > 0)
        sums[last:] = 1.0  # rounding must not reach a task without a share
        return sums

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.names:
                raise SondeError(f"there is no task {name!r} in the mixture: it has {', '.join(self.names)}")
