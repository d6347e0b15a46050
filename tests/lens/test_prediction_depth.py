"""Prediction depth and iteration learned: tables whose answer is known."""

import pytest
import torch
from families import tiny

from sonde.data.multiple_choice import Prompt
from sonde.errors import SondeError
from sonde.lens.choices import ChoiceScores, choice_scores
from sonde.lens.prediction_depth import Learning, choice_depth, decided_share, depth_against_learning, learning
from sonde.lm.model import LanguageModel

ANSWERS = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])


def scores(answers: torch.Tensor) -> ChoiceScores:
    n = answers.shape[1]
    log_probs = torch.nn.functional.one_hot(answers, 2).float()
    sites = tuple(f"resid_pre.{layer}" for layer in range(len(answers) - 1))
    return ChoiceScores(sites, log_probs, torch.full((n,), 2), torch.zeros(n, dtype=torch.long))


def test_a_question_is_settled_where_its_answer_stays():
    made = scores(ANSWERS)
    assert choice_depth(made).tolist() == [0, 2, 3, 3]
    assert decided_share(made).tolist() == [0.25, 0.25, 0.5, 1.0]


def test_a_question_is_learned_at_the_checkpoint_from_which_its_answer_stays():
    assert Learning((10, 20, 40, 80), ANSWERS).iteration_learned.tolist() == [10, 40, 80, 80]


def test_depth_that_follows_learning_correlates_and_the_reverse_does_not():
    generator = torch.Generator().manual_seed(0)
    depth = torch.randint(0, 6, (80,), generator=generator)
    same, opposite = (depth_against_learning(depth, sign * depth * 100) for sign in (1, -1))
    assert same.estimate == pytest.approx(1) and opposite.estimate == pytest.approx(-1)
    shuffled = depth[torch.randperm(80, generator=generator)]
    assert depth_against_learning(depth, shuffled).contains(0)


def test_questions_that_ask_the_same_count_once():
    depth = torch.arange(40) % 5
    iteration = torch.where(torch.arange(40) < 20, depth, 4 - depth)
    once = depth_against_learning(depth, iteration, [str(i // 2) for i in range(40)])
    assert once.n == 20


def test_checkpoints_are_asked_one_by_one(lens_lm):
    prompts = [Prompt("Is this a statement?", (" no", " yes"), 0), Prompt("Which?", (" one", " two"), 1)]
    early = LanguageModel(tiny("gpt_neox", vocab_size=400, seed=3), lens_lm.tokenizer)
    found = learning([(1, early), (5, lens_lm)], prompts)
    assert found.steps == (1, 5)
    for row, lm in zip(found.answers, (early, lens_lm), strict=True):
        assert torch.equal(row, choice_scores(lm, prompts)["lens"].answers[-1])
    with pytest.raises(SondeError, match="checkpoint 1 comes after checkpoint 5"):
        learning([(5, lens_lm), (1, early)], prompts)
    with pytest.raises(SondeError, match="1 checkpoint: when a question was learned takes at least two"):
        learning([(5, lens_lm)], prompts)


def test_orders_that_cannot_be_compared_are_refused():
    depth = torch.arange(4)
    with pytest.raises(SondeError, match="4 depths and 3 iterations"):
        depth_against_learning(depth, depth[:3])
    with pytest.raises(SondeError, match="share one depth or one iteration"):
        depth_against_learning(depth, torch.zeros(4, dtype=torch.long))
