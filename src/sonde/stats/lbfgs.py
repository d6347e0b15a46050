"""Many small smooth minimisations at once, each with its own steps: limited-memory BFGS over a batch of problems.

Directions come from the last `memory` steps of each problem (Nocedal 1980; two-loop recursion), over an inverse Hessian
that starts as a preconditioner times (s . y) / (y . M⁻¹ y). Step lengths satisfy the weak Wolfe conditions, found by
doubling and halving (Lewis & Overton 2013, algorithm 2.6), which needs nothing but values and slopes and runs on all
problems at once. A problem that is done leaves the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DECREASE, _CURVATURE = 1e-4, 0.9
_TRIALS = 30

Objective = Callable[[Float[Tensor, "b p"], Int[Tensor, " b"]], tuple[Float[Tensor, " b"], Float[Tensor, "b p"]]]
Preconditioner = Callable[[Float[Tensor, "b p"], Int[Tensor, " b"]], Float[Tensor, "b p"]]


@dataclass(frozen=True)
class Minimum:
    """Where the problems ended: `x`, the objective's `value`, the number of `steps`, and whether each `converged`."""

    x: Float[Tensor, "b p"]
    value: Float[Tensor, " b"]
    steps: Int[Tensor, " b"]
    converged: Bool[Tensor, " b"]


@torch.no_grad()
def minimise(
    objective: Objective,
    start: Float[Tensor, "b p"],
    *,
    precondition: Preconditioner | None = None,
    steps: int = 1000,
    memory: int = 10,
    tolerance: float = 1e-9,
) -> Minimum:
    """Minimise `objective(x, which)`, the values and gradients of the problems `which` at their points `x`.

    Args:
        objective: called with those problems only that are not done; values and gradients in float64.
        start: a point for each problem.
        precondition: M⁻¹ v for the problems `which`, M about the Hessian up to a factor.
        steps: most steps of a problem.
        memory: pairs that are kept.
        tolerance: a problem is done when the step is predicted to gain less than this share of its value, twice in
            turn, or when no step gains anything that rounding does not hide.

    Raises `ValueError` where the objective is not finite at the start.

    """
    x = start.double().clone()
    which = torch.arange(len(x), device=x.device)
    value, gradient = objective(x, which)
    if not bool(value.isfinite().all() & gradient.isfinite().all()):
        bad = int((~(value.isfinite() & gradient.isfinite().all(-1))).nonzero()[0])
        raise ValueError(f"the objective of problem {bad} is {float(value[bad]):g} at its start")
    done = Minimum(x.clone(), value.clone(), torch.zeros_like(which), torch.zeros_like(which, dtype=torch.bool))
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    gamma = torch.full_like(value, -1.0)
    calm = torch.zeros_like(which)
    for step in range(steps):
        direction = -_two_loops(gradient, pairs, gamma, which, precondition)
        slope = (gradient * direction).sum(-1)
        first = gamma < 0
        length = torch.ones_like(value)
        if precondition is None:
            length = torch.where(first, 1 / gradient.norm(dim=-1).clamp(min=1.0), length)
        gain = -slope * length / 2
        calm = torch.where(gain <= tolerance * value.abs().clamp(min=1e-12), calm + 1, 0)
        new, new_value, new_gradient, moved = _line_search(objective, x, value, slope, direction, length, which)
        settled = (calm >= 2) | ~moved | (gain == 0)
        s, y = new - x, new_gradient - gradient
        curvature = (s * y).sum(-1)
        good = moved & (curvature > 1e-14 * s.norm(dim=-1) * y.norm(dim=-1))
        scaled = y if precondition is None else precondition(y, which)
        gamma = torch.where(good, curvature / (y * scaled).sum(-1).clamp(min=torch.finfo(y.dtype).tiny), gamma)
        rho = torch.where(good, 1 / torch.where(good, curvature, 1), 0)
        pairs = [*pairs, (s, y, rho)][-memory:]
        x, value, gradient = new, new_value, new_gradient
        if bool(settled.any()) or step == steps - 1:
            done.x[which], done.value[which] = x, value
            done.steps[which], done.converged[which] = step + 1, settled
            on = ~settled
            if not bool(on.any()):
                break
            x, value, gradient, gamma, calm, which = (t[on] for t in (x, value, gradient, gamma, calm, which))
            pairs = [(s[on], y[on], rho[on]) for s, y, rho in pairs]
    return done


def _two_loops(
    gradient: Float[Tensor, "b p"],
    pairs: list[tuple[Tensor, Tensor, Tensor]],
    gamma: Float[Tensor, " b"],
    which: Int[Tensor, " b"],
    precondition: Preconditioner | None,
) -> Float[Tensor, "b p"]:
    q = gradient.clone()
    weights = []
    for s, y, rho in reversed(pairs):
        weight = rho * (s * q).sum(-1)
        q -= weight[:, None] * y
        weights.append(weight)
    r = q if precondition is None else precondition(q, which)
    r = r * torch.where(gamma > 0, gamma, 1)[:, None]
    for (s, y, rho), weight in zip(pairs, reversed(weights), strict=True):
        r += (weight - rho * (y * r).sum(-1))[:, None] * s
    return r


def _line_search(
    objective: Objective,
    x: Float[Tensor, "b p"],
    value: Float[Tensor, " b"],
    slope: Float[Tensor, " b"],
    direction: Float[Tensor, "b p"],
    length: Float[Tensor, " b"],
    which: Int[Tensor, " b"],
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, " b"]]:
    """Points, values and gradients after a step, and whether there was one that does not raise the value."""
    low, high = torch.zeros_like(length), torch.full_like(length, float("inf"))
    best, best_value = x.clone(), value.clone()
    best_gradient = torch.zeros_like(x)
    moved = torch.zeros_like(which, dtype=torch.bool)
    open_ = torch.arange(len(x), device=x.device)
    for _ in range(_TRIALS):
        t = length[open_]
        point = x[open_] + t[:, None] * direction[open_]
        found, gradient = objective(point, which[open_])
        falls = found <= value[open_] + _DECREASE * t * slope[open_]
        flat = (gradient * direction[open_]).sum(-1) >= _CURVATURE * slope[open_]
        kept = open_[falls]
        best[kept], best_value[kept], best_gradient[kept] = point[falls], found[falls], gradient[falls]
        moved[kept] = True
        high[open_[~falls]] = t[~falls]
        low[open_[falls & ~flat]] = t[falls & ~flat]
        open_ = open_[~(falls & flat)]
        if not len(open_):
            break
        ends = high[open_]
        length[open_] = torch.where(ends.isfinite(), (low[open_] + ends) / 2, 2 * low[open_])
    return best, best_value, best_gradient, moved
