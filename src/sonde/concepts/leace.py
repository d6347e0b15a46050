"""After which edit of x does no linear predictor of z do better than a constant, at the least damage to x?

With S = Cov(x), C = Cov(x, z), any root S = G Gᴴ and U an orthonormal basis of the columns of G⁻¹ C, LEACE (Belrose et
al. 2023, arXiv:2306.03819) is

    r(x) = x - L R (x - mu),        L = G U,        R = Uᴴ G⁻¹.

z is linearly guarded exactly if Cov(r(x), z) = 0, and of all affine maps that do this r changes x least, in every
quadratic norm at once. It removes rank(C) dimensions (at most k - 1 for k classes), keeps the mean and is idempotent.
Since R S Rᴴ = I, Cov(r(x)) = S - L Lᴴ: no variance ever grows on the rows that it was fitted on.

Which columns count is decided on the standardised z: there the singular values of G⁻¹ C are correlations, whatever the
units of z or the frequency of a class.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.estimator import AffineEraser
from sonde.concepts.statistics import ConceptStatistics
from sonde.stats.leace_map import column_basis, leace_parts
from sonde.stats.solve import Root, shrunk


class LeaceEraser(AffineEraser):
    """The least-squares eraser: `LeaceEraser.fit(x, z)(x)`. See `sonde.concepts.estimator` for streams and Pipelines.

    Args:
        affine: keep the mean of x; without, r(x) = x - L R x, whose mean moves.
        shrinkage: shrink S towards a multiple of the identity (`sonde.stats.solve.shrunk`). Guardedness stays exact
            whatever positive definite S is; a better S damages new rows less.
        tolerance: correlations up to this share of the largest are left; None is 1e-6 for float64 rows, else 1e-4.
        categorical: whether z are labels; None: whole numbers with one label a row are.
        decay: weight of earlier rows at each `update`; None for 1.
        precision: of products within a batch: torch.float64 for double accumulation; None follows the rows.

    Attributes:
        rank: dimensions taken out.
        facts: "singular_values" that were kept (for labels the canonical correlations of x and z), "largest_discarded",
            "shrinkage" (the weight of the sample covariance), "covariance_rank", n and k.

    Warns where correlations beyond rounding are left, and where n < d without shrinkage: then z is guarded on the
    fitting rows only.

    """

    def __init__(
        self,
        *,
        affine: bool = True,
        shrinkage: bool = True,
        tolerance: float | None = None,
        categorical: bool | None = None,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.affine, self.shrinkage, self.tolerance = affine, shrinkage, tolerance
        self.categorical, self.decay, self.precision = categorical, decay, precision

    def collects(self) -> ConceptStatistics:
        """Pooled covariance, and cross-covariance with z."""
        return ConceptStatistics(categorical=self.categorical, decay=self.decay, precision=self.precision)

    def solve(self, statistics: ConceptStatistics) -> None:
        """One Cholesky factor (or eigendecomposition) and one thin SVD."""
        root, facts = covariance_root(statistics, shrinkage=self.shrinkage)
        basis, spectrum = concept_basis(
            root.whiten(statistics.standardised_cross_covariance), statistics, tolerance=self.tolerance
        )
        self.facts = {**facts, **spectrum}
        left, right = leace_parts(root, basis)
        self.set_parts(left, right, statistics.mean if self.affine else None, statistics.dtype)


def covariance_root(statistics: ConceptStatistics, *, shrinkage: bool) -> tuple[Root, dict[str, Any]]:
    """A root of the covariance of x and facts about it. Warns of fewer rows than dimensions without shrinkage."""
    covariance, facts = statistics.covariance, {}
    if shrinkage:
        covariance, alpha = shrunk(covariance, statistics.weight)
        facts["shrinkage"] = float(alpha)
    root = Root(covariance)
    facts["covariance_rank"] = root.rank
    if not shrinkage and statistics.n < statistics.dim:
        warnings.warn(
            f"{statistics.n} rows of width {statistics.dim} without shrinkage: the covariance has rank {root.rank}, "
            "and z is guarded on the fitting rows only",
            stacklevel=5,
        )
    return root, facts


def concept_basis(
    cross: Float[Tensor, "d k"],
    statistics: ConceptStatistics,
    *,
    tolerance: float | None,
    unit: float = 1.0,
) -> tuple[Float[Tensor, "d q"], dict[str, Any]]:
    """Orthonormal basis of the columns of a cross-covariance, with the singular values kept and the largest left.

    Values up to `tolerance` of the largest are left, and all where none exceeds rounding: tolerance² times `unit`, the
    size that a perfect correlation would have.
    """
    single = statistics.dtype not in (torch.float64, torch.complex128)
    found = column_basis(cross, tolerance=tolerance, single=single, unit=unit)
    discarded = found.largest_left / unit
    if found.left:
        given = f" ({tolerance:g})" if tolerance is not None else ""
        warnings.warn(
            f"{found.left} of {len(found.values) + found.left} directions stay, with a correlation of up to "
            f"{discarded:.3g}: lower tolerance{given} to take them out",
            stacklevel=5,
        )
    return found.basis, {"singular_values": (found.values / unit).tolist(), "largest_discarded": discarded}
