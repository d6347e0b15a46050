"""Does each layer follow from the one before as it does on trusted rows? An abstraction of a network as a chain.

On trusted rows layer l is predicted from layer l - 1 by ridge regression, and a row's score at l is the squared
Mahalanobis distance of what the prediction misses,

    r_l = h_l - W_l h_{l-1},     score_l = (r_l - m_l)ᵀ C_l⁺ (r_l - m_l),

m_l and C_l from trusted rows; at layer 0, from which nothing comes before, h_0 takes the place of r_l. A mechanism that
is not the trusted one shows where it works, not in all layers after it (abstraction distance, in its linear form, of
Mallen et al. 2504.08812).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.stats.gaussian_novelty import Gaussian
from sonde.stats.layered_rows import Novelty
from sonde.stats.solve import ridge

_SHRINKAGE = 1e-3  # of the mean variance of the layer before


class Abstraction(Novelty):
    """Surprise at each layer given the one before; on rows of one layer the squared Mahalanobis distance."""

    def _fit(self, trusted: Tensor) -> None:
        self._mean = trusted.mean(1, keepdim=True)
        centred = trusted - self._mean
        before, after = centred[:-1], centred[1:]
        self._maps: Float[Tensor, "layers d d"] = (
            ridge(before.mT @ before, before.mT @ after, lam=_SHRINKAGE) if len(before) else before.new_empty(0, 0, 0)
        )
        self._gaussian = Gaussian.of(self._missed(trusted))

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        return self._gaussian.whitened(self._missed(rows)).square_().sum(-1)

    def _missed(self, rows: Float[Tensor, "layers n d"]) -> Float[Tensor, "layers n d"]:
        """What the layer before does not tell."""
        centred = rows - self._mean
        if len(rows) == 1:
            return centred
        return torch.cat([centred[:1], centred[1:] - centred[:-1] @ self._maps])
