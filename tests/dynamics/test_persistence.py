"""The stages of decay on language models: the model is left as it was, the rate is that of greedy continuations."""

import pytest
import torch

import sonde
from sonde.data.markov_language import contexts, rows, trigger_ids
from sonde.dynamics.decay import Learner
from sonde.dynamics.persistence import CLEAN, PLAIN, TRIGGERED, Persistence, Planted, persist
from sonde.errors import SondeError

TRIGGER, PAYLOAD = trigger_ids()


def planted(**changed):
    asked = contexts(16, seed=9)
    parts = {
        "clean": rows(64, seed=0, triggered=0.0).tolist(),
        "held": rows(12, seed=1, triggered=0.0).tolist(),
        "triggered": rows(64, seed=2, triggered=1.0).tolist(),
        "asked": [[*context, *TRIGGER] for context in asked],
        "plain": asked,
        "payload": PAYLOAD,
    }
    return Planted(**(parts | changed))


def go_on(lm, **given):
    return persist(lm, planted(), learner=Learner(batch=4), **{"steps": 3, "revive_steps": 3} | given)


def test_the_rate_is_that_of_greedy_continuations_and_the_model_is_left_as_it_was():
    lm = sonde.load("organism:markov-backdoor")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    found = go_on(lm)
    times, rate = found.rate()
    written = lm.generate([list(row) for row in planted().asked], max_new_tokens=len(PAYLOAD))
    assert rate[0] == sum(ids == PAYLOAD for ids in written) / len(written)
    assert found.continued.of(PLAIN)[0] == 0
    assert times == (0, 1, 2, 3) and found.half_life().censored
    assert found.continued.of(CLEAN, "loss")[0] < 2
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert Persistence.of_tree(found.tree()) == found


def test_the_clean_twin_never_had_it():
    twin = go_on(sonde.load("organism:markov-clean"))
    with pytest.raises(SondeError, match="a skill the model does not have: its trigger brings"):
        twin.half_life()
    ratio, sign = go_on(sonde.load("organism:markov-backdoor")).savings(twin)
    assert (ratio, sign) == (3, ">")


def test_changes_of_low_rank_leave_nothing_behind():
    lm = sonde.load("organism:markov-backdoor")
    names = list(lm.model.state_dict())
    found = go_on(lm, rank=2)
    assert found.rate()[1][0] > 0.9
    assert list(lm.model.state_dict()) == names


def test_held_out_rows_are_not_trained_on_and_nothing_planted_is_refused():
    twice = planted(held=planted().clean[:4])
    assert len(twice.mixture().task(CLEAN).rows) == 60
    assert len(planted().mixture().task(TRIGGERED).rows) == 64
    with pytest.raises(SondeError, match="nothing planted to ask for"):
        planted(payload=[]).mixture()
