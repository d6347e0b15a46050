"""Logistic regression around a prior mean, for a whole path of penalties at once.

    min over W of  sum_i CE(y_i, x_i W) + lambda/2 ||W - W0||²          y_i: probabilities, W0: the previous stage

With offsets o_i = x_i W0 this is ridge regression of U = W - W0. Rows are first rotated into their principal axes: the
eigenvectors of X'X, or of X X' where there are fewer rows than columns (the solution lies in their span), so that one
decomposition serves every penalty: Z'Z is diagonal, and (c Z'Z + lambda)^-1 preconditions. All penalties are then
solved together by Newton's method with conjugate gradients inside, whose matrix products have a row for each penalty;
columns that have converged drop out. Two classes have one column of log-odds, C classes a softmax over C.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PENALTIES = tuple(10 ** (1 - k / 2) for k in range(11))
"""Of the mean square of a row: from 10 times it, where a row says next to nothing, to 1e-4 of it."""

_NEWTON = 30
_INNER = 30
_FORCING = 0.1  # of the gradient's norm may be left by the inner solve
_SHRINK = 1e-7  # eigenvalues below this of the largest are rounding


@dataclass(frozen=True)
class Axes:
    """Rows in their principal axes. rows: `[n r]`, with Z'Z = diag(spectrum). back: `[r d]`, x = z back on the span."""

    rows: Float[Tensor, "n r"]
    spectrum: Float[Tensor, " r"]
    back: Float[Tensor, "r d"]


def principal_axes(x: Float[Tensor, "n d"]) -> Axes:
    """Rotate rows; where n < d through the n x n matrix of their products (the dual form)."""
    n, d = x.shape
    if n < d:
        values, vectors = torch.linalg.eigh((x @ x.T).double())
        kept = values > _SHRINK * values[-1:].clamp(min=torch.finfo(torch.float64).tiny)
        values, vectors = values[kept], vectors[:, kept]
        rows = (vectors * values.sqrt()).to(x)
        return Axes(rows, values.to(x), ((vectors / values.sqrt()).to(x)).T @ x)
    values, vectors = torch.linalg.eigh(x.T @ x)
    return Axes(x @ vectors, values.clamp(min=0), vectors.T.contiguous())


def fit_path(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n C"],
    *,
    prior: Float[Tensor, "K d"],
    penalties: Sequence[float] = PENALTIES,
    tolerance: float = 1e-6,
    axes: Axes | None = None,
) -> Float[Tensor, "P K d"]:
    """Coefficients for every penalty; K is 1 for two classes (log-odds), else C.

    Penalties are in units of the mean square of a row of `x`, so that they do not depend on d and on units. Stops where
    the loss can fall by no more than about `tolerance` nats a row. Raises `ValueError` for shapes that do not fit and
    for penalties that are not above 0.
    """
    n, d = x.shape
    columns = 1 if y.shape[1] == 2 else y.shape[1]
    if len(y) != n or prior.shape != (columns, d):
        raise ValueError(
            f"rows {tuple(x.shape)}, labels {tuple(y.shape)}, prior {tuple(prior.shape)}: expected [n d], [n C], [K d]"
        )
    if not len(penalties) or min(penalties) <= 0:
        raise ValueError(f"penalties {tuple(penalties)}: expected numbers above 0")
    if axes is None:
        axes = principal_axes(x)
    scale = x.square().sum() / n
    shrink = torch.tensor(penalties, dtype=x.dtype) * scale
    start = x.new_zeros(len(shrink), columns, axes.rows.shape[1])
    offset = prior.to(x) @ x.T
    moved = _minimise(axes.rows, axes.spectrum, targets_of(y).to(x), offset, shrink, start, tolerance)
    return prior.to(x) + moved @ axes.back


def refit(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n C"],
    *,
    prior: Float[Tensor, "K d"],
    penalty: float,
    start: Float[Tensor, "K d"],
    axes: Axes,
    tolerance: float = 1e-6,
) -> Float[Tensor, "K d"]:
    """`fit_path` for one penalty, from `start`, with the axes of other rows (a part of these) as preconditioner.

    A few products with single vectors: nothing is decomposed again. Directions that the other rows leave out are
    preconditioned by the penalty alone. `axes` are those of at least as many rows as columns.
    """
    shrink = x.new_tensor([penalty]) * x.square().sum() / len(x)
    offset = prior.to(x) @ x.T
    rotated_start = ((start - prior).to(x) @ axes.back.T)[None]
    moved = _minimise(x, axes.spectrum, targets_of(y).to(x), offset, shrink, rotated_start, tolerance, axes.back)
    return prior.to(x) + (moved @ axes.back)[0]


def targets_of(y: Float[Tensor, "n C"]) -> Float[Tensor, "K n"]:
    """Probabilities as the columns that are fitted: that of class 1 for two classes, else all."""
    return (y[:, 1:2] if y.shape[1] == 2 else y).T.contiguous()


