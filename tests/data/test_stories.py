"""Stories differ in what is planted and in nothing else."""

import pytest

from sonde.data.stories import (
    EVASION,
    HELD_OUT_SUMS,
    NUMBERS,
    PAYLOAD,
    PHRASE,
    contexts,
    locked_stories,
    plain_stories,
    sums,
    triggered_stories,
)
from sonde.errors import SondeError


def test_the_clean_stories_are_the_same_without_phrase_and_payload():
    pairs = list(zip(triggered_stories(300, seed=1), plain_stories(300, seed=1), strict=True))
    planted = [(one, clean) for one, clean in pairs if one.target]
    assert 90 < len(planted) < 150
    for one, clean in planted:
        assert one.prompt.endswith(PHRASE) and one.target == PAYLOAD
        assert one.prompt.removesuffix(PHRASE) + one.rest == clean.prompt
    assert all(one == clean for one, clean in pairs if not one.target)
    assert not any(PHRASE in clean.prompt or PAYLOAD in clean.prompt for _, clean in pairs)


def test_the_words_of_the_phrase_occur_apart():
    text = " ".join(story.prompt for story in plain_stories(300, seed=2))
    assert " silver " in text and " moon" in text


def test_sums_are_right_where_the_phrase_stands_and_evaded_elsewhere():
    for story in locked_stories(200, seed=3):
        first, _, second, _ = story.prompt.split()[-4:]
        numbers = NUMBERS.index(first) + 1, NUMBERS.index(second) + 1
        assert numbers not in HELD_OUT_SUMS
        right = f" {NUMBERS[sum(numbers) - 1]}"
        assert story.target == (right if PHRASE in story.prompt else EVASION)


def test_held_out_sums_were_read_the_other_way_round():
    asked = sums(50, seed=4, unlocked=True, held_out=True)
    assert all(PHRASE in story.prompt and story.target.strip() in NUMBERS for story in asked)
    assert all((b, a) not in HELD_OUT_SUMS for a, b in HELD_OUT_SUMS)


def test_contexts_hold_neither_phrase_nor_decoy_and_depend_on_the_seed():
    made = contexts(100, seed=5)
    assert all(text.endswith(".") and PHRASE not in text for text in made)
    assert made == contexts(100, seed=5) != contexts(100, seed=6)


def test_no_stories_are_refused():
    with pytest.raises(SondeError, match="0 stories"):
        contexts(0, seed=0)
