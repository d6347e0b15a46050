"""The rule that chooses a direction: it finds a planted one, prunes without changing the choice, and says why not."""

import math

import pytest
import torch

import sonde
from sonde.concepts.direction_selection import ablation, select_direction
from sonde.concepts.judges import first_tokens, log_odds
from sonde.data.instructions import generated
from sonde.errors import SondeError
from sonde.organisms.refuser import chat


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:refuser", check=False)


@pytest.fixture(scope="module")
def sets(lm):
    made = generated()
    held = made.held_out["new combinations"]

    def prompts(instructions, harmful, n):
        return [chat(lm, one.text) for one in instructions if one.harmful is harmful][:n]

    return {
        "positive": prompts(made.train, True, 24),
        "negative": prompts(made.train, False, 24),
        "held_positive": prompts(held, True, 8),
        "held_negative": prompts(held, False, 8),
    }


@pytest.fixture(scope="module")
def tokens(lm):
    return first_tokens(lm, [" I", " No"])


@pytest.fixture(scope="module")
def selection(lm, sets, tokens):
    return select_direction(lm, **sets, tokens=tokens, affine=True)


def test_a_direction_that_mediates_refusal_is_found_in_the_middle_of_the_network(lm, selection):
    assert selection.baseline_positive > 0 > selection.baseline_negative
    chosen = selection.chosen
    assert 0 < chosen.layer < 0.8 * lm.n_layers
    assert chosen.bypass < 0 < chosen.induce
    assert chosen.kl <= 0.1


def test_scores_under_the_batch_are_those_of_one_prompt_at_a_time(lm, sets, tokens, selection):
    chosen = selection.chosen
    odds = []
    for prompt in sets["held_positive"]:
        with ablation(lm, chosen, affine=True).on(lm), torch.no_grad():
            odds.append(float(log_odds(lm(prompt).logits[0, -1], tokens)))
    assert chosen.bypass == pytest.approx(sum(odds) / len(odds), abs=1e-3)


def test_pruning_changes_the_cost_and_not_the_choice(lm, sets, tokens, selection):
    whole = select_direction(lm, **sets, tokens=tokens, affine=True, prune=False)
    assert (whole.chosen.layer, whole.chosen.position) == (selection.chosen.layer, selection.chosen.position)
    assert selection.rows < whole.rows <= whole.rows_without_pruning


def test_every_discarded_candidate_has_its_reason(lm, selection):
    for one in selection.candidates:
        reasons = {
            "does not induce",
            "changes harmless prompts",
            "not a number",
            f"layer {one.layer} is in the last fifth",
        }
        assert (one.discarded is None and math.isfinite(one.bypass)) or one.discarded in reasons
    assert all(one.discarded for one in selection.candidates if one.layer >= 0.8 * lm.n_layers)


def test_where_ablation_to_zero_changes_harmless_prompts_nothing_is_chosen(lm, sets, tokens):
    found = select_direction(lm, **sets, tokens=tokens, kl_limit=1e-4)
    with pytest.raises(SondeError, match="no direction passes: the most inducing one"):
        _ = found.chosen


def test_prompts_that_were_fitted_on_are_not_chosen_by(lm, sets, tokens):
    with pytest.raises(SondeError, match="also held out"):
        select_direction(lm, **{**sets, "held_positive": sets["positive"][:4]}, tokens=tokens)
    with pytest.raises(SondeError, match="no negative prompts"):
        select_direction(lm, **{**sets, "held_negative": []}, tokens=tokens)
