"""A dictionary of activations that are at hand: initialise at their mean, take steps on random batches."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.step import Step
from sonde.features.step_config import StepConfig


def fit(
    x: Float[Tensor, "n inputs"],
    design: Design,
    config: StepConfig | None = None,
    *,
    y: Float[Tensor, "n outputs"] | None = None,
    steps: int = 1000,
    rows: int = 1024,
    centre: bool = True,
    seed: int = 0,
    progress: str | None = None,
) -> tuple[Dictionary, list[dict[str, float]]]:
    """Train a dictionary on rows of activations.

    Args:
        x: activations.
        design: what to train.
        config: of the steps; its `steps` is set to `steps`.
        y: targets of a transcoder.
        steps: optimiser steps, each on `rows` rows; an epoch goes through the rows in a new random order, and rows that
            are left over from it are not used.
        rows: of a batch.
        centre: start at the mean of `x` (and `y`); see `Dictionary.initialised`.
        seed: of the weights and of the order of the rows.
        progress: label of a progress bar; None: no bar.

    Returns:
        the dictionary, and what `Step` gave for each step.

    Raises:
        SondeError: where `Step` does, and for fewer rows than a batch has.
        ValueError: for a configuration that does not fit the design.

    """
    if len(x) < rows:
        raise SondeError(f"there are {len(x)} rows of activations, fewer than a batch of {rows}")
    changes: dict[str, Any] = (config or StepConfig()).__dict__ | {"steps": steps}
    means = (None, None) if not centre else (x.mean(0), None if y is None else y.mean(0))
    dictionary = Dictionary.initialised(design, mean=means[0], target_mean=means[1], seed=seed, device=x.device)
    step = Step(dictionary, StepConfig(**changes))
    generator = torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(steps), desc=progress, unit="step", disable=progress is None):
        if len(order) < rows:
            order = torch.randperm(len(x), generator=generator)
        chosen, order = order[:rows].to(x.device), order[rows:]
        history.append(step(x[chosen], None if y is None else y[chosen]))
    step.finish()
    return dictionary, history
