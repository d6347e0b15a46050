"""Does a rule come all of a sudden, and does memory come first? One task with endless data, and with little.

The same network is trained on fresh sequences at every step, or on a fixed set, with weight decay or without. A phase
change is a fall of most of the test loss within one doubling of the steps; grokking is a test loss that falls long
after the train loss has (Nanda et al. 2023, arXiv:2301.05217: with endless data there is a phase change and no
grokking; grokking takes limited data and regularisation).
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sonde.data.sequence_tasks import Sequences, SequenceTask
from sonde.errors import SondeError
from sonde.nets.loop import Schedule, Watch, log_steps, train
from sonde.nets.transformer import Transformer, TransformerShape

_WARMUP = 10
_TEST_SEED = 2**31 - 1
_FRESH_SEED = 2**30  # of the first fresh batch: none is the limited set or the test set


@dataclass(frozen=True)
class Arm:
    """How one network is trained: `examples` fixed sequences, or fresh ones at every step where None."""

    examples: int | None = None
    weight_decay: float = 1.0

    @property
    def name(self) -> str:
        """In words."""
        data = "endless data" if self.examples is None else f"{self.examples:,} examples"
        return f"{data}, weight decay {self.weight_decay:g}"


@dataclass(frozen=True)
class Training:
    """What all arms share. `marks` looks a doubling of the steps are taken; a batch is drawn from a fixed set too."""

    shape: TransformerShape
    steps: int = 2000
    batch: int = 256
    lr: float = 1e-3
    test: int = 1024
    marks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2 or self.batch < 1 or self.test < 1 or self.lr <= 0:
            raise SondeError(f"steps {self.steps}, batch {self.batch}, test {self.test} and lr {self.lr} are too small")


@dataclass(frozen=True)
class Look:
    """Losses in nats a predicted token, and the share of predicted tokens that are right, after `step` steps."""

    step: int
    train: float
    test: float
    accuracy: float


def learn(
    task: SequenceTask, arm: Arm, training: Training, *, checkpoint: Path | None = None, progress: str | None = None
) -> list[Look]:
    """Train one arm and look on the way. With `checkpoint`, an interrupted training goes on from there.

    Raises `SondeError` for a fixed set that is smaller than a batch of one.
    """
    if arm.examples is not None and arm.examples < 1:
        raise SondeError(f"{arm.examples} examples are none to learn from")
    net = Transformer(training.shape, seed=training.seed)
    fixed = None if arm.examples is None else task.draw(arm.examples, training.seed)
    test = task.draw(training.test, _TEST_SEED - training.seed)

    def batch(step: int) -> Sequences:
        if fixed is None:
            return task.draw(training.batch, _FRESH_SEED + training.seed * training.steps + step)
        if len(fixed.tokens) <= training.batch:
            return fixed
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(fixed.tokens), generator=generator)[: training.batch]
        return Sequences(fixed.tokens[rows], fixed.mask[rows])

    @torch.no_grad()
    def look(done: int) -> dict[str, float]:
        seen = fixed if fixed is not None else batch(done)
        logits, targets = _predicted(net, test)
        return {
            "train": float(nn.functional.cross_entropy(*_predicted(net, seen))),
            "test": float(nn.functional.cross_entropy(logits, targets)),
            "accuracy": float((logits.argmax(-1) == targets).double().mean()),
        }

    watch = Watch(log_steps(training.steps, per_octave=training.marks), look)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=training.lr, weight_decay=arm.weight_decay, betas=(0.9, 0.98), fused=True
    )
    train(
        net,
        lambda step: nn.functional.cross_entropy(*_predicted(net, batch(step))),
        [optimizer],
        steps=training.steps,
        schedule=Schedule(warmup=_WARMUP / training.steps, decay=0.0),
        checkpoint=checkpoint,
        identity={"task": repr(task), "arm": asdict(arm), "training": asdict(training)},
        watch=watch,
        progress=progress,
    )
    return [Look(step, **values) for step, values in sorted(watch.seen.items())]


def _predicted(net: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Logits and targets where the next token is to be predicted, in float64."""
    logits = net(sequences.tokens[:, :-1])
    return logits[sequences.mask].double(), sequences.tokens[:, 1:][sequences.mask]


@dataclass(frozen=True)
class Change:
    """What a training looks like.

    Attributes:
        learned: first step with a test accuracy above 0.9; None where there is none.
        memorised: first step with a train loss below a tenth of the first; None where there is none.
        sharpest: largest share of the whole fall of the test loss that one doubling of the steps takes.
        delay: `learned` over `memorised`: about 1 without grokking.

    """

    learned: int | None
    memorised: int | None
    sharpest: float
    delay: float | None


def change(looks: Sequence[Look]) -> Change:
    """Read a training. Raises `SondeError` for fewer than three looks."""
    if len(looks) < 3:
        raise SondeError(f"{len(looks)} looks at a training say nothing about its course: give 3 or more")
    first, least = looks[0].test, min(look.test for look in looks)
    learned = next((look.step for look in looks if look.accuracy > 0.9), None)
    memorised = next((look.step for look in looks if look.train < 0.1 * looks[0].train), None)
    falls = [
        before.test - after.test
        for before, after in itertools.combinations(looks, 2)
        if before.step > 0 and after.step <= 2 * before.step
    ]
    return Change(
        learned=learned,
        memorised=memorised,
        sharpest=max(0.0, *falls) / (first - least) if first > least else 0.0,
        delay=learned / memorised if learned is not None and memorised else None,
    )


def row(arm: Arm, look: Look) -> dict[str, Any]:
    """One look as a row of a table."""
    return {"arm": arm.name, **asdict(look)}
