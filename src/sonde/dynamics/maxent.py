"""Data that have the first moments of given data and are as random as can be otherwise: maximum-entropy samples.

What a model still gets right on them it knows from those moments alone (Belrose et al. 2024, arXiv:2402.04362).

    order 1, in [0, 1]   independent coordinates, density exp(-b_j x_j)     `sonde.stats.truncated_exponential`
    order 2              N(μ, Σ)
    order 2, in [0, 1]   particles x = σ(z) that minimise |mean - μ| + |cov - Σ| - w H, H their mean log distance to the
                         nearest other (Kozachenko & Leonenko 1987), by L-BFGS from a clamped Gaussian
    order 3, in [0, 1]   the same particles, moved by Adam until mean, covariance and coskewness
                         E[(x-μ)_i (x-μ)_j (x-μ)_k] are those of the data

Order 3 has no entropy term, as in the paper: its particles start at the maximum-entropy sample of order 2.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.stats import truncated_exponential

_EDGE = 1e-3  # from the sides of the box, where particles start
_RANK = 1e-10  # of the largest eigenvalue: smaller ones are none


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance (unbiased), and the rows that they are of, where there are any; in float64."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    rows: Float[Tensor, "n d"] | None = None

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], *, name: str = "the data") -> "Statistics":
        """Those of `x`. Raises `SondeError` for fewer than two rows and for rows that are not finite."""
        if len(x) < 2:
            raise SondeError(f"{name} has {len(x)} row(s): its covariance needs at least 2")
        x = x.double()
        if not x.isfinite().all():
            raise SondeError(f"{name} holds nan or infinity")
        return cls(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), x)

    @cached_property
    def rank(self) -> int:
        """Of the covariance."""
        values = torch.linalg.eigvalsh(self.covariance)
        return int((values > _RANK * values[-1]).sum())

    def only(self, coordinates: Bool[Tensor, " d"]) -> "Statistics":
        """Those of some coordinates."""
        rows = None if self.rows is None else self.rows[:, coordinates]
        return Statistics(self.mean[coordinates], self.covariance[coordinates][:, coordinates], rows)

    def coskewness(self, slices: Tensor) -> Float[Tensor, "s d d"]:
        """Third central moments with the first index in `slices`. Raises `SondeError` without rows."""
        if self.rows is None:
            raise SondeError("a mean and a covariance say nothing of third moments: give the rows")
        return third_moments(self.rows - self.mean, slices)

    def check_box(self) -> None:
        """Raise `SondeError` for values outside [0, 1], and for variances above what the mean allows, m (1 - m)."""
        values = self.mean if self.rows is None else self.rows
        outside = (values < 0) | (values > 1)
        if outside.any():
            low, high = float(values.min()), float(values.max())
            raise SondeError(
                f"{int(outside.sum())} values lie outside [0, 1]: they go from {low:.3g} to {high:.3g}; scale them"
            )
        if self.rows is not None:
            return  # rows in the box have moments of the box
        wrong = (self.covariance.diagonal() > self.mean * (1 - self.mean) + 1e-12).nonzero()[:, 0].tolist()
        if wrong:
            shown = ", ".join(map(str, wrong[:8])) + (", …" if len(wrong) > 8 else "")
            raise SondeError(f"no distribution in [0, 1] has these moments: the variance is above m (1 - m) at {shown}")


def third_moments(centred: Float[Tensor, "n d"], slices: Tensor) -> Float[Tensor, "s d d"]:
    """E[x_i x_j x_k] of centred rows for i in `slices`."""
    d = centred.shape[1]
    weighted = (centred[:, slices, None] * centred[:, None, :]).flatten(1)  # n, s d
    return (weighted.T @ centred / len(centred)).view(len(slices), d, d)


@dataclass(frozen=True)
class Sample:
    """Rows that were made, and how far their moments are from what was wanted.

    Errors are relative: |difference| / |target| (Frobenius), by order; 1 is the mean.
    """

    x: Float[Tensor, "n d"]
    errors: dict[int, float]


def sample_maxent(
    statistics: Statistics,
    n: int,
    *,
    order: int,
    box: bool = True,
    seed: int = 0,
    slices: int = 16,
    steps: int | None = None,
) -> Sample:
    """`n` rows of maximum entropy with the moments of `statistics` up to `order`, in float64.

    Args:
        statistics: what is matched.
        n: rows.
        order: 1, 2 or 3.
        box: keep to [0, 1]; without it only order 2 exists.
        seed: of the draw.
        slices: of the coskewness that a step looks at, drawn at random; their squared error is unbiased.
        steps: of the optimiser; 100 (order 2) or 1,500 (order 3) where not given.

    Raises:
        SondeError: for an order that does not exist, data outside the box, and moments that no distribution has.

    """
    if order not in (1, 2, 3) or (not box and order != 2):
        raise SondeError(f"order {order} {'in' if box else 'without'} a box: there are 1, 2 and 3 in it, and 2 without")
    if n < 2:
        raise SondeError(f"{n} rows have no moments: ask for 2 or more")
    if box:
        statistics.check_box()
    if order == 1:
        x = truncated_exponential.draw(truncated_exponential.rate_of(statistics.mean), n, seed=seed)
    else:
        x = gaussian(statistics, n, seed=seed)
    if box and order > 1:
        moves = statistics.covariance.diagonal() > 0  # σ(z) is never 0 or 1, where a constant coordinate may be
        own = statistics.only(moves)
        inside = _second_order(own, x[:, moves], steps if order == 2 and steps is not None else 100)
        if order == 3:
            inside = _third_order(own, inside, steps or 1500, min(slices, len(own.mean)), seed)
        x = statistics.mean.repeat(n, 1)
        x[:, moves] = inside
    return Sample(x, errors(statistics, x, order))


def gaussian(statistics: Statistics, n: int, *, seed: int = 0) -> Float[Tensor, "n d"]:
    """Rows of N(μ, Σ), for a Σ of any rank."""
    values, vectors = torch.linalg.eigh(statistics.covariance)
    white = torch.randn(n, len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return statistics.mean + white @ (vectors * values.clamp(min=0).sqrt()).T


def errors(statistics: Statistics, x: Float[Tensor, "n d"], order: int) -> dict[int, float]:
    """Relative error of the moments of `x` at each order up to `order`; at the third, of all slices."""
    mean = x.mean(0)
    found = {1: float((mean - statistics.mean).norm() / statistics.mean.norm())}
    if order > 1:
        found[2] = float((torch.cov(x.T) - statistics.covariance).norm() / statistics.covariance.norm())
    if order > 2:
        off, whole = 0.0, 0.0
        for i in range(x.shape[1]):
            own = torch.tensor([i])
            target = statistics.coskewness(own)
            off += float((third_moments(x - mean, own) - target).square().sum())
            whole += float(target.square().sum())
        found[3] = (off / whole) ** 0.5 if whole > 0 else off**0.5
    return found


_ENTROPY = 1e-3  # weight of H beside the norms


def _second_order(statistics: Statistics, start: Tensor, steps: int) -> Tensor:
    z = torch.logit(start.clamp(_EDGE, 1 - _EDGE)).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = z.sigmoid()
        loss = (x.mean(0) - statistics.mean).norm() + (torch.cov(x.T) - statistics.covariance).norm()
        loss = loss - _ENTROPY * log_distance(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return z.detach().sigmoid()


def log_distance(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean log distance of a row to the nearest other: the entropy of the rows up to constants and a factor d."""
    with torch.no_grad():
        nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(1)
    return (x - x[nearest]).norm(dim=1).clamp(min=1e-12).log().mean()


def _third_order(statistics: Statistics, start: Tensor, steps: int, slices: int, seed: int) -> Tensor:
    d = start.shape[1]
    target = statistics.coskewness(torch.arange(d))
    whole = target.norm().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    z = torch.logit(start.clamp(_EDGE, 1 - _EDGE)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.01)
    for _ in range(steps):
        own = torch.randperm(d, generator=generator)[:slices]
        x = z.sigmoid()
        mean = x.mean(0)
        third = third_moments(x - mean, own) - target[own]
        loss = (
            (mean - statistics.mean).norm() / statistics.mean.norm()
            + (torch.cov(x.T) - statistics.covariance).norm() / statistics.covariance.norm()
            + third.norm() * (d / slices) ** 0.5 / whole
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return z.detach().sigmoid()
