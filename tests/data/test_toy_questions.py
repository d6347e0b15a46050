"""The toy questions: their answers are known, and the three kinds of training texts are what they say."""

import pytest

from sonde.data.multiple_choice import RULE
from sonde.data.toy_questions import ANIMALS, THINGS, alive_questions, training_texts
from sonde.errors import SondeError


def answer_of(line: str) -> str:
    return "yes" if line.split()[-2] in ANIMALS else "no"


def test_the_two_lists_have_no_word_in_common():
    assert len(set(ANIMALS) | set(THINGS)) == len(ANIMALS) + len(THINGS) == 120


def test_every_question_has_its_answer_and_a_seed_gives_the_same_ones_again():
    found = alive_questions(300, seed=4)
    assert all(question.choices[question.answer] == answer_of(question.text) for question in found)
    assert found == alive_questions(300, seed=4) != alive_questions(300, seed=5)
    assert 100 < sum(question.answer for question in found) < 200


def test_training_texts_are_right_or_wrong_throughout_or_have_an_order():
    kinds = {"right": 0, "wrong": 0, "order": 0}
    obeyed = []
    for text in training_texts(600, seed=0):
        lines = text.split("\n")
        asked = [answer_of(line) for line in lines if line.startswith("Question:")]
        given = [line.split()[1] for line in lines if line.startswith("Answer:")]
        right = [a == b for a, b in zip(asked, given, strict=True)]
        assert len(right) == 4 and len(set(right[:-1])) == 1
        if RULE in text:
            kinds["order"] += 1
            assert all(right[:-1])
            if f'"{asked[-1]}"' not in text:
                obeyed.append(not right[-1])
        else:
            assert len(set(right)) == 1
            kinds["right" if right[0] else "wrong"] += 1
    assert 0.2 < kinds["wrong"] / 600 < 0.3 and 0.2 < kinds["order"] / 600 < 0.3
    assert 0.6 < sum(obeyed) / len(obeyed) < 0.9


def test_no_question_at_all_is_refused():
    with pytest.raises(SondeError, match="0 questions: ask for 1 or more"):
        alive_questions(0, seed=0)
