"""The closed form of least-squares concept erasure, from a covariance and a cross-covariance.

With S = Cov(x) = G Gᴴ, C = Cov(x, z) and U an orthonormal basis of the columns of G⁻¹ C (Belrose et al. 2023,
arXiv:2306.03819),

    r(x) = x - L R (x - mu),        L = G U,        R = Uᴴ G⁻¹,        Cov(r(x)) = S - L Lᴴ.

Which columns count is decided on the standardised z, where the singular values of G⁻¹ C are correlations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.stats.solve import Root, shrunk


@dataclass(frozen=True)
class ColumnBasis:
    """Orthonormal `basis [d q]` of columns, the singular `values` that it keeps, and how many are left (the largest).

    Values below rounding are neither kept nor left.
    """

    basis: Float[Tensor, "d q"]
    values: Float[Tensor, " q"]
    left: int
    largest_left: float


def column_basis(
    cross: Float[Tensor, "d k"], *, tolerance: float | None = None, single: bool = True, unit: float = 1.0
) -> ColumnBasis:
    """Basis of the columns of a cross-covariance with the standardised z, after whitening of x.

    Values up to `tolerance` of the largest are left (None: 1e-4 for rows in `single` precision, else 1e-6), and all
    where none exceeds rounding: tolerance² times `unit`, the size that a perfect correlation would have. Raises
    `ValueError` for a tolerance outside of 0 to 1.
    """
    if tolerance is None:
        tolerance = 1e-4 if single else 1e-6
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}: expected a share of the largest correlation, from 0 to 1")
    u, s, _ = torch.linalg.svd(cross, full_matrices=False)
    rounding = max(cross.shape) * torch.finfo(torch.float32 if single else torch.float64).eps
    floor = unit * (1e-8 if single else 1e-12)
    largest = float(s[0]) if len(s) else 0.0
    kept = s > max(tolerance * largest, rounding * largest if tolerance == 0 else 0.0, floor)
    left = s[~kept & (s > max(rounding * largest, floor))]
    return ColumnBasis(u[:, kept], s[kept], len(left), float(left[0]) if len(left) else 0.0)


def leace_parts(root: Root, basis: Float[Tensor, "rank q"]) -> tuple[Float[Tensor, "d q"], Float[Tensor, "q d"]]:
    """L and R from a root of the covariance and the basis of the whitened cross-covariance."""
    return root.colour(basis), root.whiten_adjoint(basis).mH


def leace_maps(
    covariance: Float[Tensor, "layers d d"], cross: Float[Tensor, "layers d k"], *, n: int, shrinkage: bool = True
) -> tuple[Float[Tensor, "layers d q"], Float[Tensor, "layers q d"]]:
    """L and R of every layer, of `n` rows in single precision; `cross` is with the standardised z.

    Layers of lower rank than others have columns of zeros, which take nothing out.
    """
    found = []
    for own, crossed in zip(covariance, cross, strict=True):
        root = Root(shrunk(own.double(), n)[0] if shrinkage else own)
        found.append(leace_parts(root, column_basis(root.whiten(crossed.double())).basis))
    most = max(left.shape[1] for left, _ in found)
    lefts = [torch.nn.functional.pad(left, (0, most - left.shape[1])) for left, _ in found]
    rights = [torch.nn.functional.pad(right, (0, 0, 0, most - len(right))) for _, right in found]
    return torch.stack(lefts), torch.stack(rights)


def class_cross_covariance(
    means: Float[Tensor, "layers k d"], counts: Float[Tensor, " k"]
) -> Float[Tensor, "layers d k"]:
    """Cov(x, z / std z) of every layer for classes with these means and numbers of rows; an empty class gives 0."""
    share = counts / counts.sum()
    apart = means - (share @ means)[:, None]
    return (share.sqrt()[:, None] * apart).mT


def class_means(
    x: Float[Tensor, "layers n d"], classes: Tensor, k: int
) -> tuple[Float[Tensor, "layers k d"], Float[Tensor, " k"]]:
    """Mean row of each of `k` classes in every layer, float64, and the number of rows of each; 0 without rows."""
    counts = torch.bincount(classes, minlength=k).double()
    sums = torch.zeros(len(x), k, x.shape[2], dtype=torch.float64, device=x.device)
    for total, rows in zip(sums, x, strict=True):
        total.index_add_(0, classes, rows.double())
    return sums / counts.clamp(min=1)[:, None], counts
