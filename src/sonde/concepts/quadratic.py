"""Erase a concept from what a quadratic classifier sees, or move rows from one class to another.

A quadratic classifier sees class means mu_c and covariances S_c. QLEACE (Belrose et al. 2025, arXiv:2502.02820) moves
every class to one mean and one covariance by the cheapest map, the optimal transport of Gaussians,

    r(x, c) = T_c (x - mu_c) + m,     T_c = S_c^-½ (S_c^½ B S_c^½)^½ S_c^-½,     m = sum_c pi_c mu_c

to their barycentre B in 2-Wasserstein distance with the class shares pi_c as weights (`sonde.stats.transport`). The
editor is T_{c -> c'} (x - mu_c) + mu_c': what this row might have been in class c'.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.estimator import LabelledEraser, labels_for
from sonde.concepts.statistics import ConceptStatistics
from sonde.stats.solve import Root, shrunk
from sonde.stats.transport import barycentre, transport


class _ByClass(LabelledEraser):
    """What the quadratic eraser and the editor share: class means and covariances."""

    means: Float[Tensor, "k d"] | None

    def __init__(
        self,
        *,
        shrinkage: bool = False,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shrinkage, self.decay, self.precision = shrinkage, decay, precision
        self.register_buffer("means", None)

    @property
    def fitted(self) -> bool:
        """Whether there is something to apply."""
        return self.means is not None

    def collects(self) -> ConceptStatistics:
        """Mean and covariance of each class."""
        return ConceptStatistics(categorical=True, covariance="class", decay=self.decay, precision=self.precision)

    def covariances(self, statistics: ConceptStatistics) -> Float[Tensor, "k d d"]:
        """Those of the classes, shrunk where asked for. Raises `ValueError` for a class with fewer than two rows."""
        found = statistics.class_covariances
        if self.shrinkage:
            return shrunk(found, statistics.class_weights)[0]
        thin = (statistics.class_weights <= statistics.dim).nonzero().flatten().tolist()
        if thin:
            warnings.warn(
                f"class {thin[0]} has no more rows than the {statistics.dim} dimensions, so that its covariance is "
                "singular and not all of the concept can go: pass shrinkage=True, or give more rows",
                stacklevel=5,
            )
        return found


class QuadraticEraser(_ByClass):
    """QLEACE: `QuadraticEraser.fit(x, z)(x, z)`; needs the labels at edit time, rows labelled -1 stay.

    Args:
        shrinkage: shrink the class covariances. Off, they are exactly equal afterwards on the fitting rows; on, nearly,
            and also where a class has fewer rows than dimensions.
        decay: weight of earlier rows at each `update`; None for 1.
        precision: of products within a batch.

    Attributes:
        means: of the classes, Float[Tensor, "k d"].
        maps: T_c, symmetric, Float[Tensor, "k d d"].
        centre: m, Float[Tensor, "d"].

    """

    maps: Float[Tensor, "k d d"] | None
    centre: Float[Tensor, " d"] | None

    def __init__(
        self,
        *,
        shrinkage: bool = False,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(shrinkage=shrinkage, decay=decay, precision=precision)
        self.register_buffer("maps", None)
        self.register_buffer("centre", None)

    def solve(self, statistics: ConceptStatistics) -> None:
        """Barycentre, then one map a class."""
        covariances = self.covariances(statistics)
        roots = [Root(covariance) for covariance in covariances]
        target, steps = barycentre(covariances, statistics.z_mean, roots=roots)
        self.facts = {"barycentre_steps": steps}
        self.means = statistics.class_means.to(statistics.dtype)
        self.maps = torch.stack([transport(root, target) for root in roots]).to(statistics.dtype)
        self.centre = statistics.mean.to(statistics.dtype)

    def forward(self, x: Float[Tensor, "*batch d"], z: Any) -> Float[Tensor, "*batch d"]:
        """Every row moved from its class to the barycentre, in the type of x."""
        self.check_fitted()
        assert self.means is not None and self.maps is not None and self.centre is not None
        labels = labels_for(x, z, len(self.means))
        kind = torch.promote_types(x.dtype, self.means.dtype)
        flat = x.reshape(-1, x.shape[-1]).to(kind)
        result = flat.clone()
        for c in labels.unique().tolist():
            if c >= 0:
                rows = (labels == c).nonzero().flatten()
                mean, root = self.means[c].to(kind), self.maps[c].to(kind)
                result[rows] = (flat[rows] - mean) @ root.T + self.centre.to(kind)
        return result.reshape(x.shape).to(x.dtype)


class QuadraticEditor(_ByClass):
    """Counterfactual classes: `QuadraticEditor.fit(x, z)(x, source, target)`. Parameters as in `QuadraticEraser`.

    The map between two classes is computed when it is first needed. Rows whose source is -1 stay.

    Attributes:
        means: of the classes, Float[Tensor, "k d"].
        spread: covariances of the classes, Float[Tensor, "k d d"], in float64.

    """

    spread: Float[Tensor, "k d d"] | None

    def __init__(
        self,
        *,
        shrinkage: bool = False,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(shrinkage=shrinkage, decay=decay, precision=precision)
        self.register_buffer("spread", None)
        self._maps: dict[tuple[int, int], Tensor] = {}

    def solve(self, statistics: ConceptStatistics) -> None:
        """Keep class means and covariances."""
        self.spread = self.covariances(statistics)
        self.means = statistics.class_means.to(statistics.dtype)
        self.facts = {}
        self._maps = {}

    def map(self, source: int, target: int) -> Float[Tensor, "d d"]:
        """T from class `source` to class `target`, symmetric and positive definite."""
        self.check_fitted()
        assert self.spread is not None and self.means is not None
        if (source, target) not in self._maps:
            self._maps[source, target] = transport(Root(self.spread[source]), self.spread[target])
        return self._maps[source, target].to(self.means)

    def forward(self, x: Float[Tensor, "*batch d"], source: Any, target: Any) -> Float[Tensor, "*batch d"]:
        """Every row moved from its class to another; `source` and `target` are one label, or one for each row."""
        self.check_fitted()
        assert self.means is not None
        k = len(self.means)
        lead = x.shape[:1] if x.ndim > 1 else x.shape[:-1]
        labels = [
            labels_for(x, torch.full(lead, given) if isinstance(given, int) else given, k) for given in (source, target)
        ]
        if int(labels[1].min()) < 0:
            raise ValueError("a target of -1: expected a class")
        kind = torch.promote_types(x.dtype, self.means.dtype)
        flat = x.reshape(-1, x.shape[-1]).to(kind)
        result = flat.clone()
        for c, to in torch.stack(labels).unique(dim=1).T.tolist():
            if c >= 0 and c != to:
                rows = ((labels[0] == c) & (labels[1] == to)).nonzero().flatten()
                moved = (flat[rows] - self.means[c].to(kind)) @ self.map(c, to).to(kind).T
                result[rows] = moved + self.means[to].to(kind)
        return result.reshape(x.shape).to(x.dtype)
