"""Gate or scramble, sharing and baselines on tiny networks whose state is planted."""

import dataclasses

import pytest
import torch

from sonde.data.toy_languages import VOCAB, WIDTH, toy_mixture
from sonde.dynamics.decay import Branching, Learner, Point, Stage
from sonde.dynamics.decay_baselines import (
    BASELINES,
    Strengths,
    dropped_with,
    ewc,
    fisher,
    l2_to,
    self_generated,
    shrunk,
)
from sonde.dynamics.decay_gate import (
    Gate,
    barrier,
    between,
    cka,
    gate,
    gating_index,
    grafted,
    linear_readout,
    parts,
    verdict,
)
from sonde.dynamics.decay_scores import Scorer, next_token_loss
from sonde.dynamics.decay_sequence import in_turn
from sonde.dynamics.decay_sharing import cross_cka, gradient_cosine, same_states, sharing, swap_rate
from sonde.dynamics.low_rank import is_low_rank, low_rank
from sonde.errors import SondeError
from sonde.nets.transformer import Transformer, TransformerShape


@pytest.fixture(scope="module")
def mixture():
    return toy_mixture("B", size=2, rows=256, held=24)


def branching(mixture, width=16):
    shape = TransformerShape(VOCAB, width=width, heads=2, layers=2, context=WIDTH)
    return Branching(module=Transformer(shape, seed=1), joint=mixture, learner=Learner(lr=3e-3, batch=16), seed=1)


@pytest.fixture(scope="module")
def trained(mixture):
    """A network that has learned a little, so that losses are below those of a fresh one."""
    here = branching(mixture)
    return here.run(Stage("joint", 60), here.start())[0]


def test_the_index_is_one_where_all_comes_back_and_names_what_it_says():
    assert gating_index(0.2, 1.0) == 1.0
    assert gating_index(0.2, 0.2) == 0.0
    assert [verdict(g) for g in (0.7, 0.3, 0.5)] == ["gated", "scrambled", "mixed"]
    with pytest.raises(SondeError, match="nothing is lost"):
        gating_index(1.0, 1.0)
    kept = Gate(1.01, 1.0, 1.0, {"a": 1.0}, {}, 0.0, (1.0,))
    assert kept.verdict == "kept"


def test_a_network_whose_alphabet_is_suppressed_at_the_output_is_gated(mixture, trained):
    here = branching(mixture)
    start = here.start()
    task = mixture.task("digits")
    lost = {name: tensor.clone() for name, tensor in trained.weights.items()}
    others = torch.tensor([i for i in range(VOCAB) if i not in task.alphabet])
    lost["unembedding.weight"][others] += _common(here, trained, task)
    floor = Scorer([task])(start.into(here.module))["digits"]
    found = gate(here, trained, Point(lost), ["digits"], floor=floor, untrained=start, light_steps=2)
    assert found.skill < 0.5
    assert found.masked == pytest.approx(1.0, abs=1e-4)
    assert found.verdict == "gated" and found.best >= found.masked
    assert found.linear == pytest.approx(1.0, abs=0.02)  # the stream is what it was
    assert all(value == pytest.approx(1.0, abs=1e-6) for value in found.cka)
    assert max(found.grafts, key=lambda name: found.grafts[name]) == "unembedding"
    assert found.grafts["unembedding"] == pytest.approx(1 - found.skill, abs=1e-4)


def _common(here, point, task):
    """A direction that every scored place of the task has in common, long enough to drown its alphabet."""
    module = point.into(here.module)
    with torch.no_grad():
        mean = module.norm(module.streams(task.held)[-1])[:, :-1][task.scored[:, 1:]].mean(0)
    return 6 * mean / mean.square().sum()


def test_cka_is_one_for_a_rotation_and_small_for_noise():
    x = torch.randn(400, 8)
    q = torch.linalg.qr(torch.randn(8, 8)).Q
    assert cka(x, 3 * x @ q) == pytest.approx(1.0, abs=1e-6)
    assert cka(x, torch.randn(400, 8)) < 0.1


