"""The training loop of small networks: deterministic, with a schedule, checkpoints and exact resume.

The batch of a step is a function of the step alone, so a run that is killed and resumed sees the same batches in the
same order and, on the same machine and thread count, ends with the same numbers.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle


@dataclass(frozen=True)
class Schedule:
    """Factor on every learning rate: linear warm-up, a plateau at 1, linear decay to 0 (fractions of all steps)."""

    warmup: float = 0.02
    decay: float = 0.3

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (0-based) of `steps`."""
        done = (step + 1) / steps
        rise = done / self.warmup if self.warmup else 1.0
        fall = (1 - step / steps) / self.decay if self.decay else 1.0
        return min(1.0, rise, fall)


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    schedule: Schedule | None = None,
    clip: float | None = None,
    checkpoint: Path | None = None,
    every: int = 200,
    identity: dict[str, Any] | None = None,
    report: Callable[[int, float], None] | None = None,
    progress: str | None = None,
) -> list[float]:
    """Minimise `loss_of_step(step)` over `steps` steps and return the loss of each step.

    `checkpoint` is a file that is written every `every` steps and read at the start: a run that was interrupted goes on
    from it. `identity` describes the run; a checkpoint of another identity is refused with `SondeError`.
    `report(step, loss)` is called after each step; `progress` is the label of a progress bar.
    """
    schedule = schedule or Schedule()
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = _restore(checkpoint, module, optimizers, identity)
    bar = tqdm(total=steps, initial=len(losses), desc=progress, disable=progress is None)
    with contextlib.closing(bar):
        for step in range(len(losses), steps):
            factor = schedule.factor(step, steps)
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr * factor
                optimizer.zero_grad(set_to_none=True)
            loss = loss_of_step(step)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
            if not losses[-1] < float("inf"):
                raise SondeError(f"the loss became {losses[-1]} at step {step}: lower the learning rate")
            if report is not None:
                report(step, losses[-1])
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
                _save(checkpoint, module, optimizers, identity, losses)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def _save(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], identity, losses) -> None:
    tree = {
        "identity": identity,
        "losses": torch.tensor(losses, dtype=torch.float64),
        "module": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    save_bundle(path, tree)


def _restore(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], identity) -> list[float]:
    tree = load_bundle(path)
    if tree["identity"] != identity:
        raise SondeError(f"{path} belongs to another configuration: {tree['identity']}, not {identity}")
    module.load_state_dict(tree["module"])
    for optimizer, state in zip(optimizers, tree["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return tree["losses"].tolist()
