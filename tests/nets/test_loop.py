"""The training loop: schedule, checkpoints, exact resume."""

import math
from itertools import pairwise

import pytest
import torch

from sonde.errors import SondeError
from sonde.nets.loop import Schedule, Watch, log_steps, train

STEPS = 30


def job(tmp_path, *, stop_at: int | None = None, identity: dict | None = None):
    """Fit a small net; `stop_at` raises in that step, as a kill would end it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    planted = torch.randn(4)

    def loss_of_step(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return ((module(x)[:, 0] - x @ planted) ** 2).mean()

    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.05)]
    losses = train(
        module,
        loss_of_step,
        optimizers,
        steps=STEPS,
        clip=1.0,
        checkpoint=tmp_path / "checkpoint.safetensors",
        every=4,
        identity=identity or {"name": "test"},
    )
    return module, losses


def test_training_lowers_the_loss(tmp_path):
    losses = job(tmp_path)[1]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("stop_at", [1, 4, 17, 29])
def test_an_interrupted_training_ends_with_the_same_numbers(tmp_path, stop_at):
    whole, losses = job(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "cut", stop_at=stop_at)
    resumed, again = job(tmp_path / "cut")
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_finished_training_is_not_repeated(tmp_path):
    _, losses = job(tmp_path)
    assert job(tmp_path, stop_at=0)[1] == losses


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    job(tmp_path)
    with pytest.raises(SondeError, match="another configuration"):
        job(tmp_path, identity={"name": "other"})


def test_a_loss_that_is_not_finite_ends_the_training():
    module = torch.nn.Linear(1, 1)
    with pytest.raises(SondeError, match="became nan at step 0"):
        train(module, lambda step: module.weight.sum() * float("nan"), [torch.optim.SGD(module.parameters())], steps=3)


def test_the_schedule_rises_stays_and_falls_to_zero():
    schedule = Schedule(warmup=0.1, decay=0.5)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:50] == [1.0] * 40
    assert all(a > b for a, b in pairwise(factors[51:]))
    assert factors[-1] == pytest.approx(0.02)


def watched(tmp_path, *, stop_at=None, stop=None):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    x = torch.randn(8, 3)

    def loss_of_step(step):
        if step == stop_at:
            raise KeyboardInterrupt
        return module(x).square().mean()

    watch = Watch((0, 1, 4, 9, 20), lambda done: {"done": done, "w": module.weight.detach().clone()}, stop=stop)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    path = None if tmp_path is None else tmp_path / "watched.safetensors"
    return train(module, loss_of_step, [optimizer], steps=20, checkpoint=path, every=5, watch=watch), watch


def test_a_watch_sees_the_chosen_steps_the_first_and_the_last_among_them():
    losses, watch = watched(None)
    assert list(watch.seen) == [0, 1, 4, 9, 20]
    assert [tree["done"] for tree in watch.seen.values()] == [0, 1, 4, 9, 20]
    assert len(losses) == 20
    assert not torch.equal(watch.seen[0]["w"], watch.seen[1]["w"])


def test_a_resumed_training_remembers_what_was_seen(tmp_path):
    _, whole = watched(None)
    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path, stop_at=12)
    _, resumed = watched(tmp_path)
    assert list(resumed.seen) == list(whole.seen)
    assert all(torch.equal(resumed.seen[step]["w"], whole.seen[step]["w"]) for step in whole.seen)


def test_a_watch_ends_training_early_and_for_good(tmp_path):
    losses, _ = watched(tmp_path, stop=lambda tree: tree["done"] >= 4)
    assert len(losses) == 4
    again, watch = watched(tmp_path, stop=lambda tree: tree["done"] >= 4, stop_at=4)
    assert again == losses
    assert list(watch.seen) == [0, 1, 4]


@pytest.mark.parametrize(("steps", "per_octave", "expected"), [(1, 1, (0, 1)), (10, 1, (0, 1, 2, 4, 8, 10))])
def test_log_steps_double_and_end_at_the_last(steps, per_octave, expected):
    assert log_steps(steps, per_octave=per_octave) == expected


def test_more_looks_an_octave_lie_between():
    marks = log_steps(64, per_octave=3)
    assert set(log_steps(64)) < set(marks)
    assert list(marks) == sorted(set(marks))


def test_a_cosine_falls_from_one_to_zero():
    schedule = Schedule(warmup=0, decay=1.0, shape="cosine")
    assert schedule.factor(0, 100) == 1
    assert schedule.factor(50, 100) == pytest.approx(0.5)
    assert schedule.factor(99, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
