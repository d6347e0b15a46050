"""Training a one-layer transformer until it groks, and what its checkpoints say of the way there (arXiv:2301.05217).

Full batch AdamW with weight decay 1 and a warm-up of ten steps, cross entropy in float64. Checkpoints every so many
steps; the key frequencies are chosen on the last one and applied to all earlier ones. Phases:

    memorised      train loss < 0.01
    circuit onset  restricted loss (test) < ½ ln P
    displacement   excluded loss (train) > 1, after memorisation
    grokked        test accuracy > 0.99
    cleanup        from the steepest fall of log test loss until the Gini coefficient of the embedding stops rising
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.data.groups import GroupTask
from sonde.data.modular import ModularTask
from sonde.dynamics.fourier import by_frequency, gini, row_norms
from sonde.dynamics.harmonics import Harmonics
from sonde.dynamics.progress_measures import Grid, Measures, cross_entropy, measures
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.nets.loop import Schedule, train
from sonde.nets.one_layer import OneLayer, Shape
from sonde.nets.pair_networks import PairMLP, PairNetwork, PairTransformer, element_embedding, logit_map

Architecture = Literal["one-layer", "mlp", "transformer"]
_WARMUP = 10
_SETTLED = 0.005  # Gini points per 100 steps


@dataclass(frozen=True)
class Grokking:
    """Settings of one training: task (a sum, or a product in a group), sizes, optimiser, steps between checkpoints.

    The paper trains 40,000 steps at a learning rate of 1e-3; three times that gives the same network in a third of the
    steps. `seed` is that of the weights; the split has its own in the task. `architecture` is the paper's one-layer
    transformer, a perceptron, or a transformer of `layers` blocks, which alone takes `dropout`; `l1` is the weight of
    the sum of absolute weights in the loss.
    """

    task: ModularTask | GroupTask = field(default_factory=ModularTask)
    shape: Shape = field(default_factory=Shape)
    steps: int = 5000
    lr: float = 3e-3
    weight_decay: float = 1.0
    every: int = 100
    seed: int = 0
    architecture: Architecture = "one-layer"
    layers: int = 2
    dropout: float = 0.0
    l1: float = 0.0

    def __post_init__(self) -> None:
        if self.task.modulus != self.shape.modulus:
            raise SondeError(f"the task has {self.task.modulus} elements, the network {self.shape.modulus}")
        if self.steps < 1 or self.every < 1:
            raise SondeError(f"steps is {self.steps} and every {self.every}; give 1 or more")
        if self.architecture not in get_args(Architecture):
            raise SondeError(f"architecture {self.architecture!r} is unknown: use {', '.join(get_args(Architecture))}")
        if self.dropout and self.architecture != "transformer":
            raise SondeError(f"dropout is of the architecture 'transformer', not of {self.architecture!r}")

    def network(self) -> PairNetwork:
        """A fresh network of these settings."""
        if self.architecture == "mlp":
            return PairMLP(self.shape, seed=self.seed)
        if self.architecture == "transformer":
            return PairTransformer(self.shape, layers=self.layers, dropout=self.dropout, seed=self.seed)
        return OneLayer(self.shape, seed=self.seed)


@dataclass(frozen=True)
class History:
    """Checkpoints of one training: the step of each (0: before the first), and its weights in order."""

    settings: Grokking
    steps: tuple[int, ...]
    states: tuple[dict[str, Tensor], ...]

    def network(self, index: int = -1) -> PairNetwork:
        """The network of a checkpoint."""
        net = self.settings.network()
        net.load_state_dict({name: tensor.float() for name, tensor in self.states[index].items()})
        return net.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write all checkpoints as one safetensors file."""
        tree = {"settings": asdict(self.settings), "steps": list(self.steps), "states": list(self.states)}
        save_bundle(path, tree)

    @staticmethod
    def load(path: str | Path) -> "History":
        """Read what `save` wrote. Raises `SondeError` for other files."""
        tree = load_bundle(path)
        try:
            given = dict(tree["settings"])
            task = GroupTask if "group" in given["task"] else ModularTask
            given |= {"task": task(**given["task"]), "shape": Shape(**given["shape"])}
            return History(Grokking(**given), tuple(tree["steps"]), tuple(tree["states"]))
        except (KeyError, TypeError) as error:
            raise SondeError(f"{path} holds no history of a grokking network") from error


def grok(settings: Grokking, *, folder: Path | None = None, progress: str | None = None) -> History:
    """Train a network and keep its checkpoints. With `folder`, an interrupted training goes on from there."""
    task = settings.task
    net = settings.network()
    pairs, labels = task.pairs[task.trained], task.labels[task.trained]
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
    )
    identity = asdict(settings)
    kept = folder / "history.safetensors" if folder is not None else None
    history = History(settings, (0,), (_state(net),))
    if kept is not None and kept.exists():
        history = History.load(kept)
        if history.settings != settings:
            raise SondeError(f"{kept} belongs to another training: choose another folder")

    def loss_of_step(step: int) -> Tensor:
        with torch.random.fork_rng(enabled=settings.dropout > 0):
            if settings.dropout:
                torch.manual_seed(step)
            loss = cross_entropy(net(pairs), labels)
        if settings.l1:
            loss = loss + settings.l1 * sum(p.abs().sum() for p in net.parameters())
        return loss

    def report(step: int, loss: float) -> None:
        nonlocal history
        done = step + 1
        if done <= history.steps[-1] or (done % settings.every and done != settings.steps):
            return
        history = History(settings, (*history.steps, done), (*history.states, _state(net)))
        if kept is not None and (len(history.steps) % 10 == 0 or done == settings.steps):
            history.save(kept)

    train(
        net,
        loss_of_step,
        [optimizer],
        steps=settings.steps,
        schedule=Schedule(warmup=_WARMUP / settings.steps, decay=0.0),
        checkpoint=None if folder is None else folder / "checkpoint.safetensors",
        every=settings.every,
        identity=identity,
        report=report,
        progress=progress,
    )
    return history


