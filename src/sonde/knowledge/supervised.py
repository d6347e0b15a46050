"""Probes that learn from labels, at all layers at once.

With mu0, mu1 the means of the false and the true rows and S the covariance within them:

logr            minimises the mean log-loss of x . w + b plus l2 |w|² (`sonde.stats.logistic`), l2 = 0.001
diff-in-means   w = mu1 - mu0 at unit length, b puts 0 half-way between the means
lda             w = S⁺ (mu1 - mu0), the Bayes classifier of two Gaussians with one covariance
random          w uniform on the unit sphere, its sign from the labels
leace-…         the same on rows from which a concept was erased, r(x) = x - L R (x - m); w . r(x) is linear in x
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.fitting import Solution, Task
from sonde.knowledge.layer_moments import LayerMoments
from sonde.stats.leace_map import class_cross_covariance, class_means, leace_maps
from sonde.stats.logistic import L2, logistic
from sonde.stats.solve import solve_spd


def fit_logr(task: Task, *, l2: float = L2) -> Solution:
    """Logistic regression; `l2` is the weight of |w|²."""
    # That of pairs serves the contrast probes too; that of the last token is wanted in more digits than this needs.
    known = task.moments.covariance("pair") if task.part == "pair" else task.moments.known("last")
    fitted = logistic(task.rows, task.true, l2=l2, covariance=known)
    facts = {"steps": fitted.steps.tolist(), "loss": fitted.loss.tolist(), "converged": bool(fitted.converged.all())}
    return Solution(fitted.weight, fitted.bias, facts)


def fit_diff_in_means(task: Task) -> Solution:
    """Difference of the means at unit length. Its scores are distances, not log-odds: `calibrated` makes them so."""
    false, true = task.class_means()
    apart = true - false
    weight = apart / apart.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return Solution(weight, -(weight * (true + false)).sum(1) / 2)


def fit_lda(task: Task) -> Solution:
    """Fisher's discriminant, with the log-odds of the classes' shares in its bias."""
    false, true = task.class_means()
    n, share = len(task.true), float(task.true.double().mean())
    covariance = task.moments.covariance(task.part)
    weights = []
    for layer, apart in enumerate(true - false):
        between = share * (1 - share) * torch.outer(apart, apart)
        within = (covariance[layer].double() * (n - 1) - between * n) / max(1, n - 2)
        # At unit diagonal, where the units of single coordinates do not decide what is a zero.
        size = within.diagonal().clamp(min=0).sqrt()
        size = torch.where(size > 1e-12 * size.max(), size, 1)
        weights.append(solve_spd(within / size / size[:, None], (apart / size)[:, None])[:, 0] / size)
    weight = torch.stack(weights)
    odds = torch.logit(torch.tensor(share, dtype=torch.float64))
    return Solution(weight, odds - (weight * (true + false)).sum(1) / 2)


def fit_random(task: Task) -> Solution:
    """One direction for all layers, drawn with the seed."""
    false, true = task.class_means()
    drawn = torch.randn(task.rows.shape[2], generator=torch.Generator().manual_seed(task.seed), dtype=torch.float64)
    weight = (drawn / drawn.norm()).expand_as(true)
    sign = torch.where(((true - false) * weight).sum(1, keepdim=True) < 0, -1.0, 1.0)
    weight = weight * sign
    return Solution(weight, -(weight * (true + false)).sum(1) / 2)


def fit_erased(solve: Callable[..., Solution]) -> Callable[..., Solution]:
    """`solve` on rows without a concept, pulled back to the rows as they are."""

    def fit(task: Task, **options: Any) -> Solution:
        left, right, mean, facts = _eraser(task)
        rows = torch.stack([_erased(*one) for one in zip(task.rows, left, right, mean, strict=True)])
        inner = solve(replace(task, rows=rows, moments=LayerMoments({task.part: rows}), erased=None), **options)
        read = (inner.weight[:, None] @ left @ right)[:, 0]
        bias = inner.bias + (read * mean).sum(1)
        return Solution(inner.weight - read, bias, {**inner.facts, **facts})

    return fit


def _eraser(task: Task) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    assert task.erased is not None
    states, given = task.erased
    known = given >= 0
    kinds, classes = given[known].unique(return_inverse=True)
    if len(kinds) < 2:
        raise SondeError(
            f"nothing to erase: all {int(known.sum())} rows are of one class. Give other states with their classes, "
            "erase=(states, classes)"
        )
    used = states if bool(known.all()) else states[known]
    means, counts = class_means(used.by_layer(task.part), classes, len(kinds))
    cross = class_cross_covariance(means, counts)
    left, right = leace_maps(used.moments.covariance(task.part), cross, n=len(used))
    return left, right, used.moments.mean(task.part), {"erased": int(left.shape[2])}


def _erased(
    rows: Float[Tensor, "n d"], left: Float[Tensor, "d q"], right: Float[Tensor, "q d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    centred = rows - mean.to(rows.dtype)
    return rows - (centred @ right.T.to(rows.dtype)) @ left.T.to(rows.dtype)
