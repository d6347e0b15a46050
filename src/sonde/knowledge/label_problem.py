"""A task whose labels cost money: a pool of rows, sources that label it at a price, test rows whose truth is known.

    problem = Problem(features=x, sources=[LabelSource.of("weak", p, price=0.1), LabelSource.of("oracle", y, price=1)],
                      test_features=x_test, test_truth=y_test)
    purchase = Purchase(problem, {"weak": 320, "oracle": 32}, seed=0)      # what may be bought, in the order of stages
    outcome = Sequential()(problem, purchase, seed=0)                      # any `Method`
    score(outcome.scores, problem.test_truth)

A `Problem` holds features `[pool d]`, or texts, or both: a method uses what it needs and refuses a problem without it.
Labels are probabilities `[pool C]` for every source, soft or one-hot, with a row of nan where a source cannot be asked.
A `Purchase` deals the pool: rows of different sources are disjoint, drawn at random in proportion to the numbers asked
for, and nested, so that a larger order of the first source extends a smaller one of the same seed. Labels come out of
the purchase alone, and it pays for them (`Ledger`). A `Method` returns scores (log-odds, or logits of C classes) of the
test rows. After Mallen & Belrose 2024 (arXiv:2410.13215), section 3.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.label_ledger import Ledger, Price, exact_price

_DEAD = 1e-6  # of the largest deviation
_ROUNDING = 1e-4


@dataclass(frozen=True, eq=False)
class LabelSource:
    """Who labels rows of the pool, at which price: a small model, a heuristic, a crowd, an expert.

    labels: `[pool C]` probabilities in float32; a row of nan is one that this source cannot be asked about.
    test_labels: what it says of the test rows, `[test C]`, or None: to score the source itself, never to train on.
    """

    name: str
    price: Fraction
    labels: Float[Tensor, "pool C"]
    test_labels: Float[Tensor, "test C"] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        labels: ArrayLike | Tensor,
        *,
        price: Price,
        classes: int = 2,
        test_labels: ArrayLike | Tensor | None = None,
    ) -> "LabelSource":
        """A source from probabilities `[pool]` of class 1, probabilities `[pool C]`, or whole numbers (classes).

        Whole numbers must be of an integer type, so that a column of classes is not taken for probabilities; nan marks
        what cannot be asked. Raises `SondeError`, naming the source, for values outside [0, 1], rows that do not add up
        to 1, class numbers from `classes` on, and a negative price.
        """
        test = None if test_labels is None else _table(name, test_labels, classes)
        return cls(name, exact_price(price, name), _table(name, labels, classes), test)

    @property
    def available(self) -> np.ndarray:
        """Which rows can be asked about `[pool]`, bool."""
        return ~self.labels.isnan().any(1).numpy()


@dataclass(frozen=True, eq=False)
class Problem:
    """A pool, its label sources and a test set; see the module. Immutable.

    features, test_features: `[pool d]` and `[test d]`, or None. texts, test_texts: strings, or None.
    sources: in the order in which a method uses them, the dearest and best last; the last one is called the oracle.
    test_truth: classes `[test]`. classes: their names.

    Raises `SondeError` for sizes that do not fit, features that are not finite, a text that occurs twice in the pool or
    in pool and test (listing rows), and test rows of one class only.
    """

    sources: Sequence[LabelSource]
    test_truth: Int[np.ndarray, " test"]
    features: Float[Tensor, "pool d"] | None = None
    test_features: Float[Tensor, "test d"] | None = None
    texts: Sequence[str] | None = None
    test_texts: Sequence[str] | None = None
    classes: tuple[str, ...] = ("no", "yes")
    name: str = "task"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "test_truth", np.asarray(self.test_truth).astype(np.int64))
        if not self.sources:
            raise SondeError("a task needs at least one label source")
        names = Counter(source.name for source in self.sources)
        if max(names.values()) > 1:
            raise SondeError(f"two label sources are called {names.most_common(1)[0][0]!r}")
        if (self.features is None) != (self.test_features is None) or (self.texts is None) != (self.test_texts is None):
            raise SondeError("give features (or texts) of the pool and of the test rows, or of neither")
        if self.features is None and self.texts is None:
            raise SondeError("a task needs features or texts")
        for source in self.sources:
            if source.labels.shape != (self.size, len(self.classes)):
                raise SondeError(
                    f"label source {source.name!r} has labels of shape {tuple(source.labels.shape)} for a pool of "
                    f"{self.size} rows and {len(self.classes)} classes"
                )
        self._check_features()
        self._check_texts()
        if self.test_truth.ndim != 1 or len(np.unique(self.test_truth)) < 2:
            raise SondeError("the test rows are of one class: accuracy and AUROC would say nothing")
        if self.test_truth.min() < 0 or self.test_truth.max() >= len(self.classes):
            raise SondeError(f"a test row is of class {self.test_truth.max()}, of {len(self.classes)} classes")

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return len(self.features) if self.features is not None else len(self.texts or ())

    @property
    def oracle(self) -> str:
        """The last source: the dearest, taken for the truth."""
        return self.sources[-1].name

    @property
    def prices(self) -> dict[str, Fraction]:
        """By source."""
        return {source.name: source.price for source in self.sources}

    def source(self, name: str) -> LabelSource:
        """The source of that name. Raises `SondeError` where there is none."""
        for source in self.sources:
            if source.name == name:
                return source
        raise SondeError(f"there is no label source {name!r}: there are {', '.join(s.name for s in self.sources)}")

    @cached_property
    def test_hash(self) -> str:
        """What identifies the test set: runs with different ones are not comparable."""
        digest = hashlib.sha256(self.test_truth.tobytes())
        if self.test_features is not None:
            digest.update(self.test_features.detach().cpu().numpy().tobytes())
        for text in self.test_texts or ():
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()[:16]

    @cached_property
    def standardised(self) -> tuple[Float[Tensor, "pool d1"], Float[Tensor, "test d1"]]:
        """Features less the pool's mean over its deviation, with a last column of ones; features cost nothing.

        Raises `SondeError` for a problem of texts alone.
        """
        if self.features is None or self.test_features is None:
            raise SondeError(f"{self.name} has texts but no features: this method works on features")
        pool = self.features if self.features.is_floating_point() else self.features.float()
        pool = pool if pool.element_size() >= 4 else pool.float()
        mean, scale = pool.mean(0), pool.std(0)
        scale = torch.where(scale > _DEAD * scale.max(), scale, torch.inf)
        made = []
        for rows in (pool, self.test_features.to(pool)):
            made.append(torch.cat([(rows - mean) / scale, rows.new_ones(len(rows), 1)], 1))
        return made[0], made[1]

    def _check_features(self) -> None:
        if self.features is None or self.test_features is None:
            return
        if self.features.ndim != 2 or self.features.shape[1:] != self.test_features.shape[1:]:
            raise SondeError(
                f"features of shapes {tuple(self.features.shape)} and {tuple(self.test_features.shape)}: expected "
                "[pool, d] and [test, d]"
            )
        for what, rows in (("pool", self.features), ("test", self.test_features)):
            if not rows.isfinite().all():
                raise SondeError(
                    f"{int((~rows.isfinite()).any(1).sum())} rows of the {what} have features that are not finite"
                )
        if len(self.test_features) != len(self.test_truth):
            raise SondeError(f"{len(self.test_features)} test rows with {len(self.test_truth)} true classes")

    def _check_texts(self) -> None:
        if self.texts is None or self.test_texts is None:
            return
        if len(self.texts) != self.size or len(self.test_texts) != len(self.test_truth):
            raise SondeError(
                f"{len(self.texts)} texts for a pool of {self.size} and {len(self.test_texts)} for "
                f"{len(self.test_truth)} test rows"
            )
        twice = repeated_texts(self.texts)
        if twice:
            raise SondeError(
                f"{len(twice)} texts of the pool occur twice, such as row {twice[0]}: the same text could be bought as "
                "weak and as oracle row; leave out rows " + _listed(twice)
            )
        known = set(self.test_texts)
        shared = [row for row, text in enumerate(self.texts) if text in known]
        if shared:
            raise SondeError(f"{len(shared)} texts of the pool are test texts too: leave out rows {_listed(shared)}")


class Purchase:
    """What a method may buy: `counts` labels of each source, used in the order in which they are named.

    Raises `SondeError` where more is asked than the pool holds, with the numbers, and for a count below 0.
    """

    def __init__(
        self, problem: Problem, counts: Mapping[str, int], *, seed: int = 0, budget: Price | None = None
    ) -> None:
        self.problem = problem
        self.counts = {name: int(count) for name, count in counts.items()}
        self.seed = seed
        self.ledger = Ledger(problem.prices, budget=budget)
        self._candidates = _dealt(problem, self.counts, seed)

    @property
    def cost(self) -> Fraction:
        """What has been paid so far."""
        return self.ledger.cost

    @property
    def bought(self) -> dict[str, Int[np.ndarray, " n"]]:
        """The rows that each source has labelled, ascending."""
        return {name: self.ledger.bought(name) for name in self.counts}

    def candidates(self, source: str) -> Int[np.ndarray, " n"]:
        """Rows that may be bought from `source`, in random order; no other source of this purchase has any of them."""
        return self._candidates[source].copy()

    def take(self, source: str, count: int | None = None) -> tuple[Int[np.ndarray, " n"], Float[Tensor, "n C"]]:
        """Buy the first `count` candidates (by default all that were ordered): their rows and labels."""
        rows = self._candidates[source][: self.counts[source] if count is None else count]
        return rows.copy(), self.buy(source, rows)

    def buy(self, source: str, rows: ArrayLike) -> Float[Tensor, "n C"]:
        """Pay for these rows, where that was not done before, and return their labels.

        Raises `SondeError` for more distinct rows than were ordered and for rows that are no candidates of `source`.
        """
        asked = np.asarray(rows, dtype=np.int64).ravel()
        allowed = self.counts.get(source, 0)
        others = np.setdiff1d(asked, self._candidates.get(source, np.empty(0, np.int64)))
        if len(others):
            raise SondeError(
                f"row {others[0]} may not be labelled by {source!r}: it belongs to another source of this purchase"
            )
        total = len(np.union1d(self.ledger.bought(source), asked))
        if total > allowed:
            raise SondeError(f"{total} labels of {source!r} were asked for, but {allowed} were ordered")
        self.ledger.pay(source, asked)
        return self.labels(source, asked)

    def labels(self, source: str, rows: ArrayLike) -> Float[Tensor, "n C"]:
        """Labels that were paid for before. Raises `SondeError` for any other."""
        self.ledger.require(source, rows)
        return self.problem.source(source).labels[torch.as_tensor(np.asarray(rows, dtype=np.int64))]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method returns: `scores` of the test rows, what it bought, and what a reader must know.

    scores: `[test]` log-odds of class 1 for two classes, `[test C]` logits for more.
    bought: rows by source. cost: of them. notes: such as "early stopping off: 1 row held out". settings: all that
    decides the numbers.
    """

    scores: Float[np.ndarray, "test *C"]
    bought: Mapping[str, Int[np.ndarray, " n"]]
    cost: Fraction
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        scores: ArrayLike,
        purchase: Purchase,
        *,
        notes: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> "Outcome":
        """The outcome of a purchase, whose ledger says what was bought. Raises `SondeError` for scores of nan."""
        array = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(array).all():
            raise SondeError(f"{int((~np.isfinite(array)).sum())} scores of the test rows are not finite")
        return cls(array, purchase.bought, purchase.cost, tuple(dict.fromkeys(notes)), dict(settings or {}))


