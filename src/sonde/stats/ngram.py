"""How well do the last few tokens alone predict the next one? The baseline a language model has to beat.

Interpolated Kneser-Ney with three discounts (Chen & Goodman 1999): with c the context of k - 1 tokens and c' the same
without its first, p_k(w|c) = (n(cw) - D(n(cw))) / n(c) + g(c) p_{k-1}(w|c'), where g(c) is the mass that the discounts
D1, D2, D3+ freed, so that every p_k(.|c) sums to one, and p_0 = 1 / vocabulary. n counts occurrences at the highest
order and distinct left neighbours (the start of a document is one) at the lower orders. A token with only j < order - 1
tokens before it in its document is predicted by the model of order j + 1, occurrences at its top.

N-grams live in one sorted int64 table an order: key = (index of the first k - 1 tokens in the table below) * vocabulary
+ last token. So any order fits 64 bits, the continuations of a context are one slice, and no loop runs over tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

Documents = ArrayLike | torch.Tensor | Sequence[ArrayLike] | Sequence[torch.Tensor]


class NgramModel:
    """Kneser-Ney model over token ids. Make one with `NgramModel.fit`."""

    def __init__(self, orders: "Sequence[_Order]", vocab_size: int) -> None:
        self._orders = list(orders)
        self.vocab_size = vocab_size

    @property
    def order(self) -> int:
        """Length of the longest n-gram: 5 looks at 4 previous tokens."""
        return len(self._orders)

    @classmethod
    def fit(cls, documents: Documents, *, vocab_size: int, order: int = 5) -> "NgramModel":
        """Count the n-grams of one document (ids `[n]`), of many (`[documents, n]`) or of a list of ids of any lengths.

        No n-gram crosses from one document to the next; `order` is cut to the longest document. Raises `ValueError`
        when there is no token, when an id is outside the vocabulary or when the order is below 1.
        """
        if order < 1:
            raise ValueError(f"order is {order}: expected at least 1")
        tokens, depth = _flatten(documents, vocab_size)
        if not len(tokens):
            raise ValueError("no tokens to count")
        orders: list[_Order] = []
        ends = prefix = np.zeros(len(tokens), dtype=np.int64)  # the n-gram that ends at a token, or just before it
        starts = np.zeros(0, dtype=np.int64)
        for k in range(1, min(order, int(depth.max()) + 1) + 1):
            whole = np.flatnonzero(depth >= k - 1)
            keys, first, ngram, n = np.unique(
                prefix[whole] * vocab_size + tokens[whole], return_index=True, return_inverse=True, return_counts=True
            )
            if orders:
                shorter = orders[-1]
                neighbours = np.bincount(ends[whole[first]], minlength=len(shorter.keys))
                neighbours[starts] += 1
                shorter.neighbours = _Counts.of(neighbours, shorter.keys // vocab_size, len(shorter.occurrences.total))
            contexts = len(orders[-1].keys) if orders else 1
            orders.append(_Order(keys, _Counts.of(n, keys // vocab_size, contexts)))
            starts = np.unique(ngram[depth[whole] == k - 1])
            ends = np.full(len(tokens), -1, dtype=np.int64)
            ends[whole] = ngram
            prefix = np.roll(ends, 1)
        return cls(orders, vocab_size)

    def log_prob(self, documents: Documents, *, order: int | None = None) -> Float[np.ndarray, "..."]:
        """Natural-log probability of every token given up to `order - 1` tokens before it in its document.

        Takes what `fit` takes. The result has the shape of an array `[n]` or `[documents, n]`; for a list of documents
        it is their concatenation. A lower `order` gives the model that `fit` with that order gives. Raises `ValueError`
        for ids outside the vocabulary and for an order that was not fitted.
        """
        orders = self._orders[: self._cut(order)]
        tokens, depth = _flatten(documents, self.vocab_size)
        p = np.full(len(tokens), 1 / self.vocab_size)
        prefix = np.zeros(len(tokens), dtype=np.int64)
        for k, table in enumerate(orders, start=1):
            known = np.flatnonzero((depth >= k - 1) & (prefix >= 0))
            context = prefix[known]
            ngram = _find(table.keys, context * self.vocab_size + tokens[known])
            seen = table.occurrences.extend(p[known], context, ngram)
            if k < len(orders):
                lower = table.lower.extend(p[known], context, ngram)
                seen = np.where(depth[known] == k - 1, seen, lower)
            p[known] = seen
            prefix = np.full(len(tokens), -1, dtype=np.int64)
            after = known[known < len(tokens) - 1] + 1
            prefix[after] = ngram[: len(after)]
        shape = documents.shape if isinstance(documents, np.ndarray | torch.Tensor) else (-1,)
        return np.log(p).reshape(shape)

    def distribution(
        self, context: ArrayLike | torch.Tensor, *, order: int | None = None
    ) -> Float[np.ndarray, " vocab"]:
        """Probabilities of all tokens after `context [n]`, the start of a document (empty: its first token)."""
        orders = self._orders[: self._cut(order)]
        before, _ = _flatten(context, self.vocab_size)
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        top = min(len(orders), len(before) + 1)
        for k, table in enumerate(orders[:top], start=1):
            node = 0
            for shorter, token in zip(orders, before[len(before) - k + 1 :], strict=False):
                node = _find(shorter.keys, np.array([node * self.vocab_size + token]))[0]
                if node < 0:
                    return p
            counts = table.occurrences if k == top else table.lower
            start, stop = np.searchsorted(table.keys, [node * self.vocab_size, (node + 1) * self.vocab_size])
            children = np.arange(start, stop)
            p = p * counts.freed[node]
            p[table.keys[children] % self.vocab_size] += counts.share(np.full(len(children), node), children)
        return p

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`."""
        return {
            "vocab_size": self.vocab_size,
            "orders": [
                {
                    "keys": torch.from_numpy(table.keys),
                    "counts": [c.state() for c in (table.occurrences, table.neighbours) if c is not None],
                }
                for table in self._orders
            ],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NgramModel":
        """The model that `state` was taken from."""
        orders = []
        for table in state["orders"]:
            counts = [_Counts(**{name: t.cpu().numpy() for name, t in c.items()}) for c in table["counts"]]
            orders.append(_Order(table["keys"].cpu().numpy(), *counts))
        return cls(orders, state["vocab_size"])

    def _cut(self, order: int | None) -> int:
        if order is not None and not 1 <= order <= self.order:
            raise ValueError(f"order is {order}: this model has orders 1 to {self.order}")
        return order or self.order


@dataclass
class _Counts:
    """One way of counting the n-grams of an order: occurrences, or distinct left neighbours."""

    n: Int[np.ndarray, " ngrams"]
    total: Int[np.ndarray, " contexts"]
    freed: Float[np.ndarray, " contexts"]
    discounts: Float[np.ndarray, " 4"]

    @classmethod
    def of(cls, n: Int[np.ndarray, " ngrams"], parent: Int[np.ndarray, " ngrams"], contexts: int) -> "_Counts":
        discounts = _discounts(n)
        total = np.bincount(parent, weights=n, minlength=contexts)
        freed = np.bincount(parent, weights=discounts[np.minimum(n, 3)], minlength=contexts)
        childless = total == 0  # the last n-gram of a document: all mass goes to the shorter context
        total[childless] = freed[childless] = 1
        return cls(n.astype(np.int32), total.astype(np.int32), freed / total, discounts)

    def share(self, context: Int[np.ndarray, " n"], ngram: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Discounted share of an n-gram in its context; 0 for -1, an n-gram not seen."""
        n = np.where(ngram < 0, 0, self.n[ngram])
        return (n - self.discounts[np.minimum(n, 3)]) / self.total[context]

    def extend(
        self, p: Float[np.ndarray, " n"], context: Int[np.ndarray, " n"], ngram: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Probability given the longer context from that given the shorter one."""
        return self.share(context, ngram) + self.freed[context] * p

    def state(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(getattr(self, name)) for name in ("n", "total", "freed", "discounts")}


@dataclass
class _Order:
    """The n-grams of one length: sorted keys, occurrences, and left neighbours (None at the highest order)."""

    keys: Int[np.ndarray, " ngrams"]
    occurrences: _Counts
    neighbours: _Counts | None = None

    @property
    def lower(self) -> _Counts:
        """The counts that a longer n-gram backs off to."""
        return self.occurrences if self.neighbours is None else self.neighbours


def _discounts(n: Int[np.ndarray, " ngrams"]) -> Float[np.ndarray, " 4"]:
    """D(0), D(1), D(2), D(3+) by Chen and Goodman's equation 26; 1/2, 1, 3/2 where the text is too small for it."""
    n1, n2, n3, n4 = np.bincount(np.minimum(n, 5), minlength=5)[1:5].tolist()
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        d = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (d[1:] > 0).all() and (d <= np.arange(4)).all():
            return d
    return np.array([0, 0.5, 1, 1.5])


def _find(keys: Int[np.ndarray, " ngrams"], wanted: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Index of each wanted key, -1 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def _flatten(documents: Documents, vocab_size: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """All tokens in a row, and for each the number of tokens before it in its document."""
    if isinstance(documents, torch.Tensor):
        documents = documents.detach().cpu().numpy()
    if isinstance(documents, np.ndarray):
        parts = list(documents) if documents.ndim == 2 else [documents]
    else:
        listed = list(documents)  # pyright: ignore[reportArgumentType]
        parts = [listed] if not listed or np.ndim(listed[0]) == 0 else listed
    arrays = [np.asarray(part) for part in parts]
    for a in arrays:
        if a.ndim != 1 or (a.size and a.dtype.kind not in "iu"):
            raise ValueError(f"a document of shape {a.shape} and type {a.dtype}: expected one row of integer ids")
    tokens = np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, dtype=np.int64)
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"token ids from {tokens.min()} to {tokens.max()} in a vocabulary of {vocab_size}")
    lengths = np.array([len(a) for a in arrays], dtype=np.int64)
    depth = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens, depth
