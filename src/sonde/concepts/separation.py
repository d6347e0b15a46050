"""Does a contrast separate answers by the behaviour that they show, or by the letter that they have?

Activations at the last token of every positive and negative prompt, that is at the letter, are looked at in two ways.
Without labels: the first two principal components, and how well each orders the prompts by behaviour and by letter
(AUROC, folded to 0.5 … 1). With labels: the vector of one half of the pairs orders the other half, among prompts of one
letter only, so that the letter can be of no help.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import at_position
from sonde.stats.intervals import Interval, bootstrap
from sonde.stats.ranks import auroc

_DRAWS = 400


@dataclass(frozen=True)
class Separation:
    """How one site separates prompts.

    behaviour: AUROC of behaviour among prompts of one letter, along the vector of the other half of the pairs.
    component_behaviour: the better folded AUROC of the first two principal components by behaviour.
    component_letter: the same by letter.
    points: the first two principal components of every prompt, positive ones first, Float[ndarray, "prompts 2"].
    """

    site: str
    behaviour: Interval
    component_behaviour: float
    component_letter: float
    points: Float[np.ndarray, "prompts 2"]


def separation(
    lm: LanguageModel,
    positive: Sequence[Sequence[int]],
    negative: Sequence[Sequence[int]],
    *,
    sites: str | Sequence[str] = "resid_post.*",
    batch: int = 32,
    seed: int = 0,
) -> list[Separation]:
    """How each site separates pairs of prompts whose last token is the letter, in order of depth.

    Raises `SondeError` for sides of different sizes, fewer than eight pairs, and other than two letters that each occur
    on both sides: then letter and behaviour cannot be told apart.
    """
    if len(positive) != len(negative):
        raise SondeError(f"{len(positive)} positive and {len(negative)} negative prompts are not pairs")
    if len(positive) < 8:
        raise SondeError(f"{len(positive)} pairs are too few to hold a half out: give at least 8")
    last = np.array([[ids[-1] for ids in side] for side in (positive, negative)])
    common, counts = np.unique(last, return_counts=True)
    letters = common[np.argsort(-counts)[:2]]
    kept = np.isin(last, letters).all(0)
    if len(letters) < 2 or any((last[side][kept] == letter).sum() < 2 for side in (0, 1) for letter in letters):
        raise SondeError("letter and behaviour cannot be told apart: each letter must occur on both sides; swap some")
    names = lm.match(*([sites] if isinstance(sites, str) else sites))
    pairs = np.flatnonzero(kept)
    rows = [list(side[i]) for side in (positive, negative) for i in pairs.tolist()]
    values = {site: torch.zeros(len(rows), lm.d_model, dtype=torch.float64) for site in names}
    for numbers, acts in at_position(lm, rows, names, batch=batch):
        for site, found in acts.items():
            values[site][numbers] = found.double().cpu()
    second = (last[:, pairs] == letters[1]).astype(np.int64)
    return [_of(site, values[site].view(2, len(pairs), -1), second, seed) for site in names]


def _of(
    site: str, values: Float[Tensor, "sides pairs d"], second: Int[np.ndarray, "sides pairs"], seed: int
) -> Separation:
    flat = values.flatten(0, 1)
    centred = flat - flat.mean(0)
    points = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).numpy()
    shown = np.repeat([1, 0], values.shape[1])
    by = [max(_folded(column, labels) for column in points.T) for labels in (shown, second.ravel())]
    half = np.random.default_rng(seed).permutation(values.shape[1]) % 2
    scores = np.zeros(values.shape[:2])
    for part in (0, 1):
        fitted = values[:, half != part].mean(1)
        direction = fitted[0] - fitted[1]
        direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
        scores[:, half == part] = ((values[:, half == part] - fitted.mean(0)) @ direction).numpy()
    table = np.concatenate([scores.T, second.T], 1)
    return Separation(site, bootstrap(_within_letter, table, draws=_DRAWS, seed=seed), by[0], by[1], points)


def _within_letter(table: Float[np.ndarray, "pairs 4"]) -> float:
    """AUROC of positive against negative scores among prompts of one letter, averaged over both letters."""
    scores, second = table[:, :2], table[:, 2:]
    found = []
    for letter in (0, 1):
        sides = [scores[second[:, side] == letter, side] for side in (0, 1)]
        if not (len(sides[0]) and len(sides[1])):
            return float("nan")
        labels = np.repeat([1, 0], [len(side) for side in sides])
        found.append(float(auroc(np.concatenate(sides), labels)))
    return float(np.mean(found))


def _folded(scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    return 0.5 + abs(float(auroc(scores, labels)) - 0.5)
