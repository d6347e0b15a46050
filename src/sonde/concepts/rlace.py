"""Erase by a game: the projection of given rank that hurts the best linear classifier most.

Relaxed linear adversarial concept erasure (Ravfogel et al. 2022, arXiv:2201.12091):

    min over theta   max over P in the Fantope {0 <= P <= I, tr P = rank}   of   E loss(z, thetaᵀ (I - P) x),

ascended in P and descended in theta in turn, P projected back onto the Fantope after each step; the eraser takes out
the `rank` leading eigenvectors of P. A baseline: unlike INLP it knows how many directions it removes, but it has no
guarantee, and each step costs an eigendecomposition of d x d.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sonde.concepts.estimator import AffineEraser
from sonde.concepts.row_sample import RowSample


class RlaceEraser(AffineEraser):
    """Baseline: an orthogonal projection found by gradient ascent and descent in turn; labels only.

    Args:
        directions: dimensions to remove, the rank of P.
        steps: of P; the classifier takes five between two of them.
        rate: step size of P, relative to the size of the first gradient.
        affine: keep the mean of x.
        seed: of the classifier's first weights.

    """

    def __init__(
        self, *, directions: int = 1, steps: int = 200, rate: float = 0.1, affine: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.directions, self.steps, self.rate, self.affine, self.seed = directions, steps, rate, affine, seed

    def collects(self) -> RowSample:
        """All rows."""
        return RowSample(categorical=True)

    def solve(self, statistics: RowSample) -> None:
        """Play the game on all rows at once. Raises `ValueError` for a rank that does not fit and for complex rows."""
        x, z = statistics.rows
        d = statistics.dim
        if not 1 <= self.directions < d or x.is_complex():
            raise ValueError(
                f"{self.directions} directions of {x.dtype} rows of width {d}: expected 1 to {d - 1}, real"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        scale = float((x - mean).square().mean().sqrt()) or 1.0
        rows = (x - mean) / scale
        with torch.enable_grad():
            p = self._play(rows, z, statistics.k)
        basis = torch.linalg.eigh(p)[1][:, -self.directions :]
        self.facts = {}
        self.set_parts(basis, basis.T, mean if self.affine else None, x.dtype)

    def _play(self, x: Float[Tensor, "n d"], z: Tensor, k: int) -> Float[Tensor, "d d"]:
        d = x.shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        theta = (0.01 * torch.randn(d, k, generator=generator, dtype=x.dtype)).to(x.device).requires_grad_()
        bias = x.new_zeros(k).requires_grad_()
        p = torch.eye(d).to(x) * (self.directions / d)
        mean_p = torch.zeros_like(p)
        optimizer = torch.optim.Adam([theta, bias], lr=0.02)
        first = None
        for step in range(self.steps):
            left = x - x @ p
            for _ in range(5):
                optimizer.zero_grad()
                (F.cross_entropy(left @ theta + bias, z) + 1e-4 * theta.square().sum()).backward()
                optimizer.step()
            with torch.no_grad():
                # the loss grows along -(gradient in the logits) times x and theta
                error = (left @ theta + bias).softmax(-1)
                error[torch.arange(len(z)), z] -= 1
                gradient = -(x.T @ error) @ theta.T / len(x)
                gradient = (gradient + gradient.T) / 2
            first = first or float(gradient.norm()) or 1.0
            p = fantope(p + self.rate / first * gradient, self.directions)
            if step >= self.steps // 2:
                mean_p += p
        return mean_p


def fantope(a: Float[Tensor, "d d"], rank: int) -> Float[Tensor, "d d"]:
    """The nearest symmetric matrix with eigenvalues in 0 to 1 that sum to `rank`."""
    values, vectors = torch.linalg.eigh(a)
    low, high = values[0] - 1, values[-1]
    for _ in range(60):
        middle = (low + high) / 2
        if (values - middle).clamp(0, 1).sum() > rank:
            low = middle
        else:
            high = middle
    return (vectors * (values - (low + high) / 2).clamp(0, 1)) @ vectors.T
