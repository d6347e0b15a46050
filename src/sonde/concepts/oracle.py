"""How little could erasing cost if the label of every row were known while it is edited?

    r(x, z) = x - Cov(x, z) Cov(z)⁺ (z - E z)

is what ordinary least squares of x on z leaves, plus the mean (Belrose et al. 2023, arXiv:2306.03819, appendix). Among
all maps of x and z that guard z linearly it changes x least: a lower bound for every eraser. For labels it moves class
means to the common mean: r(x, c) = x - mu_c + mu.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.estimator import LabelledEraser, labels_for
from sonde.concepts.statistics import ConceptStatistics, as_tensor
from sonde.stats.solve import symmetric_power


class OracleEraser(LabelledEraser):
    """The lower bound: `OracleEraser.fit(x, z)(x, z)`. Needs z at edit time; rows labelled -1 stay.

    `slope [d k]` = Cov(x, z) Cov(z)⁺ and `z_mean [k]` are its buffers. Parameters as in `LeaceEraser`.
    """

    slope: Float[Tensor, "d k"] | None
    z_mean: Float[Tensor, " k"] | None

    def __init__(
        self,
        *,
        categorical: bool | None = None,
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.categorical, self.decay, self.precision = categorical, decay, precision
        self.register_buffer("slope", None)
        self.register_buffer("z_mean", None)

    @property
    def fitted(self) -> bool:
        """Whether there is something to apply."""
        return self.slope is not None

    def collects(self) -> ConceptStatistics:
        """The cross-covariance of x with z, and the covariance of z."""
        return ConceptStatistics(
            categorical=self.categorical, covariance="none", decay=self.decay, precision=self.precision
        )

    def solve(self, statistics: ConceptStatistics) -> None:
        """Regress x on z. For labels the columns of the slope are mu_c - mu, and z is not centred."""
        kind = statistics.dtype
        self.facts = {"categorical": bool(statistics.categorical)}
        if statistics.categorical:
            shift = statistics.class_means - statistics.mean
            self.slope = torch.where(statistics.class_weights[:, None] > 0, shift, 0).T.to(kind)
            self.z_mean = statistics.z_mean.to(kind.to_real())
        else:
            # at unit variance, so that the pseudo-inverse does not take a small column for none
            covariance, scale = statistics.z_covariance, statistics.z_deviation
            scale = torch.where(scale > 0, scale, 1)
            inverse = symmetric_power(covariance / scale / scale[:, None], -1) / scale / scale[:, None]
            self.slope = (statistics.cross_covariance @ inverse).to(kind)
            self.z_mean = statistics.z_mean.to(kind)

    def forward(self, x: Float[Tensor, "*batch d"], z: Any) -> Float[Tensor, "*batch d"]:
        """The erased rows, in the type of x; z as in `fit`, for each row of x or for each sequence."""
        self.check_fitted()
        assert self.slope is not None and self.z_mean is not None
        kind = torch.promote_types(x.dtype, self.slope.dtype)
        flat = x.reshape(-1, x.shape[-1]).to(kind)
        if self.facts["categorical"]:
            labels = labels_for(x, z, self.slope.shape[1])
            table = torch.cat([self.slope.T, torch.zeros_like(self.slope.T[:1])]).to(kind)
            return (flat - table[labels]).reshape(x.shape).to(x.dtype)
        z = as_tensor(z, "z").to(x.device)
        z = z if z.is_complex() == x.is_complex() or not z.is_complex() else torch.view_as_real(z).flatten(-2)
        if z.shape == x.shape[:-1]:
            z = z[..., None]
        if z.shape[-1] != self.slope.shape[1] or z.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"z has the shape {tuple(z.shape)} for x of shape {tuple(x.shape)}")
        z = z.reshape(-1, z.shape[-1]).to(kind)
        return (flat - (z - self.z_mean.to(kind)) @ self.slope.to(kind).T).reshape(x.shape).to(x.dtype)
