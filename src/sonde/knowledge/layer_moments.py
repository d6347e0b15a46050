"""Means and covariances of the states of each layer, computed once for all probes that need them.

Covariances of the last token are summed in float64; those of pairs, which are four times as large and serve leading
eigenvectors, erasure and preconditioning, in float32.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.stats.moments import Moments

Part = Literal["last", "pair"]


class LayerMoments:
    """Of rows `[layers n width]` by part, each computed when it is first asked for, and then kept."""

    def __init__(self, rows: Mapping[Part, Float[Tensor, "layers n width"]]) -> None:
        self._rows = dict(rows)
        self._means: dict[Part, Tensor] = {}
        self._covariances: dict[Part, Tensor] = {}

    def mean(self, part: Part) -> Float[Tensor, "layers width"]:
        """Mean row of each layer, float64."""
        if part not in self._means:
            self._means[part] = self._rows[part].mean(1, dtype=torch.float64)
        return self._means[part]

    def covariance(self, part: Part) -> Float[Tensor, "layers width width"]:
        """Unbiased covariance of the rows of each layer: float64 for the last token, float32 for pairs."""
        if part not in self._covariances:
            kind = torch.float64 if part == "last" else torch.float32
            found = [Moments(x.shape[1], precision=kind).update(x).covariance.to(kind) for x in self._rows[part]]
            self._covariances[part] = torch.stack(found)
        return self._covariances[part]

    def known(self, part: Part) -> Float[Tensor, "layers width width"] | None:
        """The covariance of the rows, where it was computed before."""
        return self._covariances.get(part)

    def pair_sums(self, layer: int) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        """Of one layer, float64: Cov(h-) + Cov(h+), and Cov(h-, h+) plus its transpose."""
        whole = self.covariance("pair")[layer].double()
        d = len(whole) // 2
        cross = whole[:d, d:]
        return whole[:d, :d] + whole[d:, d:], cross + cross.T
