"""The most random distribution on [0, 1] with a given mean: density proportional to exp(-b x).

m(b) = 1/b - 1/(e^b - 1), which falls from 1 to 0 and is ½ - b/12 near 0. It is inverted by bisection, which never
fails; a draw is x = -log(1 + u (e^-b - 1)) / b for u uniform on [0, 1].
"""

import torch
from jaxtyping import Float
from torch import Tensor

_STEEPEST = 400.0
_FLAT = 1e-4  # of b, below which the distribution is uniform to working precision
_HALVINGS = 60


def mean(rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """m(b), in float64."""
    rate = rate.double()
    flat = rate.abs() < _FLAT
    b = torch.where(flat, 1.0, rate)
    return torch.where(flat, 0.5 - rate / 12, 1 / b - 1 / torch.expm1(b))


def rate_of(means: Float[Tensor, "*shape"], *, margin: float = 3e-3) -> Float[Tensor, "*shape"]:
    """The b of each mean, means first clipped to [margin, 1 - margin]. Raises `ValueError` for means outside [0, 1]."""
    means = means.double()
    outside = ~((means >= 0) & (means <= 1))
    if outside.any():
        raise ValueError(f"{int(outside.sum())} of {means.numel()} means lie outside [0, 1]")
    wanted = means.clamp(margin, 1 - margin)
    low, high = torch.full_like(wanted, -_STEEPEST), torch.full_like(wanted, _STEEPEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = mean(middle) > wanted  # m falls: the rate must be larger
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def draw(rate: Float[Tensor, " d"], n: int, *, seed: int = 0) -> Float[Tensor, "n d"]:
    """`n` rows with independent coordinates, one rate each, in float64."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, len(rate), generator=generator, dtype=torch.float64)
    flat = rate.abs() < _FLAT
    b = torch.where(flat, 1.0, rate.double())
    # from the steep end, so that e^-b does not overflow: x(u; b) = 1 - x(1 - u; -b)
    steep = b.abs()
    x = -torch.log1p(torch.where(b > 0, u, 1 - u) * torch.expm1(-steep)) / steep
    return torch.where(flat, u, torch.where(b > 0, x, 1 - x)).clamp(0, 1)
