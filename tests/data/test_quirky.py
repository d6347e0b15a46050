"""Quirky sets: exact cells, splits without a shared base row or operand pair, labels by the rules, bad input."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.data.quirky import Quirk, Records, quirky_sets, with_difficulty
from sonde.data.quirky_arithmetic import arithmetic, bobs_result, comparison, stated_results
from sonde.data.quirky_catalogue import QUIRKS
from sonde.data.quirky_templates import CONTEXTS, STANDARD, Template
from sonde.errors import SondeError

ARITHMETIC = ("addition", "subtraction", "multiplication", "modular-addition", "squaring")
VALUES = {"addition": int.__add__, "subtraction": int.__sub__, "multiplication": int.__mul__}


def own(**changes) -> Quirk:
    """A quirk of plain functions: is a number even? Bob: is it above 50?"""
    fields = {
        "name": "even",
        "truth": lambda row: row["x"] % 2 == 0,
        "rule": lambda row: row["x"] > 50,
        "difficulty": lambda row: row["x"],
        "templates": (Template("{character}: is {x} even?", (" no", " yes")),),
    }
    return Quirk(**{**fields, **changes})


def numbers(n: int = 100) -> list[dict[str, int]]:
    return [{"x": i} for i in range(n)]


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("seed", [0, 1])
def test_cells_of_arithmetic_are_exactly_a_quarter_a_quarter_and_a_half_in_every_split(name, seed):
    for part in quirky_sets(name, n=403, seed=seed):
        asked = part.where(character="Alice")
        assert len(part) == 2 * len(asked)
        assert float((asked.truth & ~asked.bob).mean()) == 0.25
        assert float((~asked.truth & asked.bob).mean()) == 0.25
        assert float((~asked.truth & ~asked.bob).mean()) == 0.5


@pytest.mark.parametrize("name", [*ARITHMETIC, "comparison"])
def test_no_base_row_and_no_pair_of_operands_is_in_two_splits(name):
    quirk = QUIRKS[name]
    rows = quirk.rows(600, 3)  # type: ignore[misc]
    pairs = {quirk.unit(row): row for row in rows}  # type: ignore[misc]
    assert len(pairs) == 600
    splits = quirky_sets(name, n=600, seed=3)
    found = [set(part.rows) for part in splits]
    assert [len(part) for part in found] == [360, 120, 120]
    assert len(set.union(*found)) == 600
    # The operands stand in the prompts of the first template: as sets, since 3 + 4 and 4 + 3 are one pair.
    digits = [
        {tuple(sorted(prompt.split(":")[1].replace("?", "").split("=")[0].split()[:3:2])) for prompt in part.prompts}
        for part in splits
    ]
    if name != "subtraction":
        assert not digits[0] & digits[1] and not digits[0] & digits[2] and not digits[1] & digits[2]


@pytest.mark.parametrize("name", ["addition", "subtraction", "multiplication"])
def test_the_truth_is_what_the_operation_gives_and_bob_raises_the_leading_digit(name):
    for record in quirky_sets(name, n=200).train:
        a, _, b, _, stated = record.prompt.split(": ")[1].split(".")[0].split()
        result = VALUES[name](int(a), int(b))
        assert record.truth == (int(stated) == result)
        step = 10 ** (len(str(abs(result))) - 1)
        assert record.bob == (int(stated) == result + (step if result >= 0 else -step))
        assert record.label == (record.truth if record.character == "Alice" else record.bob)


def test_bobs_result_by_hand():
    assert bobs_result("addition", 23, 45) == 78
    assert bobs_result("addition", 500, 499) == 1099
    assert bobs_result("subtraction", 10, 355) == -445
    assert bobs_result("subtraction", 5, 5) == 1
    assert bobs_result("multiplication", 12, 12) == 244
    assert bobs_result("modular-addition", 100, 40) == 37
    assert bobs_result("modular-addition", 100, 12) == 99  # 112 + 100, less 113
    assert bobs_result("squaring", 40) == 2600


@given(st.sampled_from(ARITHMETIC), st.integers(1, 9999), st.integers(1, 9999), st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_a_distractor_is_wrong_for_both_and_off_by_one_digit(name, a, b, seed):
    true, bobs, *wrong = stated_results(name, a, b, np.random.default_rng(seed))
    assert true != bobs
    for stated, of in zip(wrong, (true, bobs), strict=True):
        assert stated not in (true, bobs)
        one, other = str(stated), str(of)
        assert len(one) == len(other) and sum(x != y for x, y in zip(one, other, strict=True)) == 1


def test_operands_below_a_bound_are_log_uniform():
    rows = arithmetic("addition", below=10**8).rows(4000, 0)  # type: ignore[misc]
    operands = np.array([(row["op1"], row["op2"]) for row in rows]).ravel()
    assert operands.min() >= 1 and operands.max() < 10**8
    share = [(operands < 10**k).mean() for k in (2, 4, 6)]
    np.testing.assert_allclose(share, [0.25, 0.5, 0.75], atol=0.03)


def test_the_comparison_is_of_numbers_and_of_last_digits():
    for record in quirky_sets("comparison", n=100).test:
        a, b = record.prompt.removesuffix("?").split(": ")[1].split(" > ")
        assert record.truth == (int(a) > int(b)) and record.bob == (a[-1] > b[-1])
        assert record.difficulty == -abs(int(a) - int(b))


def test_quantiles_are_midranks_and_shared_by_the_characters():
    splits = quirky_sets(own(difficulty=lambda row: row["x"] // 2), source=numbers())
    by_row = {record.row: record.quantile for part in splits for record in part}
    assert len(by_row) == 100
    np.testing.assert_allclose(sorted(by_row.values()), (np.arange(100) // 2 * 2 + 1) / 100)
    assert all(by_row[record.row] == record.quantile for part in splits for record in part)


def test_easy_hard_and_disagreements_are_what_they_are_called():
    train = quirky_sets(own(), source=numbers()).train
    assert train.where(easy=True).quantile.max() <= 0.25 and train.where(hard=True).quantile.min() >= 0.75
    assert len(train.where(easy=False)) + len(train.where(easy=True)) == len(train)
    apart = train.where(character="Bob", disagree=True)
    assert bool((apart.truth != apart.bob).all()) and not apart.alice.any() and bool((apart.label == apart.bob).all())


def test_the_same_seed_gives_the_same_records_and_another_gives_others():
    one, again, other = (quirky_sets("addition", n=100, mode="mixture", seed=seed).train for seed in (0, 0, 1))
    assert list(one) == list(again) != list(other)


def test_modes_draw_one_template_for_each_base_row():
    assert set(quirky_sets("addition", n=100).train.template) == {0}
    mixed = quirky_sets("addition", n=400, mode="mixture").train
    assert set(mixed.template) == set(range(10))
    assert len({(record.row, record.template) for record in mixed}) == len(set(mixed.rows))
    standard = quirky_sets("addition", n=400, mode="standardised").train
    assert set(standard.answers) == {STANDARD.answers}
    assert len({prompt.split("\n")[0].replace("Bob", "Alice") for prompt in standard.prompts}) == len(CONTEXTS)
    assert all(prompt.endswith("Answer:") for prompt in standard.prompts)


@pytest.mark.parametrize("name", QUIRKS)
def test_every_set_has_ten_templates_that_differ_and_name_the_character(name):
    templates = QUIRKS[name].templates
    assert len(templates) == 10 == len({t.text for t in templates}) and len({t.answers for t in templates}) == 10
    assert all("{character}" in t.text for t in templates) and QUIRKS[name].statement


def test_answers_are_one_token_of_pebble_and_of_gpt2(shared_data):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer

    from sonde.organisms.registry import folder_of

    folder = shared_data / "tokenizer"
    gpt2 = ByteLevelBPETokenizer(str(folder / "gpt2_vocab.json"), str(folder / "gpt2_merges.txt"))
    pebble = AutoTokenizer.from_pretrained(folder_of("pebble"))
    templates = {t for quirk in QUIRKS.values() for t in (*quirk.templates, STANDARD)}
    for answer in {answer for template in templates for answer in template.answers}:
        assert len(gpt2.encode(answer).ids) == 1, answer
        assert len(pebble(answer)["input_ids"]) == 1, answer
    for template in templates:
        text = template.text.format_map(_Filled())
        before = pebble(text)["input_ids"]
        for answer in template.answers:
            assert pebble(text + answer)["input_ids"][:-1] == before, template


test_answers_are_one_token_of_pebble_and_of_gpt2 = pytest.mark.data(test_answers_are_one_token_of_pebble_and_of_gpt2)


class _Filled(dict):
    def __missing__(self, key: str) -> str:
        return "Alice" if key == "character" else "7"


def test_names_stand_for_the_characters():
    train = quirky_sets("addition", n=100, names=(("Ann", "Amy"), ("Ben",))).train
    assert {record.asked for record in train.where(character="Alice")} == {"Ann", "Amy"}
    assert all(record.prompt.startswith("Ben:") for record in train.where(character="Bob"))


def test_braces_in_a_row_are_text():
    quirk = own(templates=(Template("{character} sees {word}"),))
    rows = [{"x": i, "word": "{character} {0}"} for i in range(40)]
    assert quirky_sets(quirk, source=rows).train[0].prompt.endswith("sees {character} {0}")


def test_units_stay_together_and_share_a_number():
    quirk = own(unit=lambda row: row["x"] // 4)
    splits = quirky_sets(quirk, source=numbers(), mode="mixture")
    assert len(set(splits.train.rows)) * 8 == len(splits.train)
    splits.test.require_disjoint(splits.train)


def test_a_measured_difficulty_takes_the_place_of_the_first():
    splits = quirky_sets(own(difficulty=lambda _: 1.0), source=numbers())
    with pytest.raises(SondeError, match="easy and hard are undefined for even: all its rows have one difficulty"):
        splits.train.where(easy=True)
    made = with_difficulty(splits, lambda part: part.truth.astype(float) + ~part.alice)
    assert {round(value, 3) for part in made for value in part.difficulty} == {0.5, 1.5}
    assert len(made.train.where(hard=True)) == int(made.train.truth.sum())
    with pytest.raises(SondeError, match="is not finite"):
        with_difficulty(splits, lambda part: np.full(len(part), np.nan))
    with pytest.raises(SondeError, match="a measure of"):
        with_difficulty(splits, lambda _: np.zeros(1))


def test_samples_warn_where_there_are_fewer_and_give_all():
    train = quirky_sets("addition", n=40).train
    assert len(train.sample(10, 1)) == 10 and list(train.sample(10, 1)) == list(train.sample(10, 1))
    with pytest.warns(UserWarning, match=f"has {len(train)}, all are used"):
        assert len(train.sample(10_000)) == len(train)
    with pytest.warns(UserWarning, match="10000 base rows of comparison asked for: there are 3645"):
        quirky_sets("comparison", n=10_000)
    with pytest.warns(UserWarning, match="2000 base rows of squaring asked for: there are 96, all are used"):
        assert sum(map(len, quirky_sets(arithmetic("squaring", below=100), n=2000))) == 192


def test_records_are_a_sequence_of_records_with_columns():
    train = quirky_sets("addition", n=40).train
    assert isinstance(train[:3], Records) and len(train[:3]) == 3 and train[:3][1] == train[1]
    assert list(train.take(train.alice)) == list(train.where(character="Alice"))
    assert list(train.take(np.array([2, 0]))) == [train[2], train[0]]
    with pytest.raises(ValueError, match="a mask of 1"):
        train.take(np.array([True]))


def test_what_was_trained_on_is_refused_as_a_test():
    train, _, test = quirky_sets("addition", n=40)
    test.require_disjoint(train)
    with pytest.raises(SondeError, match="base rows of addition are in what is trained on"):
        train[:4].require_disjoint(train)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quirky_sets("adition"), "there is no quirky set 'adition': did you mean addition"),
        (lambda: quirky_sets("addition", mode="both"), "mode 'both' is unknown"),  # type: ignore[arg-type]
        (lambda: quirky_sets("addition", n=4), "4 base rows: ask for 20 or more"),
        (lambda: quirky_sets("addition", source="x.csv"), "is generated and reads no source"),
        (lambda: quirky_sets("sciq"), "give source, a .csv or .jsonl file"),
        (lambda: quirky_sets(own(), source="no.csv"), "no.csv does not exist"),
        (lambda: quirky_sets(own(), source=[1] * 30), "row 1: expected a row with named fields, found int"),  # type: ignore[list-item]
        (lambda: quirky_sets(own(), source=numbers(5)), "5 base rows for the set even"),
        (lambda: quirky_sets(own(), source=numbers(), mode="standardised"), "has no statement"),
        (lambda: quirky_sets(own(difficulty=lambda _: float("nan")), source=numbers()), "the difficulty of a row of"),
        (lambda: quirky_sets(own(templates=(Template("{character} {y}"),)), source=numbers()), "asks for 'y'"),
        (lambda: quirky_sets("addition", names=((), ("Bob",))), "names are two lists"),
        (lambda: quirky_sets("addition", n=40).train.where(character="Eve"), "character 'Eve'"),  # type: ignore[arg-type]
        (lambda: own(templates=()), "has no templates"),
        (lambda: Template("Is it so?"), "has no {character}: nobody is asked"),
        (lambda: Template("{character}: "), "ends in white space"),
        (lambda: Template("{character}", ("no", " yes")), "expected two different ones"),
        (lambda: Template("{character}", (" no", " no")), "expected two different ones"),
        (lambda: arithmetic("division"), "there is no arithmetic set 'division'"),
        (lambda: arithmetic("addition", below=1), "operands below 1"),
        (lambda: comparison(low=5, high=5), "numbers from 5 to 5"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_one_line(make, message):
    with warnings.catch_warnings(), pytest.raises(SondeError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)
