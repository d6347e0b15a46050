"""Logistic regression of one set of labels on many sets of features (layers), all at once.

For each layer, over w and b:

    mean over rows of  log(1 + exp(m)) - y m,    m = x . w + b,    plus  l2 |w|²,

which has one minimum. Rows are centred and scaled to unit variance once, which changes the numbers that are descended
and not the objective: in those coordinates the penalty is l2 |w / s|². L-BFGS starts from the curvature of a classifier
that knows nothing, Cov(x) / 4 + 2 l2, whose Cholesky factor makes a dozen steps of what takes hundreds without it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.stats.lbfgs import minimise

L2 = 0.001
_BYTES = 1 << 28  # standardised rows that are held at once
_DEAD = 1e-7  # of the largest deviation


@dataclass(frozen=True)
class Logistic:
    """Of each layer: `weight` and `bias` in the units of the rows, the `loss` with its penalty, steps, convergence."""

    weight: Float[Tensor, "layers d"]
    bias: Float[Tensor, " layers"]
    loss: Float[Tensor, " layers"]
    steps: Int[Tensor, " layers"]
    converged: Bool[Tensor, " layers"]


@torch.no_grad()
def logistic(
    x: Float[Tensor, "layers n d"],
    y: Float[Tensor, " n"] | Bool[Tensor, " n"],
    *,
    l2: float = L2,
    covariance: Float[Tensor, "layers d d"] | None = None,
    steps: int = 1000,
) -> Logistic:
    """Fit every layer; y are labels, or shares between 0 and 1.

    `covariance` of x, where it is known already, saves its computation. Raises `ValueError` for shapes that do not fit,
    for y outside of 0 to 1, and for labels of one class.
    """
    y = y.double()
    if x.ndim != 3 or y.shape != x.shape[1:2]:
        raise ValueError(
            f"labels of shape {tuple(y.shape)} for rows of shape {tuple(x.shape)}: expected (layers, n, d)"
        )
    if l2 < 0:
        raise ValueError(f"l2 is {l2}: expected 0 or more")
    if not len(y) or not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError("labels are 0 and 1, or shares between them, one for each of at least one row")
    if float(y.min()) == float(y.max()):
        raise ValueError(f"all {len(y)} labels are {float(y[0]):g}: a classifier needs both classes")
    size = max(1, _BYTES // max(1, x[0].numel() * 4))
    parts = [
        _fit(x[i : i + size], y, l2, None if covariance is None else covariance[i : i + size], steps)
        for i in range(0, len(x), size)
    ]
    return Logistic(*(torch.cat([getattr(part, name) for part in parts]) for name in Logistic.__dataclass_fields__))


def _fit(
    x: Float[Tensor, "layers n d"], y: Float[Tensor, " n"], l2: float, covariance: Tensor | None, steps: int
) -> Logistic:
    layers, n, d = x.shape
    # Any shift and scale near these would do: they are undone exactly at the end.
    shift = x.mean(1)
    rows = x - shift[:, None]
    scale = rows.square().mean(1).double().sqrt()
    scale = torch.where(scale > _DEAD * scale.amax(1, keepdim=True), scale, 1)
    rows /= scale[:, None].to(x.dtype)
    penalty = l2 / scale**2
    inverse = torch.stack([_inverse(i, rows, scale, penalty, covariance) for i in range(layers)])

    def objective(v: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        margins = torch.stack([rows[i] @ w for i, w in zip(which.tolist(), v[:, :d].to(rows.dtype), strict=True)])
        margins = margins.double() + v[:, d:]
        loss = (torch.nn.functional.softplus(margins) - y * margins).mean(1)
        residual = (margins.sigmoid() - y) / n
        pulled = residual.to(rows.dtype)
        slopes = torch.stack([r @ rows[i] for i, r in zip(which.tolist(), pulled, strict=True)]).double()
        held = penalty[which] * v[:, :d]
        gradient = torch.cat([slopes + 2 * held, residual.sum(1, keepdim=True)], 1)
        return loss + (held * v[:, :d]).sum(1), gradient

    def precondition(g: Tensor, which: Tensor) -> Tensor:
        lead = [inverse[i] @ part for i, part in zip(which.tolist(), g[:, :d].to(inverse.dtype), strict=True)]
        return torch.cat([torch.stack(lead).double(), 4 * g[:, d:]], 1)

    start = torch.zeros(layers, d + 1, dtype=torch.float64, device=x.device)
    start[:, d] = torch.logit(y.mean())
    end = minimise(objective, start, precondition=precondition, steps=steps)
    weight = end.x[:, :d] / scale
    return Logistic(weight, end.x[:, d] - (weight * shift.double()).sum(1), end.value, end.steps, end.converged)


def _inverse(
    layer: int, rows: Tensor, scale: Tensor, penalty: Tensor, covariance: Tensor | None
) -> Float[Tensor, "d d"]:
    """(C / 4 + 2 penalty)⁻¹ with C the covariance of the standardised rows, in their type."""
    x, s = rows[layer], scale[layer]
    c = x.T @ x / len(x) if covariance is None else covariance[layer] / s / s[:, None]
    curvature = c.double() / 4
    curvature.diagonal().add_(2 * penalty[layer] + 1e-6)
    return torch.cholesky_inverse(torch.linalg.cholesky(curvature)).to(rows.dtype)