@runtime_checkable
class Method(Protocol):
    """A way to turn a purchase into a classifier: sequential fitting, prompts, fine-tuning of a language model.

    It takes labels from `purchase` only (`take`, `buy`, `labels`), trains, and scores the problem's test rows. Equal
    arguments give equal numbers. It raises `SondeError` for a problem that it cannot use (texts or features missing).
    """

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def __call__(self, problem: Problem, purchase: Purchase, *, seed: int) -> Outcome:
        """Buy, train and score the test rows."""
        ...


def repeated_texts(texts: Sequence[str]) -> list[int]:
    """Rows whose text has occurred before, ascending: leave them out."""
    seen: set[str] = set()
    again = []
    for row, text in enumerate(texts):
        if text in seen:
            again.append(row)
        seen.add(text)
    return again


def log_odds(labels: Float[Tensor, "n C"], *, floor: float = 1e-6) -> Float[Tensor, "n K"]:
    """Scores that say what the probabilities say: log-odds `[n]` of class 1 for two classes, else log p `[n C]`."""
    logs = labels.double().clamp(floor, 1 - floor).log()
    return logs[:, 1] - logs[:, 0] if labels.shape[1] == 2 else logs


def _table(name: str, labels: ArrayLike | Tensor, classes: int) -> Float[Tensor, "n C"]:
    """Labels in any form as probabilities of every class."""
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.dtype.kind in "iub" and given.ndim == 1:
        worst = int(given.max(initial=0)), int(given.min(initial=0))
        if worst[0] >= classes or worst[1] < 0:
            raise SondeError(
                f"label source {name!r} holds class {worst[0] if worst[0] >= classes else worst[1]}, but there are "
                f"{classes} classes, 0 to {classes - 1}: give probabilities in [0, 1], or say how many classes"
            )
        table = np.eye(classes, dtype=np.float32)[given.astype(np.int64)]
    else:
        table = _probabilities(name, given.astype(np.float64), classes)
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.float32))


