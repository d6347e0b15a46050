"""Statements are read as they are labelled, bases are never split, and the made-up ones are what they say."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.data.statements import comparisons, in_words, read_statements, split_by_base
from sonde.errors import SondeError

ROWS = [{"statement": f"Statement {i}.", "label": i % 2, "city": f"c{i // 2}"} for i in range(40)]


def test_labels_and_bases_are_read_from_csv_and_jsonl(tmp_path):
    table = tmp_path / "facts.csv"
    table.write_text("statement,label,city\n" + "".join(f"{r['statement']},{r['label']},{r['city']}\n" for r in ROWS))
    lines = tmp_path / "facts.jsonl"
    lines.write_text("\n".join(json.dumps({**r, "label": bool(r["label"])}) for r in ROWS))
    for path in (table, lines):
        found = read_statements(path, base="city")
        assert found.name == "facts" and len(found) == 40
        assert found.labels.tolist() == [bool(r["label"]) for r in ROWS]
        assert found.bases == tuple(r["city"] for r in ROWS)


@pytest.mark.data
def test_the_files_of_the_literature_are_read(shared_data):
    found = read_statements(shared_data / "truth/cities.csv", base="city")
    assert len(found) == 1496 and found.labels.sum() == 748


def test_a_statement_that_occurs_twice_is_read_once_and_not_with_two_labels():
    assert len(read_statements([*ROWS, ROWS[3]])) == 40
    with pytest.raises(SondeError, match=r"row 41: 'Statement 3\.' is called true in one row and false in another"):
        read_statements([*ROWS, {"statement": "Statement 3.", "label": 0}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"statement": "It is.", "label": "maybe"}, "row 41: the label is 'maybe', expected 1 or 0"),
        ({"text": "It is.", "label": 1}, "row 41 has no 'statement'; its fields are text, label"),
        ({"statement": "", "label": 1}, "statement 41 is empty"),
        ("It is.", "row 41: expected a row with the fields"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(SondeError, match=message):
        read_statements([*ROWS, row])


def test_one_class_is_refused():
    with pytest.raises(SondeError, match="has 20 true and 0 false statements"):
        read_statements(ROWS[1::2])


def test_comparisons_are_true_where_they_say_so_and_the_two_relations_disagree_everywhere():
    larger, smaller = (comparisons(relation, n=101, seed=3) for relation in ("larger", "smaller"))
    numbers = {in_words(n): n for n in range(20, 100)}
    for text, label in zip(larger.texts, larger.labels, strict=True):
        first, second = text.lower().removesuffix(".").split(" is larger than ")
        assert (numbers[first] > numbers[second]) == label
    assert larger.bases == smaller.bases
    assert not (larger.labels == smaller.labels).any()
    assert larger.labels.sum() in (50, 51)


@given(st.integers(0, 100), st.integers(20, 200))
def test_a_base_falls_into_the_same_part_in_every_set(seed, n):
    sets = [comparisons("larger", n=max(n, 60), seed=0), comparisons("smaller", n=60, seed=0)]
    found = split_by_base(sets, seed=seed)
    for part in range(3):
        here = {sets[0].bases[i] for i in found[0][part]}
        there = {sets[1].bases[i] for other in range(3) if other != part for i in found[1][other]}
        assert not here & there
    for one, rows in zip(sets, found, strict=True):
        assert sorted(np.concatenate(rows)) == list(range(len(one)))


def test_a_set_that_cannot_be_split_is_named():
    found = read_statements([{**row, "city": f"c{row['label']}"} for row in ROWS], base="city")
    with pytest.raises(SondeError, match="the given statements is too small, or its bases too few"):
        split_by_base([found])


def test_other_relations_and_too_many_pairs_are_refused():
    with pytest.raises(SondeError, match="relation 'equal'"):
        comparisons("equal")
    with pytest.raises(SondeError, match="4000 comparisons: ask for 16 to 3081"):
        comparisons(n=4000)
