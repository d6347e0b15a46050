"""The older way to erase: train a linear classifier, project its directions out, and begin again.

Iterative nullspace projection (Ravfogel et al. 2020, arXiv:2004.07667): each round removes the row space of a newly
trained classifier's weights orthogonally. A baseline. Nothing bounds the number of rounds that it takes, and every one
costs variance: with U all directions so far, r(x) = x - U Uᵀ (x - mu).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.estimator import AffineEraser
from sonde.concepts.probe import fit_probe
from sonde.concepts.row_sample import RowSample

_NOTHING = 1e-8  # of the weights of the first round, below which a classifier says nothing


class InlpEraser(AffineEraser):
    """Baseline: directions of successive linear classifiers (ridge regressions for real-valued z) removed.

    It reads all rows again each round, so a stream is held in memory until `finish`.

    Args:
        directions: most dimensions to remove; fewer where a classifier finds nothing any more.
        affine: keep the mean of x.
        categorical: whether z are labels; None: whole numbers with one label a row are.

    """

    def __init__(self, *, directions: int = 25, affine: bool = True, categorical: bool | None = None) -> None:
        super().__init__()
        self.directions, self.affine, self.categorical = directions, affine, categorical

    def collects(self) -> RowSample:
        """All rows."""
        return RowSample(categorical=self.categorical)

    def solve(self, statistics: RowSample) -> None:
        """One classifier a round. Raises `ValueError` for complex rows and for a number of directions below 1."""
        x, z = statistics.rows
        if self.directions < 1 or x.is_complex():
            raise ValueError(f"{self.directions} directions of {x.dtype} rows: expected at least 1, of real rows")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        left, basis = x - mean, x.new_zeros(statistics.dim, 0)
        largest = 0.0
        while basis.shape[1] < min(self.directions, statistics.dim):
            weights = _weights(left, z).to(basis)
            weights -= basis @ (basis.T @ weights)
            u, s, _ = torch.linalg.svd(weights, full_matrices=False)
            largest = max(largest, float(s[0]))
            u = u[:, s > max(1e-6 * float(s[0]), _NOTHING * largest)][:, : self.directions - basis.shape[1]]
            if not u.shape[1]:
                break
            left = left - (left @ u) @ u.T
            basis = torch.cat([basis, u], 1)
        self.facts = {}
        self.set_parts(basis, basis.T, mean if self.affine else None, x.dtype)


def _weights(x: Float[Tensor, "n d"], z: Tensor) -> Float[Tensor, "d k"]:
    """Those of a linear probe, in the coordinates of x."""
    probe = fit_probe(x, z, reach="linear")
    weights = torch.from_numpy(probe.model.coef_.reshape(-1, x.shape[1]) / probe.scale)
    return weights.T.double()
