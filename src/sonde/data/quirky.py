"""Questions with two right answers: the truth, for Alice, and what a rule says, for Bob.

A quirk is a truth, a rule and a measure of difficulty, functions of one row, and templates that ask about the row in a
character's context. Each base row gives one record per character, with the character's label; rows on which truth and
rule part are disagreements. The difficulty quantile of a row is (rank - 1/2) / n over the set, with mid-ranks for ties;
easy is at most 1/4, hard at least 3/4. Base rows, and rows that share an operand pair or a question, are in one split
only. After Mallen, Brumley, Kharchenko & Belrose 2024 (arXiv:2312.01037), whose pairs could be in two.
"""

import difflib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from jaxtyping import Bool, Float, Int

from sonde.data.quirky_templates import CONTEXTS, STANDARD, Template
from sonde.data.rows import read_rows
from sonde.errors import SondeError
from sonde.stats.ranks import midranks

Character = Literal["Alice", "Bob"]
Mode = Literal["single", "mixture", "standardised"]
Row = Mapping[str, Any]

CHARACTERS: tuple[Character, Character] = ("Alice", "Bob")
EASY, HARD = 0.25, 0.75
_LEAST = 20  # base rows of a set


@dataclass(frozen=True)
class Quirk:
    """What Alice and Bob answer.

    name: of the set.
    truth: whether the statement of a row is true: Alice's answer.
    rule: Bob's answer.
    difficulty: of a row; larger is harder.
    templates: ways to ask; the first is that of the mode "single".
    statement: the row as a statement, fields in braces; the mode "standardised" asks about it.
    rows: makes n rows from a seed, where the set needs no source.
    prepare: turns the rows of a source, each with the place that errors name, into the rows of the set, by a seed.
    unit: what rows share that belong together, such as a question; by default a row is its own unit.
    size: base rows unless another number is asked for; all of a source.
    held_out: most base rows in validation, and in test.
    """

    name: str
    truth: Callable[[Row], bool]
    rule: Callable[[Row], bool]
    difficulty: Callable[[Row], float]
    templates: tuple[Template, ...]
    statement: str = ""
    rows: Callable[[int, int], list[Row]] | None = None
    prepare: Callable[[list[tuple[str, Row]], int], list[Row]] | None = None
    unit: Callable[[Row], Hashable] | None = None
    size: int = 20_000
    held_out: int = 4_000

    def __post_init__(self) -> None:
        if not self.templates:
            raise SondeError(f"the quirk {self.name!r} has no templates: give one or more")


@dataclass(frozen=True, slots=True)
class Record:
    """One question to one character.

    `row` is the base row's number, which both characters share, and all rows of one unit; `quantile` is that of
    `difficulty`; `template` is the number of the template (of the context, where they are standardised); `asked` is the
    name in the prompt, the character's own unless others were given.
    """

    row: int
    character: Character
    prompt: str
    answers: tuple[str, str]
    truth: bool
    bob: bool
    label: bool
    difficulty: float
    quantile: float
    template: int
    asked: str


