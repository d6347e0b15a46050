"""How often does an n-gram of any length stand in a text, and what follows it? All suffixes in order, in linear time.

The order is found by the difference cover of Kärkkäinen & Sanders (2003): suffixes that begin at 1 or 2 modulo 3 are
named by their first three symbols and, where names repeat, ordered by recursion on the sequence of names; the others
follow by one sort of (symbol, rank of the next suffix), and both are merged by rank. Only integers are sorted, never
suffixes, so a text that repeats itself costs no more than another. The n-grams that begin alike are one interval of
the order, found for all queries at once by halving. 4 bytes a token below 2^31 tokens, beside the text itself.
"""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from sonde.errors import SondeError
from sonde.files import replacing, write_text
from sonde.stats.ngram_tables import Documents, check_ids, flatten

_BREAK = 1  # closes a document; below every token, above what stands past the end


class SuffixArray:
    """All suffixes of a text of several documents, in order. Make one with `SuffixArray.build`, open with `open`."""

    def __init__(self, symbols: Int[np.ndarray, " n"], order: Int[np.ndarray, " n"], vocab_size: int) -> None:
        self.symbols, self.order, self.vocab_size = symbols, order, vocab_size

    @classmethod
    def build(cls, documents: Documents, *, vocab_size: int) -> "SuffixArray":
        """Index one document (ids `[n]`), many (`[documents, n]`) or a list of ids of any lengths.

        No n-gram crosses from one document to the next. Raises `ValueError` where there is no token, and for an id
        outside the vocabulary, naming it and its place.
        """
        tokens, _, lengths = flatten(documents, vocab_size)
        if not len(tokens):
            raise ValueError("no tokens to index")
        symbols = np.insert(tokens + _BREAK + 1, np.cumsum(lengths), _BREAK)
        narrow = np.uint16 if vocab_size + _BREAK < 1 << 16 else np.uint32
        wide = np.int32 if len(symbols) < 1 << 31 else np.int64
        return cls(symbols.astype(narrow), suffix_order(symbols).astype(wide), vocab_size)

    def count(self, grams: Int[np.ndarray, "n k"] | ArrayLike) -> Int[np.ndarray, " n"]:
        """How often each n-gram occurs. Raises `ValueError` for ids outside the vocabulary."""
        low, high = self._intervals(grams)
        return high - low

    def positions(self, gram: Int[np.ndarray, " k"] | ArrayLike) -> Int[np.ndarray, "occurrences 2"]:
        """Document and place in it of each occurrence of one n-gram, in the order of the text."""
        (low,), (high,) = self._intervals(np.asarray(gram)[None])
        at = np.sort(np.asarray(self.order[low:high]).astype(np.int64))
        ends = np.flatnonzero(self.symbols == _BREAK)
        document = np.searchsorted(ends, at)
        return np.stack([document, at - np.where(document > 0, ends[document - 1] + 1, 0)], axis=1)

    def continuations(
        self, contexts: Int[np.ndarray, "n k"] | ArrayLike
    ) -> tuple[Int[np.ndarray, " n+1"], Int[np.ndarray, " nonzero"], Int[np.ndarray, " nonzero"]]:
        """What follows each context, as `NgramTables.continuations` says it: where rows begin, tokens, counts."""
        contexts = np.asarray(contexts)
        low, high = self._intervals(contexts)
        size = high - low
        row = np.repeat(np.arange(len(size)), size)
        place = np.arange(size.sum()) + np.repeat(low - np.cumsum(size) + size, size)
        follows = self.symbols[self.order[place].astype(np.int64) + contexts.shape[1]].astype(np.int64)
        row, follows = row[follows != _BREAK], follows[follows != _BREAK] - _BREAK - 1
        new = np.flatnonzero(np.diff(row * self.vocab_size + follows, prepend=-1))
        begins = np.concatenate([[0], np.cumsum(np.bincount(row[new], minlength=len(size)))])
        return begins, follows[new], np.diff(np.append(new, len(row)))

    def save(self, folder: str | Path) -> None:
        """Write `symbols.npy`, `order.npy` and last `config.json` into a folder."""
        folder = Path(folder)
        for name in ("symbols", "order"):
            with replacing(folder / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, getattr(self, name))
        write_text(folder / "config.json", json.dumps({"vocab_size": self.vocab_size, "length": len(self.order)}))

    @classmethod
    def open(cls, folder: str | Path) -> "SuffixArray":
        """The index in a folder, memory-mapped. Raises `SondeError` for damage."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            symbols, order = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("symbols", "order")
            )
            if not len(symbols) == len(order) == config["length"]:
                raise ValueError(f"{len(symbols)} symbols and {len(order)} suffixes, not {config['length']}")
            return cls(symbols, order, int(config["vocab_size"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SondeError(f"{folder} does not hold a suffix array: {error}") from error

    def _intervals(self, grams: Int[np.ndarray, "n k"] | ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """First and last (exclusive) suffix that begins with each n-gram; of none, all suffixes but the breaks."""
        grams = np.asarray(grams)
        if grams.ndim != 2:
            raise ValueError(f"n-grams of shape {grams.shape}: expected one row of ids for each")
        check_ids(grams, self.vocab_size)
        low = np.full(len(grams), int((self.symbols == _BREAK).sum()) if not grams.shape[1] else 0)
        high = np.full(len(grams), len(self.order))
        for j, symbol in enumerate((grams.astype(np.int64) + _BREAK + 1).T):
            low, high = self._bound(low, high, j, symbol), self._bound(low, high, j, symbol + 1)
        return low, high

    def _bound(self, low: np.ndarray, high: np.ndarray, offset: int, symbol: np.ndarray) -> np.ndarray:
        """First suffix of each interval, in which all agree before `offset`, whose symbol there is `symbol` or more."""
        low, high = low.copy(), high.copy()
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) // 2
            at = self.order[middle].astype(np.int64) + offset
            less = np.where(at < len(self.symbols), self.symbols[np.minimum(at, len(self.symbols) - 1)], 0)
            less = less < symbol[open_]
            low[open_[less]] = middle[less] + 1
            high[open_[~less]] = middle[~less]
        return low


def suffix_order(symbols: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Where the suffixes of a sequence of positive integers begin, in lexicographic order."""
    n = len(symbols)
    if n < 3:
        return np.array(sorted(range(n), key=lambda i: symbols[i:].tolist()), dtype=np.int64)
    text = np.concatenate([symbols, [0, 0, 0]]).astype(np.int64)
    bits = int(text.max()).bit_length()
    # a suffix past the end stands in for the last third where its length asks for one (Kärkkäinen & Sanders, 2.1)
    cover = np.concatenate([np.arange(1, n + (n % 3 == 1), 3), np.arange(2, n, 3)])
    name, order = _ranks(_packed((text[cover], bits), (text[cover + 1], bits), (text[cover + 2], bits)))
    if name[order[-1]] < len(cover) - 1:
        order = suffix_order(name + 1)
    rank = np.zeros(n + 3, dtype=np.int64)
    rank[cover[order]] = np.arange(1, len(cover) + 1)
    ordered = cover[order]
    ordered = ordered[ordered < n]
    width = len(cover).bit_length()

    others = np.arange(0, n, 3)
    others = others[np.argsort(_packed((text[others], bits), (rank[others + 1], width)))]
    first, second = ordered[ordered % 3 == 1], ordered[ordered % 3 == 2]
    # one third against each of the others, by symbols up to the next place that has a rank in both
    before = _places(first, others, lambda i: _packed((text[i], bits), (rank[i + 1], width)))
    before += _places(second, others, lambda i: _packed((text[i], bits), (text[i + 1], bits), (rank[i + 2], width)))
    merged = np.empty(n, dtype=np.int64)
    taken = np.zeros(n, dtype=bool)
    taken[before + np.arange(len(others))] = True
    merged[taken] = others
    merged[~taken] = ordered
    return merged


def _packed(*parts: tuple[Int[np.ndarray, " n"], int]) -> Int[np.ndarray, " n"]:
    """Numbers of given bits in one word, the first highest; the lower ones are ranked first where they do not fit."""
    (high, bits), *rest = parts
    if not rest:
        return high
    low, below = _packed(*rest), sum(width for _, width in rest)
    if bits + below > 63:
        low, _ = _ranks(low)
        below = int(low.max()).bit_length()
    return (high << below) | low


def _ranks(values: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Rank of each value among the distinct ones, and the order that sorts them."""
    order = np.argsort(values)
    ordered = values[order]
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.cumsum(np.concatenate([[False], ordered[1:] != ordered[:-1]]))
    return rank, order


def _places(among: Int[np.ndarray, " n"], these: Int[np.ndarray, " m"], key) -> Int[np.ndarray, " m"]:
    """How many of `among` come before each of `these`, both in the order of `key`."""
    keys = key(np.concatenate([among, these]))
    return np.searchsorted(keys[: len(among)], keys[len(among) :])
