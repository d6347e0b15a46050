"""From values to ranks and back, with ties dealt at random: the coordinates of an empirical distribution.

The dithered mid-rank of x in a sample is P(X < x) + U P(X = x) with U uniform, which is uniform whatever ties the
sample has (the distributional transform; Rüschendorf 2009). The quantile function is the left-continuous inverse.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def dithered_rank(x: Float[Tensor, "n d"], sample: Float[Tensor, "m d"], *, seed: int = 0) -> Float[Tensor, "n d"]:
    """Ranks of `x` in [0, 1], each column in the column of `sample`; U from `seed`."""
    ordered = sample.T.contiguous().sort().values
    columns = x.T.contiguous()
    below = torch.searchsorted(ordered, columns).double()
    up_to = torch.searchsorted(ordered, columns, right=True).double()
    u = torch.rand(columns.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((below + u * (up_to - below)) / len(sample)).T


def quantile(rank: Float[Tensor, "n d"], sample: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    """The value of `sample` at each rank, column by column."""
    ordered = sample.T.contiguous().sort().values
    place = (rank.T * len(sample)).ceil().long().sub(1).clamp(0, len(sample) - 1)
    return ordered.gather(1, place).T
