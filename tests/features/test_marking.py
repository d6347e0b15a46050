"""A mark is never ambiguous, whatever the text holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.features.marking import marked, plain, spans, strengths


@given(st.lists(st.tuples(st.text("ab<>\\ ", max_size=4), st.booleans()), max_size=8))
def test_what_is_marked_can_be_read_back(pairs):
    pairs = [(token or "x", mark) for token, mark in pairs]
    tokens, marks = [token for token, _ in pairs], [mark for _, mark in pairs]
    groups, inside = [], False
    for token, mark in pairs:
        if mark and inside:
            groups[-1] += token
        elif mark:
            groups.append(token)
        inside = mark
    assert spans(marked(tokens, marks)) == groups


def test_adjacent_tokens_share_a_pair_and_lines_become_one():
    assert marked([" a", " b", "\n", " c"], [True, True, False, True]) == "<< a b>>↵<< c>>"
    assert plain(["a\r", "\nb"]) == "a↵b"
    assert marked(["x"], [False]) == "x"


@pytest.mark.parametrize("tokens", [["1 <", "< 2"], ["x", ">>"], ["a \\", "b"]])
def test_literal_marks_are_escaped(tokens):
    assert spans(marked(tokens, [False, True])) == [tokens[1]]
    assert spans(marked(tokens, [True, False])) == [tokens[0]]
    assert spans(marked(tokens, [False, False])) == []


def test_code_that_cannot_be_mistaken_is_left_as_it_is():
    assert marked(["a", " ->", " b"], [True, False, False]) == "<<a>> -> b"


def test_strengths_are_whole_numbers_that_rounding_does_not_raise():
    assert strengths([0.0, 0.3, 0.30004, 0.31, 1.0, 2.0, -1.0], 1.0) == [0, 3, 3, 4, 10, 10, 0]
    assert strengths([0.0], 0.0) == [0]
