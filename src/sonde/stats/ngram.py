"""How well do the last few tokens alone predict the next one? The baseline a language model has to beat.

With c the context of k - 1 tokens and c' the same without its first, p_k(w|c) = (n(cw) - D(n(cw))) / n(c) +
g(c) p_{k-1}(w|c'), where g(c) is the mass that the discounts D freed, so that every p_k(.|c) sums to one, and p_0 =
1 / vocabulary. Three kinds:

- "kneser-ney": discounts D1, D2, D3+ for each order (Chen & Goodman 1999); n counts occurrences at the highest order
  and distinct left neighbours (the start of a document is one) at the lower ones.
- "absolute": one discount for each order, n1 / (n1 + 2 n2), and occurrences everywhere (Ney, Essen & Kneser 1994).
- "none": maximum likelihood, no discount: a context that was never continued has no prediction.

A token with only j < order - 1 tokens before it in its document is predicted by the model of order j + 1, occurrences
at its top. The counts are `sonde.stats.ngram_tables`; no loop runs over tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from sonde.errors import SondeError
from sonde.stats.ngram_rows import NgramRows
from sonde.stats.ngram_tables import Documents, Level, NgramTables, check_ids, children, flatten

Smoothing = Literal["kneser-ney", "absolute", "none"]


class NgramModel:
    """Next-token model from counts. Make one with `NgramModel.fit`, or of tables that were built or opened.

    `notes` says in words where a text was too small to estimate a discount and a fixed one was taken. Raises
    `ValueError` for a smoothing that does not exist.
    """

    def __init__(self, tables: NgramTables, smoothing: Smoothing = "kneser-ney") -> None:
        if smoothing not in ("kneser-ney", "absolute", "none"):
            raise ValueError(f"smoothing {smoothing!r} is none of kneser-ney, absolute, none")
        self.tables, self.smoothing = tables, smoothing
        self.vocab_size = tables.vocab_size
        notes: list[str] = []
        neighbours = _neighbours(tables) if smoothing == "kneser-ney" else []
        self._orders: list[_Order] = []
        for k, level in enumerate(tables.levels):
            lower = _Counts.of(neighbours[k], level, smoothing, k + 1, notes) if k < len(neighbours) else None
            self._orders.append(_Order(level, _Counts.of(level.counts, level, smoothing, k + 1, notes), lower))
        self.notes = tuple(dict.fromkeys(notes))

    @property
    def order(self) -> int:
        """Length of the longest n-gram: 5 looks at 4 previous tokens."""
        return len(self._orders)

    @classmethod
    def fit(
        cls, documents: Documents, *, vocab_size: int, order: int = 5, smoothing: Smoothing = "kneser-ney"
    ) -> "NgramModel":
        """Count the n-grams of one document (ids `[n]`), of many (`[documents, n]`) or of a list of ids of any lengths.

        No n-gram crosses from one document to the next; `order` is cut to the longest document. Raises `ValueError`
        when there is no token, for an id outside the vocabulary (with its place) and for an order below 1.
        """
        return cls(NgramTables.build(documents, vocab_size=vocab_size, order=order), smoothing)

    def log_prob(self, documents: Documents, *, order: int | None = None) -> Float[np.ndarray, "..."]:
        """Natural-log probability of every token given up to `order - 1` tokens before it in its document.

        Takes what `fit` takes. The result has the shape of an array `[n]` or `[documents, n]`; for a list of documents
        it is their concatenation. A lower `order` gives the model that `fit` with that order gives. Raises `ValueError`
        for ids outside the vocabulary and for an order that was not fitted, and `SondeError` where an unsmoothed model
        never saw a context; a token that it never saw after its context has -inf.
        """
        orders = self._orders[: self._cut(order)]
        tokens, depth, _ = flatten(documents, self.vocab_size)
        p = np.full(len(tokens), 1 / self.vocab_size)
        prefix = np.zeros(len(tokens), dtype=np.int64)
        for k, table in enumerate(orders, start=1):
            known = np.flatnonzero((depth >= k - 1) & (prefix >= 0))
            if self.smoothing == "none":
                self._refuse(tokens, np.flatnonzero(depth >= k - 1), prefix, table, k)
            context = prefix[known]
            ngram = table.level.find(context, tokens[known])
            seen = table.occurrences.extend(p[known], context, ngram)
            if k < len(orders):
                lower = table.lower.extend(p[known], context, ngram)
                seen = np.where(depth[known] == k - 1, seen, lower)
            p[known] = seen
            prefix = np.full(len(tokens), -1, dtype=np.int64)
            after = known[known < len(tokens) - 1] + 1
            prefix[after] = ngram[: len(after)]
        shape = documents.shape if isinstance(documents, np.ndarray | torch.Tensor) else (-1,)
        with np.errstate(divide="ignore"):
            return np.log(p).reshape(shape)

    def distribution(
        self, context: ArrayLike | torch.Tensor, *, order: int | None = None
    ) -> Float[np.ndarray, " vocab"]:
        """Probabilities of all tokens after `context [n]`, the start of a document (empty: its first token).

        Raises `SondeError` where an unsmoothed model never saw the context.
        """
        before, *_ = flatten(context, self.vocab_size)
        return self.rows(before[None], order=order).dense()[0].numpy()

    def rows(
        self,
        contexts: Int[np.ndarray, "n k"] | ArrayLike | torch.Tensor,
        *,
        order: int | None = None,
        unseen: Literal["raise", "empty"] = "raise",
    ) -> NgramRows:
        """Next-token distributions after many contexts of one length at once, sparse; longer ones are cut to fit.

        A smoothed model backs off from a context that it never saw. An unsmoothed one raises `SondeError` naming the
        first such context, or with "empty" leaves its row without mass. Raises `ValueError` for ids outside the
        vocabulary and an order that was not fitted.
        """
        orders = self._orders[: self._cut(order)]
        array = contexts.detach().cpu().numpy() if isinstance(contexts, torch.Tensor) else np.asarray(contexts)
        if array.ndim != 2:
            raise ValueError(f"contexts of shape {array.shape}: expected one row of ids for each context")
        check_ids(array, self.vocab_size)
        top = min(len(orders), array.shape[1] + 1)
        weight = np.ones(len(array))
        found: list[_Found] = []
        for k in range(top, 1 if self.smoothing != "none" else top - 1, -1):
            table = orders[k - 1]
            counts = table.occurrences if k == top else table.lower
            node = self.tables.find(array[:, array.shape[1] - k + 1 :])
            if self.smoothing == "none":
                node = np.where((node >= 0) & (counts.total[node] > 0), node, -1)
                if unseen == "raise" and (node < 0).any():
                    first = int(np.flatnonzero(node < 0)[0])
                    raise _no_continuation(array[first, array.shape[1] - k + 1 :], f"row {first}")
            found.append(_Found(table.level, node, *children(table.level, node), counts, weight))
            weight = weight * np.where(node < 0, 1.0, counts.freed[node])
        if self.smoothing == "none":
            weight = np.zeros(len(array))
        base = self._base(top, len(orders))
        if not found:
            return NgramRows.of(np.zeros(len(array) + 1, np.int64), np.zeros(0, np.int64), np.zeros(0), weight, base)
        support = found[-1]
        values = support.values()
        for longer in found[:-1]:
            # an n-gram without its first token is in the table below, so all that follows here follows there too
            row = longer.row
            at = support.level.find(support.node[row], longer.level.tokens[longer.picked])
            values[at - support.level.offsets[support.node[row]] + support.begins[row]] += longer.values()
        return NgramRows.of(support.begins, support.level.tokens[support.picked], values, weight, base)

    def predictions(
        self,
        tokens: Int[np.ndarray, "batch pos"] | torch.Tensor,
        *,
        order: int | None = None,
        first: int | None = None,
        every: int = 1,
        unseen: Literal["raise", "empty"] = "raise",
    ) -> NgramRows:
        """What the model says at the positions first, first + every, … of each sequence, as logits there do.

        logits[t] predict token t + 1, so the context of order n is the tokens t - n + 2 … t. `first` is order - 2 where
        not given, the first position with a whole context. Rows come sequence by sequence. Raises as `rows` does, and
        `ValueError` for an earlier `first`.
        """
        order = self._cut(order)
        array = tokens.detach().cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
        if array.ndim != 2:
            raise ValueError(f"tokens of shape {array.shape}: expected one row of ids for each sequence")
        least = max(order - 2, 0)
        first = least if first is None else first
        if not least <= first < array.shape[1]:
            raise ValueError(f"first is {first}: order {order} has whole contexts from {least} to {array.shape[1] - 1}")
        if order == 1:
            contexts = np.zeros((array[:, first::every].size, 0), dtype=np.int64)
        else:
            windows = np.lib.stride_tricks.sliding_window_view(array, order - 1, axis=1)
            contexts = windows[:, first - least :: every].reshape(-1, order - 1)
        return self.rows(contexts, order=order, unseen=unseen)

    def sample(
        self, sequences: int, length: int, *, seed: int = 0, order: int | None = None
    ) -> Int[np.ndarray, "sequences length"]:
        """Documents drawn from the model, all at once, one token after the other.

        Each token comes from the discounted counts of its context or, with the probability that they freed, from those
        of the shorter one. An unsmoothed model goes to the shorter context only where a document ended in this one.
        """
        orders = self._orders[: self._cut(order)]
        rng = np.random.default_rng(seed)
        out = np.zeros((sequences, length), dtype=np.int64)
        nodes = [np.zeros(sequences, dtype=np.int64)]  # of the last k - 1 tokens in the table below order k
        for t in range(length):
            drawn = rng.integers(self.vocab_size, size=sequences)
            waiting = np.arange(sequences)
            for k in range(len(nodes), 0, -1):
                counts = orders[k - 1].occurrences if k == len(nodes) else orders[k - 1].lower
                at = waiting[nodes[k - 1][waiting] >= 0]
                at = at[rng.random(len(at)) >= counts.freed[nodes[k - 1][at]]]
                low, high = counts.bounds(orders[k - 1].level, nodes[k - 1][at])
                picked = np.searchsorted(counts.cumulative, low + rng.random(len(at)) * (high - low), side="right") - 1
                drawn[at] = orders[k - 1].level.tokens[picked]
                waiting = np.setdiff1d(waiting, at, assume_unique=True)
            out[:, t] = drawn
            longer = [table.level.find(node, drawn) for table, node in zip(orders, nodes, strict=False)]
            nodes = [nodes[0], *longer[: len(orders) - 1]]
        return out

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        return {"vocab_size": self.vocab_size, "smoothing": self.smoothing, "tables": self.tables.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NgramModel":
        """The model that `state` was taken from."""
        return cls(NgramTables.from_state(state["tables"], state["vocab_size"]), state["smoothing"])

    def _cut(self, order: int | None) -> int:
        if order is not None and not 1 <= order <= self.order:
            raise ValueError(f"order is {order}: this model has orders 1 to {self.order}")
        return order or self.order

    def _base(self, top: int, order: int) -> Float[np.ndarray, " vocab"]:
        """Probabilities of all tokens after no context, below an order of `top` in a model of `order`."""
        first = self._orders[0]
        counts = first.occurrences if top == 1 or order == 1 else first.lower
        base = np.full(self.vocab_size, counts.freed[0] / self.vocab_size)
        base[first.level.tokens] += counts.share(np.zeros(len(first.level.keys), dtype=np.int64), slice(None))
        return base

    def _refuse(self, tokens: np.ndarray, at: np.ndarray, prefix: np.ndarray, table: "_Order", k: int) -> None:
        lost = at[(prefix[at] < 0) | (table.occurrences.total[prefix[at]] == 0)]
        if len(lost):
            raise _no_continuation(tokens[lost[0] - k + 1 : lost[0]], f"position {lost[0]}")


@dataclass
class _Counts:
    """One way of counting the n-grams of an order: occurrences, or distinct left neighbours."""

    n: Int[np.ndarray, " ngrams"]
    total: Int[np.ndarray, " contexts"]
    freed: Float[np.ndarray, " contexts"]
    discounts: Float[np.ndarray, " 4"]
    _shares: Float[np.ndarray, " ngrams"] | None = None

    @classmethod
    def of(
        cls, n: Int[np.ndarray, " ngrams"], level: Level, smoothing: Smoothing, order: int, notes: list[str]
    ) -> "_Counts":
        estimated, exact = _DISCOUNTS[smoothing](n)
        discounts = np.array(estimated)
        if not exact:
            notes.append(f"order {order}: too few n-grams occur once, twice …: discounts of {estimated[1:]} were taken")
        total = np.bincount(level.parents, weights=n, minlength=level.contexts)
        freed = np.bincount(level.parents, weights=discounts[np.minimum(n, 3)], minlength=level.contexts)
        childless = total == 0  # the last n-gram of a document: all mass goes to the shorter context
        known = np.where(childless, 1, total)
        freed[childless] = 1
        if smoothing != "none":
            total = known
        return cls(n.astype(np.int32), total.astype(np.int32), freed / known, discounts)

    def share(self, context: Int[np.ndarray, " n"], ngram: Int[np.ndarray, " n"] | slice) -> Float[np.ndarray, " n"]:
        """Discounted share of an n-gram in its context; 0 for -1, an n-gram not seen."""
        n = self.n if isinstance(ngram, slice) else np.where(ngram < 0, 0, self.n[ngram])
        return (n - self.discounts[np.minimum(n, 3)]) / self.total[context]

    def extend(
        self, p: Float[np.ndarray, " n"], context: Int[np.ndarray, " n"], ngram: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Probability given the longer context from that given the shorter one."""
        return self.share(context, ngram) + self.freed[context] * p

    def shares(self, level: Level) -> Float[np.ndarray, " ngrams"]:
        """`share` of all n-grams, computed once."""
        if self._shares is None:
            self._shares = self.share(level.parents, slice(None))
        return self._shares

    @cached_property
    def cumulative(self) -> Float[np.ndarray, " ngrams+1"]:
        """Running sum of the discounted counts, from 0."""
        return np.concatenate([[0.0], np.cumsum(self.n - self.discounts[np.minimum(self.n, 3)])])

    def bounds(self, level: Level, node: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Where the continuations of contexts begin and end in `cumulative`."""
        return self.cumulative[level.offsets[node]], self.cumulative[level.offsets[node + 1]]


@dataclass
class _Found:
    """What one table says after each of many contexts: the index of the context, what follows it, and its weight."""

    level: Level
    node: Int[np.ndarray, " n"]
    begins: Int[np.ndarray, " n+1"]
    picked: Int[np.ndarray, " nonzero"]
    counts: _Counts
    weight: Float[np.ndarray, " n"]

    @property
    def row(self) -> Int[np.ndarray, " nonzero"]:
        """The context that each n-gram continues."""
        return np.repeat(np.arange(len(self.node)), np.diff(self.begins))

    def values(self) -> Float[np.ndarray, " nonzero"]:
        """The part of the probability that comes from this table."""
        shares = self.counts.shares(self.level)[self.picked]
        if (self.weight != 1).any():
            shares *= np.repeat(self.weight, np.diff(self.begins))
        return shares


@dataclass
class _Order:
    """The n-grams of one length: their table, occurrences, and left neighbours (Kneser-Ney, below the highest)."""

    level: Level
    occurrences: _Counts
    neighbours: _Counts | None = None

    @property
    def lower(self) -> _Counts:
        """The counts that a longer n-gram backs off to."""
        return self.occurrences if self.neighbours is None else self.neighbours


def _neighbours(tables: NgramTables) -> "Sequence[Int[np.ndarray, ' ngrams']]":
    """Distinct left neighbours of the n-grams of all lengths but the longest; the start of a document is one."""
    found = []
    without_first = np.zeros(len(tables.levels[0].keys), dtype=np.int64)  # of each n-gram, in the table below
    for shorter, level in zip(tables.levels[:-1], tables.levels[1:], strict=True):
        without_first = shorter.find(without_first[level.parents], level.tokens)
        neighbours = np.bincount(without_first, minlength=len(shorter.keys))
        neighbours[shorter.openings] += 1
        found.append(neighbours)
    return found


def _no_continuation(context: Int[np.ndarray, " k"], where: str) -> SondeError:
    return SondeError(
        f"no continuation for context {context.tolist()} ({where}): it never occurs in the counted text, or only at "
        "the end of a document; count more text or use smoothing"
    )


def _three_discounts(n: Int[np.ndarray, " ngrams"]) -> tuple[list[float], bool]:
    """D(0), D(1), D(2), D(3+) by Chen and Goodman's equation 26; 1/2, 1, 3/2 where the text is too small for it."""
    n1, n2, n3, n4 = np.bincount(np.minimum(n, 5), minlength=5)[1:5].tolist()
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        d = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (d[1:] > 0).all() and (d <= np.arange(4)).all():
            return d.tolist(), True
    return [0, 0.5, 1, 1.5], False


def _one_discount(n: Int[np.ndarray, " ngrams"]) -> tuple[list[float], bool]:
    """n1 / (n1 + 2 n2) at every count; 1/2 where no n-gram occurs once, or none twice."""
    n1, n2 = np.bincount(np.minimum(n, 3), minlength=3)[1:3].tolist()
    estimated = n1 > 0 and n2 > 0
    return [0, *[n1 / (n1 + 2 * n2) if estimated else 0.5] * 3], estimated


def _no_discount(n: Int[np.ndarray, " ngrams"]) -> tuple[list[float], bool]:
    return [0.0] * 4, True


_DISCOUNTS = {"kneser-ney": _three_discounts, "absolute": _one_discount, "none": _no_discount}
