"""Can the trace of a concept in class covariances be erased without labels at edit time?

Only approximately. ALF-QLEACE (Belrose et al. 2025, arXiv:2502.02820) is LEACE, P, then the removal of directions in
which the projected class covariances P S_c Pᵀ differ most from their mean: take the singular vector v of the largest
singular value of all differences, project v out of all of them, and go on until the largest Frobenius norm has fallen
to (1 - target) of what it was. With V the vectors found,

    r(x) = mu + (I - V Vᵀ) P (x - mu).
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import eigsh
from torch import Tensor

from sonde.concepts.estimator import AffineEraser
from sonde.concepts.leace import concept_basis, covariance_root
from sonde.concepts.statistics import ConceptStatistics


class AlfQleaceEraser(AffineEraser):
    """LEACE, then directions in which class covariances differ: an affine edit that needs no labels to apply.

    Args:
        target: share of the difference of covariances to take out, as a Frobenius norm.
        max_rank: most dimensions to take out after LEACE; None for as many as the target needs.
        affine, shrinkage, tolerance, decay, precision: as in `LeaceEraser`. Covariances by class are not shrunk.

    `facts["differences"]` has the largest Frobenius difference before and after every direction, relative to the first.

    """

    def __init__(
        self,
        *,
        target: float = 0.9,
        max_rank: int | None = None,
        affine: bool = True,
        shrinkage: bool = True,
        tolerance: float | None = None,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.target, self.max_rank = target, max_rank
        self.affine, self.shrinkage, self.tolerance = affine, shrinkage, tolerance
        self.decay, self.precision = decay, precision

    def collects(self) -> ConceptStatistics:
        """Mean and covariance of each class."""
        return ConceptStatistics(categorical=True, covariance="class", decay=self.decay, precision=self.precision)

    def solve(self, statistics: ConceptStatistics) -> None:
        """LEACE, then one Lanczos vector a step. Raises `ValueError` for a target or rank that makes no sense."""
        if not 0 < self.target < 1 or (self.max_rank is not None and self.max_rank < 0):
            raise ValueError(f"target is {self.target} and max_rank {self.max_rank}: expected a share and a number")
        root, facts = covariance_root(statistics, shrinkage=self.shrinkage)
        basis, spectrum = concept_basis(
            root.whiten(statistics.standardised_cross_covariance), statistics, tolerance=self.tolerance
        )
        left, right = root.colour(basis), root.whiten_adjoint(basis).mH
        covariances = statistics.class_covariances
        half = covariances - left @ (right @ covariances)
        projected = half - (half @ right.mH) @ left.mH
        found, differences = _directions(
            projected - projected.mean(0), self.target, statistics.dim if self.max_rank is None else self.max_rank
        )
        # I - (I - V Vᵀ)(I - L R) = [L V] [R; Vᵀ (I - L R)]
        reading = found.mH - (found.mH @ left) @ right
        self.facts = {**facts, **spectrum, "differences": differences}
        self.set_parts(
            torch.cat([left, found], 1),
            torch.cat([right, reading]),
            statistics.mean if self.affine else None,
            statistics.dtype,
        )


def _directions(
    differences: Float[Tensor, "k d d"], target: float, most: int
) -> tuple[Float[Tensor, "d q"], list[float]]:
    d = differences.shape[-1]
    start = float(torch.linalg.matrix_norm(differences).max())
    found, trace = [], [1.0]
    first = np.ones(d) / d**0.5
    while len(found) < min(most, d - 1) and start > 0 and trace[-1] > 1 - target:
        tops = [eigsh(one.cpu().numpy(), k=1, which="LM", v0=first) for one in differences]
        vector = max(tops, key=lambda top: abs(float(top[0][0])))[1][:, 0]
        v = torch.as_tensor(vector).to(differences)
        half = differences - torch.einsum("i,cj->cij", v, v.conj() @ differences)
        differences = half - torch.einsum("ci,j->cij", half @ v, v.conj())
        found.append(v)
        trace.append(float(torch.linalg.matrix_norm(differences).max()) / start)
    vectors = torch.stack(found, 1) if found else differences.new_zeros(d, 0)
    return vectors, trace
