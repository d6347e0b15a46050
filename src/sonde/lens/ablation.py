"""Take directions out of a hidden state: what remains, and what takes the place of the component?

    r(h) = h - Vᵀ V (h - m)        V: k orthonormal rows

m is the mean of the states (mean ablation), zero, or the state of another token or row (resampling, by a derangement,
so that none is replaced by itself). The first keeps a direction's usual value, the last keeps its distribution.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.surgery import derangement

Kind = Literal["mean", "zero", "resample"]


def ablate(
    hidden: Float[Tensor, "*rows d_model"],
    directions: Float[Tensor, "k d_model"],
    reference: Float[Tensor, "*#rows d_model"],
) -> Float[Tensor, "*rows d_model"]:
    """`hidden` with its component in the span of orthonormal `directions` replaced by that of `reference`."""
    return hidden - (hidden - reference) @ directions.T @ directions


def replacement(
    hidden: Float[Tensor, "n d_model"], kind: Kind = "mean", *, seed: int = 0
) -> Float[Tensor, "*#n d_model"]:
    """What ablation puts in the place of a component of n states: their mean, zero, or other rows of them.

    Raises `SondeError` for another kind, and for fewer than two rows where mean or other rows are wanted.
    """
    if kind not in get_args(Kind):
        raise SondeError(f"ablation {kind!r} is unknown: use mean, zero or resample")
    if kind == "zero":
        return torch.zeros_like(hidden[0])
    if kind == "resample":
        return hidden[derangement(len(hidden), seed=seed).to(hidden.device)]
    if len(hidden) < 2:
        raise SondeError(f"mean ablation needs at least 2 rows to take the mean of, not {len(hidden)}")
    return hidden.mean(0)


@dataclass(frozen=True)
class SubspaceAblation:
    """An edit for `lm.editing`: the component in the span of `directions` becomes that of a mean, zero or another row.

    Args:
        directions: orthonormal, Float[Tensor, "k d_model"].
        kind: with "resample" each row of a batch takes the component of another row at the same position.
        mean: of the states, Float[Tensor, "d_model"]; needed for the kind "mean" alone.
        seed: of the derangement.

    Raises `SondeError` for directions that are not orthonormal and a mean that is missing; resampling refuses a batch
    of one row.

    """

    directions: Float[Tensor, "k d_model"]
    kind: Kind = "mean"
    mean: Float[Tensor, " d_model"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_orthonormal(self.directions)
        if self.kind not in get_args(Kind):
            raise SondeError(f"ablation {self.kind!r} is unknown: use mean, zero or resample")
        if (self.kind == "mean") != (self.mean is not None):
            raise SondeError(f"{self.kind} ablation takes {'a' if self.kind == 'mean' else 'no'} mean of the states")

    def __call__(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The states without the component."""
        directions = self.directions.to(hidden)
        if self.mean is not None:
            return ablate(hidden, directions, self.mean.to(hidden))
        if self.kind == "zero":
            return hidden - hidden @ directions.T @ directions
        return ablate(hidden, directions, hidden[derangement(len(hidden), seed=self.seed).to(hidden.device)])


def check_orthonormal(directions: Float[Tensor, "k d_model"]) -> None:
    """Raise `SondeError` unless the rows are orthonormal."""
    if directions.ndim != 2:
        raise SondeError(f"directions have shape (k, d_model), not {tuple(directions.shape)}")
    gram = directions.double() @ directions.double().T
    error = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
    if not error < 1e-3:
        raise SondeError(
            f"directions should be orthonormal, but their products are off by {error:.2g}: "
            "use torch.linalg.qr(directions.T).Q.T"
        )
