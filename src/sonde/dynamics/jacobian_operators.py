"""The spectrum of a Jacobian that is too large to form: from products with it and its transpose alone.

    top_singular        block Lanczos from a random start (block Krylov): span{Ω, (JᵀJ)Ω, …, (JᵀJ)^q Ω}, then the SVD of
                        J on it (Musco & Musco 2015, arXiv:1504.05477)
    spectral_density    stochastic Lanczos quadrature on JᵀJ: from a random unit vector z, m steps give a tridiagonal
                        matrix whose eigenvalues θ and squared first components τ are the nodes and weights of a density
                        with the right first 2m moments (Ubaru, Chen & Saad 2017)
    membership          ‖Jv - v‖ / ‖v‖: 0 for a direction that training carries through unchanged

`minus_identity(J)` is J - I, whose large singular values are those directions which training does change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.stats.intervals import Interval, bootstrap_mean

_OVERSAMPLE = 8


class Operator(Protocol):
    """A square matrix of size `n` that is known by its products with columns [n, k]."""

    @property
    def n(self) -> int:
        """Rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the columns."""
        ...

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u."""
        ...


@dataclass(frozen=True)
class Products:
    """An operator from two functions."""

    n: int
    dtype: torch.dtype
    jvp: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor], Tensor]


def matrix(j: Float[Tensor, "N N"]) -> Products:
    """A dense matrix as an operator."""
    return Products(len(j), j.dtype, lambda v: j @ v, lambda u: j.T @ u)


def minus_identity(j: Operator) -> Products:
    """J - I. Its rank, at a tolerance, is the number of directions that are not bulk."""
    return Products(j.n, j.dtype, lambda v: j.jvp(v) - v, lambda u: j.vjp(u) - u)


class Singular(NamedTuple):
    """The largest singular values, in descending order, with their vectors as columns."""

    u: Float[Tensor, "N k"]
    sigma: Float[Tensor, " k"]
    v: Float[Tensor, "N k"]


def top_singular(j: Operator, k: int, *, iterations: int = 4, seed: int = 0, progress: str | None = None) -> Singular:
    """The `k` largest singular values and vectors, by (iterations + 1) products each with J and Jᵀ of k + 8 columns.

    Every iteration narrows the error several times over where the spectrum falls; the last of the k are the least
    exact. Raises `SondeError` for k outside 1 … N.
    """
    if not 1 <= k <= j.n or iterations < 0:
        raise SondeError(
            f"k is {k} and iterations {iterations}: give 1 to {j.n:,} singular values, 0 or more iterations"
        )
    width = min(j.n, k + _OVERSAMPLE)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(j.n, width, generator=generator, dtype=j.dtype)
    basis = torch.linalg.qr(block).Q
    images = []
    for turn in tqdm(range(iterations + 1), desc=progress, disable=progress is None):
        newest = basis[:, sum(image.shape[1] for image in images) :]
        images.append(j.jvp(newest))
        room = j.n - basis.shape[1]
        if turn == iterations or not room:
            break
        block = j.vjp(images[-1])[:, :room]
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            block = block - basis @ (basis.T @ block)
        basis = torch.cat([basis, _orthonormal(block, basis)], 1)
    u, sigma, vh = torch.linalg.svd(torch.cat(images, 1), full_matrices=False)
    return Singular(u[:, :k], sigma[:k], (basis @ vh.T)[:, :k])


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    q = torch.linalg.qr(block).Q
    return torch.linalg.qr(q - basis @ (basis.T @ q)).Q  # where the block had lost rank, its QR strays into the basis


@dataclass(frozen=True)
class Density:
    """Nodes (singular values) and weights of a spectral density, for every random start: [starts, m], weights sum to 1.

    The number of singular values is `n`.
    """

    n: int
    sigma: Float[Tensor, "starts m"]
    weight: Float[Tensor, "starts m"]

    def fraction(self, low: float, high: float) -> Interval:
        """Share of the singular values from `low` to `high`, with an interval over random starts.

        A share of a density that was made of m nodes is blurred at its ends by about 1 / m of the spectrum's width.
        """
        inside = (self.sigma >= low) & (self.sigma <= high)
        return bootstrap_mean((self.weight * inside).sum(1).double().numpy())

    def histogram(self, edges: Float[Tensor, " bins+1"]) -> Float[Tensor, "starts bins"]:
        """Share of the spectrum between consecutive edges."""
        found = [
            np.histogram(s.numpy(), bins=edges.numpy(), weights=w.numpy())[0]
            for s, w in zip(self.sigma.double(), self.weight.double(), strict=True)
        ]
        return torch.tensor(np.array(found))


def spectral_density(
    j: Operator, *, nodes: int = 80, starts: int = 10, seed: int = 0, progress: str | None = None
) -> Density:
    """The density of singular values, from `nodes` products with JᵀJ of `starts` columns.

    Lanczos vectors are kept and made orthogonal again at every step, which costs memory for nodes · starts columns.
    Raises `SondeError` for fewer than 2 starts, and for nodes outside 1 … N.
    """
    if not 1 <= nodes <= j.n or starts < 2:
        raise SondeError(f"{nodes} nodes and {starts} starts: give 1 to {j.n:,} nodes and at least 2 starts")
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(j.n, starts, generator=generator, dtype=j.dtype)
    kept = [z / z.norm(dim=0)]
    diagonal, beside = [], []
    for turn in tqdm(range(nodes), desc=progress, disable=progress is None):
        w = j.vjp(j.jvp(kept[-1]))
        diagonal.append((w * kept[-1]).sum(0))
        if turn + 1 == nodes:
            break
        stack = torch.stack(kept)
        for _ in range(2):
            w = w - torch.einsum("mns,ms->ns", stack, torch.einsum("mns,ns->ms", stack, w))
        norm = w.norm(dim=0)
        beside.append(norm)
        kept.append(w / norm.clamp_min(torch.finfo(j.dtype).tiny))
    t = torch.diag_embed(torch.stack(diagonal, 1).double())
    if beside:
        off = torch.diag_embed(torch.stack(beside, 1).double(), offset=1)
        t = t + off + off.mT
    values, vectors = torch.linalg.eigh(t)
    return Density(j.n, values.clamp_min(0).sqrt(), vectors[:, 0] ** 2)


def membership(j: Operator, v: Float[Tensor, "N k"]) -> Float[Tensor, " k"]:
    """‖Jv - v‖ / ‖v‖ of every column: how far a direction is from being bulk. No decomposition is needed."""
    return (j.jvp(v) - v).norm(dim=0) / v.norm(dim=0)
