"""Contrast-consistent search: a direction on which "true" and "false" exclude each other, and one of them holds.

With p± = sigmoid(w . r(h±) + b) of the normalised states, all restarts of all layers descend together (L-BFGS) on

    ccs               mean (p+ + p- - 1)² + min(p+, p-)²                                     (Burns et al. 2212.03827)
    prompt-variance   the same + mean over rows of (p - its mean over the question's templates)², both answers
    js                JS(p+, 1 - p-) + confidence H((p+ + 1 - p-) / 2), in bits              (EleutherAI/elk)

plus l2 / 2 (|w|² + b²), and each layer keeps its restart of least loss. Normalisations r: "leace" erases answer x
template, "mean" subtracts the mean of each answer in each template, "burns" divides by its mean deviation as well. The
score is half the difference of the two log-odds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.fitting import Solution, Task
from sonde.stats.lbfgs import minimise
from sonde.stats.leace_map import class_cross_covariance, class_means, leace_maps

Loss = Literal["ccs", "prompt-variance", "js"]
Norm = Literal["leace", "mean", "burns"]
Init = Literal["default", "spherical", "pca"]
_BYTES = 1 << 28  # normalised rows that are held at once
Slopes = Callable[[Float[Tensor, "b n 2"]], tuple[Float[Tensor, " b"], Float[Tensor, "b n 2"]]]


def fit_ccs(
    task: Task,
    *,
    norm: Norm = "leace",
    loss: Loss = "ccs",
    init: Init = "default",
    restarts: int = 10,
    l2: float = 0.01,
    steps: int = 1000,
    confidence: float = 1.0,
) -> Solution:
    """All layers and restarts at once.

    Args:
        task: contrast pairs; `templates` to normalise by, `groups` for "prompt-variance".
        norm: "leace", "mean" or "burns".
        loss: "ccs", "prompt-variance" or "js".
        init: "default" as a linear layer is, "spherical" uniform on the unit sphere of (w, b), "pca" the leading
            principal components of the differences, one a restart.
        restarts: of each layer.
        l2: weight of (|w|² + b²) / 2.
        steps: most L-BFGS steps.
        confidence: weight of the entropy in "js".

    Raises `SondeError` for an unknown norm, loss or init, and for settings that do not fit.

    """
    for value, known in ((norm, ("leace", "mean", "burns")), (init, ("default", "spherical", "pca"))):
        if value not in known:
            raise SondeError(f"{value!r} is unknown: use {', '.join(known)}")
    if restarts < 1 or l2 < 0:
        raise SondeError(f"{restarts} restarts with l2 {l2}: expected at least 1, and 0 or more")
    slopes = _slopes(loss, task, confidence)
    pairs = task.rows.unflatten(2, (2, -1))
    layers, n, _, d = pairs.shape
    cells = torch.zeros(n, dtype=torch.long) if task.templates is None else task.templates
    if int(cells.min()) < 0:
        raise SondeError(f"template {int(cells.min())}: templates are numbered from 0")
    normal = _Normalisation.of(norm, pairs, cells)
    generator = torch.Generator().manual_seed(task.seed)
    size = max(1, _BYTES // (n * 2 * d * 4))
    weights, losses, taken = [], [], []
    for first in range(0, layers, size):
        own = range(first, min(layers, first + size))
        rows = torch.stack([normal.rows(pairs[i], i, cells) for i in own])
        start = _starts(init, rows, restarts, generator)
        found, value, used = _search(rows, start, slopes, l2=l2, steps=steps)
        best = value.argmin(1)
        weights.append(found[torch.arange(len(best)), best, :d])
        losses.append(value)
        taken.append(used)
    weight, loss_of = torch.cat(weights), torch.cat(losses)
    facts = {"loss": loss_of.amin(1).tolist(), "losses": loss_of.tolist(), "steps": torch.cat(taken).tolist()}
    return normal.solution(weight, facts)


@dataclass(frozen=True)
class _Normalisation:
    """What is subtracted, divided out and erased, by template; the last entry is for templates that were not seen.

    mean, scale: of each answer in each template. left, right: L and R of the eraser; without one, of no columns.
    """

    mean: Float[Tensor, "templates layers 2 d"]
    scale: Float[Tensor, "templates layers 2"]
    left: Float[Tensor, "layers d q"]
    right: Float[Tensor, "layers q d"]

    @staticmethod
    def of(norm: Norm, pairs: Float[Tensor, "layers n 2 d"], templates: Int[Tensor, " n"]) -> "_Normalisation":
        layers, _, _, d = pairs.shape
        k = int(templates.max()) + 1
        both = torch.stack([2 * templates, 2 * templates + 1], 1).flatten()
        means, counts = class_means(pairs.flatten(1, 2), both, 2 * k)
        pooled = pairs.mean(1, dtype=torch.float64)
        seen = (counts > 0).view(k, 1, 2, 1)
        mean = torch.cat([torch.where(seen, means.unflatten(1, (k, 2)).transpose(0, 1), pooled), pooled[None]])
        scale = torch.ones(k + 1, layers, 2, dtype=torch.float64)
        left, right = pairs.new_zeros(layers, d, 0).double(), pairs.new_zeros(layers, 0, d).double()
        if norm == "leace":
            mean = pooled.mean(1)[None, :, None].expand(k + 1, layers, 2, d)
            covariance = torch.stack(
                [_gram((x - m.to(x.dtype)).flatten(0, 1)) for x, m in zip(pairs, mean[0], strict=True)]
            )
            left, right = leace_maps(covariance, class_cross_covariance(means, counts), n=2 * pairs.shape[1])
        if norm == "burns":
            for t in range(k + 1):
                own = torch.ones_like(templates, dtype=torch.bool) if t == k else templates == t
                if bool(own.any()):
                    apart = torch.stack([(x[own] - m).square().mean(0) for x, m in zip(pairs, mean[t], strict=True)])
                    scale[t] = apart.sqrt().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return _Normalisation(mean, scale, left, right)

    def rows(self, pairs: Float[Tensor, "n 2 d"], layer: int, templates: Int[Tensor, " n"]) -> Float[Tensor, "n 2 d"]:
        """Normalised states of one layer."""
        x = pairs - self.mean[:, layer].to(pairs.dtype)[templates]
        x /= self.scale[:, layer].to(pairs.dtype)[templates][..., None]
        return x - (x @ self.right[layer].T.to(x.dtype)) @ self.left[layer].T.to(x.dtype)

    def solution(self, weight: Float[Tensor, "layers d"], facts: dict) -> Solution:
        """Half the difference of w . r(h+) and w . r(h-), as a probe of states as they are; b cancels."""
        read = weight - (weight[:, None] @ self.left @ self.right)[:, 0]
        sides = torch.tensor([-0.5, 0.5], dtype=read.dtype)
        shift = -((self.mean * read[:, None]).sum(-1) / self.scale * sides).sum(-1)
        halves = (sides[:, None] * read[:, None]).flatten(1)
        if len(self.mean) == 2:
            scaled = halves.unflatten(1, (2, -1)) / self.scale[0][..., None]
            return Solution(scaled.flatten(1), shift[0], facts)
        return Solution(halves, torch.zeros_like(shift[0]), facts, 1 / self.scale, shift)


def _search(
    rows: Float[Tensor, "layers n 2 d"],
    start: Float[Tensor, "layers restarts width"],
    slopes: Slopes,
    *,
    l2: float,
    steps: int,
) -> tuple[Float[Tensor, "layers restarts width"], Float[Tensor, "layers restarts"], Int[Tensor, "layers restarts"]]:
    """Where each restart ended, its loss without the penalty, and its steps."""
    layers, n, _, d = rows.shape
    restarts = start.shape[1]
    flat = rows.flatten(1, 2)
    inverse = torch.stack([_inverse(_gram(x), l2) for x in flat])

    def layers_of(which: Tensor) -> list[tuple[int, Tensor]]:
        own = which // restarts
        return [(layer, (own == layer).nonzero()[:, 0]) for layer in own.unique().tolist()]

    def margins(theta: Tensor, which: Tensor) -> Float[Tensor, "b n 2"]:
        found = torch.empty(len(theta), 2 * n, dtype=flat.dtype)
        for layer, places in layers_of(which):
            found[places] = theta[places, :d].to(flat.dtype) @ flat[layer].T + theta[places, d:].to(flat.dtype)
        return found.view(-1, n, 2)

    def objective(theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = slopes(margins(theta, which))
        slope = slope.reshape(len(theta), -1)
        gradient = torch.empty_like(theta)
        for layer, places in layers_of(which):
            gradient[places, :d] = (slope[places] @ flat[layer]).double()
        gradient[:, d] = slope.sum(1, dtype=torch.float64)
        return value + l2 / 2 * theta.square().sum(1), gradient + l2 * theta

    def precondition(g: Tensor, which: Tensor) -> Tensor:
        found = g / (1 + l2)
        for layer, places in layers_of(which):
            found[places, :d] = (g[places, :d].to(inverse.dtype) @ inverse[layer]).double()
        return found

    end = minimise(objective, start.flatten(0, 1), precondition=precondition, steps=steps, tolerance=1e-7)
    loss = end.value - l2 / 2 * end.x.square().sum(1)
    shape = layers, restarts
    return end.x.view(*shape, d + 1), loss.view(shape), end.steps.view(shape)


def _gram(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    return x.T @ x / len(x)


def _inverse(covariance: Float[Tensor, "d d"], l2: float) -> Float[Tensor, "d d"]:
    """(C + l2)⁻¹, near the inverse of the loss's curvature up to a factor where probabilities are near 1/2."""
    curvature = covariance.double()
    floor = 1e-6 * float(curvature.diagonal().mean())
    curvature.diagonal().add_(l2 + floor)
    return torch.cholesky_inverse(torch.linalg.cholesky(curvature)).to(covariance.dtype)


