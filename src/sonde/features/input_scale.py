"""On what scale does a dictionary read? A factor or a whitening map, measured on a sample and folded in after training.

"norm": s = √d / E‖x‖, so that rows have norm √d on average; "rms": s = 1 / √E x², so that every number has mean square
1; "whiten": x' = (x - μ) A with A = (Σ + εI)^-1/2. A factor leaves what is chosen as it is; under whitening the errors
that training weighs are those of x', so that directions of small variance count as much as large ones. After training
the maps are folded into the weights: W_enc' = W_enc A, W_dec' = W_dec A⁻¹, b_dec' = b_dec A⁻¹ + μ (A = sI, μ = 0 for a
factor), while b_enc and thresholds stay.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary

Scale = Literal["none", "norm", "rms", "whiten"]
SCALES: tuple[Scale, ...] = get_args(Scale)
_RIDGE = 1e-4  # of the mean variance


@dataclass(frozen=True)
class Sample:
    """What a sample of rows says: mean, E‖x‖, E‖x‖² and, where asked, covariance and geometric median; float64."""

    mean: Float[Tensor, " d"]
    norm: Float[Tensor, ""]
    square: Float[Tensor, ""]
    covariance: Float[Tensor, "d d"] | None = None
    median: Float[Tensor, " d"] | None = None

    @staticmethod
    def of(rows: Float[Tensor, "n d"], *, covariance: bool = False, median: bool = False) -> "Sample":
        """Measure rows."""
        x = rows.double()
        mean = x.mean(0)
        return Sample(
            mean,
            x.norm(dim=1).mean(),
            x.square().sum(1).mean(),
            (x - mean).T @ (x - mean) / len(x) if covariance else None,
            geometric_median(x) if median else None,
        )

    def tensors(self) -> list[Tensor]:
        """What was measured, to be averaged over processes in place."""
        return [part for part in (self.mean, self.norm, self.square, self.covariance, self.median) if part is not None]

    @property
    def spread(self) -> Float[Tensor, "d d"]:
        """The covariance. Raises `ValueError` where it was not measured."""
        if self.covariance is None:
            raise ValueError("this sample has no covariance: measure it with covariance=True")
        return self.covariance


class InputScale:
    """A map x' = s x, or x' = (x - μ) A; made by `InputScale.of(kind, sample)`.

    Of a crosscoder, whose streams lie side by side, every stream has its own.
    """

    def __init__(self, factor: float = 1.0, affine: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.factor = factor
        self._affine = affine  # μ, A and its inverse, in place of the factor

    @staticmethod
    def of(kind: Scale, *samples: Sample) -> "InputScale":
        """The map of a kind, from a sample of each stream. Raises `SondeError` for other kinds and for zeros."""
        if kind not in SCALES:
            raise SondeError(f"scale is {kind!r}; it is one of {', '.join(SCALES)}")
        if kind == "none":
            return InputScale()
        if not all(float(sample.square) > 0 for sample in samples):
            raise SondeError("all activations of the sample are 0: there is no scale to take them to")
        if kind == "whiten":
            maps = [_whitening(sample.spread) for sample in samples]
        else:
            sizes = [
                (float(s.norm) if kind == "norm" else float(s.square) ** 0.5) / len(s.mean) ** 0.5 for s in samples
            ]
            if len(samples) == 1:
                return InputScale(1 / sizes[0])
            ones = [torch.eye(len(sample.mean), dtype=torch.float64) for sample in samples]
            maps = [(one / size, one * size) for one, size in zip(ones, sizes, strict=True)]
        mean = torch.cat([sample.mean for sample in samples]) * (kind == "whiten")
        to, back = (torch.block_diag(*matrices).float() for matrices in zip(*maps, strict=True))
        return InputScale(affine=(mean.float(), to, back))

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return self._affine is None and self.factor == 1

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The scaled rows."""
        if self._affine is None:
            return x if self.factor == 1 else x * self.factor
        mean, to, _ = (part.to(x) for part in self._affine)
        return (x - mean) @ to

    def inverse(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Rows on the scale of the model again."""
        if self._affine is None:
            return x if self.factor == 1 else x / self.factor
        mean, _, back = (part.to(x) for part in self._affine)
        return x @ back + mean

    def state(self) -> dict[str, Any]:
        """A tree of numbers and tensors."""
        return {"factor": self.factor, "affine": None if self._affine is None else list(self._affine)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "InputScale":
        """The scale that `state` was taken from."""
        affine = state["affine"]
        return InputScale(state["factor"], None if affine is None else tuple(affine))  # type: ignore[arg-type]

    def folded(self, dictionary: Dictionary, target: "InputScale | None" = None) -> Dictionary:
        """The dictionary of x, of one that was trained on x' (and, a transcoder, to give what `target` makes of y).

        Under a map, one that chooses across rows by norm becomes the JumpReLU that it is, with a threshold for each
        latent. Raises `SondeError` where a map cannot be folded: it would change norms that the choice depends on.
        """
        target = target or self
        if self.is_identity and target.is_identity:
            return dictionary
        if self._affine is None and target._affine is None:
            return dictionary.folded_scale(self.factor, target=target.factor)
        foldable(dictionary.design)
        if dictionary.design.ranked_by_norm:
            dictionary = dictionary.as_jumprelu()
        return self._folded_map(dictionary, target)

    @torch.no_grad()
    def _folded_map(self, dictionary: Dictionary, target: "InputScale") -> Dictionary:
        folded = copy.deepcopy(dictionary)
        mean, to, _ = self._matrices(folded.w_enc)
        offset, _, back = target._matrices(folded.w_dec)
        folded.w_enc.copy_(dictionary.w_enc @ to)
        folded.w_dec.copy_(dictionary.w_dec @ back)
        folded.b_dec.copy_(dictionary.b_dec @ back + offset)
        if not dictionary.design.centred:
            moved = folded.w_enc @ mean
            folded.b_enc.sub_(moved)
            if folded.b_mag is not None and folded.r_mag is not None:
                folded.b_mag.sub_(folded.r_mag.exp() * moved)
        if folded.w_skip is not None and dictionary.w_skip is not None:
            folded.w_skip.copy_(back.T @ dictionary.w_skip @ to)
            folded.b_dec.sub_(folded.w_skip @ mean)
        return folded

    def _matrices(self, like: Float[Tensor, "latents d"]) -> list[Tensor]:
        """μ, A and its inverse, for rows of `like`."""
        if self._affine is not None:
            return [part.to(like) for part in self._affine]
        one = torch.eye(like.shape[1], device=like.device, dtype=like.dtype)
        return [torch.zeros_like(one[0]), one * self.factor, one / self.factor]


def foldable(design: Design) -> None:
    """Raise `SondeError` for a design whose rows may have one factor, but no whitening and no factor a stream."""
    if design.layer_norm or (design.ranked_by_norm and not design.chooses_across_rows):
        what = "layer_norm" if design.layer_norm else "ranked_by_norm"
        raise SondeError(f"a design with {what} takes no such scale: folding it back would change the norms of latents")


def _whitening(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + _RIDGE * values.clamp(min=0).mean()
    return (vectors * values**-0.5) @ vectors.T, (vectors * values**0.5) @ vectors.T


def geometric_median(x: Float[Tensor, "n d"], *, steps: int = 50) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances to the rows (Weiszfeld's iteration), which outliers hardly move."""
    point = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        point = (x * weight[:, None]).sum(0) / weight.sum()
    return point