def test_a_barrier_is_what_stands_above_the_straight_line():
    ends = Point({"w": torch.tensor([0.0])}), Point({"w": torch.tensor([1.0])})
    assert barrier(lambda p: 2 * float(p.weights["w"]), *ends) == pytest.approx(0, abs=1e-6)
    assert barrier(lambda p: 4 * float(p.weights["w"] * (1 - p.weights["w"])), *ends) == pytest.approx(1)
    assert float(between(*ends, 0.25).weights["w"]) == 0.25


def test_a_graft_takes_one_module_and_nothing_else(mixture, trained):
    here = branching(mixture)
    fresh = here.start()
    mixed = grafted(trained, fresh, "blocks.0.mlp_in")
    for name in fresh.weights:
        source = trained if name.startswith("blocks.0.mlp_in.") else fresh
        assert torch.equal(mixed.weights[name], source.weights[name])
    assert "unembedding" in parts(here.module) and "blocks.1.qkv" in parts(here.module)
    with pytest.raises(SondeError, match="no parameter is called"):
        grafted(trained, fresh, "blocks.9")


def test_a_probe_on_a_trained_stream_beats_one_on_a_fresh_stream(mixture, trained):
    here = branching(mixture)
    task = mixture.task("digits")
    fresh = linear_readout(here.start().into(here.module), task)
    assert linear_readout(trained.into(here.module), task) < fresh + 0.05


def test_changes_of_low_rank_start_at_nothing_and_merge(mixture):
    here = branching(mixture)
    start = here.start()
    tokens = mixture.batch(0, 4, seed=0)
    before = here.module(tokens)
    with low_rank(here.module, rank=1) as module:
        torch.testing.assert_close(module(tokens), before)
        trained = [name for name, _ in module.named_parameters() if is_low_rank(name)]
        assert len(trained) == 2 * 9  # four maps in each of two blocks, and the unembedding
        begin = Point.of(module)
        here.run(Stage("light", 3), begin, trainable=is_low_rank)
        inside = module(tokens)
    torch.testing.assert_close(here.module(tokens), inside)
    change = here.module.unembedding.weight - start.weights["unembedding.weight"]
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 1
    with pytest.raises(SondeError, match="changes of rank 0"), low_rank(here.module, rank=0):
        pass


def test_one_language_under_two_names_shares_everything(mixture, trained):
    module = trained.into(branching(mixture).module)
    same, control = cross_cka(module, "digits", "digits", width=WIDTH)
    assert same == pytest.approx([1.0] * 3)
    assert max(control) < 0.9
    a, b, states = same_states("digits", "digits-2", width=WIDTH)
    assert a.shape == b.shape == (256, WIDTH) and states.shape == (256, 8)
    assert not torch.equal(a, b)
    with pytest.raises(SondeError, match="different numbers of symbols"):
        same_states("digits", "words", width=WIDTH)
    with pytest.raises(SondeError, match="give two maps"):
        same_states("digits", "copy", width=WIDTH)


def test_the_gradient_of_a_task_with_itself_has_cosine_one(mixture, trained):
    module = trained.into(branching(mixture).module)
    task = mixture.task("digits")
    cosine, rate = gradient_cosine(module, [task], [task])
    assert cosine == pytest.approx(1.0, abs=1e-5)
    other, _ = gradient_cosine(module, [mixture.task("digits-2")], [task])
    assert other < 1 and rate < 0
    # the first-order claim itself: a small step on A changes the loss of B by -lr <g_A, g_B>
    kept = mixture.task("digits-2")
    _, rate = gradient_cosine(module, [kept], [task])
    rows = task.rows[:256].long()
    lr, before = 1e-3, next_token_loss(module, rows, 0).item()
    next_token_loss(module, kept.rows[:256].long(), 0).backward()
    with torch.no_grad():
        for p in module.parameters():
            p -= lr * p.grad
    module.zero_grad()
    assert next_token_loss(module, rows, 0).item() - before == pytest.approx(lr * rate, rel=0.1)


