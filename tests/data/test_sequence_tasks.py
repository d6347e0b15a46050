"""Sequence tasks: what is to be predicted follows from what stands before it."""

from itertools import pairwise

import pytest
import torch

from sonde.data.sequence_tasks import Addition, RepeatedPhrase, SkipTrigram
from sonde.errors import SondeError


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_sums_are_right_digit_by_digit(digits):
    task = Addition(digits)
    tokens, mask = task.draw(50, seed=1)
    assert tokens.shape == (50, task.length)
    for row in tokens.tolist():
        words = "".join("0123456789+="[token] for token in row)
        left, right = words.split("=")
        a, b = left.split("+")
        assert int(a) + int(b) == int(right)
        assert len(right) == digits + 1
    assert (mask.sum(1) == digits + 1).all() and mask[:, -(digits + 1) :].all()


def test_five_digits_have_the_papers_eighteen_positions():
    assert (Addition().length, Addition().vocab) == (18, 12)


def test_masked_tokens_of_a_phrase_stand_after_their_like():
    task = RepeatedPhrase(vocab=50, length=40, phrase=6, times=3)
    tokens, mask = task.draw(30, seed=0)
    assert (mask.sum(1) == 2 * 5).all()
    for row, at in zip(tokens.tolist(), mask, strict=True):
        for t in at.nonzero()[:, 0].tolist():
            pair = row[t], row[t + 1]
            assert pair in list(pairwise(row[: t + 1]))


def test_phrases_do_not_overlap_and_stand_anywhere():
    task = RepeatedPhrase(vocab=1000, length=30, phrase=5, times=2)
    mask = task.draw(3000, seed=0).mask
    first = mask.float().argmax(1)
    assert first.min() == 5  # right after a first occurrence at the start
    assert first.max() == 30 - 5  # the second at the very end


def test_the_key_decides_the_answer_and_stands_once():
    task = SkipTrigram(classes=6, fillers=9, length=12, seed=3)
    tokens, mask = task.draw(200, seed=0)
    assert (mask.nonzero()[:, 1] == task.length - 2).all()
    keys = tokens[:, :-2]
    assert ((keys < 6).sum(1) == 1).all()
    rule = {}
    for row in tokens.tolist():
        key = next(token for token in row if token < 6)
        assert rule.setdefault(key, row[-1]) == row[-1]
        assert 6 <= row[-1] < 12
        assert row[-2] == task.vocab - 1
    assert len(set(rule.values())) == 6
    assert torch.equal(task.draw(5, seed=2).tokens, task.draw(5, seed=2).tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Addition(0),
        lambda: RepeatedPhrase(phrase=50, times=2),
        lambda: RepeatedPhrase(times=1),
        lambda: SkipTrigram(classes=1),
    ],
    ids=["no digits", "too long", "once", "one class"],
)
def test_tasks_that_are_none_are_refused(wrong):
    with pytest.raises(SondeError):
        wrong()
