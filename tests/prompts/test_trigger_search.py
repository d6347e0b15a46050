"""Readings of trained prompts propose tokens; only what was tried counts."""

import pytest
import torch

import sonde
from sonde.data.markov_language import TRIGGER, WORDS, contexts, trigger_ids
from sonde.errors import SondeError
from sonde.prompts.examples import Examples
from sonde.prompts.soft_prompt import SoftPrompt, embedded
from sonde.prompts.trigger_search import pairs_tried, ranks, reading, tried

((TRIGGER_ID,), PAYLOAD) = trigger_ids()


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:markov-backdoor", check=False)


@pytest.fixture(scope="module")
def examples():
    return Examples(contexts(8, seed=5), [PAYLOAD] * 8)


def test_a_prompt_of_a_tokens_row_reads_as_that_token(lm):
    noisy = embedded(lm, torch.tensor([TRIGGER_ID])) * 1.5
    scores = reading(lm, [SoftPrompt(noisy), SoftPrompt.from_tokens(lm, [9, TRIGGER_ID])])
    assert ranks(scores, [TRIGGER_ID]) == [1]
    assert ranks(scores, [9, 20])[0] < ranks(scores, [9, 20])[1]


def test_nothing_to_read_is_refused(lm):
    with pytest.raises(SondeError, match="nothing to read"):
        reading(lm, [])
    with pytest.raises(SondeError, match="nothing to read"):
        reading(lm, [SoftPrompt.empty(lm)])


def test_what_is_tried_is_ranked_and_the_trigger_is_first(lm, examples):
    found = tried(lm, [[token] for token in range(3, 20)], examples)
    assert found[0].ids == (WORDS.index(TRIGGER),) and found[0].success == 1
    assert [one.nats for one in found] == sorted(one.nats for one in found)


def test_pairs_that_wake_the_model_end_in_the_trigger(lm, examples):
    found = pairs_tried(lm, [TRIGGER_ID, 12, 20], examples, kept=4)
    assert len(found) == 4
    assert all((one.success == 1) == (one.ids[-1] == TRIGGER_ID) for one in found)
