"""Erase a concept and keep a task: no linear trace of z, and the covariance of x with y exactly as it was.

In whitened coordinates let A and B be orthonormal bases of the columns of Cov(x, z) and Cov(x, y). Of all projections
that send A to 0 and leave B alone, the one that changes x least, in every quadratic norm, projects along A onto the
orthogonal complement of A, tilted to hold B (SPLINCE, Holstege et al. 2025, arXiv:2506.10703):

    r(x) = x - L R (x - mu),    L = G A,    R = (Aᴴ N A)⁻¹ Aᴴ N G⁻¹,    N = I - B Bᴴ,    Cov(x) = G Gᴴ.

Without y this is LEACE. What z and y share cannot be erased and kept: it is erased. The projection is oblique, so that,
unlike LEACE, it can make variances grow.
"""

import warnings
from typing import Any, Self

import torch

from sonde.concepts.estimator import AffineEraser
from sonde.concepts.leace import concept_basis, covariance_root
from sonde.concepts.statistics import ConceptStatistics

_SHARED = 1e-6  # sine of the angle under which a direction of y is one of z


class SplinceEraser(AffineEraser):
    """LEACE that keeps Cov(x, y): `SplinceEraser.fit(x, z, keep=y)(x)`.

    Parameters as in `LeaceEraser`. `update(x, z, mask, keep=y)` takes y as it takes z: labels, -1 where unknown, or
    values. Warns where z and y share directions, which are erased.
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

    kept: ConceptStatistics | None = None

    def collects(self) -> ConceptStatistics:
        """Pooled covariance, and cross-covariance with z."""
        return ConceptStatistics(categorical=self.categorical, decay=self.decay, precision=self.precision)

    def update(self, x: Any, z: Any, mask: Any = None, *, keep: Any = None) -> Self:
        """Take in rows with the concept z and the task `keep`; returns itself. Raises `ValueError` without a task."""
        if keep is None:
            raise ValueError("nothing to keep: pass keep=y, or use LeaceEraser")
        super().update(x, z, mask)
        if self.kept is None:
            self.kept = ConceptStatistics(covariance="none", decay=self.decay, precision=self.precision)
        self.kept.update(x, keep, mask)
        return self

    def merge(self, other: "SplinceEraser") -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take in what another unfinished eraser has seen; returns itself."""
        super().merge(other)
        if other.kept is not None:
            if self.kept is None:
                self.kept = ConceptStatistics(covariance="none", decay=self.decay, precision=self.precision)
            self.kept.merge(other.kept)
        return self

    def solve(self, statistics: ConceptStatistics) -> None:
        """LEACE's factor and SVD, one more for y, and a solve of q x q."""
        assert self.kept is not None
        root, facts = covariance_root(statistics, shrinkage=self.shrinkage)
        concept, spectrum = concept_basis(
            root.whiten(statistics.standardised_cross_covariance), statistics, tolerance=self.tolerance
        )
        task, _ = concept_basis(
            root.whiten(self.kept.standardised_cross_covariance), self.kept, tolerance=self.tolerance
        )
        # a direction of y that lies in the span of z is not kept
        kind = torch.promote_types(concept.dtype, task.dtype)
        concept, task = concept.to(kind), task.to(kind)
        outside = task - concept @ (concept.mH @ task)
        _, sines, angles = torch.linalg.svd(outside, full_matrices=False)
        shared = int((sines <= _SHARED).sum())
        if shared:
            warnings.warn(
                f"{shared} of {task.shape[1]} directions of the task are also the concept's: they are erased",
                stacklevel=4,
            )
            task = task @ angles[sines > _SHARED].mH
        reading = concept - task @ (task.mH @ concept)
        right = torch.linalg.solve(reading.mH @ concept, reading.mH)
        self.facts = {**facts, **spectrum, "kept_rank": task.shape[1]}
        self.set_parts(
            root.colour(concept),
            root.whiten_adjoint(right.mH).mH,
            statistics.mean if self.affine else None,
            statistics.dtype,
        )
        self.kept = None

    def _fit(self, x: Any, z: Any, mask: Any = None, *, keep: Any = None) -> Self:
        """Fit on rows x `[n d]`, the concept z and the task `keep`; returns the eraser."""
        self.statistics, self.kept = self.collects(), None
        return self.update(x, z, mask, keep=keep).finish()
