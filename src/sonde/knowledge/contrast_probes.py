"""Contrastive representation clustering: what varies most between the two answers' states is whether one is true.

Which answer was read is erased first (LEACE with z = negative or positive); u is the top principal component of the
differences that are left, and the score is u . (r(h+) - r(h-)) (Burns et al. 2212.03827, "CRC-TPC"; Mallen & Belrose
2312.01037). One eigenproblem a layer, of matrices that all contrast probes share.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.knowledge.fitting import Solution, Task
from sonde.knowledge.layer_moments import LayerMoments
from sonde.stats.leace_map import leace_maps

_DENSE = 256  # up to this width all eigenvectors are as fast as one


def fit_crc(task: Task) -> Solution:
    """Top principal component of the erased differences."""
    moments, n = task.moments, len(task.states)
    weights, shares = [], []
    for layer in range(len(task.rows)):
        left, right = answer_eraser(moments, layer, n)
        same, crossed = moments.pair_sums(layer)
        spread = project(same - crossed, left, right)
        u, value = top_eigenvector(spread)
        weights.append(pulled_back(u, left, right))
        shares.append(float(value / spread.diagonal().sum().clamp(min=torch.finfo(spread.dtype).tiny)))
    weight = torch.stack(weights)
    return Solution(torch.cat([-weight, weight], 1), weight.new_zeros(len(weight)), {"variance_share": shares})


def answer_eraser(moments: LayerMoments, layer: int, n: int) -> tuple[Float[Tensor, "d q"], Float[Tensor, "q d"]]:
    """L and R that take out which of the two answers a state is of."""
    negative, positive = moments.mean("pair")[layer].unflatten(0, (2, -1))
    apart = positive - negative
    pooled = moments.pair_sums(layer)[0] / 2 + torch.outer(apart, apart) / 4
    cross = torch.stack([-apart, apart], 1) * (0.5**0.5 / 2)
    left, right = leace_maps(pooled[None], cross[None], n=2 * n)
    return left[0], right[0]


def project(a: Float[Tensor, "d d"], left: Float[Tensor, "d q"], right: Float[Tensor, "q d"]) -> Float[Tensor, "d d"]:
    """P A Pᵀ with P = 1 - L R, without a product of two large matrices."""
    half = a - left @ (right @ a)
    return half - (half @ right.T) @ left.T


def pulled_back(u: Float[Tensor, " d"], left: Float[Tensor, "d q"], right: Float[Tensor, "q d"]) -> Float[Tensor, " d"]:
    """Pᵀ u: what reads from a state as it is what u reads from the erased one."""
    return u - right.T @ (left.T @ u)


def top_eigenvector(a: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """Unit eigenvector of the largest (not: largest in size) eigenvalue of a symmetric matrix, and the eigenvalue.

    Lanczos from a fixed start, or all eigenvectors where it does not converge. The largest coordinate is positive.
    """
    from scipy.sparse.linalg import ArpackError, eigsh

    vector = value = None
    if len(a) > _DENSE:
        start = torch.randn(len(a), generator=torch.Generator().manual_seed(0), dtype=a.dtype)
        try:
            values, vectors = eigsh(a.cpu().numpy(), k=1, which="LA", v0=start.numpy())
            value, vector = torch.from_numpy(values)[0], torch.from_numpy(vectors)[:, 0]
        except ArpackError:
            vector = None
    if vector is None or value is None:
        values, vectors = torch.linalg.eigh(a)
        value, vector = values[-1], vectors[:, -1]
    return vector * torch.sign(vector[vector.abs().argmax()]), value
