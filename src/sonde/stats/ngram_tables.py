"""Which n-grams stand in a text, and how often? Sorted tables of all lengths from 1 to n, made by one integer sort.

As many tokens as fit into 64 bits are packed into one word for every place of the text; a single sort of these words
puts equal n-grams side by side and the n-grams of every shorter length with them, so that all tables come from one
sort and run lengths. Longer n-grams are made token by token from the table below. What is kept is one sorted int64 key
and one count a *distinct* n-gram: key = (index of its first k - 1 tokens in the table below) * vocabulary + last token.
Any order and any vocabulary fit this key, and the continuations of a context are one slice. Tables are saved as plain
arrays and opened memory-mapped.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike

from sonde.errors import SondeError
from sonde.files import replacing, write_text

Documents = ArrayLike | torch.Tensor | Sequence[ArrayLike] | Sequence[torch.Tensor]

_WORD = 64  # bits of a packed word


@dataclass
class Level:
    """The n-grams of one length: sorted keys, how often each occurs, and which of them open a document."""

    keys: Int[np.ndarray, " ngrams"]
    counts: Int[np.ndarray, " ngrams"]
    openings: Int[np.ndarray, " openings"]
    contexts: int
    vocab_size: int

    @cached_property
    def parents(self) -> Int[np.ndarray, " ngrams"]:
        """Index of the first k - 1 tokens of each n-gram in the table below."""
        return self.keys // self.vocab_size

    @cached_property
    def tokens(self) -> Int[np.ndarray, " ngrams"]:
        """The last token of each n-gram, in 16 bits where the vocabulary allows."""
        return (self.keys % self.vocab_size).astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def offsets(self) -> Int[np.ndarray, " contexts+1"]:
        """The n-grams that continue context `c` are those from `offsets[c]` to `offsets[c + 1]`."""
        children = np.bincount(self.parents, minlength=self.contexts)
        return np.concatenate([[0], np.cumsum(children)])

    @cached_property
    def totals(self) -> Int[np.ndarray, " contexts"]:
        """How often each context is continued; 0 for one that only stands at the end of a document."""
        sums = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return np.diff(sums[self.offsets])

    def find(self, context: Int[np.ndarray, " n"], token: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Index of each context (an index of the table below) with its token; -1 where it does not occur."""
        if not len(self.keys):
            return np.full(len(context), -1)
        wanted = np.asarray(context, dtype=np.int64) * self.vocab_size + token
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((self.keys[at] == wanted) & (np.asarray(context) >= 0), at, -1)