def _starts(
    init: Init, rows: Float[Tensor, "layers n 2 d"], restarts: int, generator: torch.Generator
) -> Float[Tensor, "layers restarts width"]:
    layers, n, _, d = rows.shape
    shape = layers, restarts, d + 1
    if init == "default":
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(d)
    if init == "spherical":
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn / drawn.norm(dim=-1, keepdim=True)
    if restarts > min(n, d):
        raise SondeError(
            f"{restarts} restarts from principal components of {n} differences of width {d}: ask for fewer"
        )
    start = torch.zeros(shape, dtype=torch.float64)
    for own, x in zip(start, rows, strict=True):
        vectors = torch.linalg.eigh(_gram(x[:, 1] - x[:, 0]).double()).eigenvectors
        own[:, :d] = vectors.flip(1)[:, :restarts].T
    return start


def _slopes(loss: Loss, task: Task, confidence: float) -> Slopes:
    """The loss of margins, summed in float64, and its derivative by each margin."""
    if loss == "js":
        return lambda m: _js(m, confidence)
    if loss == "ccs":
        return _ccs
    if loss != "prompt-variance":
        raise SondeError(f"loss {loss!r} is unknown: use ccs, prompt-variance or js")
    if task.groups is None:
        raise SondeError("prompt-variance needs groups: which question each row asks")
    _, which, sizes = task.groups.unique(return_inverse=True, return_counts=True)
    if int(sizes.max()) == 1:
        raise SondeError("prompt-variance needs questions that are asked in several templates: every group has one row")

    def varied(m: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = _ccs(m)
        p = m.sigmoid()
        sums = p.new_zeros(len(p), len(sizes), 2).index_add_(1, which, p)
        apart = p - (sums / sizes[:, None])[:, which]
        value = value + apart.square().sum((1, 2), dtype=torch.float64) / p.shape[1]
        return value, slope + 2 * apart * p * (1 - p) / p.shape[1]

    return varied


def _ccs(m: Float[Tensor, "b n 2"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n 2"]]:
    p = m.sigmoid()
    negative, positive = p.unbind(-1)
    clash, least = positive + negative - 1, torch.minimum(positive, negative)
    value = (clash.square() + least.square()).mean(1, dtype=torch.float64)
    smaller = torch.stack([negative <= positive, positive < negative], -1)
    return value, 2 * (clash[..., None] + smaller * least[..., None]) * p * (1 - p) / m.shape[1]


def _js(m: Float[Tensor, "b n 2"], confidence: float) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n 2"]]:
    m = m.double()
    odds = torch.stack([-m[..., 0], m[..., 1]], -1)  # of "true" by each answer
    p = odds.sigmoid()
    middle = p.mean(-1).clamp(1e-12, 1 - 1e-12)
    entropy = torch.nn.functional.softplus(odds) - p * odds
    weight = 1 + confidence
    nats = weight * (torch.special.entr(middle) + torch.special.entr(1 - middle)) - entropy.mean(-1)
    by_p = (odds - weight * torch.logit(middle)[..., None]) / 2
    slope = by_p * p * (1 - p) * torch.tensor([-1.0, 1.0], dtype=m.dtype)
    return nats.mean(1) / math.log(2), (slope / (m.shape[1] * math.log(2))).float()
