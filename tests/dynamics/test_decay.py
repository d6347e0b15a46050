"""Stages of training that branch from a point: bit for bit, with the optimiser's state kept, reset or decayed."""

import dataclasses

import pytest
import torch

from sonde.data.toy_languages import VOCAB, WIDTH, toy_mixture
from sonde.dynamics.decay import Branching, Curve, Learner, Point, Stage
from sonde.dynamics.decay_scores import Scorer, alphabets_differ, chance
from sonde.errors import SondeError
from sonde.nets.transformer import Transformer, TransformerShape

NO_WARMUP = {"switch": "keep", "warmup": 0}


@pytest.fixture(scope="module")
def mixture():
    return toy_mixture("B", size=2, rows=128, held=16)


def branching(mixture, *, dropout=0.0, **learner):
    shape = TransformerShape(VOCAB, width=16, heads=2, layers=1, context=WIDTH, dropout=dropout)
    return Branching(module=Transformer(shape, seed=3), joint=mixture, learner=Learner(batch=8, **learner), seed=3)


def same(first, second):
    return all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_branch_with_the_state_kept_is_the_uncut_run_bit_for_bit(mixture, tmp_path, optimizer):
    here = branching(mixture, dropout=0.1, optimizer=optimizer)
    start = here.start()
    whole, _ = here.run(Stage("whole", 12, warmup=0), start)
    half, _ = here.run(Stage("first", 5, warmup=0), start)
    half.save(tmp_path / "half.safetensors")
    here.run(Stage("something else", 4, only=("digits",)), half)  # another branch changes nothing
    rest, _ = here.run(Stage("rest", 7, **NO_WARMUP), Point.load(tmp_path / "half.safetensors"))
    assert same(rest, whole)
    assert rest.steps == whole.steps == 12


def test_a_killed_stage_resumes_bit_for_bit_and_keeps_what_it_saw(mixture, tmp_path, monkeypatch):
    here = branching(mixture)
    start, kept, again = here.start(), {4: None}, {4: None}
    stage = Stage("drop", 10, drop=("digits",))
    whole, seen = here.run(stage, start, keep=kept)
    monkeypatch.setattr("sonde.dynamics.decay._EVERY", 3)
    file = tmp_path / "stage.safetensors"

    def killed(module):
        if calls.append(0) or len(calls) == 8:
            raise KeyboardInterrupt
        return torch.zeros(())

    calls = []
    with pytest.raises(KeyboardInterrupt):
        here.run(stage, start, keep=again, checkpoint=file, penalty=killed)
    resumed, curve = here.run(stage, start, keep=again, checkpoint=file)
    assert same(resumed, whole)
    assert curve.times == seen.times and curve.scores == seen.scores
    assert same(again[4], kept[4]) and again[4].steps == 4


def test_the_switch_resets_decays_or_keeps_the_moments(mixture):
    here = branching(mixture)
    start, _ = here.run(Stage("joint", 6), here.start())
    ends = {how: here.run(Stage("go on", 1, switch=how, warmup=0), start)[0] for how in ("keep", "reset", "decay")}
    assert not same(ends["keep"], ends["reset"])
    assert not same(ends["keep"], ends["decay"])
    kept = ends["keep"].optimizer["state"][0]["step"]
    assert kept == 7 and ends["reset"].optimizer["state"][0]["step"] == 1


def test_what_is_dropped_is_not_read_and_the_batch_stays(mixture):
    left = Stage("drop", 4, drop=("digits",)).mixture(mixture)
    rows = left.batch(0, 64, seed=0)
    assert len(rows) == 64
    assert set(rows[:, 0].tolist()) == {int(mixture.task("digits-2").rows[0, 0])}
    share = Stage("drop", 4, drop=("digits",), replay=0.01).mixture(mixture).shares["digits"]
    assert share == pytest.approx(0.01)


def test_only_chosen_parameters_move_and_all_can_be_trained_again(mixture):
    here = branching(mixture)
    start = here.start()
    end, _ = here.run(Stage("light", 2), start, trainable=lambda name: name.startswith("unembedding"))
    moved = {name for name in start.weights if not torch.equal(start.weights[name], end.weights[name])}
    assert moved == {"unembedding.weight"}
    assert all(p.requires_grad for p in here.module.parameters())
    with pytest.raises(SondeError, match="trains no parameter"):
        here.run(Stage("light", 2), start, trainable=lambda name: False)


