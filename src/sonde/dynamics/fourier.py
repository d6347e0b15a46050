"""Fourier analysis on the numbers modulo P, and on pairs of them.

The basis F is real and orthonormal: row 0 is constant; rows 2k-1 and 2k are sqrt(2/P) cos and sin of 2 pi k t / P,
k = 1 … (P-1)/2; an even P has the alternating row at the end. What depends on a + b alone at frequency k is

    cos w_k(a+b) = cos cos - sin sin        sin w_k(a+b) = sin cos + cos sin        w_k = 2 pi k / P

(Nanda et al. 2023, arXiv:2301.05217). All of it in float64.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError


def frequencies(modulus: int) -> range:
    """Frequencies that have a cosine and a sine: 1 … (P-1)/2."""
    return range(1, (modulus - 1) // 2 + 1)


def basis(modulus: int) -> Float[Tensor, "p p"]:
    """The orthonormal rows of F."""
    t = torch.arange(modulus, dtype=torch.float64)
    rows = [torch.full_like(t, 1 / math.sqrt(modulus))]
    for k in frequencies(modulus):
        angle = 2 * math.pi * k / modulus * t
        rows += [math.sqrt(2 / modulus) * angle.cos(), math.sqrt(2 / modulus) * angle.sin()]
    if modulus % 2 == 0:
        rows.append((1 - 2 * (t % 2)) / math.sqrt(modulus))
    return torch.stack(rows)


def sum_directions(modulus: int, ks: Sequence[int]) -> Float[Tensor, "pairs two_k"]:
    """Unit vectors on the grid of pairs: cos w_k(a+b) and sin w_k(a+b) for each k, as columns.

    Raises `SondeError` for a frequency that does not exist.
    """
    check(modulus, ks)
    t = torch.arange(modulus, dtype=torch.float64)
    total = (t[:, None] + t[None]).flatten()
    columns = []
    for k in ks:
        angle = 2 * math.pi * k / modulus * total
        columns += [math.sqrt(2) / modulus * angle.cos(), math.sqrt(2) / modulus * angle.sin()]
    return torch.stack(columns, 1) if columns else torch.zeros(modulus**2, 0, dtype=torch.float64)


def block_directions(modulus: int, ks: Sequence[int]) -> Float[Tensor, "pairs eight_k"]:
    """Unit vectors on the grid: {1, cos, sin} x {1, cos, sin} of each k without the constant, as columns."""
    check(modulus, ks)
    f = basis(modulus)
    columns = []
    for k in ks:
        rows = f[[0, 2 * k - 1, 2 * k]]
        columns.append(torch.einsum("ia,jb->abij", rows, rows).reshape(modulus**2, 9)[:, 1:])
    return torch.cat(columns, 1) if columns else torch.zeros(modulus**2, 0, dtype=torch.float64)


def check(modulus: int, ks: Sequence[int]) -> None:
    """Raise `SondeError` for a frequency that the modulus does not have."""
    for k in ks:
        if k not in frequencies(modulus):
            raise SondeError(f"frequency {k} does not exist modulo {modulus}: it has 1 to {(modulus - 1) // 2}")


def gini(x: Float[Tensor, " m"]) -> float:
    """Gini coefficient of non-negative numbers: 0 when all are equal, near 1 when one has everything."""
    ordered = x.double().sort().values
    m = len(ordered)
    weights = 2 * torch.arange(1, m + 1, dtype=torch.float64) - m - 1
    total = ordered.sum()
    return float((weights * ordered).sum() / (m * total)) if total > 0 else 0.0


def row_norms(modulus: int, matrix: Float[Tensor, "p d"]) -> Float[Tensor, " p"]:
    """Norms of the Fourier rows of a matrix over its first axis of numbers."""
    return (basis(modulus) @ matrix.double()).norm(dim=1)


def by_frequency(modulus: int, norms: Float[Tensor, " p"]) -> Float[Tensor, " k"]:
    """The norm of cosine and sine together, for each frequency."""
    pairs = norms[1 : 1 + 2 * len(frequencies(modulus))].view(-1, 2)
    return pairs.square().sum(1).sqrt()
