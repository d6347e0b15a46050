"""The training loop: schedule, checkpoints, exact resume."""

from itertools import pairwise

import pytest
import torch

from sonde.errors import SondeError
from sonde.nets.loop import Schedule, train

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
