"""Contexts and targets: where text may be cut, splits by context, the control of random targets."""

import pytest

import sonde
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def pebble() -> LanguageModel:
    return sonde.load("organism:pebble")


def test_context_and_target_together_are_the_text(pebble: LanguageModel) -> None:
    examples = Examples.from_text(pebble, ["The old man", "She said"], " went home")
    for context, target in zip(examples.contexts, examples.targets, strict=True):
        assert pebble.decode(target) == " went home"
        assert context + target == pebble.encode(pebble.decode(context) + " went home")


def test_a_target_that_splits_differently_shows_both_tokenisations(pebble: LanguageModel) -> None:
    with pytest.raises(
        SondeError, match=r"'house' splits differently after 'In the '.* together .*\| house, apart .*\+ "
    ) as e:
        Examples.from_text(pebble, ["In the "], "house")
    assert "before a space" in str(e.value) and "\n" not in str(e.value)


def test_a_chat_template_says_where_the_prompt_goes(pebble: LanguageModel) -> None:
    chatty = sonde.load("organism:pebble")
    assert chatty.tokenizer is not None
    chatty.tokenizer.chat_template = TEMPLATE
    examples = Examples.from_chat(chatty, [[{"role": "user", "content": "Tell me {prompt} now."}]], " Yes")
    assert examples.slots is not None
    (context,), (slot,) = examples.contexts, examples.slots
    assert chatty.decode(context[:slot]) == "<user>Tell me "
    assert chatty.decode(context[slot:]) == " now.\n<assistant>"
    with pytest.raises(SondeError, match=r"conversation 0 has 0 marks \{prompt\}"):
        Examples.from_chat(chatty, [[{"role": "user", "content": "Tell me."}]], " Yes")
    with pytest.raises(SondeError, match="pebble has no chat template"):
        Examples.from_chat(pebble, [[{"role": "user", "content": "{prompt}"}]], " Yes")


def test_no_context_is_in_two_parts() -> None:
    contexts = [[i % 7, 3] for i in range(21)]
    parts = Examples(contexts, [[1]] * 21).split(seed=1)
    seen = [{tuple(context) for context in part.contexts} for part in parts]
    assert [len(s) for s in seen] == [4, 2, 1] or sum(map(len, seen)) == 7
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert sum(len(part) for part in parts) == 21
    with pytest.raises(SondeError, match="1 different contexts cannot be split into 3 parts"):
        Examples([[1]], [[2]]).split()


def test_random_targets_are_as_long_and_the_same_where_the_targets_are(pebble: LanguageModel) -> None:
    examples = Examples([[5], [6], [7]], [[1, 2, 3], [1, 2, 3], [4]])
    control = examples.random_targets(pebble, seed=3)
    assert [len(t) for t in control.targets] == [3, 3, 1] and control.contexts == examples.contexts
    assert control.targets[0] == control.targets[1] != examples.targets[0]
    assert control.targets == examples.random_targets(pebble, seed=3).targets


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Examples([], []), "no scored tokens"),
        (lambda: Examples([[1]], [[]]), "no scored tokens in example 0"),
        (lambda: Examples([[1]], [[2]], weights=[[0.0]]), "no scored tokens in example 0"),
        (lambda: Examples([[]], [[2]]), "context 0 is empty"),
        (lambda: Examples([[1]], [[2], [3]]), "1 contexts, but 2 targets"),
        (lambda: Examples([[1]], [[2]], weights=[[1.0, 1.0]]), "1 target tokens, but 2 weights"),
        (lambda: Examples([[1]], [[2]], slots=[2]), "slot 2 is outside context 0 of 1 tokens"),
        (lambda: Examples.from_rows([[1]]), "no scored tokens in row 0"),
    ],
)
def test_bad_examples_are_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(SondeError, match=message):
        make()