class NgramTables:
    """Counts of all n-grams up to a length. Make them with `NgramTables.build`, open saved ones with `open`."""

    def __init__(self, levels: Sequence[Level], vocab_size: int) -> None:
        self.levels = list(levels)
        self.vocab_size = vocab_size

    @property
    def order(self) -> int:
        """Length of the longest n-gram."""
        return len(self.levels)

    @classmethod
    def build(cls, documents: Documents, *, vocab_size: int, order: int) -> "NgramTables":
        """Count one document (ids `[n]`), many (`[documents, n]`) or a list of ids of any lengths.

        No n-gram crosses from one document to the next; `order` is cut to the longest document. Raises `ValueError`
        when there is no token, for an id outside the vocabulary (naming it and its place), and for an order below 1.
        """
        if order < 1:
            raise ValueError(f"order is {order}: expected at least 1")
        tokens, depth, lengths = flatten(documents, vocab_size)
        if not len(tokens):
            raise ValueError("no tokens to count")
        order = min(order, int(depth.max()) + 1)
        starts = np.flatnonzero(depth == 0)
        left = np.repeat(lengths, lengths) - depth
        bits = vocab_size.bit_length()
        packed = min(order, _WORD // bits)
        words = _words(tokens, left, bits, packed)
        levels, distinct = _unpack(words, bits, packed, vocab_size)
        if packed < order:
            node = np.where(left >= packed, np.searchsorted(distinct, words), -1)
            for k in range(packed, order):
                at = np.flatnonzero(left > k)
                keys = node[at] * vocab_size + tokens[at + k]
                level = Level(*_runs(np.sort(keys)), np.zeros(0, dtype=np.int64), len(levels[-1].keys), vocab_size)
                if k + 1 < order:
                    node = np.full(len(tokens), -1)
                    node[at] = np.searchsorted(level.keys, keys)
                levels.append(level)
        tables = cls(levels, vocab_size)
        opening = np.zeros(len(starts), dtype=np.int64)
        for k, level in enumerate(levels):
            long = left[starts] > k
            starts, opening = starts[long], opening[long]
            opening = level.find(opening, tokens[starts + k])
            level.openings = np.unique(opening)
        return tables

    def find(self, grams: Int[np.ndarray, "n k"] | ArrayLike) -> Int[np.ndarray, " n"]:
        """Index of each n-gram in the table of its length, -1 where it does not occur; for length 0, zeros.

        Raises `ValueError` for ids outside the vocabulary and for n-grams longer than the tables.
        """
        grams = np.asarray(grams)
        if grams.ndim != 2 or grams.shape[1] > self.order:
            raise ValueError(f"n-grams of shape {grams.shape}: expected rows of 0 to {self.order} ids")
        check_ids(grams, self.vocab_size)
        node = np.zeros(len(grams), dtype=np.int64)
        for level, token in zip(self.levels, grams.T, strict=False):
            node = level.find(node, token)
        return node

    def count(self, grams: Int[np.ndarray, "n k"] | ArrayLike) -> Int[np.ndarray, " n"]:
        """How often each n-gram occurs. Raises `ValueError` as `find` does."""
        grams = np.asarray(grams)
        node = self.find(grams)
        if not grams.shape[1]:
            return np.full(len(grams), int(self.levels[0].counts.sum()))
        return np.where(node < 0, 0, np.asarray(self.levels[grams.shape[1] - 1].counts)[node]).astype(np.int64)

    def continuations(
        self, contexts: Int[np.ndarray, "n k"] | ArrayLike
    ) -> tuple[Int[np.ndarray, " n+1"], Int[np.ndarray, " nonzero"], Int[np.ndarray, " nonzero"]]:
        """What follows each context, as the rows of a CSR matrix: where rows begin, tokens, counts.

        A context that never occurs has an empty row. Raises `ValueError` as `find` does, and for contexts as long as
        the longest n-grams.
        """
        contexts = np.asarray(contexts)
        if contexts.ndim != 2 or contexts.shape[1] >= self.order:
            raise ValueError(f"contexts of shape {contexts.shape}: expected rows of 0 to {self.order - 1} ids")
        level = self.levels[contexts.shape[1]]
        begins, picked = children(level, self.find(contexts))
        return begins, level.tokens[picked], level.counts[picked]

    def save(self, folder: str | Path) -> None:
        """Write the tables as a new folder of `.npy` files and `config.json`. Raises `SondeError` for an old one."""
        folder = Path(folder)
        if folder.exists():
            raise SondeError(f"{folder} exists already: give the name of a new folder")
        beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            for k, level in enumerate(self.levels, start=1):
                for name in ("keys", "counts", "openings"):
                    with replacing(beside / f"{name}.{k}.npy") as path, path.open("wb") as file:
                        np.save(file, getattr(level, name))
            write_text(beside / "config.json", json.dumps({"vocab_size": self.vocab_size, "order": self.order}))
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def open(cls, folder: str | Path) -> "NgramTables":
        """The tables in a folder, memory-mapped: only what is asked for is read. Raises `SondeError` for damage."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            vocab_size, contexts, levels = int(config["vocab_size"]), 1, []
            for k in range(1, int(config["order"]) + 1):
                keys, counts, openings = (
                    np.load(folder / f"{name}.{k}.npy", mmap_mode="r", allow_pickle=False)
                    for name in ("keys", "counts", "openings")
                )
                levels.append(Level(keys, counts, openings, contexts, vocab_size))
                contexts = len(keys)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SondeError(f"{folder} does not hold n-gram tables: {error}") from error
        return cls(levels, vocab_size)

    def state(self) -> list[dict[str, Any]]:
        """A tree for `sonde.files.save_bundle`."""
        return [
            {name: torch.from_numpy(np.array(getattr(level, name))) for name in ("keys", "counts", "openings")}
            for level in self.levels
        ]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]], vocab_size: int) -> "NgramTables":
        """The tables that `state` was taken from."""
        levels, contexts = [], 1
        for one in state:
            keys, counts, openings = (one[name].cpu().numpy() for name in ("keys", "counts", "openings"))
            levels.append(Level(keys, counts, openings, contexts, vocab_size))
            contexts = len(keys)
        return cls(levels, vocab_size)


def children(level: Level, node: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n+1"], Int[np.ndarray, " nonzero"]]:
    """The n-grams that continue each context, one context after the other, and where each begins. None for -1."""
    known = np.maximum(node, 0)
    first = np.where(node < 0, 0, level.offsets[known])
    size = np.where(node < 0, 0, level.offsets[known + 1] - first)
    begins = np.concatenate([[0], np.cumsum(size)])
    return begins, np.arange(begins[-1]) + np.repeat(first - begins[:-1], size)


def check_ids(ids: Int[np.ndarray, "..."], vocab_size: int) -> None:
    """Raise `ValueError` naming the first id that is outside the vocabulary, and its place."""
    if not ids.size:
        return
    if ids.dtype.kind not in "iu":
        raise ValueError(f"ids of type {ids.dtype}: expected integers")
    if ids.min() < 0 or ids.max() >= vocab_size:
        place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        where = np.unravel_index(place, ids.shape)
        named = str(int(where[0])) if ids.ndim == 1 else str(tuple(map(int, where)))
        raise ValueError(f"token id {ids.flat[place]} at position {named}: expected 0 to {vocab_size - 1}")


def flatten(
    documents: Documents, vocab_size: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " documents"]]:
    """All tokens in a row, for each the number of tokens before it in its document, and the documents' lengths."""
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
    tokens = np.concatenate([a.astype(np.int64) for a in arrays]) if arrays else np.zeros(0, dtype=np.int64)
    check_ids(tokens, vocab_size)
    lengths = np.array([len(a) for a in arrays], dtype=np.int64)
    depth = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens, depth, lengths


def _words(tokens: Int[np.ndarray, " n"], left: Int[np.ndarray, " n"], bits: int, packed: int) -> Int[np.ndarray, " n"]:
    """The `packed` tokens from each place on in one integer, the first one highest; 0 stands past a document's end."""
    symbols = (tokens + 1).astype(np.uint64)
    words = symbols << (bits * (packed - 1))
    for j in range(1, packed):
        words[:-j] |= symbols[j:] << (bits * (packed - 1 - j))
    short = np.flatnonzero(left < packed)
    past = (bits * (packed - left[short])).astype(np.uint64)
    words[short] = (words[short] >> past) << past
    return words


def _runs(ordered: Int[np.ndarray, " n"], weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a sorted array and how often each occurs (or the sum of its weights)."""
    begins = np.flatnonzero(_changes(ordered))
    if weights is None:
        return ordered[begins], np.diff(np.append(begins, len(ordered)))
    return ordered[begins], np.add.reduceat(weights, begins)


def _changes(ordered: Int[np.ndarray, " n"]) -> np.ndarray:
    new = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return new


def _unpack(
    words: Int[np.ndarray, " n"], bits: int, packed: int, vocab_size: int
) -> tuple[list[Level], Int[np.ndarray, " ngrams"]]:
    """Tables of lengths 1 to `packed` from the packed words, and the distinct whole words."""
    values, counts = _runs(np.sort(words))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    mask = (1 << bits) - 1
    for _ in range(packed):
        whole = (values & mask) != 0
        found.append((values[whole], counts[whole]))
        values, counts = _runs(values >> bits, counts)
    levels: list[Level] = []
    contexts, shorter = 1, np.zeros(1, dtype=np.uint64)
    for grams, n in reversed(found):
        context = grams >> bits
        new = _changes(context)
        # every prefix stands in the table below, in the same order: its index by looking up each distinct one once
        parent = np.searchsorted(shorter, context[new])[np.cumsum(new) - 1]
        keys = parent * vocab_size + (grams & mask).astype(np.int64) - 1
        levels.append(Level(keys, n, np.zeros(0, dtype=np.int64), contexts, vocab_size))
        contexts, shorter = len(grams), grams
    return levels, found[0][0]