def _state(net: PairNetwork) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@torch.no_grad()
def grid_of(net: torch.nn.Module, task: ModularTask | GroupTask) -> Grid:
    """Logits on all pairs of a task, of any network that takes pairs; with the components that its circuit may use."""
    return Grid(task.modulus, net(task.pairs), task.labels, task.trained, harmonics_of(task))


def harmonics_of(task: ModularTask | GroupTask) -> Harmonics:
    """Frequencies of a + b, or of a - b where that is the task; components of a group."""
    if isinstance(task, GroupTask):
        return Harmonics.of_group(task.table, name=f"the group {task.group.upper()}")
    if task.operation == "subtract":
        return Harmonics.modulo(task.modulus, task.labels.view(task.modulus, task.modulus))
    return Harmonics.modulo(task.modulus)


@dataclass(frozen=True)
class Point:
    """One checkpoint on the way: progress measures and what the weights are like.

    Attributes:
        step: training steps done.
        measures: see `sonde.dynamics.progress_measures`.
        gini_embedding, gini_logits: concentration of the Fourier rows of W_E, and of W_L = W_out W_U over classes (of
            all rows in the components of a group).
        squared_weights: sum of squares of all weights, and by matrix.

    """

    step: int
    measures: Measures
    gini_embedding: float
    gini_logits: float
    squared_weights: float
    squared_by_matrix: dict[str, float]


def trace(history: History, keys: Sequence[int], *, progress: str | None = None) -> list[Point]:
    """The measures of every checkpoint, for key frequencies that were chosen on the last.

    Warns where the last checkpoint is better on the pairs that are said to be held out: the split is not its own.
    """
    from tqdm import tqdm

    task, points = history.settings.task, []
    components = harmonics_of(task).components if isinstance(task, GroupTask) else None
    for index in tqdm(range(len(history.steps)), desc=progress, disable=progress is None, unit="checkpoint"):
        net = history.network(index)
        squared = {name: float(tensor.double().square().sum()) for name, tensor in net.state_dict().items()}
        points.append(
            Point(
                step=history.steps[index],
                measures=measures(grid_of(net, task), keys),
                gini_embedding=gini(_norms(element_embedding(net), components)),
                gini_logits=gini(_norms(logit_map(net), components)),
                squared_weights=sum(squared.values()),
                squared_by_matrix=squared,
            )
        )
    last = points[-1].measures
    if last.train > last.test:
        warnings.warn(
            f"the loss on trained pairs ({last.train:.2g}) is above that on the others ({last.test:.2g}): "
            "is this the split that the network was trained on?",
            stacklevel=2,
        )
    return points


def _norms(matrix: Tensor, components: dict[int, Tensor] | None) -> Float[Tensor, " rows"]:
    if components is None:
        return row_norms(len(matrix), matrix)
    return torch.cat([(q.T @ matrix.double()).norm(dim=1) for q in components.values()])


@dataclass(frozen=True)
class Phases:
    """Steps at which each phase begins; None where it was not seen.

    `cleanup` is its first and last step. `says` is the reading in one sentence.
    """

    memorised: int | None
    onset: int | None
    displaced: int | None
    half: int | None
    grokked: int | None
    cleanup: tuple[int, int] | None

    @property
    def says(self) -> str:
        """The transition in words, or that there was none."""
        if self.grokked is None:
            return "no grokking transition found"
        return f"memorised by step {self.memorised}, circuit from step {self.onset}, grokked at step {self.grokked}"


def phases(points: Sequence[Point], modulus: int) -> Phases:
    """When each phase began. Without a test accuracy above 0.99 there is no transition, and no step is invented."""
    memorised = _first(points, lambda p: p.measures.train < 0.01)
    grokked = _first(points, lambda p: p.measures.accuracy_test > 0.99)
    half = _first(points, lambda p: p.measures.accuracy_test > 0.5)
    if grokked is None:
        return Phases(memorised, None, None, half, None, None)
    level = 0.5 * math.log(modulus)
    onset = _first(points, lambda p: p.measures.restricted["test"] < level)
    displaced = _first(points, lambda p: memorised is not None and p.step > memorised and p.measures.excluded > 1)
    return Phases(memorised, onset, displaced, half, grokked, _cleanup(points))


def _first(points: Sequence[Point], holds: Any) -> int | None:
    return next((point.step for point in points if holds(point)), None)


def _cleanup(points: Sequence[Point]) -> tuple[int, int] | None:
    if len(points) < 3:
        return None
    falls = [
        (math.log(before.measures.test) - math.log(after.measures.test)) / (after.step - before.step)
        for before, after in itertools.pairwise(points)
    ]
    start = max(range(len(falls)), key=falls.__getitem__)
    for before, after in itertools.pairwise(points[start:]):
        if (after.gini_embedding - before.gini_embedding) / (after.step - before.step) * 100 < _SETTLED:
            return points[start].step, before.step
    return points[start].step, points[-1].step


def key_frequencies_by_embedding(net: PairNetwork) -> tuple[int, ...]:
    """Frequencies whose norm in W_E is above a quarter of the largest: the rule of a public demonstration."""
    norms = by_frequency(net.shape.modulus, row_norms(net.shape.modulus, element_embedding(net)))
    order = norms.argsort(descending=True).tolist()
    return tuple(i + 1 for i in order if norms[i] > norms.max() / 4)
