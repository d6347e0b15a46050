import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sonde
from sonde.data.contrast_pairs import (
    ContrastItem,
    balanced,
    built_in,
    letter_balance,
    read_contrast,
    relabel,
    render,
    rendered_text,
    swap_letters,
)
from sonde.errors import SondeError

ITEM = ContrastItem("Will you stop?\n\nChoices:\n (A) Yes, of course.\n (B)No,\nnever.", "A", "B")
RECORD = {
    "question": ITEM.question,
    "answer_matching_behavior": "(A)",
    "answer_not_matching_behavior": " (B) ",
}
BEHAVIOURS = (
    *("coordinate-other-ais", "corrigible-neutral-HHH", "hallucination", "myopic-reward"),
    *("refusal", "survival-instinct", "sycophancy"),
)


@pytest.fixture(scope="module")
def pebble():
    return sonde.load("organism:pebble", check=False).tokenizer


def words(*vocabulary, chat=None):
    """A tokenizer that knows these words, split at white space and punctuation."""
    table = {word: i for i, word in enumerate(("<unk>", *vocabulary))}
    plain = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    made.chat_template = chat
    return made


def test_items_are_read_from_a_file_and_from_memory(tmp_path):
    (tmp_path / "items.json").write_text(json.dumps([RECORD]))
    assert read_contrast(tmp_path / "items.json") == read_contrast([RECORD]) == [ITEM]


def test_swapped_letters_exchange_the_texts():
    swapped = swap_letters(ITEM)
    assert swapped.question == "Will you stop?\n\nChoices:\n(A) No,\nnever.\n(B) Yes, of course."
    assert (swapped.matching, swapped.other) == ("B", "A")
    assert swap_letters(swapped).question.split() == ITEM.question.replace("(B)No", "(B) No").split()


def test_other_labels_take_the_place_of_letters_in_order():
    assert relabel(ITEM).question == "Will you stop?\n\nChoices:\n(1) Yes, of course.\n(2) No,\nnever."
    assert (relabel(ITEM).matching, relabel(ITEM).other) == ("1", "2")
    with pytest.raises(SondeError, match="2 choices need as many labels, not 1"):
        relabel(ITEM, ("1",))


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 5))
def test_balanced_items_have_each_letter_half_of_the_time(first, seed):
    items = [ITEM if early else swap_letters(ITEM) for early in first]
    made = balanced(items, seed=seed)
    assert abs(2 * sum(item.matching == "A" for item in made) - len(made)) <= 1
    meant = {"A": "Yes", "B": "No,"}
    for item in made:  # whatever the letter, the behaviour is the same answer
        assert f"({item.matching}) Yes" in item.question or meant[item.matching] in item.question


def test_letters_are_counted_and_one_letter_alone_is_refused():
    share = letter_balance([ITEM, swap_letters(ITEM), ITEM, ITEM])
    assert (share.estimate, share.n) == (0.75, 4)
    with pytest.raises(SondeError, match="all 2 answers that show the behaviour have the earlier letter"):
        letter_balance([ITEM, ITEM])
    with pytest.raises(SondeError, match="later letter"):
        letter_balance([swap_letters(ITEM)])
    with pytest.raises(SondeError, match="there are no items"):
        letter_balance([])


def test_the_letter_is_the_token_after_the_bracket(pebble):
    found = render(ITEM, pebble)
    text = pebble.decode(found.prompt)
    assert text == "Input: " + ITEM.question + "\nResponse: ("
    assert [pebble.decode([i]) for i in (found.match, found.other)] == ["A", "B"]
    assert found.positive == [*found.prompt, found.match] and found.negative[-1] == found.other


def test_a_chat_template_is_used_where_there_is_one():
    each = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    template = each + "{% if add_generation_prompt %}<bot> {% endif %}"
    tokenizer = words("A", "B", "(", ")", "<", ">", "bot", "user", "system", chat=template)
    assert rendered_text(ITEM, tokenizer) == f"<user> {ITEM.question} <bot> ("
    assert rendered_text(ITEM, tokenizer, system="Be kind.").startswith("<system> Be kind. <user> ")
    assert rendered_text(ITEM, tokenizer, chat=False).startswith("Input: ")
    found = render(ITEM, tokenizer)
    assert tokenizer.convert_ids_to_tokens([*found.prompt[-3:], found.match, found.other])[-3:] == ["(", "A", "B"]


