"""Which directions of initial weights training amplifies, forgets, or carries through: J = U Σ Vᵀ, sorted by |σ - 1|.

Right vectors v live at initialisation, left vectors u at the end of training. A direction is chaotic (σ > 1), stable
(σ < 1) or bulk (σ ≈ 1). No threshold is given by theory, so shares are told at several, and subspaces of the k most
bulk-like directions compared over k. Inside a cluster of equal σ single vectors mean nothing; subspaces do.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle

TOLERANCES = (1e-3, 1e-2, 0.1)
_FLOAT32_FLOOR = 1e-6

Region = Literal["bulk", "complement", "chaotic", "stable"]


class Regions(NamedTuple):
    """How many directions are chaotic, bulk and stable at a tolerance on |σ - 1|."""

    chaotic: int
    bulk: int
    stable: int


@dataclass(frozen=True)
class Spectrum:
    """One singular value decomposition of J: columns of `u` and `v` belong together; `sigma` descends."""

    u: Float[Tensor, "N N"]
    sigma: Float[Tensor, " N"]
    v: Float[Tensor, "N N"]

    @staticmethod
    def of(j: Float[Tensor, "N N"]) -> "Spectrum":
        """Decompose J, in its own precision. Raises `SondeError` where it is not square or not finite."""
        if j.ndim != 2 or j.shape[0] != j.shape[1] or not j.isfinite().all():
            raise SondeError(f"a Jacobian of shape {tuple(j.shape)}: give a square one with finite entries")
        u, sigma, vh = torch.linalg.svd(j)
        return Spectrum(u, sigma, vh.T.contiguous())

    @property
    def n(self) -> int:
        """N."""
        return len(self.sigma)

    @cached_property
    def order(self) -> Int[Tensor, " N"]:
        """Indices from the most bulk-like direction to the least."""
        return (self.sigma - 1).abs().argsort(stable=True)

    def regions(self, tolerance: float = 0.1) -> Regions:
        """Chaotic, bulk and stable directions. Raises `SondeError` below what the precision can tell apart."""
        if tolerance <= 0 or (self.sigma.dtype != torch.float64 and tolerance < _FLOAT32_FLOOR):
            raise SondeError(
                f"|σ - 1| < {tolerance:g} cannot be counted in {str(self.sigma.dtype).removeprefix('torch.')}: "
                "use a tolerance of 1e-6 or more, or a float64 Jacobian"
            )
        off = self.sigma - 1
        bulk = int((off.abs() < tolerance).sum())
        chaotic = int((off >= tolerance).sum())
        return Regions(chaotic, bulk, self.n - bulk - chaotic)

    def fraction(self, tolerance: float = 0.1) -> float:
        """Share of directions with |σ - 1| below the tolerance."""
        return self.regions(tolerance).bulk / self.n

    def alignment(self) -> Float[Tensor, " N"]:
        """cos(u_i, v_i), in the order of `sigma`."""
        return (self.u * self.v).sum(0)

    def directions(self, region: Region, k: int) -> Float[Tensor, "N k"]:
        """Right vectors: the k most or (complement) the least bulk-like, the most chaotic, the most stable.

        Raises `SondeError` for k outside 1 … N.
        """
        return self.v[:, self.ranked(region)[: self._size(k)]]

    def ranked(self, region: Region) -> Int[Tensor, " N"]:
        """All indices, those of the region first."""
        if region == "bulk":
            return self.order
        if region == "complement":
            return self.order.flip(0)
        return torch.arange(self.n) if region == "chaotic" else torch.arange(self.n).flip(0)

    def displacement(self, start: Float[Tensor, " N"], end: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """|⟨θ_T - θ₀, v_i⟩| in the order of `sigma`: along which directions training went."""
        return (self.v.T @ (end - start).to(self.v.dtype)).abs()

    def displaced_share(self, start: Float[Tensor, " N"], end: Float[Tensor, " N"], k: int) -> float:
        """Share of ‖θ_T - θ₀‖² inside the k most bulk-like directions. A random subspace holds k / N."""
        squared = self.displacement(start, end) ** 2
        return float(squared[self.order[: self._size(k)]].sum() / squared.sum())

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file."""
        save_bundle(path, {"u": self.u, "sigma": self.sigma, "v": self.v})

    @staticmethod
    def load(path: str | Path) -> "Spectrum":
        """Read what `save` wrote. Raises `SondeError` for other files."""
        tree = load_bundle(path)
        try:
            return Spectrum(tree["u"], tree["sigma"], tree["v"])
        except (KeyError, TypeError) as error:
            raise SondeError(f"{path} holds no spectrum") from error

    def _size(self, k: int) -> int:
        if not 1 <= k <= self.n:
            raise SondeError(f"k is {k}: give 1 to {self.n:,} directions")
        return k


def overlap(a: Float[Tensor, "N k"], b: Float[Tensor, "N k"]) -> float:
    """‖AᵀB‖²_F / k of two orthonormal bases: the mean squared cosine of principal angles. By chance it is k / N.

    Raises `SondeError` for bases of other sizes.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise SondeError(
            f"subspaces of {tuple(a.shape)} and {tuple(b.shape)}, [parameters, directions]: give two of one size"
        )
    return float((a.T @ b.to(a.dtype)).square().sum() / a.shape[1])


def overlaps(a: Spectrum, b: Spectrum, counts: list[int]) -> list[float]:
    """`overlap` of the k most bulk-like directions of two trainings, for every k of `counts`, from one product."""
    if a.n != b.n:
        raise SondeError(f"Jacobians of {a.n:,} and of {b.n:,} parameters: only trainings of one size can be compared")
    squared = (a.v[:, a.order].T @ b.v[:, b.order].to(a.v.dtype)).square()
    return [float(squared[: a._size(k), :k].sum() / k) for k in counts]