def test_a_stage_ends_when_the_criterion_is_met(mixture):
    here = branching(mixture)
    _, curve = here.run(Stage("short", 16), here.start(), until=(["digits"], lambda scores: True))
    assert curve.times == (0,)
    assert curve.first(["digits"], lambda scores: True) == 0
    assert curve.first(["digits"], lambda scores: False) is None


def test_the_joint_phase_goes_on_in_blocks_and_then_says_that_it_failed(mixture):
    here = branching(mixture)
    point, curve, learned = here.learn(4, limit=3)
    assert not learned
    assert curve.times[-1] == point.steps == 12
    assert list(curve.times) == sorted(set(curve.times))
    whole, _ = here.run(Stage("joint", 12), branching(mixture).start())
    assert here.learn(4, limit=1)[0].steps == 4
    assert point.steps == whole.steps


def test_curves_and_points_survive_their_trees(mixture):
    here = branching(mixture)
    _, curve = here.run(Stage("joint", 3), here.start())
    assert Curve.of_tree(curve.tree()) == curve
    rows = curve.rows(seed=3)
    assert len(rows) == len(curve.times) * 2 and {"seed", "stage", "step", "task", "exact"} <= set(rows[0])
    assert curve.tokens == 8 * WIDTH


def test_scores_are_those_of_a_network_that_knows_the_answers(mixture):
    class Knows(torch.nn.Module):
        def __init__(self, task, wrong=0.0):
            super().__init__()
            self.size, self.task, self.wrong = torch.nn.Linear(VOCAB, 1), task, wrong

        def forward(self, tokens):
            place = {tuple(row): i for i, row in enumerate(self.task.held.tolist())}
            answers = torch.stack([self.task.answers[place[tuple(row)]] for row in tokens.tolist()])
            logits = torch.zeros(*tokens.shape, VOCAB)
            logits[:, :-1] = 20 * torch.nn.functional.one_hot(answers[:, 1:], VOCAB)
            logits[..., 0] += self.wrong  # a token outside the alphabet that is always louder
            return logits

    task = mixture.task("digits")
    right = Scorer([task])(Knows(task))["digits"]
    assert right["accuracy"] == right["exact"] == right["masked_exact"] == 1
    assert right["loss"] < 1e-3
    suppressed = Scorer([task])(Knows(task, wrong=40.0))["digits"]
    assert suppressed["exact"] == suppressed["accuracy"] == 0
    assert suppressed["masked_exact"] == 1 and suppressed["masked_loss"] < 1e-3


def test_chance_is_that_of_the_alphabet(mixture):
    found = chance(mixture.task("digits"))
    assert found["accuracy"] == 0.25
    assert found["loss"] == pytest.approx(1.3863, abs=1e-4)
    assert found["exact"] == pytest.approx(0.25**18)


def test_unequal_alphabets_are_warned_of():
    ten = toy_mixture("B", rows=32, held=4)
    assert "digits 4, words 61" in alphabets_differ([ten.task("digits"), ten.task("words")])
    assert alphabets_differ([ten.task("digits"), ten.task("reversed")]) == ""


def test_names_that_are_not_there_are_answered_with_those_that_are(mixture):
    here = branching(mixture)
    with pytest.raises(SondeError, match="no task 'latin' in the mixture: it has digits, digits-2"):
        here.run(Stage("drop", 2, drop=("latin",)), here.start())
    with pytest.raises(SondeError, match="leaves an empty mixture"):
        here.run(Stage("drop", 2, drop=("digits", "digits-2")), here.start())


def test_a_rate_that_reaches_zero_before_the_switch_is_warned_of():
    with pytest.warns(UserWarning, match="reaches 0 before the switch"):
        Learner(ends=0.3)


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (lambda: Learner(lr=0), "a learning rate of 0"),
        (lambda: Learner(optimizer="adam"), "optimizer 'adam' is unknown"),
        (lambda: Stage("s", 0), "0 steps"),
        (lambda: Stage("s", 2, switch="forget"), "switch 'forget' is unknown"),
        (lambda: Stage("s", 2, drop=("a",), only=("b",)), "both `drop` and `only`"),
        (lambda: Scorer([]), "no task to score"),
    ],
)
def test_settings_that_make_no_sense_are_refused(made, line):
    with pytest.raises(SondeError, match=line):
        made()


def test_another_networks_state_is_refused(mixture):
    here = branching(mixture)
    point, _ = here.run(Stage("joint", 2), here.start())
    short = dataclasses.replace(point, optimizer={**point.optimizer, "param_groups": [{"params": [0]}]})
    with pytest.raises(SondeError, match="switch with reset"):
        here.run(Stage("go on", 2, switch="keep"), short)
