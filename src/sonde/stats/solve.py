"""Linear systems with a covariance on the left, solved to a stated accuracy, and what its eigenvalues say.

A x = b by Cholesky where A is positive definite to working precision and the residual confirms it; else by the
eigendecomposition with eigenvalues below rtol * largest dropped, which gives the least-norm solution. Ridge regression
solves (S_xx + lam tr(S_xx) / d I) W = S_xy, so that `lam` is a share of the mean variance and does not depend on units.
Effective rank = exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007).
"""

import torch
from jaxtyping import Float
from torch import Tensor

_SYMMETRIC = 1e-6  # largest |A - Aᵀ| relative to |A| that is taken for rounding


def solve_spd(
    a: Float[Tensor, "... d d"], b: Float[Tensor, "... d k"], *, rtol: float = 1e-10
) -> Float[Tensor, "... d k"]:
    """Solve A x = b for symmetric positive semi-definite A, singular or not, in float64.

    The result satisfies `|A x - b| <= rtol (|A| |x| + |b|)` where b lies in the span of A; otherwise it is the
    least-squares solution of least norm with eigenvalues below `rtol` of the largest taken for zero. Raises
    `ValueError` for shapes that do not fit, for an A that is not symmetric or has an eigenvalue clearly below 0 and
    for values that are not finite.
    """
    a = _symmetric(a)
    b = b.to(a.dtype)
    if b.shape[:-1] != a.shape[:-1]:
        raise ValueError(f"a right-hand side of shape {tuple(b.shape)} for matrices of shape {tuple(a.shape)}")
    if not b.isfinite().all():
        raise ValueError("the right-hand side holds nan or infinity")
    factor, failed = torch.linalg.cholesky_ex(a)
    factor = torch.where((failed > 0)[..., None, None], torch.eye(a.shape[-1]).to(a), factor)
    # The condition number, from the inverse: the pivots of a singular matrix need not be small.
    condition = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(torch.cholesky_inverse(factor))
    singular = (failed > 0) | ~(rtol * condition < 1)
    x = torch.cholesky_solve(b, factor)
    residual = torch.linalg.matrix_norm(a @ x - b)
    allowed = rtol * (torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(x) + torch.linalg.matrix_norm(b))
    poor = singular | ~(residual <= allowed)
    if poor.any():
        values, vectors = _eigen(a[poor], rtol)
        inverse = torch.where(values > rtol * values[..., -1:], 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0)
        x[poor] = vectors @ (inverse[..., None] * (vectors.mH @ b[poor]))
    return x


def ridge(xx: Float[Tensor, "... d d"], xy: Float[Tensor, "... d k"], *, lam: float = 1e-4) -> Float[Tensor, "... d k"]:
    """Coefficients W of y ≈ x W from the scatters (or covariances) of centred data, shrunk by `lam` mean variances.

    Raises `ValueError` for a negative `lam` and as `solve_spd` does.
    """
    if lam < 0:
        raise ValueError(f"lam is {lam}: expected 0 or more")
    xx = _symmetric(xx)
    mean_variance = xx.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return solve_spd(xx + lam * mean_variance * torch.eye(xx.shape[-1]).to(xx), xy)


def spectrum(a: Float[Tensor, "... d d"]) -> Float[Tensor, "... d"]:
    """Eigenvalues of a symmetric positive semi-definite matrix, largest first, in float64; rounding below 0 becomes 0.

    Raises `ValueError` as `solve_spd` does.
    """
    return _eigen(_symmetric(a), 1e-10)[0].flip(-1).clamp(min=0)


def effective_rank(a: Float[Tensor, "... d d"]) -> Float[Tensor, "..."]:
    """Number of directions that share the variance, between 1 and d; nan for a matrix of zeros."""
    values = spectrum(a)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def symmetric_power(a: Float[Tensor, "... d d"], exponent: float, *, rtol: float = 1e-10) -> Float[Tensor, "... d d"]:
    """A to a real power on its span: 1/2 colours, -1/2 whitens, -1 is the pseudo-inverse; in float64.

    Eigenvalues below `rtol` of the largest are taken for zero and stay zero. Raises `ValueError` as `solve_spd` does.
    """
    values, vectors = _eigen(_symmetric(a), rtol)
    kept = values > rtol * values[..., -1:]
    powers = torch.where(kept, torch.where(kept, values, 1) ** exponent, 0)
    return (vectors * powers[..., None, :]) @ vectors.mH


def _eigen(a: Tensor, rtol: float) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d d"]]:
    values, vectors = torch.linalg.eigh(a)
    largest = values.abs().amax(-1)
    if (values[..., 0] < -max(rtol, _SYMMETRIC) * largest).any():
        raise ValueError(f"an eigenvalue of {values[..., 0].min():.3g} beside {largest.max():.3g}: not a covariance")
    return values, vectors


