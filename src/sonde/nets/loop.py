"""The training loop of small networks: deterministic, with a schedule, checkpoints and exact resume.

The batch of a step is a function of the step alone, so a run that is killed and resumed sees the same batches in the
same order and, on the same machine and thread count, ends with the same numbers.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle


@dataclass(frozen=True)
class Schedule:
    """Factor on every learning rate: linear warm-up, a plateau at 1, decay to 0 (fractions of all steps).

    The decay is linear or half a period of a cosine; `Schedule(warmup=0, decay=0)` is constant.
    """

    warmup: float = 0.02
    decay: float = 0.3
    shape: Literal["linear", "cosine"] = "linear"

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (0-based) of `steps`."""
        done = (step + 1) / steps
        rise = done / self.warmup if self.warmup else 1.0
        fall = min(1.0, (1 - step / steps) / self.decay) if self.decay else 1.0
        if self.shape == "cosine":
            fall = (1 - math.cos(math.pi * fall)) / 2
        return min(1.0, rise, fall)


def log_steps(steps: int, *, per_octave: int = 1) -> tuple[int, ...]:
    """0, 1, 2, 4, … and `steps` itself: where to look when most happens early; `per_octave` looks a doubling."""
    octaves = math.log2(steps) if steps > 1 else 0
    marks = (round(2 ** (i / per_octave)) for i in range(math.floor(octaves * per_octave) + 1))
    return tuple(sorted({0, *marks, steps}))


@dataclass
class Watch:
    """Looks at a training on its way, and remembers.

    `look(done)` is called after `done` steps, for each of `steps` (0: before the first), and returns a tree that
    `sonde.files.save_bundle` takes; a resumed training has in `seen` what the interrupted one saw. Training ends early
    where `stop` says so of what was seen.
    """

    steps: Collection[int]
    look: Callable[[int], Any]
    stop: Callable[[Any], bool] | None = None
    seen: dict[int, Any] = field(default_factory=dict)

    def after(self, done: int) -> bool:
        """Look where it is time to; whether training shall end."""
        if done in self.steps and done not in self.seen:
            self.seen[done] = self.look(done)
        return self.stop is not None and done in self.seen and self.stop(self.seen[done])


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
    watch: Watch | None = None,
    progress: str | None = None,
) -> list[float]:
    """Minimise `loss_of_step(step)` over `steps` steps and return the loss of each step (fewer if `watch` ended it).

    `checkpoint` is a file that is written every `every` steps and read at the start: a run that was interrupted goes on
    from it. `identity` describes the run; a checkpoint of another identity is refused with `SondeError`.
    `report(step, loss)` is called after each step; `watch` looks at chosen steps; `progress` labels a progress bar.
    """
    schedule = schedule or Schedule()
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = _restore(checkpoint, module, optimizers, identity, watch)
    if watch is not None and watch.after(len(losses)):
        return losses
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
            ends = (watch is not None and watch.after(step + 1)) or step + 1 == steps
            if checkpoint is not None and ((step + 1) % every == 0 or ends):
                _save(checkpoint, module, optimizers, identity, losses, watch)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            if ends:
                break
    return losses


def _save(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], identity, losses, watch) -> None:
    tree = {
        "identity": identity,
        "losses": torch.tensor(losses, dtype=torch.float64),
        "module": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "seen": None if watch is None else dict(watch.seen),
    }
    save_bundle(path, tree)


def _restore(
    path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], identity, watch
) -> list[float]:
    tree = load_bundle(path)
    if tree["identity"] != identity:
        raise SondeError(f"{path} belongs to another configuration: {tree['identity']}, not {identity}")
    module.load_state_dict(tree["module"])
    for optimizer, state in zip(optimizers, tree["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if watch is not None:
        watch.seen.update(tree["seen"] or {})
    return tree["losses"].tolist()
