"""Spectral attribute removal: the orthogonal projection that takes every linear trace of z out of x.

With U an orthonormal basis of the columns of C = Cov(x, z), r(x) = x - U Uᵀ (x - mu) has Cov(r(x), z) = 0 (Shao, Ziser
& Cohen 2023, "Gold Doesn't Always Glitter"). It guards z as LEACE does and needs no covariance of x, but changes x
more: LEACE is the best of all affine maps that guard.
"""

import torch

from sonde.concepts.estimator import AffineEraser
from sonde.concepts.leace import concept_basis
from sonde.concepts.statistics import ConceptStatistics


class SalEraser(AffineEraser):
    """Orthogonal eraser, with the parameters of `LeaceEraser` that make sense without a covariance.

    `facts["singular_values"]` are those of the cross-covariance with standardised z, in units of x's root mean square.
    """

    def __init__(
        self,
        *,
        affine: bool = True,
        tolerance: float | None = None,
        categorical: bool | None = None,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.affine, self.tolerance = affine, tolerance
        self.categorical, self.decay, self.precision = categorical, decay, precision

    def collects(self) -> ConceptStatistics:
        """The cross-covariance of x with z alone: O(n d k)."""
        return ConceptStatistics(
            categorical=self.categorical, covariance="none", decay=self.decay, precision=self.precision
        )

    def solve(self, statistics: ConceptStatistics) -> None:
        """One thin SVD of d x k."""
        cross = statistics.standardised_cross_covariance
        basis, self.facts = concept_basis(cross, statistics, tolerance=self.tolerance, unit=statistics.root_mean_square)
        self.set_parts(basis, basis.mH, statistics.mean if self.affine else None, statistics.dtype)
