"""Is the truth easier to learn from these features than the weak labeller's rule? Two learning curves, one ratio.

Each concept is learned on its first n rows, n growing in steps, and the divergence of the prediction from it is taken
on rows that were held out: KL(y || p) in nats, for hard labels the cross-entropy. The area under that curve over log n,
as a share of the constant curve of chance, is low for a concept that is salient. Relative salience is the ratio of the
weak rule's area to the truth's: above 1 the truth is learned sooner, so few oracle labels go far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.label_fit import cross_entropy, logits_of, targets_of
from sonde.knowledge.label_logistic import fit_stage
from sonde.knowledge.label_problem import Problem
from sonde.stats.intervals import Interval, bootstrap_mean, bootstrap_means

_FRACTIONS = 10


@dataclass(frozen=True)
class SalienceCurve:
    """How fast a concept is learned: KL in nats on held-out rows by number of labels, and the area, over seeds.

    areas: `[seeds]`, as a share of the area at chance.
    """

    concept: str
    rows: tuple[int, ...]
    divergence: tuple[Interval, ...]
    area: Interval
    areas: Float[np.ndarray, " seeds"]


def salience(
    problem: Problem, *, sources: Sequence[str] | None = None, most: int = 2048, seeds: Sequence[int] = (0, 1, 2)
) -> list[SalienceCurve]:
    """The learning curve of each source's hardened labels. Its labels are read without paying: this is a diagnosis.

    most: labels at the end of the curves; it is lowered to four fifths of what every source labels. Raises `SondeError`
    for fewer than two seeds and for a pool of fewer than 40 rows that all sources label.
    """
    names = [source.name for source in problem.sources] if sources is None else list(sources)
    if len(seeds) < 2:
        raise SondeError("salience needs at least two seeds for its interval")
    available = np.flatnonzero(np.logical_and.reduce([problem.source(name).available for name in names]))
    most = min(most, len(available) * 4 // 5)
    if len(available) < 40:
        raise SondeError(f"{len(available)} rows of the pool are labelled by {' and '.join(names)}: at least 40 needed")
    steps = tuple(sorted({round(float(n)) for n in np.geomspace(4, most, _FRACTIONS)}))
    made = []
    for name in names:
        curves = np.array([_curve(problem, name, available, steps, seed) for seed in seeds])
        areas = _areas(curves, steps, float(np.log(len(problem.classes))))
        made.append(SalienceCurve(name, steps, tuple(bootstrap_means(curves)), bootstrap_mean(areas), areas))
    return made


def relative_salience(truth: SalienceCurve, weak: SalienceCurve) -> Interval:
    """Area of the weak rule over that of the truth: above 1 the truth is the more salient. Interval over seeds."""
    return bootstrap_mean(weak.areas / truth.areas)


def _curve(
    problem: Problem, source: str, available: Int[np.ndarray, " n"], steps: Sequence[int], seed: int
) -> list[float]:
    pool, _ = problem.standardised
    order = torch.from_numpy(np.random.default_rng(seed).permutation(available))
    labels = problem.source(source).labels
    hard: Float[Tensor, "pool C"] = torch.nn.functional.one_hot(labels.argmax(1), labels.shape[1]).to(labels)
    held = order[steps[-1] :][:2000]
    columns = 1 if len(problem.classes) == 2 else len(problem.classes)
    targets = targets_of(hard[held]).to(pool)
    found = []
    for n in steps:
        rows = order[:n]
        weights, _ = fit_stage(pool[rows], hard[rows], pool.new_zeros(columns, pool.shape[1]), seed=seed)
        found.append(float(cross_entropy(logits_of(weights, pool[held]), targets)))
    return found


def _areas(
    curves: Float[np.ndarray, "seeds steps"], steps: Sequence[int], chance: float
) -> Float[np.ndarray, " seeds"]:
    logs = np.log(np.array(steps, dtype=np.float64))
    return np.trapezoid(curves, logs, axis=1) / (chance * (logs[-1] - logs[0]))