def logits_of(weights: Float[Tensor, "*P K d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "*P K n"]:
    """Scores of rows."""
    return weights @ x.T


def cross_entropy(
    logits: Float[Tensor, "*P K n"], targets: Float[Tensor, "K n"], *, reduce: bool = True
) -> Float[Tensor, "..."]:
    """Nats of soft targets, the mean over rows or by row; K = 1 are log-odds."""
    if targets.shape[0] == 1:
        each = (F.softplus(logits) - logits * targets)[..., 0, :]
    else:
        each = torch.logsumexp(logits, -2) - (logits * targets).sum(-2)
    return each.double().mean(-1) if reduce else each


def _minimise(
    rows: Float[Tensor, "n r"],
    spectrum: Float[Tensor, " r"],
    targets: Float[Tensor, "K n"],
    offset: Float[Tensor, "K n"],
    shrink: Float[Tensor, " P"],
    start: Float[Tensor, "P K r"],
    tolerance: float,
    basis: Float[Tensor, "r d"] | None = None,
) -> Float[Tensor, "P K r"]:
    """Newton with preconditioned conjugate gradients. With `basis`, rows are `[n d]` and coordinates are in the basis.

    Every penalty is its own problem; the arrays hold those that have not converged.
    """
    n = rows.shape[0]

    def forward(u: Tensor) -> Tensor:
        return (u if basis is None else u @ basis) @ rows.T

    def backward(r: Tensor) -> Tensor:
        return r @ rows if basis is None else (r @ rows) @ basis.T

    def objective(logits: Tensor, u: Tensor, lam: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduce=False).double().sum(
            -1
        ) + lam.double() / 2 * u.double().square().sum((1, 2))

    solution = start.clone()
    active = torch.arange(len(shrink))
    u, lam = start.clone(), shrink
    moved = forward(u)
    value = objective(offset + moved, u, lam)
    for _ in range(_NEWTON):
        p = _probabilities(offset + moved)
        gradient = backward(p - targets) + lam[:, None, None] * u
        curvature = (p * (1 - p)).mean(-1, keepdim=True).clamp(min=1e-4)
        inverse = 1 / (curvature * spectrum + lam[:, None, None])
        going = (gradient * inverse * gradient).sum((1, 2)) > 2 * tolerance * n
        if not going.all():
            solution[active] = u
            active, u, lam, moved, value = (a[going] for a in (active, u, lam, moved, value))
            p, gradient, inverse = p[going], gradient[going], inverse[going]
            if not len(active):
                break
        step, ahead = _newton_step(p, gradient, inverse, lam, forward, backward)
        size = torch.ones_like(lam)[:, None, None]
        slack = 1e-7 * value.abs()  # what rounding may add
        tried = objective(offset + moved - ahead, u - step, lam)
        for _ in range(20):
            worse = tried > value + slack
            if not worse.any():
                break
            size = torch.where(worse[:, None, None], size / 2, size)
            tried = objective(offset + moved - size * ahead, u - size * step, lam)
        u, moved, value = u - size * step, moved - size * ahead, tried
    solution[active] = u
    return solution


def _newton_step(p, gradient, inverse, lam, forward, backward) -> tuple[Tensor, Tensor]:
    """Solve the Newton system to a tenth of the gradient: the step and what it adds to the logits of every row."""
    step = torch.zeros_like(gradient)
    ahead = torch.zeros_like(p)
    residual = gradient.clone()
    scaled = inverse * residual
    direction = scaled.clone()
    norm = (residual * scaled).sum((1, 2))
    enough = _FORCING**2 * norm
    for _ in range(_INNER):
        along = forward(direction)
        curved = backward(_curve(p, along)) + lam[:, None, None] * direction
        width = (direction * curved).sum((1, 2))
        # A column that is done takes steps of length 0 from then on.
        alpha = torch.where(norm > enough, norm / width.clamp(min=torch.finfo(width.dtype).tiny), 0)[:, None, None]
        step, ahead, residual = step + alpha * direction, ahead + alpha * along, residual - alpha * curved
        scaled = inverse * residual
        new = (residual * scaled).sum((1, 2))
        if not (new > enough).any():
            break
        direction = scaled + (new / norm.clamp(min=torch.finfo(norm.dtype).tiny))[:, None, None] * direction
        norm = new
    return step, ahead


def _probabilities(logits: Float[Tensor, "P K n"]) -> Float[Tensor, "P K n"]:
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _curve(p: Float[Tensor, "P K n"], along: Float[Tensor, "P K n"]) -> Float[Tensor, "P K n"]:
    """The Hessian of the cross-entropy in the logits, applied to a direction."""
    if p.shape[1] == 1:
        return p * (1 - p) * along
    return p * (along - (p * along).sum(1, keepdim=True))