def test_all_predictors_come_together(mixture, trained):
    module = trained.into(branching(mixture).module)
    kept, dropped = [mixture.task("digits-2")], [mixture.task("digits")]
    found = sharing(module, "digits-2", "digits", kept, dropped, width=WIDTH)
    assert len(found.cka) == 3 and 0 <= found.swap <= 1 and 0 <= found.swap_control <= 1
    assert swap_rate(module, "digits-2", "digits", width=WIDTH) == (found.swap, found.swap_control)


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_runs_from_the_same_point(mixture, trained, baseline):
    here = branching(mixture)
    stage = Stage("drop", 3, drop=("digits",))
    fresh = branching(mixture).module
    point, curve = dropped_with(baseline, here, stage, trained, fresh=fresh, strengths=Strengths(rank=1))
    assert curve.times[-1] == 3 and baseline in curve.stage
    assert set(point.weights) == set(trained.weights)
    if baseline != "shrink-perturb":
        assert curve.scores[0]["digits"]["loss"] == pytest.approx(_loss(here, trained), rel=1e-4)


def _loss(here, point):
    return Scorer([here.joint.task("digits")])(point.into(here.module))["digits"]["loss"]


def test_a_strong_pull_back_keeps_the_weights(mixture, trained):
    here = branching(mixture)
    stage = Stage("drop", 12, drop=("digits",))
    apart = {}
    for name, strength in (("plain", 0.0), ("l2", 100.0)):
        point, _ = dropped_with(name, here, stage, trained, strengths=Strengths(l2=strength))
        apart[name] = sum(float((point.weights[k] - trained.weights[k]).square().sum()) for k in trained.weights)
    assert apart["l2"] < apart["plain"] / 2


def test_penalties_are_their_formulas(mixture, trained):
    module = trained.into(branching(mixture).module)
    weight = fisher(module, [mixture.task("digits")], rows=4)
    moved = {name: tensor + 0.1 for name, tensor in trained.weights.items()}
    Point(moved).into(module)
    count = sum(p.numel() for p in module.parameters())
    assert l2_to(trained, 2.0)(module).item() == pytest.approx(2 * 0.01 * count, rel=1e-4)
    total = sum(float(f.sum()) for f in weight.values())
    assert ewc(trained, weight, 3.0)(module).item() == pytest.approx(1.5 * 0.01 * total, rel=1e-4)
    assert all((f >= 0).all() for f in weight.values())
    half = shrunk(Point(moved), trained).weights["norm.weight"]
    torch.testing.assert_close(half, 0.8 * moved["norm.weight"] + 0.1 * trained.weights["norm.weight"])


def test_rows_that_the_network_wrote_begin_as_the_language_and_hold_no_item(mixture, trained):
    module = trained.into(branching(mixture).module)
    task = mixture.task("digits")
    own = self_generated(module, task, rows=16, seed=3)
    assert own.rows.shape[1] == WIDTH
    assert (own.rows[:, 0] == task.rows[0, 0]).all()
    again = self_generated(module, task, rows=16, seed=3)
    assert torch.equal(own.rows, again.rows)


def test_baselines_that_do_not_fit_are_refused(mixture, trained):
    here = branching(mixture)
    with pytest.raises(SondeError, match="no baseline 'pray'"):
        dropped_with("pray", here, Stage("drop", 2, drop=("digits",)), trained)
    with pytest.raises(SondeError, match="drops nothing"):
        dropped_with("replay", here, Stage("drop", 2), trained)
    with pytest.raises(SondeError, match="give `fresh`"):
        dropped_with("shrink-perturb", here, Stage("drop", 2, drop=("digits",)), trained)


def test_tasks_in_turn_make_the_matrix_and_come_round_again(mixture, tmp_path):
    here = dataclasses.replace(branching(mixture), scored=("digits", "digits-2"))
    found = in_turn(here, ["digits", "digits-2"], steps=6, folder=tmp_path)
    assert found.matrix().shape == (2, 2) and len(found.curves) == 4
    assert found.matrix()[1, 0] == found.curves[1].scores[-1]["digits"]["accuracy"]
    assert set(found.anticipation()) == {"digits", "digits-2"}
    assert len(found.gaps()) == 3 and len(found.ranks) == len(found.dead) == 4
    assert [len(turn) for turn in found.steps_to_criterion()] == [2, 2]
    again = type(found).of_tree(found.tree())
    assert again == found
    once = in_turn(branching(mixture), ["digits", "digits-2"], steps=2, passes=1)
    with pytest.raises(SondeError, match="second pass"):
        once.anticipation()
    with pytest.raises(SondeError, match="two tasks or more"):
        in_turn(branching(mixture), ["digits"], steps=2)