def _symmetric(a: Tensor) -> Float[Tensor, "... d d"]:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a matrix of shape {tuple(a.shape)}: expected a square one")
    a = a.to(torch.complex128) if a.is_complex() else a.double()
    if not a.isfinite().all():
        raise ValueError("the matrix holds nan or infinity")
    if (a - a.mH).abs().max() > _SYMMETRIC * a.abs().max():
        raise ValueError(f"the matrix is not symmetric: entries differ by up to {(a - a.mH).abs().max():.3g}")
    return (a + a.mH) / 2


class Root:
    """A square root G of a covariance, A = G Gᴴ, that can be applied and undone; in float64 (complex128).

    G is the Cholesky factor where A is well enough conditioned (judged at unit diagonal, where units of single
    coordinates do not count), which costs d³/3 and no eigenvectors. Otherwise eigenvalues up to d eps of the largest
    are dropped and G is d x rank, with its pseudo-inverse. Raises `ValueError` for a matrix that is not square, not
    finite or has an eigenvalue clearly below 0.

    Attributes:
        rank: numerical rank of A.
        cholesky: which of the two it is.

    """

    def __init__(self, a: Float[Tensor, "d d"]) -> None:
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"a matrix of shape {tuple(a.shape)}: expected a square one")
        a = a.to(torch.promote_types(a.dtype, torch.float64))
        if not a.sum().isfinite():
            raise ValueError("the matrix holds nan or infinity")
        self._factor, failed = torch.linalg.cholesky_ex(a)
        limit = 1 / (len(a) * torch.finfo(torch.float64).eps)
        self.cholesky = not failed and _condition(a, self._factor) < limit
        self.rank = len(a)
        self._inverse = None
        if not self.cholesky:
            scale = a.diagonal().real.sqrt()
            scale = torch.where(scale > 0, scale, 1)[:, None]
            values, vectors = _eigen(_symmetric(a / scale / scale.T), 1e-10)
            kept = values > values[-1] / limit
            self.rank = int(kept.sum())
            self._factor = vectors[:, kept] * values[kept].sqrt() * scale
            q, r = torch.linalg.qr(self._factor)
            self._inverse = torch.linalg.solve_triangular(r, q.mH, upper=True)

    def colour(self, b: Float[Tensor, "rank k"]) -> Float[Tensor, "d k"]:
        """G b: what is white becomes correlated as A says."""
        return self._factor @ b

    def colour_adjoint(self, b: Float[Tensor, "d k"]) -> Float[Tensor, "rank k"]:
        """Gᴴ b."""
        return self._factor.mH @ b

    def whiten(self, b: Float[Tensor, "d k"]) -> Float[Tensor, "rank k"]:
        """G⁺ b."""
        if self._inverse is not None:
            return self._inverse @ b
        return torch.linalg.solve_triangular(self._factor, b, upper=False)

    def whiten_adjoint(self, b: Float[Tensor, "rank k"]) -> Float[Tensor, "d k"]:
        """(G⁺)ᴴ b."""
        if self._inverse is not None:
            return self._inverse.mH @ b
        return torch.linalg.solve_triangular(self._factor.mH, b, upper=True)


def shrunk(covariance: Float[Tensor, "... d d"], n: float | Tensor) -> tuple[Float[Tensor, "... d d"], Tensor]:
    """Linear shrinkage of a sample covariance of `n` rows towards a multiple of the identity, and its weight alpha.

    alpha S + (1 - alpha) (tr S / d) I with alpha = 1 - (tr S)² / n / (|S|² - (tr S)² / d), held within 0 and 1, which
    the formula alone is not for few rows (Bodnar, Gupta & Parolya 2014, arXiv:1308.2608).
    """
    d = covariance.shape[-1]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).real
    trace = diagonal.sum(-1)
    spread = torch.linalg.matrix_norm(covariance) ** 2 - trace**2 / d
    alpha = (1 - trace**2 / n / spread.clamp(min=torch.finfo(trace.dtype).tiny)).clamp(0, 1)
    result = covariance * alpha[..., None, None]
    result.diagonal(dim1=-2, dim2=-1).add_(((1 - alpha) * trace / d)[..., None])
    return result, alpha


def _condition(a: Float[Tensor, "d d"], factor: Float[Tensor, "d d"]) -> float:
    """About the condition number of A = G Gᴴ at unit diagonal, from below: power and inverse iteration."""
    scale = a.diagonal().real.sqrt()[:, None]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(a), 1, generator=generator, dtype=torch.float64).to(a)
    norms = []
    for step in (lambda v: a @ (v / scale) / scale, lambda v: torch.cholesky_solve(v * scale, factor) * scale):
        v = start
        for _ in range(4):
            v = step(v / torch.linalg.vector_norm(v))
        norms.append(float(torch.linalg.vector_norm(v)))
    condition = norms[0] * norms[1]
    return condition if condition == condition else float("inf")
