"""What keeps a dropped skill: replay, self-generated replay, L2 to the start, EWC, adapters only, shrink-and-perturb.

    replay            B keeps 0.1 % or 1 % of the batch
    self-replay       the share goes to rows that the network itself wrote before the drop, from B's first token
    L2 to the start   loss + λ |θ - θ0|²
    EWC               loss + λ/2 sum_i F_i (θ_i - θ0_i)², F the diagonal Fisher of B       (Kirkpatrick et al. 2017)
    changes of rank r only these are trained after the drop
    shrink-perturb    θ <- a θ + b θ', θ' a fresh network: at the switch, for plasticity   (Ash & Adams 2020)
    low rate          a tenth of the learning rate

Each is a drop stage with one thing changed, from the same point; the row of the plain drop is the control of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sonde.data.task_mixture import Mixture, Task
from sonde.dynamics.decay import Branching, Curve, Penalty, Point, Stage
from sonde.dynamics.decay_scores import logits_of, next_token_loss
from sonde.dynamics.low_rank import is_low_rank, low_rank
from sonde.errors import SondeError

Baseline = Literal["plain", "replay", "self-replay", "l2", "ewc", "low-rank", "shrink-perturb", "low-rate"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

_ROWS = 512
_SHRINK, _PERTURB = 0.8, 0.1


@dataclass(frozen=True)
class Strengths:
    """How strong each baseline is."""

    replay: float = 0.01
    l2: float = 0.01
    ewc: float = 1000.0
    rank: int = 4
    rate: float = 0.1


def dropped_with(
    baseline: Baseline,
    branching: Branching,
    stage: Stage,
    start: Point,
    *,
    strengths: Strengths | None = None,
    fresh: nn.Module | None = None,
) -> tuple[Point, Curve]:
    """Run a drop stage with one baseline; returns its end and curve.

    `fresh` is a newly drawn network, which shrink-and-perturb needs. Raises `SondeError` for an unknown baseline and
    for a stage that drops nothing.
    """
    if baseline not in BASELINES:
        raise SondeError(f"there is no baseline {baseline!r}: choose from {', '.join(BASELINES)}")
    if not stage.drop:
        raise SondeError(f"stage {stage.name!r} drops nothing, so there is nothing to keep")
    strength = strengths or Strengths()
    own = replace(stage, name=f"{stage.name}, {baseline}")
    lost = [branching.joint.task(name) for name in stage.drop]
    if baseline == "replay":
        return branching.run(replace(own, replay=strength.replay), start)
    if baseline == "self-replay":
        written = [self_generated(start.into(branching.module), task, seed=branching.seed) for task in lost]
        by_name = {task.name: task for task in written}
        joint = Mixture(
            tuple(by_name.get(task.name, task) for task in branching.joint.tasks), dict(branching.joint.shares)
        )
        return branching.run(replace(own, replay=strength.replay), start, joint=joint)
    if baseline == "l2":
        return branching.run(own, start, penalty=l2_to(start, strength.l2))
    if baseline == "ewc":
        weight = fisher(start.into(branching.module), lost)
        return branching.run(own, start, penalty=ewc(start, weight, strength.ewc))
    if baseline == "low-rank":
        return _by_rank(branching, own, start, strength.rank)
    if baseline == "shrink-perturb":
        if fresh is None:
            raise SondeError("shrink-and-perturb needs a fresh network: give `fresh`")
        return branching.run(own, shrunk(start, Point.of(fresh)))
    if baseline == "low-rate":
        slow = replace(branching.learner, lr=branching.learner.lr * strength.rate)
        return branching.run(own, start, learner=slow)
    return branching.run(own, start)


def l2_to(start: Point, strength: float) -> Penalty:
    """λ times the squared distance from the weights of a point."""

    def penalty(module: nn.Module) -> Tensor:
        apart = [(p - start.weights[name]).square().sum() for name, p in module.named_parameters()]
        return strength * torch.stack(apart).sum()

    return penalty


def fisher(module: nn.Module, tasks: Sequence[Task], *, rows: int = 64) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information: the mean squared gradient of the loss of single rows."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    for task in tasks:
        for row in task.rows[:rows].long():
            grads = torch.autograd.grad(next_token_loss(module, row[None], task.pad), list(named.values()))
            for name, g in zip(named, grads, strict=True):
                total[name] += g.square()
            count += 1
    return {name: square / count for name, square in total.items()}


def ewc(start: Point, weight: dict[str, Tensor], strength: float) -> Penalty:
    """Half of λ times the distance from a point, each coordinate weighted by its Fisher information."""

    def penalty(module: nn.Module) -> Tensor:
        named = dict(module.named_parameters())
        apart = [(f * (named[name] - start.weights[name]).square()).sum() for name, f in weight.items()]
        return strength / 2 * torch.stack(apart).sum()

    return penalty


@torch.no_grad()
def self_generated(module: nn.Module, task: Task, *, rows: int = _ROWS, seed: int = 0) -> Task:
    """The task with rows that the network wrote itself: from each row's first token on, drawn at temperature 1.

    Rows that happen to be evaluation items are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = task.rows[:rows, :1].long()
    module.eval()
    for _ in range(task.rows.shape[1] - 1):
        chances = logits_of(module, tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    known = {tuple(row) for row in task.held.tolist()}
    fresh = torch.tensor([tuple(row) not in known for row in tokens.tolist()])
    return replace(task, rows=_not_empty(tokens[fresh], task.name))


def shrunk(start: Point, fresh: Point) -> Point:
    """Weights shrunk towards 0 with a little of a fresh network added; no state of the optimiser."""
    mixed = {name: _SHRINK * own + _PERTURB * fresh.weights[name] for name, own in start.weights.items()}
    return Point(mixed, steps=start.steps)


def _by_rank(branching: Branching, stage: Stage, start: Point, rank: int) -> tuple[Point, Curve]:
    module = start.into(branching.module)
    with low_rank(module, rank=rank, seed=branching.seed):
        begin = Point.of(module, steps=start.steps)
        _, curve = branching.run(stage, begin, trainable=is_low_rank)
    return Point.of(module, steps=start.steps + curve.times[-1]), curve


def _not_empty(rows: Int[Tensor, "n pos"], name: str) -> Int[Tensor, "n pos"]:
    if not len(rows):
        raise SondeError(f"all rows of {name!r} that the network wrote are evaluation items: draw fewer items")
    return rows
