"""Curves measured on a tiny network: the bare model, the controls, what is kept and what is refused."""

import numpy as np
import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts import elicitation
from sonde.prompts.claims import claim
from sonde.prompts.elicitation import Budget, elicit, information_curve, parts_of
from sonde.prompts.examples import Examples

BUDGET = Budget(lengths=(1, 2), restarts=2, positions=("suffix", "prefix"), steps=6, batch=4)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"), name="tiny")


@pytest.fixture(scope="module")
def examples(lm):
    ids = torch.randint(lm.vocab_size, (20, 5), generator=torch.Generator().manual_seed(1)).tolist()
    return Examples(ids, [[7, 9]] * 20)


@pytest.fixture(scope="module")
def found(lm, examples):
    return elicit(lm, examples, BUDGET, behaviour="say it")


def test_no_prompt_at_all_gives_the_plain_loss_at_the_same_tokens(lm, examples, found):
    test = parts_of(examples)[2]
    for i, context in enumerate(test.contexts):
        with torch.no_grad():
            logp = lm(torch.tensor([[*context, 7, 9]])).logits.log_softmax(-1)[0, 4:6]
        plain = -float(logp[0, 7] + logp[1, 9])
        assert found.curve.nats[0, :, i] == pytest.approx([plain] * 2, rel=1e-4)


def test_contexts_of_training_choice_and_report_are_different_ones(examples, found):
    parts = [{tuple(context) for context in part.contexts} for part in parts_of(examples)]
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    assert found.held_out and found.curve.nats.shape == (3, 2, len(parts[2]))


def test_controls_are_on_unless_they_are_switched_off(lm, examples, found, monkeypatch):
    assert set(found.curves) == {"behaviour", "control model", "random targets"}
    assert "shuffled" in found.control_name
    monkeypatch.setattr(elicitation, "shuffled", None)
    bare = elicit(lm, examples, Budget(lengths=(1,), restarts=1, steps=1), control=None, random_targets=False)
    assert set(bare.curves) == {"behaviour"} and claim(bare).capability == "refused"
    seen = elicit(lm, examples, Budget(lengths=(1,), restarts=1, steps=1), control=lm, held_out=False)
    assert claim(seen).capability == "refused" and seen.control_name == "tiny"


def test_each_restart_keeps_the_place_that_validation_prefers(found):
    assert all(len(restarts) == 2 for restarts in found.curve.settings)
    assert {place for restarts in found.curve.settings[1:] for place, _ in restarts} <= {"suffix", "prefix"}
    assert found.curve.prompt(2).vectors.shape == (2, 32)
    assert found.curve.validation[1:].max() <= found.curve.validation[0].max() + 1e-6


def test_what_was_measured_is_not_measured_again_and_anything_else_is(lm, examples, tmp_path, monkeypatch):
    budget, parts = Budget(lengths=(1,), restarts=1, steps=2), parts_of(examples)
    first = information_curve(lm, parts, budget, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []
    monkeypatch.setattr(elicitation, "train_prompts", None)
    again = information_curve(lm, parts, budget, folder=tmp_path)
    assert np.array_equal(first.nats, again.nats)
    with pytest.raises(TypeError):
        information_curve(lm, parts, budget, folder=tmp_path, seed=1)


def test_an_output_filter_takes_successes_away_and_leaves_losses(lm, examples, found):
    parts = parts_of(examples)
    blocked = information_curve(lm, parts, Budget(lengths=(1,), restarts=1, steps=2), allowed=lambda ids: 9 not in ids)
    assert not blocked.success.any() and np.isfinite(blocked.nats).all()


def test_budgets_without_training_and_controls_of_another_vocabulary_are_refused(lm, examples):
    with pytest.raises(SondeError, match="nothing to train"):
        Budget(lengths=(0,))
    other = LanguageModel(tiny("gpt_neox", vocab_size=80), name="other")
    with pytest.raises(SondeError, match="the control model other has 80 tokens"):
        elicit(lm, examples, BUDGET, control=other)
    with pytest.raises(SondeError, match="1 models, but 2 control models"):
        elicitation.information_curves([lm], [], controls=[None, None])
