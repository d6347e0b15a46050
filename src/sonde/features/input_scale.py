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
from sonde.features.dictionary import Dictionary

Scale = Literal["none", "norm", "rms", "whiten"]
SCALES: tuple[Scale, ...] = get_args(Scale)
_RIDGE = 1e-4  # of the mean variance


@dataclass(frozen=True)
class Sample:
    """What a sample of rows says: mean and geometric median, E‖x‖, E‖x‖², covariance; float64."""

    mean: Float[Tensor, " d"]
    median: Float[Tensor, " d"]
    norm: Float[Tensor, ""]
    square: Float[Tensor, ""]
    covariance: Float[Tensor, "d d"]

    @staticmethod
    def of(rows: Float[Tensor, "n d"]) -> "Sample":
        """Measure rows."""
        x = rows.double()
        mean = x.mean(0)
        centred = x - mean
        return Sample(
            mean, geometric_median(x), x.norm(dim=1).mean(), (x**2).sum(1).mean(), centred.T @ centred / len(x)
        )

    def tensors(self) -> list[Tensor]:
        """All of them, to be averaged over processes in place."""
        return [self.mean, self.median, self.norm, self.square, self.covariance]


class InputScale:
    """A map x' = s x, or x' = (x - μ) A; made by `InputScale.of(kind, sample)`."""

    def __init__(self, factor: float = 1.0, whitening: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.factor = factor
        self._whitening = whitening  # μ, A and its inverse

    @staticmethod
    def of(kind: Scale, sample: Sample) -> "InputScale":
        """The map of a kind. Raises `SondeError` for another kind and for a sample of zeros."""
        if kind not in SCALES:
            raise SondeError(f"scale is {kind!r}; it is one of {', '.join(SCALES)}")
        d = len(sample.mean)
        if kind == "none":
            return InputScale()
        if not float(sample.square) > 0:
            raise SondeError("all activations of the sample are 0: there is no scale to take them to")
        if kind == "norm":
            return InputScale(d**0.5 / float(sample.norm))
        if kind == "rms":
            return InputScale((d / float(sample.square)) ** 0.5)
        values, vectors = torch.linalg.eigh(sample.covariance)
        values = values.clamp(min=0) + _RIDGE * values.clamp(min=0).mean()
        maps = ((vectors * values**power) @ vectors.T for power in (-0.5, 0.5))
        return InputScale(whitening=(sample.mean.float(), *(matrix.float() for matrix in maps)))  # type: ignore[arg-type]

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return self._whitening is None and self.factor == 1

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The scaled rows."""
        if self._whitening is None:
            return x if self.factor == 1 else x * self.factor
        mean, matrix, _ = (part.to(x) for part in self._whitening)
        return (x - mean) @ matrix

    def inverse(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Rows on the scale of the model again."""
        if self._whitening is None:
            return x if self.factor == 1 else x / self.factor
        mean, _, back = (part.to(x) for part in self._whitening)
        return x @ back + mean

    def state(self) -> dict[str, Any]:
        """A tree of numbers and tensors."""
        return {"factor": self.factor, "whitening": None if self._whitening is None else list(self._whitening)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "InputScale":
        """The scale that `state` was taken from."""
        whitening = state["whitening"]
        return InputScale(state["factor"], None if whitening is None else tuple(whitening))  # type: ignore[arg-type]

    def folded(self, dictionary: Dictionary, target: "InputScale | None" = None) -> Dictionary:
        """The dictionary of x, of one that was trained on x' (and, a transcoder, to give what `target` makes of y).

        Raises `SondeError` where a whitening map cannot be folded: it would change norms that the choice depends on.
        """
        target = target or self
        if self.is_identity and target.is_identity:
            return dictionary
        if self._whitening is None and target._whitening is None:
            return dictionary.folded_scale(self.factor, target=target.factor)
        return self._folded_whitening(dictionary, target)

    @torch.no_grad()
    def _folded_whitening(self, dictionary: Dictionary, target: "InputScale") -> Dictionary:
        refuse_whitening(dictionary)
        assert self._whitening is not None
        assert target._whitening is not None
        folded = copy.deepcopy(dictionary)
        mean, to, _ = (part.to(folded.w_enc) for part in self._whitening)
        offset, _, back = (part.to(folded.w_enc) for part in target._whitening)
        folded.w_enc.copy_(dictionary.w_enc @ to)
        folded.w_dec.copy_(dictionary.w_dec @ back)
        folded.b_dec.copy_(dictionary.b_dec @ back + offset)
        if not dictionary.design.centred:
            moved = folded.w_enc @ mean
            folded.b_enc -= moved
            if folded.b_mag is not None and folded.r_mag is not None:
                folded.b_mag -= folded.r_mag.exp() * moved
        if folded.w_skip is not None and dictionary.w_skip is not None:
            folded.w_skip.copy_(back.T @ dictionary.w_skip @ to)
            folded.b_dec -= folded.w_skip @ mean
        return folded


def refuse_whitening(dictionary: Dictionary) -> None:
    """Raise `SondeError` for a dictionary that cannot be trained on whitened rows and folded afterwards."""
    design = dictionary.design
    if design.layer_norm or design.ranked_by_norm:
        what = "layer_norm" if design.layer_norm else "ranked_by_norm"
        raise SondeError(f"a design with {what} cannot be trained on whitened rows: folding the map back changes norms")


def geometric_median(x: Float[Tensor, "n d"], *, steps: int = 50) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances to the rows (Weiszfeld's iteration), which outliers hardly move."""
    point = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        point = (x * weight[:, None]).sum(0) / weight.sum()
    return point
