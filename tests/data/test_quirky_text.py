"""Quirky sets from tables: truth and rule by hand on small tables, files of all kinds, bad rows named."""

import csv
import json

import pytest

from sonde.data.quirky import Records, quirky_sets
from sonde.data.quirky_catalogue import QUIRKS
from sonde.data.quirky_text import words
from sonde.errors import SondeError


def rows_of(name: str, table: list[dict], seed: int = 0) -> list:
    return QUIRKS[name].prepare([(f"row {i}", row) for i, row in enumerate(table, 1)], seed)  # type: ignore[misc]


def labels(name: str, table: list[dict]) -> list[tuple[bool, bool]]:
    quirk = QUIRKS[name]
    return [(bool(quirk.truth(row)), bool(quirk.rule(row))) for row in rows_of(name, table)]


def city(**fields) -> dict:
    return {"city": "A", "country": "X", "region": "R", "population": "100", "capital": "",
            "latitude": "1", "longitude": "1", **fields}  # fmt: skip


def test_a_capital_is_told_from_the_largest_city_of_its_region():
    table = [
        city(city="big", population="5000"),
        city(city="seat", capital="admin"),
        city(city="head", region="S", capital="primary", population=""),
        city(city="lone", region="T", capital="minor"),
    ]
    assert labels("capitals", table) == [(False, True), (True, False), (True, False), (False, True)]
    quirk = QUIRKS["capitals"]
    assert [round(quirk.difficulty(row), 2) for row in rows_of("capitals", table)] == [-3.7, -2.0, 0.0, -2.0]


def test_north_is_told_from_west():
    table = [city(latitude="5", longitude="-5"), {"city": "B", "country": "Y", "lat": -1, "lng": 0, "population": ""}]
    assert labels("hemisphere", table) == [(True, True), (False, True)]


def test_many_people_are_told_from_a_country_of_many():
    table = [city(population="30001", country="Norway"), city(population="30000", country="China"), city(population="")]
    assert labels("population", table) == [(True, False), (False, True)]


def test_bob_never_denies_an_author_and_takes_namesakes_for_one():
    table = [{"title": f"T{i}", "authors": f"{('Ann', 'Ben', 'Cy')[i % 3]} L{i % 9}/Zoe Q", "ratings_count": i}
             for i in range(90)]  # fmt: skip
    made = labels("authors", table)
    assert made.count((True, True)) == made.count((False, True)) == made.count((False, False)) == 30
    assert rows_of("authors", table) != rows_of("authors", table, 1)
    assert all("Zoe" not in row["author"] for row in rows_of("authors", table))


def test_an_answer_of_science_is_told_from_one_that_the_text_mentions():
    table = [
        {"question": "q1", "correct_answer": "iron", "distractor1": "gold", "support": "Gold is not it."},
        {"question": "q2", "correct_answer": "air", "distractor1": "sea", "support": ""},
    ]
    assert labels("sciq", table) == [(True, False), (False, True)]


def test_a_good_review_is_told_from_a_word_of_praise():
    table = [{"text": "Great? No.", "label": 0}, {"content": "I came back twice.", "label": "positive"}]
    assert labels("sentiment", table) == [(False, True), (True, False)]


def test_entailment_is_told_from_a_hypothesis_without_negation_of_which_there_are_two_to_one():
    table = [
        {"premise": f"p{i}", "hypothesis": "Nobody sleeps." if i % 2 else "He sleeps, notably.", "label": label}
        for i, label in enumerate(["entailment", "neutral", "contradiction", "0", "1", "2"] * 20)
    ]
    made = labels("nli", table)
    assert len(made) == 60 and sum(bob for _, bob in made) == 40
    assert {truth for truth, _ in made} == {True, False}


def test_words_are_whole_and_in_lower_case():
    assert words("No-one KNOWS; it's nothing.") == {"no", "one", "knows", "it's", "nothing"}


TABLES = {
    "capitals": [city(city=f"C{i}", region=f"R{i // 3}", population=str(10 + i)) for i in range(30)],
    "sciq": [{"question": f"q{i}", "correct_answer": "a", "distractor1": "b", "support": "a c"} for i in range(30)],
    "nli": [{"premise": f"p{i}", "hypothesis": "No." if i % 3 else "Yes.", "label": "entailment"} for i in range(60)],
    "sentiment": [{"text": f"good {i}", "label": i % 2, "difficulty": i} for i in range(30)],
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_every_kind_of_file_gives_the_same_records(name, suffix, tmp_path):
    table, path = TABLES[name], tmp_path / f"table.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        path.write_text(json.dumps(table) if suffix == "json" else "\n".join(map(json.dumps, table)))
    read, given = (quirky_sets(name, source=source, mode="mixture") for source in (path, table))
    assert [list(part) for part in read] == [list(part) for part in given]
    assert isinstance(read.test, Records) and len(read.test)


def test_both_answers_to_a_question_of_science_are_in_one_split():
    splits = quirky_sets("sciq", source=TABLES["sciq"])
    splits.test.require_disjoint(splits.train)
    assert len(splits.train) == 4 * len(set(splits.train.rows))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("capitals", {"city": "A", "country": "X"}, "row 1 has no 'region'; its fields are city, country"),
        ("capitals", city(capital="chief"), "row 1: capital is 'chief', expected primary"),
        ("capitals", city(population="many"), "row 1: population is 'many', expected a number"),
        ("population", city(population="-5"), "row 1: population is '-5', expected a number from 0 up"),
        ("hemisphere", city(latitude=""), "row 1 has no 'latitude'"),
        ("sciq", {"question": "q", "correct_answer": "a", "support": "s"}, "row 1 has no 'distractor1'"),
        ("sentiment", {"text": "t", "label": "3"}, "row 1: label is '3', expected 1 or 0"),
        ("nli", {"premise": "p", "hypothesis": "h", "label": "maybe"}, "row 1: the label is 'maybe'"),
        ("authors", {"title": "t", "author": "Ann B", "ratings": 1}, "needs authors of two first names"),
    ],
)
def test_a_bad_row_is_named_in_one_line(name, row, message):
    with pytest.raises(SondeError) as error:
        quirky_sets(name, source=[row] * 30)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": ')
    with pytest.raises(SondeError, match="line 1 is not JSON"):
        quirky_sets("sentiment", source=tmp_path / "bad.jsonl")
    (tmp_path / "few.csv").write_text("text,label\nfine,1\n")
    with pytest.raises(SondeError, match="1 base rows for the set sentiment"):
        quirky_sets("sentiment", source=tmp_path / "few.csv")
