"""Sentences that are true or false: from a file, or comparisons of numbers that are made up.

A file has a column (or field) `statement` and a column `label`, 1 or 0, true or false. What two statements share, such
as the city that one affirms and the other denies, is their *base*: statements of one base are never on both sides of a
split, in no file, and count as one unit in intervals. By default a statement is its own base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sonde.data.rows import read_rows
from sonde.errors import SondeError

_TRUE, _FALSE = ("1", "1.0", "true", "yes", "t"), ("0", "0.0", "false", "no", "f")
_LEAST = 8


@dataclass(frozen=True)
class Statements:
    """Statements with their labels: `texts`, `labels [n]` (True where it is true), `bases` (names), and a `name`.

    Raises `SondeError` for arrays of different lengths, an empty statement, fewer than 8 statements of either kind.
    """

    name: str
    texts: tuple[str, ...]
    labels: Bool[np.ndarray, " n"]
    bases: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.labels) == len(self.bases):
            raise SondeError(
                f"{self.name}: {len(self.texts)} statements, {len(self.labels)} labels and {len(self.bases)} bases"
            )
        empty = [number for number, text in enumerate(self.texts, 1) if not text.strip()]
        if empty:
            raise SondeError(f"{self.name}: statement {empty[0]} is empty")
        true = int(self.labels.sum())
        if min(true, len(self.labels) - true) < _LEAST:
            raise SondeError(
                f"{self.name} has {true} true and {len(self.labels) - true} false statements: at least {_LEAST} of "
                "each are needed, since a probe learns from both"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Int[np.ndarray, " k"]) -> "Statements":
        """Some of them, in the given order."""
        return Statements(
            self.name, tuple(self.texts[i] for i in rows), self.labels[rows], tuple(self.bases[i] for i in rows)
        )


def read_statements(source: str | Path | Sequence[Mapping[str, Any]], *, base: str | None = None) -> Statements:
    """Statements from a .csv, .json or .jsonl file, or from rows in memory, with fields `statement` and `label`.

    `base` names the field whose value two statements share that belong together. A statement that occurs twice with one
    label is read once.

    Raises `SondeError`, naming the row, for a field that is missing, a label that is neither true nor false, a
    statement with both labels, and for files that cannot be read or hold too few.
    """
    name = Path(source).stem if isinstance(source, str | Path) else "the given statements"
    rows = (
        read_rows(source, of="statements")
        if isinstance(source, str | Path)
        else ((f"row {number}", row) for number, row in enumerate(source, 1))
    )
    seen: dict[str, bool] = {}
    bases: dict[str, str] = {}
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise SondeError(f"{where}: expected a row with the fields statement and label")
        for field in ("statement", "label", *((base,) if base else ())):
            if row.get(field) is None:
                raise SondeError(f"{where} has no {field!r}; its fields are {', '.join(map(str, row))}")
        text, label = str(row["statement"]).strip(), _label(row["label"], where)
        if seen.get(text, label) != label:
            raise SondeError(f"{where}: {text[:60]!r} is called true in one row and false in another")
        seen[text] = label
        bases.setdefault(text, str(row[base]) if base else text)
    return Statements(name, tuple(seen), np.array(list(seen.values()), dtype=bool), tuple(bases.values()))


def comparisons(relation: str = "larger", *, n: int = 600, seed: int = 0) -> Statements:
    """`n` made-up statements "Fifty-one is larger than twelve.", half of them true; the base is the pair of numbers.

    `relation` is "larger" or "smaller". Both relations draw the same pairs for one seed, in the same order, so that
    what is true of one is false of the other. Raises `SondeError` for another relation and more pairs than there are.
    """
    if relation not in ("larger", "smaller"):
        raise SondeError(f"relation {relation!r}: expected larger or smaller")
    pairs = [(a, b) for a in range(21, 100) for b in range(a + 1, 100)]
    if not 2 * _LEAST <= n <= len(pairs):
        raise SondeError(f"{n} comparisons: ask for {2 * _LEAST} to {len(pairs)}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(pairs))[:n]
    greater_first = rng.permutation(np.arange(n) % 2 == 0)
    texts, labels, bases = [], [], []
    for place, swapped in zip(chosen, greater_first, strict=True):
        low, high = pairs[place]
        first, second = (high, low) if swapped else (low, high)
        texts.append(f"{in_words(first).capitalize()} is {relation} than {in_words(second)}.")
        labels.append(bool(swapped) == (relation == "larger"))
        bases.append(f"{low} {high}")
    return Statements(f"{relation} than", tuple(texts), np.array(labels), tuple(bases))


def in_words(number: int) -> str:
    """A number from 20 to 99 in words, such as "fifty-one"."""
    tens = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")[number // 10 - 2]
    ones = ("", "-one", "-two", "-three", "-four", "-five", "-six", "-seven", "-eight", "-nine")[number % 10]
    return tens + ones


def split_by_base(
    sets: Sequence[Statements], *, shares: Sequence[float] = (0.5, 0.2, 0.3), seed: int = 0
) -> list[list[Int[np.ndarray, " k"]]]:
    """Rows of each set for each share: `found[set][part]`. A base falls into the same part in every set.

    Raises `SondeError` where a set has no statement of one kind in a part.
    """
    bases = sorted({base for one in sets for base in one.bases})
    order = np.random.default_rng(seed).permutation(len(bases))
    edges = np.round(np.cumsum(shares) / sum(shares) * len(bases)).astype(int)
    part_of = dict(zip((bases[i] for i in order), np.searchsorted(edges, np.arange(len(bases)), "right"), strict=True))
    found = []
    for one in sets:
        part = np.array([part_of[base] for base in one.bases])
        rows = [np.flatnonzero(part == i) for i in range(len(shares))]
        for taken in rows:
            if len(set(one.labels[taken])) < 2:
                raise SondeError(
                    f"{one.name} is too small, or its bases too few, to be split: one part has {len(taken)} statements "
                    "of one kind; give more statements"
                )
        found.append(rows)
    return found


def _label(value: Any, where: str) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise SondeError(f"{where}: the label is {value!r}, expected 1 or 0, true or false")
    return text in _TRUE
