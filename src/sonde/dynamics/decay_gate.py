"""Is a skill that is gone erased, or only switched off? What other ways of reading or mending the network still find.

    masked readout    logits limited to the task's alphabet
    linear readout    a softmax probe for the next symbol, on the last stream of the frozen network
    light revival     training all tasks again with almost everything frozen: unembedding and norms, or changes of rank
    1 graft             one module at a time replaced by its copy from before: the share of the skill that comes back
    interpolation     loss between the weights before and after, above the straight line between the two: a barrier
    CKA               of the streams before and after, on the task's items

    gating index      g = (s_best - s) / (1 - s)     s_best: the best of masked, linear and light revival

g >= 0.7: gated. g <= 0.3: scrambled. Else mixed. s is the normalised skill (`sonde.dynamics.decay_metrics`), each
reading against the floor of its own kind. CKA is linear, of centred rows (Kornblith et al. 2019, arXiv:1905.00414).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.data.task_mixture import Task
from sonde.dynamics.decay import Branching, Curve, Point, Stage
from sonde.dynamics.decay_scores import Scorer
from sonde.dynamics.low_rank import is_low_rank, low_rank
from sonde.errors import SondeError

GATED, SCRAMBLED = 0.7, 0.3
_PROBE_ROWS, _PENALTY, _LEAST = 128, 1e-2, 1e-12
_LIGHT_LR = 1e-2  # of changes of rank 1, which have few parameters
_BETWEEN = 9  # points of the line between two sets of weights, its ends among them


@dataclass(frozen=True)
class Gate:
    """What is left of a skill by every reading, as normalised skill, and the gating index."""

    skill: float
    masked: float
    linear: float
    light: Mapping[str, float]
    grafts: Mapping[str, float]
    barrier: float
    cka: tuple[float, ...]

    @property
    def best(self) -> float:
        """The best of masked and linear readout and light revivals."""
        return max(self.masked, self.linear, *self.light.values())

    @property
    def index(self) -> float:
        """The gating index g. Raises `SondeError` as `gating_index` does."""
        return gating_index(self.skill, self.best)

    @property
    def verdict(self) -> str:
        """Gated, mixed or scrambled; `kept` where nothing is lost that could be either."""
        try:
            return verdict(self.index)
        except SondeError:
            return "kept"


def gating_index(skill: float, best: float) -> float:
    """The index g = (s_best - s) / (1 - s). Raises `SondeError` for a skill that is not lost."""
    if skill >= 1:
        raise SondeError(f"the skill is {skill:.3g} of what it was: nothing is lost that could be gated or scrambled")
    return (best - skill) / (1 - skill)


def verdict(index: float) -> str:
    """What a gating index says."""
    return "gated" if index >= GATED else "scrambled" if index <= SCRAMBLED else "mixed"


def gate(
    branching: Branching,
    before: Point,
    after: Point,
    tasks: Sequence[str],
    *,
    floor: Mapping[str, float],
    untrained: Point,
    light_steps: int = 32,
) -> Gate:
    """Read a lost skill in every way.

    `before` and `after` are the points of the drop, `floor` the `loss` and `masked_loss` of the tasks in a network that
    never read them, and `untrained` that network or one that was never trained, the floor of the linear readout.
    `light_steps` are those of each light revival, after which the loss is taken.
    """
    module = branching.module
    chosen = [branching.joint.task(name) for name in tasks]
    scorer = Scorer(chosen)

    def mean(measure: str, point: Point) -> float:
        scores = scorer(point.into(module))
        return sum(scores[task.name][measure] for task in chosen) / len(chosen)

    def normalised(value: float, measure: str, low: float | None = None) -> float:
        low = floor[measure] if low is None else low
        high = mean(measure, before)
        if not high < low:
            raise SondeError("cannot measure decay of a skill the model does not have: it was not below the floor")
        return (low - value) / (low - high)

    linear = [
        sum(linear_readout(point.into(module), task) for task in chosen) / len(chosen)
        for point in (before, after, untrained)
    ]
    readable = linear[2] - linear[0]
    light: dict[str, Callable[[], Curve]] = {
        "unembedding and norms": lambda: _revived(branching, after, light_steps, _at_the_end),
        "changes of rank 1": lambda: _revived_by_rank(branching, after, light_steps),
    }
    lost = mean("loss", after)
    skill = normalised(lost, "loss")
    return Gate(
        skill=skill,
        masked=normalised(mean("masked_loss", after), "masked_loss"),
        linear=(linear[2] - linear[1]) / readable if readable > 0 else skill,
        light={name: normalised(float(revived().mean(tasks, "loss").min()), "loss") for name, revived in light.items()},
        grafts={name: normalised(mean("loss", grafted(before, after, name)), "loss") - skill for name in parts(module)},
        barrier=barrier(lambda point: mean("loss", point), before, after),
        cka=tuple(
            cka(first, second)
            for first, second in zip(*(_streams(point.into(module), chosen) for point in (before, after)), strict=True)
        ),
    )


def linear_readout(module: nn.Module, task: Task) -> float:
    """Loss in nats, on the task's items, of a softmax probe on the last stream, fitted to rows of its training."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = task.rows[:_PROBE_ROWS].long()
    # places that are scored in every item; where that differs from item to item, all that hold a symbol
    always = task.scored.all(0)
    places = always.expand(len(rows), -1) if always.any() else rows != (-1 if task.pad is None else task.pad)
    symbols = torch.tensor(task.alphabet if task.alphabet is not None else task.held.unique().tolist())
    places = places & torch.isin(rows, symbols)
    places[:, 0] = False

    x, y = _last_stream(module, rows, places), rows[places]
    scale = StandardScaler().fit(x)
    probe = LogisticRegression(C=1 / (_PENALTY * len(x)), max_iter=1000).fit(scale.transform(x), y)
    answers = task.answers[task.scored]
    probabilities = probe.predict_proba(scale.transform(_last_stream(module, task.held, task.scored)))
    column = {token: i for i, token in enumerate(probe.classes_.tolist())}
    given = torch.tensor(
        [
            row[column[token]] if token in column else 0.0
            for row, token in zip(probabilities, answers.tolist(), strict=True)
        ]
    )
    return float(-given.clamp(min=_LEAST).log().mean())


