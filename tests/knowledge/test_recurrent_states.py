"""The memory as features of probes: what it holds after the prompt and after each answer, in every recurrent family."""

import pytest
import torch
from families import tiny

import sonde
from sonde.errors import SondeError
from sonde.knowledge.probes import fit
from sonde.knowledge.recurrent_states import beside, extract_memory
from sonde.knowledge.states import extract
from sonde.lm.model import LanguageModel
from sonde.lm.state_positions import Projection, pooled, states_by_position
from sonde.organisms.quirky_comparison import comparison_sets
from sonde.stats.ranks import auroc

PROMPTS = [[5, 9, 2, 17], [3, 4], [8, 8, 1, 2], [7, 6]]
ANSWERS = (11, 12)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv", "falcon_h1"])
@pytest.mark.parametrize("form", ["pooled", "projected"])
def test_states_are_those_of_the_memory_after_prompt_and_answers(family, form):
    lm = LanguageModel(tiny(family))
    found = extract_memory(lm, PROMPTS, ANSWERS, form=form, seed=3)
    features = pooled if form == "pooled" else Projection(lm.d_model, seed=3)
    for row, ids in enumerate(PROMPTS):
        for side, answer in enumerate(ANSWERS):
            stepped = states_by_position(lm, torch.tensor([[*ids, answer]]), features=features)
            for place, by_position in enumerate(stepped.values()):
                torch.testing.assert_close(found.last[row, place], by_position[0, -2], rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(found.pair[row, place, side], by_position[0, -1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.lm_log_odds, extract(lm, PROMPTS, ANSWERS).lm_log_odds, rtol=1e-3, atol=1e-4)


def test_memory_and_stream_stand_beside_each_other():
    lm = LanguageModel(tiny("mamba2"))
    memory, stream = extract_memory(lm, PROMPTS, ANSWERS), extract(lm, PROMPTS, ANSWERS)
    both = beside(memory, stream)
    assert both.d == memory.d + stream.d
    assert torch.equal(both.last[..., : memory.d], memory.last)
    with pytest.raises(SondeError, match="give the same prompts and layers of one model"):
        beside(memory, stream[:2])


def test_a_network_without_memory_is_refused():
    with pytest.raises(SondeError, match=r"\(gpt_neox\) has no recurrent memory"):
        extract_memory(LanguageModel(tiny("gpt_neox")), PROMPTS, ANSWERS)


def test_the_memory_of_the_recurrent_quirky_model_tells_truth_from_what_it_says_to_bob():
    lm = sonde.load("organism:quirky-comparison-mamba2", check=False)
    sets = comparison_sets()
    learn, test = sets.validation.where(character="Alice").sample(600), sets.test.where(character="Bob", disagree=True)
    probe = fit("logr-pair", extract_memory(lm, learn.prompts, learn.answers), learn.truth)
    odds = probe.log_odds(extract_memory(lm, test.prompts, test.answers)).numpy()
    assert max(auroc(odds[:, layer], test.truth) for layer in range(odds.shape[1])) > 0.8
