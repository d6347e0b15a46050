"""The cheapest way to move one Gaussian onto another, and the Gaussian in the middle of many (2-Wasserstein).

    T = S^-½ (S^½ S' S^½)^½ S^-½,     T S T = S'

With any root S = G Gᵀ it is G⁻ᵀ (Gᵀ S' G)^½ G⁻¹: one eigendecomposition. It exists where the span of S' lies in that of
S; otherwise T S T is S' projected on what S spans. The barycentre B has a closed form for two covariances, and else is
the fixed point of B <- M B M, M = sum_c pi_c T_{B -> S_c} (Álvarez-Esteban et al. 2016, arXiv:1511.05355).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.stats.solve import Root

_STEPS = 100  # at most, of the fixed point
_SETTLED = 1e-9  # root mean square of an eigenvalue of M - I that ends it


def transport(source: Root, target: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric T with T S T = `target` for the covariance S of the root: optimal transport of Gaussians."""
    inner = _square_root(_between(source, target))
    half = source.whiten_adjoint(inner)
    result = source.whiten_adjoint(half.mH)
    return (result + result.mH) / 2


def barycentre(
    covariances: Float[Tensor, "k d d"], weights: Float[Tensor, " k"], *, roots: list[Root] | None = None
) -> tuple[Float[Tensor, "d d"], int]:
    """The covariance of least weighted mean squared Wasserstein distance to all, and the steps that it took.

    Classes of weight 0 do not count. Raises `ValueError` for weights that are negative or all 0.
    """
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError("weights of a barycentre must not be negative, and some must be above 0")
    weights = weights.double() / weights.sum()
    if len(covariances) == 2:
        first = Root(covariances[0]) if roots is None else roots[0]
        half = transport(first, covariances[1]) * weights[1]
        half.diagonal().add_(weights[0])
        return half @ covariances[0] @ half.mH, 0
    centre = torch.einsum("c,cij->ij", weights.to(covariances.dtype), covariances)
    for step in range(1, _STEPS + 1):
        root = Root(centre)
        inner = sum(
            w * _square_root(_between(root, s)) for w, s in zip(weights.tolist(), covariances, strict=True) if w > 0
        )
        assert isinstance(inner, Tensor)
        # M = G⁻ᴴ inner G⁻¹, and M B M = (G⁻ᴴ inner)(G⁻ᴴ inner)ᴴ for B = G Gᴴ
        half = root.whiten_adjoint(inner)
        centre = half @ half.mH
        excess = root.whiten_adjoint(half.mH)
        excess.diagonal().sub_(1)
        if float(torch.linalg.matrix_norm(excess)) <= _SETTLED * len(excess) ** 0.5:
            return centre, step
    return centre, _STEPS


def _between(root: Root, covariance: Float[Tensor, "d d"]) -> Float[Tensor, "rank rank"]:
    """Gᴴ S G."""
    half = root.colour_adjoint(covariance)
    return root.colour_adjoint(half.mH)


def _square_root(a: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """The positive semi-definite root."""
    values, vectors = torch.linalg.eigh((a + a.mH) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mH