@torch.no_grad()
def _last_stream(module: nn.Module, tokens: Tensor, places: Tensor) -> np.ndarray:
    """The normed last stream of a `Transformer` at the place before each of `places`."""
    stream = module.norm(module.streams(tokens)[-1])  # type: ignore[operator]
    return stream[:, :-1][places[:, 1:]].numpy()


def cka(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> float:
    """Linear CKA of two sets of activations of the same items, 1 where one is a rotation of the other."""
    x, y = (rows.double() - rows.double().mean(0) for rows in (first, second))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / scale) if scale else 0.0


def barrier(loss: Callable[[Point], float], before: Point, after: Point) -> float:
    """The most that the loss between two sets of weights rises above the straight line between their losses."""
    shares = torch.linspace(0, 1, _BETWEEN).tolist()
    losses = [loss(between(before, after, share)) for share in shares]
    line = [losses[0] + (losses[-1] - losses[0]) * share for share in shares]
    return max(value - base for value, base in zip(losses, line, strict=True))


def between(first: Point, second: Point, share: float) -> Point:
    """Weights on the line from `first` (share 0) to `second` (1)."""
    return Point({name: own.lerp(second.weights[name], share) for name, own in first.weights.items()})


def grafted(before: Point, after: Point, module: str) -> Point:
    """`after` with the parameters under the name `module` from `before`. Raises `SondeError` for a name without any."""
    mixed = {
        name: before.weights[name] if name == module or name.startswith(f"{module}.") else own
        for name, own in after.weights.items()
    }
    if all(mixed[name] is own for name, own in after.weights.items()):
        raise SondeError(f"no parameter is called {module!r}: there are {', '.join(after.weights)}")
    return Point(mixed)


def parts(module: nn.Module) -> tuple[str, ...]:
    """Names of what is grafted: attention and MLP of every block, embedding, unembedding, the last norm."""
    found = [name.rsplit(".", 1)[0] for name, _ in module.named_parameters() if "." in name]
    return tuple(dict.fromkeys(found))


def _at_the_end(name: str) -> bool:
    return name.startswith("unembedding") or "norm" in name


def _revived(branching: Branching, after: Point, steps: int, trainable: Callable[[str], bool]) -> Curve:
    stage = Stage("light revival", steps, per_octave=1)
    return branching.run(stage, after, trainable=trainable)[1]


def _revived_by_rank(branching: Branching, after: Point, steps: int) -> Curve:
    module = after.into(branching.module)
    with low_rank(module, rank=1, seed=branching.seed):
        start = Point.of(module, steps=after.steps)
        stage = Stage("light revival", steps, per_octave=1)
        return branching.run(stage, start, trainable=is_low_rank, learner=replace(branching.learner, lr=_LIGHT_LR))[1]


def _streams(module: nn.Module, tasks: Sequence[Task]) -> list[Tensor]:
    """Streams at every point of the network on the items of some tasks, at scored places, one matrix for each."""
    with torch.no_grad():
        streams = [module.streams(task.held)[:, :, :-1] for task in tasks]  # type: ignore[operator]
    found = [[points[task.scored[:, 1:]] for points in own] for own, task in zip(streams, tasks, strict=True)]
    return [torch.cat(layer) for layer in zip(*found, strict=True)]
