"""The path that training takes from θ₀: weights and optimiser moments at every step, or at some, the rest recomputed.

Snapshots every `stride` steps cost T / stride times the parameters; between two of them the steps are taken again, once
for a walk in either direction. The path itself is made by the training loop of `sonde.nets`.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, grad

from sonde.dynamics.training_map import TrainingMap
from sonde.dynamics.update_rules import RuleOptimizer, clip_factor
from sonde.errors import SondeError
from sonde.nets.loop import Watch, train

_KEPT = 1 << 29  # bytes of snapshots before only some steps are kept


class State(NamedTuple):
    """Weights and moments before a step."""

    theta: Float[Tensor, " N"]
    moments: Sequence[Float[Tensor, " N"]]


@dataclass
class Trajectory:
    """The recorded path of a training map. `losses` are those of the steps' batches."""

    map: TrainingMap
    stride: int
    snapshots: dict[int, State] = field(repr=False)
    losses: list[float] = field(repr=False)
    _segment: dict[int, State] = field(default_factory=dict, repr=False)

    @property
    def end(self) -> Float[Tensor, " N"]:
        """θ_T."""
        return self.snapshots[self.map.steps].theta

    def __getitem__(self, step: int) -> State:
        """The state after `step` steps; the stretch between two snapshots is recomputed when it is first asked for."""
        if step in self.snapshots:
            return self.snapshots[step]
        if step not in self._segment:
            base = step - step % self.stride
            state = self.snapshots[base]
            self._segment = {}
            for t in range(base, min(base + self.stride, self.map.steps) - 1):
                h = clipped(self.map, gradient(self.map, state.theta, t))
                state = State(*self.map.rule.step(*state, h, lr=self.map.rate(t), count=t + 1))
                self._segment[t + 1] = state
        return self._segment[step]


def gradient(map: TrainingMap, theta: Float[Tensor, " N"], step: int) -> Float[Tensor, " N"]:
    """The gradient of a step's loss at `theta`."""
    with map.draws(step):
        return grad(lambda x: map.loss_at(x, step))(theta)


def clipped(map: TrainingMap, g: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The gradient as the map clips it."""
    return g if map.clip is None else g * clip_factor(g.norm(), map.clip)


def record(
    map: TrainingMap,
    *,
    start: Float[Tensor, " N"] | None = None,
    stride: int | None = None,
    checkpoint: Path | None = None,
    progress: str | None = None,
) -> Trajectory:
    """Train once, from θ₀ or from `start`, and keep the path. By default every step is kept, up to half a gigabyte.

    `checkpoint` is the training loop's: an interrupted recording goes on from it. Raises `SondeError` for a training
    that diverges, with its step and loss, and for a stride below 1.
    """
    theta0 = map.start if start is None else start
    bytes_kept = map.steps * map.n * (1 + map.rule.n_moments) * theta0.element_size()
    stride = stride or (1 if bytes_kept <= _KEPT else math.isqrt(map.steps) + 1)
    if stride < 1:
        raise SondeError(f"stride is {stride}; give 1 or more")
    module = copy.deepcopy(map.module)
    torch.nn.utils.vector_to_parameters(theta0.clone(), module.parameters())
    optimizer = RuleOptimizer(module.parameters(), map.rule)
    named: dict[str, Tensor] = dict(module.named_parameters())

    def loss_of_step(step: int) -> Tensor:
        x, y = map.batch(step)
        with map.draws(step):
            return map.loss(functional_call(module, named, (x,)), y)

    def look(done: int) -> list[Tensor]:
        states = [
            optimizer.state[p].get("moments") or [torch.zeros_like(p)] * map.rule.n_moments for p in named.values()
        ]
        moments = [torch.cat([moment.flatten() for moment in kind]) for kind in zip(*states, strict=True)]
        return [torch.cat([p.detach().flatten() for p in named.values()]), *moments]

    watch = Watch({*range(0, map.steps, stride), map.steps}, look)
    identity = map.identity() | {"from": theta0.double().square().sum().item(), "stride": stride}
    losses = train(
        module,
        loss_of_step,
        [optimizer],
        steps=map.steps,
        schedule=map.schedule,
        clip=map.clip,
        checkpoint=checkpoint,
        identity=identity,
        watch=watch,
        progress=progress,
    )
    snapshots = {step: State(theta, moments) for step, (theta, *moments) in watch.seen.items()}
    return Trajectory(map, stride, snapshots, losses)