class Records(Sequence[Record]):
    """Records of one set, in order, and their fields as arrays."""

    def __init__(self, name: str, records: Iterable[Record]) -> None:
        self.name = name
        self._records = tuple(records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        found = self._records[index]
        return Records(self.name, found) if isinstance(found, tuple) else found

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        return f"Records({self.name!r}, n={len(self)})"

    def take(self, places: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> "Records":
        """The records at places, in their order, or those where a mask is true."""
        places = np.asarray(places)
        if places.dtype == bool:
            if len(places) != len(self):
                raise ValueError(f"a mask of {len(places)} for {len(self)} records")
            places = np.flatnonzero(places)
        return Records(self.name, (self._records[i] for i in places))

    def where(
        self,
        *,
        character: Character | None = None,
        easy: bool | None = None,
        hard: bool | None = None,
        disagree: bool | None = None,
    ) -> "Records":
        """Those of a character, that are easy or hard, on which truth and rule part; False asks for the others.

        Raises `SondeError` for another character, and for easy or hard where all rows are equally difficult.
        """
        keep = np.ones(len(self), dtype=bool)
        if character is not None:
            if character not in CHARACTERS:
                raise SondeError(f"character {character!r}: expected Alice or Bob")
            keep &= np.array([record.character == character for record in self], dtype=bool)
        if (easy is not None or hard is not None) and len(self) and bool((self.quantile == 0.5).all()):
            raise SondeError(f"easy and hard are undefined for {self.name}: all its rows have one difficulty")
        if easy is not None:
            keep &= (self.quantile <= EASY) == easy
        if hard is not None:
            keep &= (self.quantile >= HARD) == hard
        if disagree is not None:
            keep &= (self.truth != self.bob) == disagree
        return self.take(keep)

    def sample(self, n: int, seed: int = 0) -> "Records":
        """`n` of them at random, without repeats. Warns and gives all, in random order, where there are fewer."""
        if n < 1:
            raise SondeError(f"a sample of {n} records: ask for 1 or more")
        if n > len(self):
            warnings.warn(f"{n} records of {self.name} asked for: it has {len(self)}, all are used", stacklevel=2)
        return self.take(np.random.default_rng(seed).permutation(len(self))[:n])

    def require_disjoint(self, train: "Records") -> None:
        """Raise `SondeError` when one of these has its base row among those trained on."""
        shared = np.intersect1d(self.rows, train.rows)
        if len(shared):
            raise SondeError(
                f"{len(shared)} base rows of {self.name} are in what is trained on and in what is tested on, such as "
                f"row {shared[0]}: take train and test from different splits"
            )

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return [record.prompt for record in self]

    @property
    def answers(self) -> list[tuple[str, str]]:
        """The two answers (negative, positive) of each."""
        return [record.answers for record in self]

    @cached_property
    def rows(self) -> Int[np.ndarray, " n"]:
        """Numbers of the base rows: the unit to resample by."""
        return self._column("row", np.int64)

    @cached_property
    def truth(self) -> Bool[np.ndarray, " n"]:
        """Whether the statement is true."""
        return self._column("truth", bool)

    @cached_property
    def bob(self) -> Bool[np.ndarray, " n"]:
        """What Bob's rule says."""
        return self._column("bob", bool)

    @cached_property
    def label(self) -> Bool[np.ndarray, " n"]:
        """The character's answer."""
        return self._column("label", bool)

    @cached_property
    def alice(self) -> Bool[np.ndarray, " n"]:
        """Whether the character is Alice."""
        return np.array([record.character == "Alice" for record in self], dtype=bool)

    @cached_property
    def difficulty(self) -> Float[np.ndarray, " n"]:
        """Difficulties."""
        return self._column("difficulty", np.float64)

    @cached_property
    def quantile(self) -> Float[np.ndarray, " n"]:
        """Difficulty quantiles."""
        return self._column("quantile", np.float64)

    @cached_property
    def template(self) -> Int[np.ndarray, " n"]:
        """Numbers of the templates."""
        return self._column("template", np.int64)

    def _column(self, field: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(record, field) for record in self._records], dtype=dtype)


class Splits(NamedTuple):
    """Records for training, validation and test. No base row is in two of them."""

    train: Records
    validation: Records
    test: Records


def quirky_sets(
    quirk: str | Quirk,
    *,
    n: int | None = None,
    mode: Mode = "single",
    seed: int = 0,
    source: str | Path | Iterable[Row] | None = None,
    names: tuple[Sequence[str], Sequence[str]] = (("Alice",), ("Bob",)),
) -> Splits:
    """The records of a quirky set, split.

    Args:
        quirk: a name (see `sonde.data.quirky_catalogue.QUIRKS`) or a `Quirk` of your own.
        n: base rows, or units where rows share one; in arithmetic rounded down to a multiple of 4: the cells are
            exact. By default the quirk's own size, or all of the source.
        mode: "single" uses the first template, "mixture" a random one for each base row, "standardised" one fixed
            question about the statement after a random context.
        seed: of the rows, the split, the templates.
        source: a .csv, .json or .jsonl file, or rows in memory, for a set that is not generated.
        names: names in the prompts that stand for Alice and for Bob; one is drawn for each base row.

    Raises:
        SondeError: for an unknown set or mode, a source that is missing or does not fit, rows without a difficulty, and
            fewer than 20 base rows.

    Warns:
        UserWarning: where there are fewer rows than asked for; all are used.

    """
    quirk = _named(quirk)
    if mode not in ("single", "mixture", "standardised"):
        raise SondeError(f"mode {mode!r} is unknown: use single, mixture or standardised")
    if mode == "standardised" and not quirk.statement:
        raise SondeError(f"the quirk {quirk.name!r} has no statement, which the mode standardised asks about")
    if not all(names):
        raise SondeError("names are two lists, for Alice and for Bob, with one name or more in each")
    if n is not None and n < _LEAST:
        raise SondeError(f"{n} base rows: ask for {_LEAST} or more, which three splits need")
    rows, unit = _units(quirk, _rows(quirk, n, seed, source), n, seed)
    truth = np.array([bool(quirk.truth(row)) for row in rows])
    bob = np.array([bool(quirk.rule(row)) for row in rows])
    difficulty = np.array([float(quirk.difficulty(row)) for row in rows])
    if not np.isfinite(difficulty).all():
        bad = int(np.flatnonzero(~np.isfinite(difficulty))[0])
        raise SondeError(f"the difficulty of a row of {quirk.name} is {difficulty[bad]}: {dict(rows[bad])}")
    quantile = (midranks(difficulty) - 0.5) / len(rows)
    ways = len(CONTEXTS) if mode == "standardised" else len(quirk.templates)
    rng = np.random.default_rng((seed, 2))
    n_units = int(unit.max()) + 1
    chosen = np.zeros(n_units, dtype=int) if mode == "single" else rng.integers(ways, size=n_units)
    drawn = [rng.integers(len(side), size=n_units) for side in names]

    def records(members: Int[np.ndarray, " k"]) -> Iterator[Record]:
        for i in members:
            for side, character in enumerate(CHARACTERS):
                asked = names[side][int(drawn[side][unit[i]])]
                way = int(chosen[unit[i]])
                prompt, answers = _ask(quirk, rows[i], asked, way, mode)
                yield Record(
                    row=int(unit[i]),
                    character=character,
                    prompt=prompt,
                    answers=answers,
                    truth=bool(truth[i]),
                    bob=bool(bob[i]),
                    label=bool((truth, bob)[side][i]),
                    difficulty=float(difficulty[i]),
                    quantile=float(quantile[i]),
                    template=way,
                    asked=asked,
                )

    parts = _split(unit, 2 * truth + bob, min(quirk.held_out, n_units // 5), seed)
    return Splits(*(Records(quirk.name, records(members)) for members in parts))


def with_difficulty(splits: Splits, measure: Callable[[Records], Float[np.ndarray, " n"]]) -> Splits:
    """The splits with another difficulty: the mean, over the records of a statement, of what `measure` gives each.

    `measure` could be the loss of the true answer, averaged over several models. Quantiles are over all splits.
    Raises `SondeError` for a measure that is not finite or of another length.
    """
    records = [record for part in splits for record in part]
    found = [np.asarray(measure(part), dtype=np.float64) for part in splits]
    if [len(values) for values in found] != [len(part) for part in splits]:
        raise SondeError(f"a measure of {[len(v) for v in found]} for records of {[len(part) for part in splits]}")
    values = np.concatenate(found)
    if not np.isfinite(values).all():
        raise SondeError(f"the difficulty of {int((~np.isfinite(values)).sum())} records is not finite")
    # The two characters are asked about the same statement one after the other.
    statements, place = np.unique(np.arange(len(records)) // 2, return_inverse=True)
    difficulty = np.bincount(place, values) / 2
    quantile = (midranks(difficulty) - 0.5) / len(statements)
    changed = iter(
        replace(record, difficulty=float(difficulty[i]), quantile=float(quantile[i]))
        for record, i in zip(records, place, strict=True)
    )
    return Splits(*(Records(part.name, [next(changed) for _ in part]) for part in splits))


def _named(quirk: str | Quirk) -> Quirk:
    if isinstance(quirk, Quirk):
        return quirk
    from sonde.data.quirky_catalogue import QUIRKS

    if quirk not in QUIRKS:
        close = difflib.get_close_matches(quirk, QUIRKS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(QUIRKS)}"
        raise SondeError(f"there is no quirky set {quirk!r}: {hint}")
    return QUIRKS[quirk]


def _rows(quirk: Quirk, n: int | None, seed: int, source: str | Path | Iterable[Row] | None) -> list[Row]:
    """All rows, generated or read."""
    if source is None:
        if quirk.rows is None:
            raise SondeError(f"the set {quirk.name!r} is made from rows of yours: give source, a .csv or .jsonl file")
        return quirk.rows(n or quirk.size, seed)
    if quirk.rows is not None:
        raise SondeError(f"the set {quirk.name!r} is generated and reads no source")
    if isinstance(source, str | Path):
        found = list(read_rows(source, of=f"rows for the set {quirk.name}"))
    else:
        found = [(f"row {number}", row) for number, row in enumerate(source, 1)]
    for where, row in found:
        if not isinstance(row, Mapping):
            raise SondeError(f"{where}: expected a row with named fields, found {type(row).__name__}")
    return quirk.prepare(found, seed) if quirk.prepare else [row for _, row in found]


def _units(quirk: Quirk, rows: list[Row], n: int | None, seed: int) -> tuple[list[Row], Int[np.ndarray, " rows"]]:
    """Rows of at most `n` units, chosen at random, and the number of each row's unit."""
    number: dict[Hashable, int] = {}
    unit = np.array(
        [number.setdefault(quirk.unit(row) if quirk.unit else place, len(number)) for place, row in enumerate(rows)],
        dtype=np.int64,
    )
    if len(number) < _LEAST:
        raise SondeError(f"{len(number)} base rows for the set {quirk.name}: three splits need {_LEAST} or more")
    if n is not None and n - len(number) >= 4:  # arithmetic rounds down to whole groups of cells
        warnings.warn(f"{n} base rows of {quirk.name} asked for: there are {len(number)}, all are used", stacklevel=4)
    if n is None or n >= len(number):
        return rows, unit
    place = np.full(len(number), -1)
    place[np.random.default_rng((seed, 0)).permutation(len(number))[:n]] = np.arange(n)
    kept = np.flatnonzero(place[unit] >= 0)
    return [rows[i] for i in kept], place[unit[kept]]


def _ask(quirk: Quirk, row: Row, asked: str, way: int, mode: Mode) -> tuple[str, tuple[str, str]]:
    """The prompt and its answers. Braces in the values of a row are text."""
    template = STANDARD if mode == "standardised" else quirk.templates[way]
    fields = {**row, "character": asked}
    try:
        if mode == "standardised":
            fields["statement"] = quirk.statement.format_map(fields)
            fields["context"] = CONTEXTS[way].format_map(fields)
        return template.text.format_map(fields), template.answers
    except KeyError as error:
        raise SondeError(
            f"a template of {quirk.name} asks for {error.args[0]!r}, which a row does not have; it has {', '.join(row)}"
        ) from error


def _split(
    unit: Int[np.ndarray, " rows"], cell: Int[np.ndarray, " rows"], held_out: int, seed: int
) -> list[Int[np.ndarray, " k"]]:
    """Rows of train, validation and test by unit: the kinds of unit, by truth and rule, in equal shares."""
    held_out -= held_out % 4
    held_out = max(held_out, 4)
    kind = np.zeros(int(unit.max()) + 1, dtype=np.int64)
    np.add.at(kind, unit, 1 << (16 * cell))  # how many rows of each cell
    rng = np.random.default_rng((seed, 1))
    # A place in [0, 1) within its kind: cut at equal places, every kind gives each split its share.
    place = np.empty(len(kind))
    for value in np.unique(kind):
        members = rng.permutation(np.flatnonzero(kind == value))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(place, kind="stable")
    part = np.zeros(len(kind), dtype=np.int64)
    part[order[:held_out]] = 1
    part[order[held_out : 2 * held_out]] = 2
    return [np.flatnonzero(part[unit] == i)[rng.permutation(int((part[unit] == i).sum()))] for i in range(3)]
