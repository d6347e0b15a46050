"""Training a small network by changes of low rank alone: W + B A on every linear map, B = 0 at first.

The maps stay what they are and only A and B are trained (Hu et al., arXiv:2106.09685). For language models there is
`sonde.lm.lora`; this is the same on plain modules, whose weights come back merged.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sonde.errors import SondeError


class _LowRank(nn.Module):
    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.low_a = nn.Parameter(torch.randn(rank, columns, generator=generator) * columns**-0.5)
        self.low_b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return weight + self.low_b @ self.low_a


def is_low_rank(name: str) -> bool:
    """Whether a parameter's name is that of a change of low rank: what to train inside `low_rank`."""
    return name.endswith((".low_a", ".low_b"))


@contextmanager
def low_rank(module: nn.Module, *, rank: int, seed: int = 0) -> Iterator[nn.Module]:
    """Inside, every linear map of `module` has a change of `rank`; at the end it is added to the weights.

    Raises `SondeError` for a rank below 1 and a network without linear maps.
    """
    maps = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if rank < 1 or not maps:
        raise SondeError(f"changes of rank {rank} to {len(maps)} linear maps: give 1 or more, and a network with some")
    generator = torch.Generator().manual_seed(seed)
    for part in maps:
        parametrize.register_parametrization(part, "weight", _LowRank(part.weight.detach(), rank, generator))
    try:
        yield module
    finally:
        for part in maps:
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
