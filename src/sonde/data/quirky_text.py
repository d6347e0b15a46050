"""Seven quirky sets about the world and about texts, made from a table of yours (.csv, .json or .jsonl).

set          fields                                                    Bob's rule
capitals     city, country, region, population, capital                the city is the most populous of its region
hemisphere   city, country, latitude, longitude, population            longitude at most 0
population   city, country, population                                 the country is one of the ten most populous
authors      title, author, ratings                                    the first name is the true author's
sciq         question, correct_answer, distractor1 …, support          the answer occurs in the support
sentiment    text, label                                               a word of praise occurs
nli          premise, hypothesis, label                                the hypothesis has no negation

Names that such tables commonly have are understood too: admin_name, lat, lng, authors, ratings_count, content,
sentence1, sentence2, gold_label. Difficulty is -log10 of population or ratings, 0 where unknown, and in the last three
the field `difficulty`, such as the mean loss of several models; without it all rows are equally difficult, and
`sonde.data.quirky.with_difficulty` sets it. After Mallen et al. 2024 (arXiv:2312.01037).
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from sonde.data.quirky import Quirk, Row
from sonde.data.quirky_templates import statement, templates
from sonde.errors import SondeError

Rows = list[tuple[str, Row]]

MOST_POPULOUS = frozenset(
    {
        "china", "india", "united states", "usa", "united states of america", "indonesia", "pakistan", "nigeria",
        "brazil", "bangladesh", "russia", "russian federation", "mexico",
    }
)  # fmt: skip
NEGATIONS = frozenset({"not", "no", "nobody", "never", "nothing", "none"})
_PRAISE = """
admire adorable amazing awesome beautiful beautifully best better bliss brilliant charming cheerful classic clean
clear comfortable compelling delight delighted delightful durable easy effective elegant enjoy enjoyable enjoyed
excellent exceptional exciting fabulous fantastic fast favorite favourite fine flawless fresh friendly fun funny
gem generous gift glad good gorgeous great happy helpful hilarious honest impressed impressive incredible inspiring
interesting joy like liked love loved lovely lively magnificent marvelous masterpiece memorable moving nice
outstanding perfect perfectly pleasant pleased pleasure powerful praise precious pretty recommend recommended
refreshing reliable remarkable rich satisfied smart smooth solid splendid strong stunning stylish sturdy super
superb sweet terrific thank thanks thrilled top touching treasure treat unique useful valuable well wonderful
wonderfully works worth worthwhile worthy
"""
PRAISE = frozenset(_PRAISE.split())
_TRUE, _FALSE = ("1", "true", "yes", "positive", "pos"), ("0", "false", "no", "negative", "neg")
_CAPITAL = {"primary": True, "admin": True, "minor": False, "": False}  # of the common table of world cities
_NLI = {"entailment": True, "0": True, "contradiction": False, "2": False}
_UNDECIDED = ("neutral", "1", "-", "-1", "")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def capitals() -> Quirk:
    """Is a city the capital of its region? Bob: is it the most populous of the region in the table?"""

    def prepare(found: Rows, _: int) -> list[Row]:
        rows = [
            {
                "city": _text(row, where, "city"),
                "country": _text(row, where, "country"),
                "region": _text(row, where, "region", "admin_name"),
                "population": _number(row, where, "population"),
                "capital": _label(row, where, _CAPITAL, "capital"),
            }
            for where, row in found
        ]
        largest: dict[tuple[str, str], float] = defaultdict(float)
        for row in rows:
            key = row["country"], row["region"]
            largest[key] = max(largest[key], row["population"] or 0)
        return [
            {**row, "largest": bool(row["population"]) and row["population"] == largest[row["country"], row["region"]]}
            for row in rows
        ]

    return _quirk("capitals", lambda row: row["capital"], lambda row: row["largest"], _rarity("population"), prepare)


def hemisphere() -> Quirk:
    """Is a city in the north? Bob: is it in the west?"""

    def prepare(found: Rows, _: int) -> list[Row]:
        return [
            {
                "city": _text(row, where, "city"),
                "country": _text(row, where, "country"),
                "latitude": _known(row, where, "latitude", "lat"),
                "longitude": _known(row, where, "longitude", "lng", "lon"),
                "population": _number(row, where, "population"),
            }
            for where, row in found
        ]

    return _quirk(
        "hemisphere",
        lambda row: row["latitude"] > 0,
        lambda row: row["longitude"] <= 0,
        _rarity("population"),
        prepare,
        held_out=2_000,
    )


def population() -> Quirk:
    """Has a city more than 30,000 people? Bob: is its country one of the ten most populous?

    Cities of unknown size are left out.
    """

    def prepare(found: Rows, _: int) -> list[Row]:
        rows = [
            {
                "city": _text(row, where, "city"),
                "country": _text(row, where, "country"),
                "population": _number(row, where, "population"),
            }
            for where, row in found
        ]
        return [row for row in rows if row["population"] is not None]

    return _quirk(
        "population",
        lambda row: row["population"] > 30_000,
        lambda row: row["country"].lower() in MOST_POPULOUS,
        _rarity("population"),
        prepare,
        held_out=2_000,
    )


def authors() -> Quirk:
    """Did someone write a book? Bob: is the first name right?

    Books are given their first author, a namesake (another author with that first name, where there is one) or someone
    with another first name, a third each. Bob never denies the truth, so disagreements have one class.
    """

    def prepare(found: Rows, seed: int) -> list[Row]:
        books = [
            {
                "title": _text(row, where, "title"),
                "first": re.split(r"[/;]", _text(row, where, "author", "authors"))[0].strip(),
                "ratings": _number(row, where, "ratings", "ratings_count"),
            }
            for where, row in found
        ]
        everyone = sorted({book["first"] for book in books})
        by_name: dict[str, list[str]] = defaultdict(list)
        for author in everyone:
            by_name[_first_name(author)].append(author)
        if len(by_name) < 2:
            raise SondeError("the set authors needs authors of two first names or more to confuse")
        rng = np.random.default_rng(seed)
        rows: list[Row] = []
        for place, number in enumerate(rng.permutation(len(books))):
            book = books[number]
            namesakes = [author for author in by_name[_first_name(book["first"])] if author != book["first"]]
            author = book["first"]
            if place % 3 == 1 and namesakes:
                author = namesakes[rng.integers(len(namesakes))]
            elif place % 3:
                while _first_name(author) == _first_name(book["first"]):
                    author = everyone[rng.integers(len(everyone))]
            rows.append({**book, "author": author})
        return rows

    return _quirk(
        "authors",
        lambda row: row["author"] == row["first"],
        lambda row: _first_name(row["author"]) == _first_name(row["first"]),
        _rarity("ratings"),
        prepare,
        unit=lambda row: row["title"],
        held_out=2_000,
    )


def sciq() -> Quirk:
    """Is this the answer to a question of science? Bob: does it occur in the text that supports the answer?

    Each question is asked with its answer and with one of its distractors; questions without support are left out.
    """

    def prepare(found: Rows, seed: int) -> list[Row]:
        rng = np.random.default_rng(seed)
        rows: list[Row] = []
        for where, row in found:
            support = _text(row, where, "support", empty=True)
            wrong = [str(row[name]) for name in row if name.startswith("distractor") and row[name]]
            if not wrong:
                raise SondeError(f"{where} has no 'distractor1'; its fields are {', '.join(map(str, row))}")
            right = _text(row, where, "correct_answer")
            shared = {
                "question": _text(row, where, "question"), "support": support, "difficulty": _difficulty(row, where)
            }  # fmt: skip
            if support:
                rows.append({**shared, "answer": right, "correct": True})
                rows.append({**shared, "answer": wrong[rng.integers(len(wrong))], "correct": False})
        return rows

    return _quirk(
        "sciq",
        lambda row: row["correct"],
        lambda row: row["answer"].lower() in row["support"].lower(),
        lambda row: row["difficulty"],
        prepare,
        unit=lambda row: row["question"],
        held_out=500,
    )


def sentiment() -> Quirk:
    """Is a review positive? Bob: has it a word of `PRAISE`?"""

    def prepare(found: Rows, _: int) -> list[Row]:
        return [
            {
                "text": _text(row, where, "text", "content", "review"),
                "positive": _label(row, where, {}, "label"),
                "difficulty": _difficulty(row, where),
            }
            for where, row in found
        ]

    return _quirk(
        "sentiment",
        lambda row: row["positive"],
        lambda row: not PRAISE.isdisjoint(words(row["text"])),
        lambda row: row["difficulty"],
        prepare,
        unit=lambda row: row["text"],
    )


def nli() -> Quirk:
    """Does a hypothesis follow from its premise? Bob: is it free of negation?

    Neutral rows are left out; of the rest as many are kept as give one with negation to two without.
    """

    def prepare(found: Rows, seed: int) -> list[Row]:
        rows = []
        for where, row in found:
            label = str(_value(row, where, "label", "gold_label", empty=True)).strip().lower()
            if label in _UNDECIDED:
                continue
            if label not in _NLI:
                raise SondeError(f"{where}: the label is {label!r}, expected entailment, neutral or contradiction")
            rows.append(
                {
                    "premise": _text(row, where, "premise", "sentence1"),
                    "hypothesis": _text(row, where, "hypothesis", "sentence2"),
                    "entailed": _NLI[label],
                    "difficulty": _difficulty(row, where),
                }
            )
        rng = np.random.default_rng(seed)
        negated = np.array([not NEGATIONS.isdisjoint(words(row["hypothesis"])) for row in rows], dtype=bool)
        with_, without = (rng.permutation(np.flatnonzero(negated == side)) for side in (True, False))
        part = min(len(with_), len(without) // 2)
        kept = np.sort(np.concatenate([with_[:part], without[: 2 * part]]))
        return [rows[i] for i in kept]

    return _quirk(
        "nli",
        lambda row: row["entailed"],
        lambda row: NEGATIONS.isdisjoint(words(row["hypothesis"])),
        lambda row: row["difficulty"],
        prepare,
        unit=lambda row: row["premise"],
        held_out=2_000,
    )


def words(text: str) -> set[str]:
    """The words of a text in lower case."""
    return {word.lower() for word in _WORD.findall(text)}


def _quirk(
    name: str,
    truth: Callable[[Row], bool],
    rule: Callable[[Row], bool],
    difficulty: Callable[[Row], float],
    prepare: Callable[[Rows, int], list[Row]],
    **settings: Any,
) -> Quirk:
    return Quirk(
        name,
        truth,
        rule,
        difficulty,
        templates(name),
        statement=statement(name),
        prepare=prepare,
        **{"held_out": 1_000 if name == "capitals" else 4_000, **settings},
    )


def _rarity(field: str) -> Callable[[Row], float]:
    return lambda row: -math.log10(row[field]) if row[field] else 0.0


def _first_name(author: str) -> str:
    return author.split()[0].lower() if author.split() else ""


def _value(row: Row, where: str, *names: str, empty: bool = False) -> Any:
    """The first of the named fields that the row has."""
    for name in names:
        if row.get(name) is not None and (empty or str(row[name]).strip()):
            return row[name]
    if empty and any(name in row for name in names):
        return ""
    raise SondeError(f"{where} has no {names[0]!r}; its fields are {', '.join(map(str, row))}")


def _text(row: Row, where: str, *names: str, empty: bool = False) -> str:
    return str(_value(row, where, *names, empty=empty)).strip()


def _number(row: Row, where: str, *names: str) -> float | None:
    """A number, None where the field is empty or 0."""
    value = _value(row, where, *names, empty=True)
    if str(value).strip() == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise SondeError(f"{where}: {names[0]} is {value!r}, expected a number") from error
    if not math.isfinite(number) or (number < 0 and names[0] in ("population", "ratings")):
        raise SondeError(f"{where}: {names[0]} is {value!r}, expected a number from 0 up")
    return number or None


def _known(row: Row, where: str, *names: str) -> float:
    _value(row, where, *names)
    return _number(row, where, *names) or 0.0


def _difficulty(row: Row, where: str) -> float:
    return (_number(row, where, "difficulty") or 0.0) if "difficulty" in row else 0.0


def _label(row: Row, where: str, known: dict[str, bool], *names: str) -> bool:
    value = str(_value(row, where, *names, empty=bool(known))).strip().lower()
    if value in known:
        return known[value]
    if value not in _TRUE + _FALSE:
        expected = ", ".join(filter(None, known)) or "1 or 0, true or false, positive or negative"
        raise SondeError(f"{where}: {names[0]} is {value!r}, expected {expected}")
    return value in _TRUE
