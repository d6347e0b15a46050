"""What a probe is fitted on, and what comes of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.knowledge.layer_moments import LayerMoments, Part
from sonde.knowledge.states import States


@dataclass(frozen=True)
class Solution:
    """A weight and a bias for each layer, and those of templates; see `FittedProbe`."""

    weight: Float[Tensor, "layers width"]
    bias: Float[Tensor, " layers"]
    facts: dict[str, Any] = field(default_factory=dict)
    template_scale: Float[Tensor, "templates layers 2"] | None = None
    template_bias: Float[Tensor, "templates layers"] | None = None


@dataclass(frozen=True)
class Task:
    """What `fit` was given, checked: all rows of a supervised probe are labelled, unsupervised ones have no labels.

    `rows` of each layer are what the probe reads, and `moments` theirs: of the states as they are, or erased.
    """

    states: States
    part: Part
    rows: Float[Tensor, "layers n width"]
    moments: LayerMoments
    labels: Int[Tensor, " n"] | None
    templates: Int[Tensor, " n"] | None
    groups: Int[Tensor, " n"] | None
    erased: tuple[States, Int[Tensor, " m"]] | None
    seed: int

    @property
    def true(self) -> Bool[Tensor, " n"]:
        """Which rows are true."""
        assert self.labels is not None
        return self.labels == 1

    def class_means(self) -> tuple[Float[Tensor, "layers width"], Float[Tensor, "layers width"]]:
        """Mean of the false and of the true rows, float64."""
        false, true = ((self.labels == c) for c in (0, 1))
        return self.rows[:, false].mean(1, dtype=torch.float64), self.rows[:, true].mean(1, dtype=torch.float64)
