"""How fast does a skill go, how much is left, how cheaply does it come back? Numbers of a curve, or a score matrix.

skill             s_t = (floor - loss_t) / (floor - loss_0); floor: the loss of a network never trained on the task
half-life         first crossing of ½, linear in log2(1 + t); ">M" where there is none in M steps
area under decay  AUD = ∫ s d log2(1 + t) / log2(1 + M)
savings ratio     R = steps to the criterion from scratch / steps to it in revival (Ebbinghaus 1885)
score matrix      R_ij: score on task j after stage i; b_j: before anything

ACC = mean_j R_Tj   BWT = mean_{j<T} (R_Tj - R_jj)   FWT = mean_{j>1} (R_{j-1,j} - b_j)     (Lopez-Paz & Ranzato 2017)
f_j = max_{l<T} R_lj - R_Tj                                                                (Chaudhry et al. 2018)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.stats.solve import effective_rank

CRITERION = {"accuracy": 0.95, "exact": 0.5}
_LONGEST = 10  # times the curve's length: the longest time constant that is fitted
GAP_STEPS = 64  # after a switch, in which the stability gap is looked for


@dataclass(frozen=True)
class HalfLife:
    """Where a curve first crosses the level. `value` is None where it does not within `until` steps.

    `crossings` counts how often the curve goes below: above 1 it is not monotone, and the first is what is reported.
    """

    value: float | None
    until: int
    crossings: int
    level: float = 0.5

    @property
    def censored(self) -> bool:
        """Whether the curve stayed above the level to the end."""
        return self.value is None

    @property
    def time(self) -> float:
        """The crossing, or the end where there was none: what survival analysis takes beside `censored`."""
        return float(self.until) if self.value is None else self.value

    def __str__(self) -> str:
        if self.value is None:
            return f">{self.until}"
        return f"{self.value:.3g}" + (f" (first of {self.crossings} crossings)" if self.crossings > 1 else "")


def reached(scores: Mapping[str, float]) -> bool:
    """The criterion of having learned: token accuracy 0.95 and half of the rows right as a whole."""
    return all(scores[name] >= least for name, least in CRITERION.items())


def skill(loss: ArrayLike, *, floor: float) -> Float[np.ndarray, " times"]:
    """Normalised skill from losses: 1 at the start, 0 at the floor, below 0 beyond it; it is not clipped.

    Raises `SondeError` where the loss at the start is not below the floor: there is no skill that could decay.
    """
    losses = np.asarray(loss, dtype=np.float64)
    if not losses[0] < floor:
        raise SondeError(
            f"cannot measure decay of a skill the model does not have: its loss is {losses[0]:.3g} at the start, and "
            f"{floor:.3g} in a network that was never trained on it"
        )
    return (floor - losses) / (floor - losses[0])


def half_life(times: Sequence[int], values: ArrayLike, *, level: float = 0.5) -> HalfLife:
    """The first crossing of `level` from above, linear in log2(1 + t).

    Raises `SondeError` for a curve that begins below the level, and for fewer than two points.
    """
    at, s = _curve(times, values)
    if s[0] < level:
        raise SondeError(
            f"cannot measure decay of a skill the model does not have: it begins at {s[0]:.3g}, below {level:g}"
        )
    down = np.flatnonzero((s[:-1] >= level) & (s[1:] < level))
    if not len(down):
        return HalfLife(None, int(times[-1]), 0, level)
    i = down[0]
    place = at[i] + (at[i + 1] - at[i]) * (s[i] - level) / (s[i] - s[i + 1])
    return HalfLife(float(2**place - 1), int(times[-1]), len(down), level)


def area_under_decay(times: Sequence[int], values: ArrayLike) -> float:
    """AUD: the mean of the curve over log2(1 + t), by trapezoids; 1 for a skill that stays."""
    at, s = _curve(times, values)
    return float(np.trapezoid(s, at) / (at[-1] - at[0]))


def savings(scratch: int | None, revival: int | None, *, scratch_until: int, revival_until: int) -> tuple[float, str]:
    """The savings ratio and its sign: "=" exact, ">" or "<" where one of the two never met the criterion, as a bound.

    A step count of 0 (the criterion was never lost) counts as 1. Raises `SondeError` where neither met it.
    """
    if scratch is None and revival is None:
        raise SondeError(
            f"neither training from scratch ({scratch_until} steps) nor revival ({revival_until}) met the criterion: "
            "there is no ratio; train longer"
        )
    ratio = (scratch if scratch is not None else scratch_until) / max(1, revival_until if revival is None else revival)
    return ratio, ">" if scratch is None else "<" if revival is None else "="


@dataclass(frozen=True)
class Fit:
    """A law of decay, its parameters, and the squared error on points that it was not fitted to."""

    law: str
    parameters: dict[str, float]
    held_out_error: float


def fits(times: Sequence[int], values: ArrayLike) -> tuple[Fit, Fit]:
    """The power law (1 + t/tau)^-alpha and the exponential (1 - floor) exp(-t/tau) + floor, the better one first.

    Each is fitted to every other point and compared on the rest. Raises `SondeError` for fewer than eight points.
    """
    from scipy.optimize import least_squares

    t, s = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(t) < 8:
        raise SondeError(f"{len(t)} points cannot tell a power law from an exponential: score at 8 steps or more")
    own, other = np.arange(len(t)) % 2 == 0, np.arange(len(t)) % 2 == 1
    laws = {
        "power": (lambda p, t: (1 + t / np.exp(p[0])) ** -np.exp(p[1]), ("tau", "alpha"), (np.exp, np.exp)),
        "exponential": (
            lambda p, t: (1 - p[1]) * np.exp(-t / np.exp(p[0])) + p[1],
            ("tau", "floor"),
            (np.exp, float),
        ),
    }
    found = []
    for law, (curve, names, natural) in laws.items():
        best = min(
            (
                least_squares(
                    lambda p, curve=curve: curve(p, t[own]) - s[own],
                    (math.log(1 + start), 0.0),
                    bounds=((-3.0, -2.0), (math.log(_LONGEST * (1 + t[-1])), 1.0 if law == "exponential" else 5.0)),
                )
                for start in (t[-1] / 100, t[-1] / 10, t[-1])
            ),
            key=lambda result: result.cost,
        )
        error = float(np.mean((curve(best.x, t[other]) - s[other]) ** 2))
        parameters = {name: float(f(x)) for name, f, x in zip(names, natural, best.x, strict=True)}
        found.append(Fit(law, parameters, error))
    first, second = sorted(found, key=lambda fit: fit.held_out_error)
    return first, second


@dataclass(frozen=True)
class TaskSequence:
    """What a sequence of tasks did to one another, in the unit of the scores."""

    average: float
    backward: float
    forward: float
    forgetting: tuple[float, ...]


def forgetting_matrix(matrix: Float[ArrayLike, "stages tasks"], before: Float[ArrayLike, " tasks"]) -> TaskSequence:
    """ACC, BWT, FWT and the forgetting of each task but the last, from the scores after each of T stages.

    Stage i trains task i. Raises `SondeError` for a matrix that is not square or has fewer than two tasks.
    """
    scores, first = np.asarray(matrix, dtype=np.float64), np.asarray(before, dtype=np.float64)
    n = len(scores)
    if n < 2 or scores.shape != (n, n) or first.shape != (n,):
        raise SondeError(f"scores of shape {scores.shape}, {first.shape} before: give one row and column for each task")
    own = np.diag(scores)
    return TaskSequence(
        average=float(scores[-1].mean()),
        backward=float((scores[-1, :-1] - own[:-1]).mean()),
        forward=float(np.mean([scores[j - 1, j] - first[j] for j in range(1, n)])),
        forgetting=tuple(float(scores[:-1, j].max() - scores[-1, j]) for j in range(n - 1)),
    )


def stability_gap(times: Sequence[int], values: ArrayLike, *, within: int = GAP_STEPS) -> float:
    """How far a score falls below its value at a switch within the next steps, at worst (De Lange et al. 2023)."""
    _, s = _curve(times, values)
    near = np.asarray(times) <= within
    return float(s[0] - s[near].min())


@dataclass(frozen=True)
class Plasticity:
    """What a network has left to learn with.

    speed: steps that the task takes alone from scratch over the steps it took here; None where it was not learned.
    dead: share of hidden units of the MLPs that never fire on the tokens. rank: effective rank of the last stream.
    norm: of all weights.
    """

    speed: float | None
    dead: float
    rank: float
    norm: float


@torch.no_grad()
def plasticity(module: nn.Module, tokens: Tensor, *, steps: int | None = None, solo: int | None = None) -> Plasticity:
    """Dead units, effective rank and weight norm of a `sonde.nets.transformer.Transformer` on a batch of tokens.

    `steps` and `solo` are those to the criterion here and alone from scratch.
    """
    fires: list[Tensor] = []
    hooks = [
        block.mlp_in.register_forward_hook(lambda _, __, out: fires.append((out > 0).flatten(0, -2).any(0)))
        for block in module.blocks  # type: ignore[union-attr]
        if block.mlp_in is not None  # type: ignore[union-attr]
    ]
    try:
        last = module.streams(tokens)[-1].flatten(0, -2).double()  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    centred = last - last.mean(0)
    dead = float(1 - torch.cat(fires).double().mean()) if fires else 0.0
    return Plasticity(
        speed=None if steps is None or solo is None else solo / max(1, steps),
        dead=dead,
        rank=float(effective_rank(centred.T @ centred)),
        norm=math.sqrt(sum(float(p.double().square().sum()) for p in module.parameters())),
    )


def compare_budgets(first: int, second: int, *, forced: bool = False) -> None:
    """Raise `SondeError` where trainings that are compared read different numbers of tokens, unless `forced`."""
    if first != second and not forced:
        raise SondeError(
            f"the mixtures read {first} and {second} tokens: a comparison would be of budgets; match them, or force it"
        )


def _curve(times: Sequence[int], values: ArrayLike) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    t, s = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(t) != len(s) or len(t) < 2 or (np.diff(t) <= 0).any() or t[0] < 0:
        raise SondeError(f"{len(t)} times and {len(s)} values: give two or more of each, times increasing from 0")
    return np.log2(1 + t), s
