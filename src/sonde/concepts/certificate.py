"""Is the concept gone, and what did it cost? What can be said exactly, and what probes say on rows of their own.

z is linearly guarded in x exactly if Cov(x, z) = 0, for labels if all class means are one, so the first lines need no
classifier: the largest gap between class means, relative to the root mean variance of a coordinate, and the largest
correlation |G⁻¹ Cov(x, z / std z)| with Cov(x) = G Gᴴ. On rows that were not fitted on both are sampling noise, not 0,
and probes tell what is left: a linear and a nonlinear one, trained on one half of the rows and scored on the other.
The damage is the mean squared change, and how norms changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.probe import Reach, fit_probe
from sonde.concepts.statistics import ConceptStatistics, concept_rows
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean, wilson
from sonde.stats.solve import Root, shrunk


@dataclass(frozen=True)
class Certificate:
    """What is left of a concept and what erasing it cost, before and after as pairs.

    Gaps and correlations are numbers of the rows given; scores and costs have 95 % intervals over rows. `score` is
    "accuracy" for labels (chance is the share of the most frequent) and "R2" for values (chance is 0).
    """

    n: int
    rank: int | None
    """Dimensions that the eraser takes out, where it is an affine edit."""
    gap: tuple[float, float] | None
    """Largest distance of two class means, relative to the root mean variance of a coordinate; None for values."""
    correlation: tuple[float, float]
    """Largest singular value of the whitened cross-covariance with standardised z."""
    score: str
    chance: Interval
    linear: tuple[Interval, Interval]
    mlp: tuple[Interval, Interval]
    mean_squared_change: Interval
    """Of a row, relative to the mean squared distance of rows from their mean."""
    norm_change: Interval
    """Mean of |r(x)| / |x|, minus 1."""

    @property
    def guarded(self) -> bool:
        """Whether the linear probe on the erased rows is no better than chance, as far as the interval can tell."""
        return self.linear[1].low <= self.chance.high

    def rows(self) -> list[dict[str, Any]]:
        """The certificate as a table: quantity, before, after, each with its interval where it has one."""
        table: list[dict[str, Any]] = []
        if self.gap is not None:
            table.append({"quantity": "gap of class means", "before": self.gap[0], "after": self.gap[1]})
        table.append({"quantity": "correlation", "before": self.correlation[0], "after": self.correlation[1]})
        for name, pair in (("linear probe", self.linear), ("MLP probe", self.mlp)):
            table.append(
                {
                    "quantity": f"{name}, {self.score}",
                    "before": pair[0].estimate,
                    "before_low": pair[0].low,
                    "before_high": pair[0].high,
                    "after": pair[1].estimate,
                    "after_low": pair[1].low,
                    "after_high": pair[1].high,
                }
            )
        for name, cost in (("mean squared change", self.mean_squared_change), ("norm change", self.norm_change)):
            table.append({"quantity": name, "after": cost.estimate, "after_low": cost.low, "after_high": cost.high})
        return table

    def __str__(self) -> str:
        lines = [f"{self.n} rows, rank {self.rank}, chance {_show(self.chance)}"]
        for row in self.rows():
            sides = []
            for side in ("before", "after"):
                if side in row:
                    interval = (
                        f" ({row[side + '_low']:.3g} to {row[side + '_high']:.3g})" if side + "_low" in row else ""
                    )
                    sides.append(f"{row[side]:.3g}{interval}")
            lines.append(f"{row['quantity']}: {' -> '.join(sides)}")
        return "\n".join(lines)


def certify(
    eraser: Callable[..., Tensor],
    x: Any,
    z: Any,
    mask: Any = None,
    *,
    probes_on: tuple[Any, Any] | None = None,
    categorical: bool | None = None,
    labels_given: bool | None = None,
    seed: int = 0,
) -> Certificate:
    """Hold an eraser (or any edit) against rows x with the concept z.

    Give rows that it was not fitted on: on its own rows an eraser is exact, and a probe that sees them can only
    memorise. Probes are trained on a random half of the rows: an adversary with labelled rows of its own, who finds
    what the eraser's sampling error left. With `probes_on`, rows (x, z) such as the eraser's own, they are trained on
    those and scored on all of x, as the literature does. `labels_given`: call `eraser(x, z)`; None asks the eraser
    (`sonde.concepts.estimator.LabelledEraser`). Raises `ValueError` as `ConceptStatistics.update` does, and for fewer
    than 20 rows.
    """
    x, z, labels = concept_rows(x, z, mask, categorical=categorical)
    if len(x) < 20:
        raise ValueError(f"{len(x)} labelled rows: a certificate needs at least 20, half of them to train probes")
    if labels_given is None:
        from sonde.concepts.estimator import LabelledEraser

        labels_given = isinstance(eraser, LabelledEraser)
    with torch.no_grad():
        erased = eraser(x, z) if labels_given else eraser(x)
    sides = (x, erased)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    training = [(side[train], z[train]) for side in sides]
    if probes_on is not None:
        x_fit, z_fit, _ = concept_rows(*probes_on, categorical=labels)
        with torch.no_grad():
            training = [(x_fit, z_fit), (eraser(x_fit, z_fit) if labels_given else eraser(x_fit), z_fit)]
        test = torch.arange(len(x))
    probes: dict[str, tuple[Interval, Interval]] = {}
    reaches: tuple[Reach, ...] = ("linear", "mlp")
    for reach in reaches:
        first, second = (
            _score(*rows, side[test], z[test], reach, seed) for rows, side in zip(training, sides, strict=True)
        )
        probes[reach] = (first, second)
    change = (erased - x).double().abs().square().sum(-1) if not x.is_complex() else (erased - x).abs().square().sum(-1)
    spread = (x - x.mean(0)).abs().double().square().sum(-1).mean()
    lengths = [torch.linalg.vector_norm(side, dim=-1).double() for side in sides]
    moving = lengths[0] > 0
    if labels:
        chance = wilson(int((z[test] == torch.bincount(training[0][1]).argmax()).sum()), len(test))
    else:
        chance = Interval(0.0, 0.0, 0.0, len(test))
    measured = [_linear(side, z, labels) for side in sides]
    rank = getattr(eraser, "rank", None)
    return Certificate(
        n=len(x),
        rank=rank if isinstance(rank, int) else None,
        gap=(measured[0][0], measured[1][0]) if labels else None,
        correlation=(measured[0][1], measured[1][1]),
        score="accuracy" if labels else "R2",
        chance=chance,
        linear=probes["linear"],
        mlp=probes["mlp"],
        mean_squared_change=bootstrap_mean((change / spread).cpu().numpy(), seed=seed),
        norm_change=bootstrap_mean((lengths[1] / lengths[0] - 1)[moving].cpu().numpy(), seed=seed),
    )


def _linear(x: Float[Tensor, "n d"], z: Tensor, labels: bool) -> tuple[float, float]:
    """Largest gap of class means and largest correlation."""
    statistics = ConceptStatistics(categorical=labels, precision=torch.float64).update(x, z)
    covariance = shrunk(statistics.covariance, statistics.weight)[0]
    correlation = torch.linalg.matrix_norm(Root(covariance).whiten(statistics.standardised_cross_covariance), ord=2)
    gap = 0.0
    if labels:
        means = statistics.class_means[statistics.class_weights > 0]
        scale = float(covariance.diagonal().real.mean()) ** 0.5
        gap = float((means[:, None] - means).norm(dim=-1).max()) / scale
    return gap, float(correlation)


def _score(x: Tensor, z: Tensor, new_x: Tensor, new_z: Tensor, reach: Reach, seed: int) -> Interval:
    """Of a probe trained on the first rows and asked about the others."""
    found, truth = fit_probe(x, z, reach=reach, seed=seed).predict(new_x), new_z.cpu().numpy()
    if z.ndim == 1:
        return wilson(int((found == truth).sum()), len(truth))
    errors = np.square(truth - found.reshape(truth.shape)).sum(-1)
    around = np.square(truth - truth.mean(0)).sum(-1)
    return bootstrap(
        lambda left, total: 1 - left.sum(-1) / total.sum(-1), errors, around, batched=True, draws=500, seed=seed
    )


def _show(interval: Interval) -> str:
    return f"{interval.estimate:.3g} ({interval.low:.3g} to {interval.high:.3g})"
