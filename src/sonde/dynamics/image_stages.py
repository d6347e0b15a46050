"""Which statistics of its classes does a network use, and when? Losses on edited and on made data over training.

At steps 1, 2, 4, … a classifier is shown rows of one class with the statistics of another, which carry the label of
that other, and rows that have nothing but the statistics of their class (Belrose et al. 2024, arXiv:2402.04362). A
network that follows these statistics is right about both. Where the loss falls first and rises later, they were used
and then something finer was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sonde.data.digits import Digits
from sonde.dynamics.class_edits import ClassEdits
from sonde.dynamics.maxent import gaussian, sample_maxent
from sonde.nets.ensemble import Ensemble
from sonde.nets.loop import Schedule, Watch, log_steps, train

Batch = Callable[[int], tuple[Tensor, Tensor]]

MADE = ("order 1 in the box", "independent coordinates", "Gaussian", "order 2 in the box", "order 3 in the box")
EDITED = ("mean shift", "quantiles", "transport")
REAL = "real"


class Rows(NamedTuple):
    """Rows to be judged and the labels that count as right."""

    x: Float[Tensor, "n d"]
    y: Int[Tensor, " n"]


def edited_sets(
    data: Digits,
    *,
    seed: int = 0,
    per_class: int = 1000,
    third: bool = True,
    steps: int = 1500,
    progress: str | None = None,
) -> tuple[dict[str, Rows], dict[str, float]]:
    """Test sets by name, and the largest relative error of any moment among the classes of each made set.

    Edits act on the test rows with statistics of the training rows. `third` includes the sample of order 3, which takes
    a few seconds a class for `steps` steps; it has d³/6 third moments to meet, and with fewer numbers than that to
    choose, `per_class` x d, its rows come to resemble the data themselves.
    """
    edits = ClassEdits(data.train_x, data.train_y)
    target = edits.other_classes(data.test_y, seed=seed)
    x, y = data.test_x.double(), data.test_y
    sets = {REAL: Rows(x, y)}
    sets["mean shift"] = Rows(edits.mean_shift(x, y, target), target)
    sets["quantiles"] = Rows(edits.quantiles(x, y, target, seed=seed), target)
    sets["transport"] = Rows(edits.transport(x, y, target), target)
    labels = torch.arange(len(edits.classes)).repeat_interleave(per_class)
    sets["independent coordinates"] = Rows(edits.independent(labels, seed=seed), labels)
    sets["Gaussian"] = Rows(
        torch.cat([gaussian(c, per_class, seed=seed + i) for i, c in enumerate(edits.classes)]), labels
    )
    errors: dict[str, float] = {}
    for order in (1, 2, 3) if third else (1, 2):
        classes = tqdm(edits.classes, desc=f"{progress}, order {order}", disable=progress is None, unit="class")
        made = [
            sample_maxent(c, per_class, order=order, seed=seed + i, steps=steps if order == 3 else None)
            for i, c in enumerate(classes)
        ]
        name = f"order {order} in the box"
        sets[name] = Rows(torch.cat([sample.x for sample in made]), labels)
        errors[name] = max(max(sample.errors.values()) for sample in made)
    return {name: Rows(rows.x.float(), rows.y) for name, rows in sets.items()}, errors


@dataclass(frozen=True)
class Stage:
    """What one network says of one set after `step` steps: mean cross entropy in nats, and accuracy."""

    step: int
    member: int
    rows: str
    loss: float
    accuracy: float


def follow(
    networks: Sequence[nn.Module],
    batch: Batch,
    sets: Mapping[str, Rows],
    *,
    steps: int,
    lr: float,
    optimizer: str = "sgd",
    per_octave: int = 1,
    checkpoint: Path | None = None,
    identity: dict | None = None,
    progress: str | None = None,
) -> list[Stage]:
    """Train networks of one shape side by side on `batch(step)`, and judge all sets at log-spaced steps.

    `optimizer` is "sgd", with momentum 0.9 as for the digits, or "adam". An interrupted training goes on from
    `checkpoint`.
    """
    many = Ensemble(networks)

    def look(done: int) -> list[dict]:
        with torch.no_grad():
            return [
                asdict(Stage(done, member, name, *_judged(logits, rows.y)))
                for name, rows in sets.items()
                for member, logits in enumerate(many(rows.x))
            ]

    def loss_of_step(step: int) -> Tensor:
        x, y = batch(step)
        return sum((nn.functional.cross_entropy(logits, y) for logits in many(x)), torch.zeros(()))

    watch = Watch(log_steps(steps, per_octave=per_octave), look)
    rule = (
        torch.optim.Adam(many.parameters(), lr) if optimizer == "adam" else torch.optim.SGD(many.parameters(), lr, 0.9)
    )
    train(
        many,
        loss_of_step,
        [rule],
        steps=steps,
        schedule=Schedule(warmup=0.0, decay=0.0),
        checkpoint=checkpoint,
        identity=identity,
        watch=watch,
        progress=progress,
    )
    return [Stage(**row) for _, rows in sorted(watch.seen.items()) for row in rows]


def _judged(logits: Tensor, y: Tensor) -> tuple[float, float]:
    loss = float(nn.functional.cross_entropy(logits.double(), y))
    return loss, float((logits.argmax(-1) == y).double().mean())


@dataclass(frozen=True)
class Course:
    """A loss over training: its least value, the step of that, the last value, and how far it rose, last / least."""

    least: float
    at: int
    last: float

    @property
    def rise(self) -> float:
        """Last over least: 1 for a loss that never rose."""
        return self.last / self.least


def course(stages: Sequence[Stage], rows: str, member: int) -> Course:
    """The course of one network's loss on one set. Steps before the first do not count."""
    own = sorted((s for s in stages if s.rows == rows and s.member == member and s.step > 0), key=lambda s: s.step)
    best = min(own, key=lambda s: s.loss)
    return Course(best.loss, best.step, own[-1].loss)


def peak(stages: Sequence[Stage], rows: str, member: int) -> int:
    """The first step at which the accuracy of one network on one set is largest."""
    own = sorted((s for s in stages if s.rows == rows and s.member == member), key=lambda s: s.step)
    return max(own, key=lambda s: (s.accuracy, -s.step)).step
