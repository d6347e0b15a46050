"""Give rows of one class the statistics of another, up to a chosen order, and leave all else as it is.

    mean shift      x - (mean of x) + μ', clamped to the box and repeated until the mean of all is μ'
    quantiles       each coordinate's rank in its class, then the other class's value at that rank (CQN)
    transport       x ↦ μ' + A (x - μ), the cheapest map of N(μ, Σ) onto N(μ', Σ')       `sonde.stats.transport`

Edited rows carry the label of the class that they were moved to: a model that is right about them follows the
statistics that were moved (Belrose et al. 2024, arXiv:2402.04362). Independent draws of each coordinate are beside
them: what all orders between coordinates are worth.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.dynamics.maxent import Statistics
from sonde.errors import SondeError
from sonde.stats.quantiles import dithered_rank, quantile
from sonde.stats.solve import Root
from sonde.stats.transport import transport

_RIDGE = 1e-6  # of the mean variance, added to both covariances
_ROUNDS = 10_000
_SETTLED = 1e-6


class ClassEdits:
    """Edits between the classes of `x [n, d]`, `y [n]`: `edits.quantiles(rows, labels, targets)` and the like.

    Raises `SondeError` for a class with fewer than two rows. Maps are made when they are first needed.

    Args:
        x: rows that the statistics are of.
        y: their classes, 0 to k - 1.
        ridge: share of the mean variance that is added to both covariances of a transport. Without it a map is exact
            only where the target varies in no direction in which the source does not.

    """

    def __init__(self, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], *, ridge: float = _RIDGE) -> None:
        self.classes = [Statistics.of(x[y == c], name=f"class {c}") for c in range(int(y.max()) + 1)]
        self.rows = [x[y == c].double() for c in range(len(self.classes))]
        self.shares = torch.bincount(y, minlength=len(self.classes)).double() / len(y)
        self.ridge = ridge
        self._maps: dict[tuple[int, int], Transport] = {}

    def other_classes(self, y: Int[Tensor, " n"], *, seed: int = 0) -> Int[Tensor, " n"]:
        """A target for each row: a class drawn from the shares, its own left out."""
        weights = self.shares.repeat(len(y), 1)
        weights.scatter_(1, y[:, None], 0)
        return torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed))[:, 0]

    def independent(self, y: Int[Tensor, " n"], *, seed: int = 0) -> Float[Tensor, "n d"]:
        """New rows of the classes `y`, every coordinate drawn on its own from its class."""
        generator = torch.Generator().manual_seed(seed)
        d = len(self.classes[0].mean)
        result = torch.empty(len(y), d, dtype=torch.float64)
        for c, rows in _by_class(y).items():
            own = self.rows[c]
            result[rows] = own.gather(0, torch.randint(len(own), (len(rows), d), generator=generator))
        return result

    def mean_shift(
        self, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], target: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """Rows whose mean, for every pair of classes, is the target's, and which stay in [0, 1].

        Raises `SondeError` where clamping to the box keeps the mean away; it also takes variance away near the sides.
        """
        result = x.double().clone()
        for (_, to), rows in _by_pair(y, target).items():
            wanted, moved = self.classes[to].mean, result[rows]
            for _ in range(_ROUNDS):
                off = moved.mean(0) - wanted
                if float(off.abs().max()) < _SETTLED:
                    break
                moved = (moved - off).clamp(0, 1)
            else:
                raise SondeError(f"the mean of class {to} was not reached in {_ROUNDS:,} rounds: is it in [0, 1]?")
            result[rows] = moved
        return result

    def quantiles(
        self, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], target: Int[Tensor, " n"], *, seed: int = 0
    ) -> Float[Tensor, "n d"]:
        """Every coordinate at its rank in the target class: all of each coordinate's distribution is moved."""
        result = x.double().clone()
        for (c, to), rows in _by_pair(y, target).items():
            rank = dithered_rank(result[rows], self.rows[c], seed=seed + len(self.classes) * c + to)
            result[rows] = quantile(rank, self.rows[to])
        return result

    def transport(
        self, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], target: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """Mean and covariance moved by the cheapest affine map."""
        result = x.double().clone()
        for (c, to), rows in _by_pair(y, target).items():
            result[rows] = self.map(c, to)(result[rows])
        return result

    def map(self, source: int, target: int) -> "Transport":
        """The map between two classes.

        Raises `SondeError` for `ridge=0` where the source's covariance lacks directions that the target's has.
        """
        if (source, target) not in self._maps:
            first, second = self.classes[source], self.classes[target]
            if self.ridge == 0 and first.rank < len(first.mean):
                raise SondeError(
                    f"the covariance of class {source} has rank {first.rank} of {len(first.mean)}: give a ridge"
                )
            self._maps[source, target] = Transport(first, second, ridge=self.ridge)
        return self._maps[source, target]


class Transport:
    """x ↦ μ' + A (x - μ). In the span of both classes' rows where they are fewer than the dimensions.

    `ridge` mean variances (of both covariances together) are added to each; outside the span these are equal, and A is
    the identity there.
    """

    def __init__(self, source: Statistics, target: Statistics, *, ridge: float = _RIDGE) -> None:
        d = len(source.mean)
        self.source, self.target = source.mean, target.mean
        self.ridge = ridge * float((source.covariance.trace() + target.covariance.trace()) / (2 * d))
        self.basis: Tensor | None = None
        covariances = (source.covariance, target.covariance)
        if source.rows is not None and target.rows is not None and len(source.rows) + len(target.rows) < d:
            rows = torch.cat([source.rows - source.mean, target.rows - target.mean])
            basis = self.basis = torch.linalg.qr(rows.T).Q
            covariances = tuple(basis.T @ covariance @ basis for covariance in covariances)
        eye = self.ridge * torch.eye(len(covariances[0]), dtype=torch.float64)
        self.matrix = transport(Root(covariances[0] + eye), covariances[1] + eye)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The rows moved."""
        centred = x.double() - self.source
        if self.basis is None:
            return self.target + centred @ self.matrix
        inside = centred @ self.basis
        return self.target + centred + (inside @ self.matrix - inside) @ self.basis.T


def _by_class(y: Tensor) -> Mapping[int, Tensor]:
    return {int(c): (y == c).nonzero()[:, 0] for c in y.unique()}


def _by_pair(y: Tensor, target: Tensor) -> Mapping[tuple[int, int], Tensor]:
    pairs = torch.stack([y, target], 1)
    return {(int(c), int(to)): (pairs == torch.tensor([c, to])).all(1).nonzero()[:, 0] for c, to in pairs.unique(dim=0)}