def test_letters_that_are_no_token_of_their_own_are_shown_with_their_split():
    item = ContrastItem("(A) or (B)", "A", "B")
    with pytest.raises(SondeError, match=r"the letter B is not a single token .* '.*\(B' is split as \[.*'<unk>'\]"):
        render(item, words("A", "(", ")"))


def test_a_tokenizer_that_joins_bracket_and_letter_is_given_the_letter_alone():
    joined = Tokenizer(models.BPE({c: i for i, c in enumerate([*"AB()IRnput:esor\u0120\u010a", "(A"])}, [("(", "A")]))
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joined.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined)
    assert tokenizer.convert_ids_to_tokens(tokenizer("(A(B")["input_ids"]) == ["(A", "(", "B"]
    found = render(ContrastItem("(A) or (B)", "A", "B"), tokenizer)
    assert tokenizer.convert_ids_to_tokens([*found.prompt[-1:], found.match, found.other]) == ["(", "A", "B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "  "}, "item 0: the question is empty"),
        ({"question": None}, "item 0: it has no 'question'"),
        ({"answer_matching_behavior": None}, "item 0: it has no 'answer_matching_behavior'"),
        ({"answer_matching_behavior": "Yes"}, r"is 'Yes': expected a letter in brackets, such as '\(A\)'"),
        ({"answer_matching_behavior": "(C)"}, r"does not list the choice \(C\): Will you stop"),
        ({"answer_matching_behavior": "(B)"}, "both answers have the letter B"),
    ],
    ids=str,
)
def test_a_bad_item_is_named(change, message):
    with pytest.raises(SondeError, match=message):
        read_contrast([{key: value for key, value in {**RECORD, **change}.items() if value is not None}])


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(SondeError, match="does not exist: give a JSON file"):
        read_contrast(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SondeError, match="cannot be read as JSON"):
        read_contrast(tmp_path / "bad.json")
    for content in ("{}", "[]", '"text"'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(SondeError, match="is not a list of items with the keys question"):
            read_contrast(tmp_path / "other.json")
    with pytest.raises(SondeError, match=r"item 0: expected an object .* not int"):
        read_contrast([3])


def test_choices_that_are_not_lines_cannot_be_swapped():
    with pytest.raises(SondeError, match="not lines that begin with their labels: Is it"):
        swap_letters(ContrastItem("Is it (A) or (B)?", "A", "B"))


def test_chat_without_a_template_is_refused(pebble):
    with pytest.raises(SondeError, match="has no chat template"):
        render(ITEM, pebble, chat=True)
    with pytest.raises(SondeError, match="a system message needs a chat template"):
        render(ITEM, pebble, system="Be kind.")


def test_the_built_in_items_are_balanced_and_held_out_by_situation():
    fit, held = built_in(100)
    assert (len(fit), len(held)) == (100, 50)
    assert letter_balance(fit).estimate == letter_balance(held).estimate == 0.5

    def situations(items):
        return {item.question.split(".")[0].split(" has ")[-1].split(" is ")[-1] for item in items}

    assert not situations(fit) & situations(held)
    assert built_in(100) == (fit, held)


@pytest.mark.data
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_published_sets_load_and_render(name, shared_data, pebble):
    for part, least in (("", 290), ("_test", 50)):
        items = read_contrast(shared_data / f"contrast/{name}{part}.json")
        assert len(items) >= least
        assert letter_balance(balanced(items)).estimate == pytest.approx(0.5, abs=1 / len(items))
        for item in items[::25]:
            assert pebble.decode([render(item, pebble).match]) == item.matching
            assert swap_letters(item).matching == item.other
            relabel(item, "123456789")
