"""How often would the model answer right if it stopped at layer l, and does its confidence come true?

The answer of a layer is its most likely choice. *Uncalibrated*, choices compete with their summed log-probabilities;
*median-calibrated* (Halawi et al. 2307.09476), each with its own minus the median over all questions, so that a layer
that always prefers one choice is not held to it. No label enters the medians. Confidence is the softmax over the
choices; its calibration is measured by the expected and by the sweep calibration error. Chance, the share of the most
frequent right choice, is the control.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lens.choices import ChoiceScores
from sonde.stats.calibration import ece, sweep_ece
from sonde.stats.intervals import Interval, wilson


@dataclass(frozen=True)
class Downstream:
    """Multiple-choice accuracy by row: the lens's sites, then the output. Calibration errors are shares, 0 is perfect.

    `chance` is the share of questions whose right choice is the most frequent one.
    """

    rows: tuple[str, ...]
    accuracy: list[Interval]
    ece: list[float]
    sweep_ece: list[float]
    chance: Interval


def downstream(scores: ChoiceScores, *, calibrated: bool = False) -> Downstream:
    """Accuracy and calibration at every layer, `calibrated` by medians or as the log-probabilities stand.

    Raises `SondeError` for questions of different numbers of choices where they are to be calibrated, and for right
    choices that are not one for each question.
    """
    if len(scores.correct) != scores.log_probs.shape[1]:
        raise SondeError(
            f"{len(scores.correct)} right choices for {scores.log_probs.shape[1]} questions: expected one for each"
        )
    log_probs = median_calibrated(scores.table) if calibrated else scores.log_probs
    confidence, answers = log_probs.double().softmax(-1).max(-1)
    right = answers == scores.correct
    n = len(scores)
    most = int(scores.correct.bincount().max())
    return Downstream(
        rows=scores.rows,
        accuracy=[wilson(int(layer.sum()), n) for layer in right],
        ece=[ece(p, y) for p, y in zip(confidence, right, strict=True)],
        sweep_ece=[sweep_ece(p, y) for p, y in zip(confidence, right, strict=True)],
        chance=wilson(most, n),
    )


def median_calibrated(log_probs: Float[Tensor, "layers n k"]) -> Float[Tensor, "layers n k"]:
    """Log-probabilities normalised over the choices, less each choice's median over the questions."""
    normalised = log_probs.log_softmax(-1)
    # the mean of the two middle values, where torch takes the lower
    return normalised - torch.quantile(normalised.double(), 0.5, dim=1, keepdim=True).to(log_probs.dtype)
