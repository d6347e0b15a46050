"""Multiple-choice questions: every form of file, prompts, and the two ways to tamper with them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.data.multiple_choice import CUE, RULE, Question, injected, prompts, questions
from sonde.errors import SondeError

ROWS = [
    {"question": "Which is a fruit?", "choices": ["stone", "plum", "rope"], "answer": "plum"},
    {"question": "Which is a fruit?", "choices": ["stone", "plum", "rope"], "answer": 1},
    {"question": "Which is a fruit?", "choices": ["stone", "plum", "rope"], "answer": "B"},
    {"question": "Which is a fruit?", "choices": {"text": ["stone", "plum"], "label": ["1", "2"]}, "answerKey": "2"},
    {"question": "Which is a fruit?", "A": "stone", "B": "plum", "answer": "B"},
    {"question": "Is a plum a fruit?", "passage": "A plum grows on a tree.", "answer": True},
]
ASKED = [Question(f"Is {number} even?", ("no", "yes"), 1 - number % 2) for number in range(20)]


def test_every_form_of_a_row_gives_its_answer():
    found = questions(ROWS)
    assert [question.choices[question.answer] for question in found] == ["plum"] * 5 + ["yes"]
    assert found[5].text == "A plum grows on a tree.\nIs a plum a fruit?"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_file_gives_what_its_rows_give(suffix, tmp_path):
    rows = [{"question": f'Is "{n}", even?', "A": "no", "B": "yes", "answer": "AB"[1 - n % 2]} for n in range(3)]
    text = {
        "json": json.dumps(rows),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": "question,A,B,answer\n" + "\n".join(f'"Is ""{n}"", even?",no,yes,{"AB"[1 - n % 2]}' for n in range(3)),
    }[suffix]
    path = tmp_path / f"questions.{suffix}"
    path.write_text(text)
    assert questions(path) == questions(rows)


def test_a_choice_is_found_by_its_text_before_its_letter():
    (found,) = questions([{"question": "Which letter comes first?", "choices": ["B", "A"], "answer": "A"}])
    assert found.answer == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "row 1: expected a question with named fields"),
        ({"q": "?"}, "row 1 has no text under `question`; its fields are q"),
        ({"question": "?"}, "row 1 has no `answer`"),
        ({"question": "?", "answer": "x"}, "row 1 has no `choices`"),
        ({"question": "?", "answer": "x", "choices": ["a", "b"]}, "row 1: the answer 'x' is none of the choices a, b"),
        ({"question": "?", "answer": 2, "choices": ["a", "b"]}, "row 1: .* there is no choice 2"),
        ({"question": "?", "answer": 0, "choices": ["a"]}, "row 1: .* has 1 choices: expected two or more"),
        ({"question": "?", "answer": 0, "choices": ["a", "a "]}, "row 1: .* choices that are empty or alike"),
        ({"question": "?", "answer": 0, "choices": {"text": ["a", "b"], "label": ["1"]}}, "as many labels"),
        ({"question": " ", "answer": 0, "choices": ["a", "b"]}, "row 1: a question has no text"),
    ],
    ids=str,
)
def test_a_row_that_is_no_question_is_named(row, message):
    with pytest.raises(SondeError, match=message):
        questions([row])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "does not exist"),
        ("a.txt", "x", "expected one that ends in .json, .jsonl, .csv"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "holds dict: expected a list"),
        ("a.json", "[]", "there is no question in it"),
        ("a.jsonl", '{"question": "?", "choices": ["a", "b"], "answer": 0}\n[', "line 2 is not JSON"),
        ("a.csv", "", "there is no question in it"),
        ("a.csv", "question,answer\n1,2,3\n4", "is not a CSV with a header"),
    ],
)
def test_a_file_without_questions_is_refused(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SondeError, match=message):
        questions(tmp_path / name)


def test_a_prompt_ends_where_its_answer_should_come():
    for style, wanted in (("text", "yes"), ("letters", "B")):
        (prompt,) = prompts([Question("Is 2 even?", ("no", "yes"), 1)], style=style)
        assert prompt.text.endswith(CUE)
        assert prompt.choices[prompt.answer] == f" {wanted}"
    assert "A. no\nB. yes\nAnswer:" in prompt.text


@settings(max_examples=25, deadline=None)
@given(shots=st.integers(0, 5), seed=st.integers(0, 1000), style=st.sampled_from(["text", "letters"]))
def test_a_question_is_never_among_its_own_examples_and_examples_do_not_repeat(shots, seed, style):
    for question, prompt in zip(ASKED, prompts(ASKED, shots=shots, seed=seed, style=style), strict=True):
        shown = prompt.text.split("\n\n")
        assert len(set(shown)) == shots + 1
        assert [question.text in one for one in shown] == [False] * shots + [True]


def test_wrong_labels_change_every_label_of_the_examples_and_nothing_else():
    right, wrong = (prompts(ASKED, shots=4, wrong_labels=flag, seed=3) for flag in (False, True))
    for a, b in zip(right, wrong, strict=True):
        assert (a.answer, a.choices) == (b.answer, b.choices)
        for one, other in zip(a.text.split("\n"), b.text.split("\n"), strict=True):
            changed = one.startswith(f"{CUE} ")
            assert (one != other) == changed


def test_an_order_stands_before_the_last_answer_and_names_a_wrong_choice():
    asked = [Question(f"Which is {n}?", tuple(f"c{m}" for m in range(4)), n) for n in range(4)]
    plain = prompts(asked, shots=2)
    for a, b in zip(plain, injected(plain, seed=1), strict=True):
        before, last = b.text.rsplit(CUE, 1)
        assert last == "" and before.count(RULE) == 2
        assert a.text == before[: before.index(RULE)] + CUE
        named = before.split('"')[1]
        assert f" {named}" in a.choices and f" {named}" != a.choices[a.answer]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 20}, "20 shots asked for: there are 19 questions"),
        ({"shots": 2, "demonstrations": ASKED[:1]}, "2 shots asked for: there are 1 questions"),
        ({"shots": -1}, "-1 shots"),
        ({"wrong_labels": True}, "wrong labels need demonstrations"),
        ({"style": "roman"}, "style 'roman' is unknown"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(SondeError, match=message):
        prompts(ASKED, **options)


def test_letters_end_at_z_and_orders_need_a_place():
    many = Question("Which?", tuple(map(str, range(27))), 0)
    with pytest.raises(SondeError, match="27 choices are more than there are letters"):
        prompts([many], style="letters")
    (prompt,) = prompts([many])
    with pytest.raises(SondeError, match="which prompt 0 does not have"):
        injected([type(prompt)("Which?", prompt.choices, 0)])
