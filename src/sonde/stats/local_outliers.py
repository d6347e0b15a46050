"""Is a row where trusted rows are? Local outlier factor, and neighbourhoods followed through the layers.

Local outlier factor (Breunig et al. 2000): with the reachability r(x, y) = max(|x - y|, distance of y to its k-th
neighbour) and density(x) = 1 / mean over the k neighbours of r(x, y), LOF(x) = mean over neighbours of density(y) /
density(x). Neighbours are trusted rows; online, also the rows of the batch.

Topological (after TED, Mo et al. 2312.02673): in each layer the rank of the nearest trusted row that the model answers
as it answers x, among all trusted rows ordered by distance. A row whose ranks are unlike those of trusted rows (squared
Mahalanobis distance of log(1 + rank) over the layers) comes to its answer another way.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.stats.gaussian_novelty import Mahalanobis
from sonde.stats.layered_rows import Novelty

_ELEMENTS = 1 << 21  # distances held at once: more leave the cache, and take four times as long
_CANCELS = 1e-4  # a squared distance below this share of the squared lengths has lost digits
_NO_ZERO = 1e-10  # as scikit-learn has it


class LocalOutlierFactor(Novelty):
    """Local outlier factor of `neighbors` neighbours for all layers at once; offline the numbers of scikit-learn."""

    untrusted = "may"

    def __init__(self, neighbors: int = 20) -> None:
        if neighbors < 1:
            raise SondeError(f"neighbors is {neighbors}; it must be at least 1")
        self.neighbors = neighbors

    def _fit(self, trusted: Tensor) -> None:
        if trusted.shape[1] <= self.neighbors:
            raise SondeError(
                f"{trusted.shape[1]} trusted rows are too few for a local outlier factor of {self.neighbors} "
                f"neighbours: give at least {self.neighbors + 1}, or fewer neighbours"
            )
        # distances are differences of squares: small around a centre
        self._centre = trusted.mean(1, keepdim=True)
        self._known = _Known(trusted - self._centre, self.neighbors)

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        rows = rows - self._centre
        if untrusted is None:
            return self._known.factor(rows)
        own = rows.shape == untrusted.shape and torch.equal(rows, untrusted - self._centre)
        known = _Known(torch.cat([untrusted - self._centre, self._known.rows], 1), self.neighbors)
        return known.own_factor()[:, : rows.shape[1]] if own else known.factor(rows)


class _Known:
    """Rows among which neighbours are sought: their neighbours, distances to the k-th, densities."""

    def __init__(self, rows: Float[Tensor, "layers m d"], k: int) -> None:
        self.rows, self._k = rows, k
        distance, self._index = nearest(rows, rows, k, same=True)
        self._kth = distance[..., -1]
        self._density = self._density_of(distance, self._index)

    def factor(self, rows: Float[Tensor, "layers n d"]) -> Float[Tensor, "layers n"]:
        """Outlier factors of other rows."""
        distance, index = nearest(rows, self.rows, self._k)
        return _take(self._density, index).mean(-1) / self._density_of(distance, index)

    def own_factor(self) -> Float[Tensor, "layers m"]:
        """Outlier factors of these rows among each other."""
        return _take(self._density, self._index).mean(-1) / self._density

    def _density_of(self, distance: Tensor, index: Tensor) -> Float[Tensor, "layers n"]:
        return 1 / (torch.maximum(distance, _take(self._kth, index)).mean(-1) + _NO_ZERO)


class Topological(Novelty):
    """Ranks, through the layers, of the nearest trusted row with the same answer. One score for all layers.

    `fit(trusted, answers)` and `score(rows, answers=answers)` take the model's answers (any whole numbers) beside the
    rows `[layers, n, d]`. Raises `SondeError` without them and for an answer that no trusted row has.
    """

    def fit(self, trusted: ArrayLike | Tensor, answers: ArrayLike | None = None) -> "Topological":
        """Learn the ranks of trusted rows among each other."""
        self._given = answers
        return super().fit(trusted)

    def score(
        self,
        rows: ArrayLike | Tensor,
        untrusted: ArrayLike | Tensor | None = None,
        *,
        answers: ArrayLike | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Strangeness of each row's ranks."""
        self._given = answers
        return super().score(rows, untrusted)

    def _fit(self, trusted: Tensor) -> None:
        self._answers = self._labels(trusted)
        self._centre = trusted.mean(1, keepdim=True)
        self._trusted = trusted - self._centre
        counts = np.unique(self._answers, return_counts=True)
        if counts[1].min() < 2:
            raise SondeError(f"answer {counts[0][counts[1].argmin()]} has only 1 trusted row: give at least 2 of each")
        self._outlier = Mahalanobis().fit(self._ranks(self._trusted, self._answers, same=True))

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        answers = self._labels(rows)
        unknown = set(answers.tolist()) - set(self._answers.tolist())
        if unknown:
            raise SondeError(f"answer {min(unknown)} is not among those of the trusted rows")
        return torch.from_numpy(self._outlier.score(self._ranks(rows - self._centre, answers)))

    def _labels(self, rows: Tensor) -> Int[np.ndarray, " n"]:
        if self._given is None or np.shape(self._given) != (rows.shape[1],):
            raise SondeError(f"Topological needs the model's answer to each of the {rows.shape[1]} rows: give answers=")
        return np.asarray(self._given).astype(np.int64)

    def _ranks(self, rows: Tensor, answers: np.ndarray, *, same: bool = False) -> Float[Tensor, "n layers"]:
        alike: Bool[Tensor, "n m"] = torch.from_numpy(answers[:, None] == self._answers)
        found = []
        for start, distance in _distances(rows, self._trusted, same=same):
            part = alike[start : start + distance.shape[1]]
            closest = torch.where(part, distance, torch.inf).amin(-1, keepdim=True)
            found.append((distance < closest).sum(-1))
        return torch.cat(found, 1).double().log1p().T