def _probabilities(name: str, given: np.ndarray, classes: int) -> np.ndarray:
    finite = given[np.isfinite(given)]
    outside = finite[(finite < 0) | (finite > 1)]
    if len(outside) or np.isinf(given).any():
        whole = len(outside) and (finite == np.round(finite)).all()
        value = f"{outside[0]:g}" if len(outside) else "infinity"
        raise SondeError(
            f"label source {name!r} holds {value}, which is outside [0, 1]"
            + (": it looks like a column of classes, give probabilities or an integer type" if whole else "")
        )
    if given.ndim == 1:
        if classes != 2:
            raise SondeError(f"label source {name!r} gives one probability a row, but there are {classes} classes")
        return np.stack([1 - given, given], 1)
    if given.ndim != 2 or given.shape[1] != classes:
        raise SondeError(f"label source {name!r} has shape {given.shape}: expected [pool] or [pool, {classes}]")
    sums = given.sum(1)
    wrong = np.flatnonzero(np.abs(sums - 1) > _ROUNDING)
    if len(wrong):
        raise SondeError(f"label source {name!r}, row {wrong[0]}: probabilities add up to {sums[wrong[0]]:g}, not 1")
    return given


def _dealt(problem: Problem, counts: Mapping[str, int], seed: int) -> dict[str, Int[np.ndarray, " n"]]:
    """The candidates of each source: rows that it alone can label first, then its part of a common permutation."""
    if min(counts.values(), default=0) < 0:
        raise SondeError(f"a purchase of {min(counts.values())} labels: expected 0 or more")
    order = np.random.default_rng(seed).permutation(problem.size)
    wanted = [name for name, count in counts.items() if count]
    can = {name: problem.source(name).available for name in counts}
    common = np.logical_and.reduce([can[name] for name in wanted]) if wanted else np.zeros(problem.size, dtype=bool)
    # A row that only some of them label goes to the one that labels fewest rows.
    taken = common.copy()
    own: dict[str, np.ndarray] = {}
    for name in sorted(wanted, key=lambda name: can[name].sum()):
        own[name] = can[name] & ~taken
        taken |= own[name]
    shared = order[common[order]]
    need = {name: max(0, counts[name] - int(own[name].sum())) for name in wanted}
    if sum(need.values()) > len(shared):
        asked = " and ".join(f"{counts[name]:,} of {name!r} ({int(can[name].sum()):,} rows)" for name in wanted)
        raise SondeError(f"more labels were asked for than the pool of {problem.size:,} rows holds: {asked}")
    weights = need if sum(need.values()) else {name: counts[name] for name in wanted}
    total, done = sum(weights.values()), 0
    dealt = {name: np.empty(0, np.int64) for name in counts}
    for name in wanted:
        start = len(shared) * done // total
        done += weights[name]
        part = shared[start : len(shared) * done // total]
        # The oracle takes its rows from the end, so that its orders too are nested whatever the others' numbers are.
        last = name == problem.oracle and len(problem.sources) > 1
        dealt[name] = np.concatenate([order[own[name][order]], part[::-1] if last else part])
    return dealt


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")