def nearest(
    rows: Float[Tensor, "layers n d"], among: Float[Tensor, "layers m d"], k: int, *, same: bool = False
) -> tuple[Float[Tensor, "layers n k"], Int[Tensor, "layers n k"]]:
    """Distances to the `k` nearest rows of `among`, nearest first, and which these are; in float64.

    `same`: row i is row i of `among` and not its own neighbour. Squared distances are |x|² + |y|² - 2 x · y; where that
    cancels, they are taken from the differences.
    """
    found = []
    for _, partly in _distances(rows, among, same=same):
        chosen = torch.from_numpy(np.argpartition(partly.numpy(), k - 1, axis=-1)[..., :k].copy())
        found.append((partly.gather(-1, chosen), chosen))
    squares, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    own = rows.square().sum(-1, keepdim=True)
    squares += own
    size = own + _take(among.square().sum(-1), index)
    layer, row, place = (squares < _CANCELS * size).nonzero(as_tuple=True)
    off = rows[layer, row] - among[layer, index[layer, row, place]]
    squares[layer, row, place] = off.square().sum(-1)
    distance, order = squares.clamp(min=0).sqrt().sort(-1)
    return distance, index.gather(-1, order)


def _distances(rows: Tensor, among: Tensor, *, same: bool):
    """Squared distances less each row's own |x|², in chunks of rows, each with the number of its first row."""
    lengths = among.square().sum(-1)[:, None]
    chunk = max(1, _ELEMENTS // (among.shape[0] * among.shape[1]))
    for start in range(0, rows.shape[1], chunk):
        part = rows[:, start : start + chunk]
        squares = torch.baddbmm(lengths, part, among.mT, alpha=-2.0)
        if same:
            own = torch.arange(part.shape[1])
            squares[:, own, start + own] = torch.inf
        yield start, squares


def _take(values: Float[Tensor, "layers m"], index: Int[Tensor, "layers n k"]) -> Float[Tensor, "layers n k"]:
    return values.gather(1, index.flatten(1)).view(index.shape)
