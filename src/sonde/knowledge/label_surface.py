"""How does accuracy grow with the numbers of labels? A surface through pilot runs, and one label's worth in others.

Power law, saturating, monotone in every source: labels of a source k that is not the oracle are worth so many oracle
labels, and no more than M_k, and accuracy follows the sum,

    n_eff = n_oracle + sum_k M_k (1 - (1 + n_k / t_k)^(-a_k))
    A = 1 - floor - (1 - chance - floor) (1 + n_eff / s)^(-b)

Alternatively a
Gaussian process on log(1 + n) with an RBF kernel and noise, which bends where the law does not, and need not be
monotone. The marginal rate of substitution, (dA/dn_oracle) / (dA/dn_weak), is how many weak labels a next oracle label
is worth: above the ratio of prices the oracle is the better buy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.knowledge.label_score import LabelRun

_STARTS = 6


class Surface(Protocol):
    """Accuracy as a function of the numbers of labels, by source in the order of `sources`."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Their names, the oracle last."""
        ...

    def predict(self, counts: Float[np.ndarray, "m K"]) -> Float[np.ndarray, " m"]:
        """Accuracy at these numbers of labels."""
        ...


@dataclass(frozen=True)
class PowerLaw:
    """The saturating law; see the module.

    floor, scale, exponent: of the oracle's curve. worth, scales, exponents: M, t and a of the other sources. rmse: of
    the fit, in accuracy.
    """

    sources: tuple[str, ...]
    floor: float
    scale: float
    exponent: float
    worth: tuple[float, ...]
    scales: tuple[float, ...]
    exponents: tuple[float, ...]
    chance: float = 0.5
    rmse: float = 0.0

    def predict(self, counts: Float[np.ndarray, "m K"]) -> Float[np.ndarray, " m"]:
        """Accuracy at these numbers of labels."""
        effective = self.equivalent(counts)
        return 1 - self.floor - (1 - self.chance - self.floor) * (1 + effective / self.scale) ** -self.exponent

    def equivalent(self, counts: Float[np.ndarray, "m K"]) -> Float[np.ndarray, " m"]:
        """How many oracle labels these labels are worth."""
        counts = np.asarray(counts, dtype=np.float64)
        total = counts[:, -1].copy()
        for k, (worth, scale, exponent) in enumerate(zip(self.worth, self.scales, self.exponents, strict=True)):
            total += worth * (1 - (1 + counts[:, k] / scale) ** -exponent)
        return total


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process on log(1 + n)."""

    sources: tuple[str, ...]
    model: Any
    mean: float

    def predict(self, counts: Float[np.ndarray, "m K"]) -> Float[np.ndarray, " m"]:
        """Accuracy at these numbers of labels."""
        return self.mean + self.model.predict(np.log1p(np.asarray(counts, dtype=np.float64)))

    def deviation(self, counts: Float[np.ndarray, "m K"]) -> Float[np.ndarray, " m"]:
        """Standard deviation of the prediction, without that of a single run."""
        return self.model.predict(np.log1p(np.asarray(counts, dtype=np.float64)), return_std=True)[1]


def table_of(
    runs: Sequence[LabelRun], sources: Sequence[str]
) -> tuple[Float[np.ndarray, "runs K"], Float[np.ndarray, " runs"]]:
    """Counts and accuracies of runs."""
    counts = np.array([[run.counts.get(name, 0) for name in sources] for run in runs], dtype=np.float64)
    return counts.reshape(len(runs), len(sources)), np.array([run.accuracy for run in runs])


def fit_power_law(
    counts: Float[np.ndarray, "runs K"],
    accuracy: Float[np.ndarray, " runs"],
    sources: Sequence[str],
    *,
    chance: float = 0.5,
    start: PowerLaw | None = None,
) -> PowerLaw:
    """Least squares from several starts, or from `start` alone (for resamples).

    Raises `SondeError` for fewer runs than the three parameters of each source.
    """
    from scipy.optimize import least_squares

    counts, accuracy = _checked(counts, accuracy, sources)
    k = len(sources)
    if len(np.unique(counts, axis=0)) < 3 * k:
        raise SondeError(
            f"{len(np.unique(counts, axis=0))} different purchases cannot fix the {3 * k} parameters of a surface over "
            f"{k} sources: pilot more budgets or shares"
        )
    others = k - 1

    def law(p: np.ndarray) -> PowerLaw:
        floor = (1 - chance) / (1 + np.exp(-p[0]))
        worth, scales, exponents = (tuple(map(float, row)) for row in np.exp(p[3:]).reshape(3, others))
        return PowerLaw(
            tuple(sources), float(floor), float(np.exp(p[1])), float(np.exp(p[2])), worth, scales, exponents, chance
        )

    def residual(p: np.ndarray) -> np.ndarray:
        return law(p).predict(counts) - accuracy

    low = np.array([-12.0, -1.0, -3.0, *[-5.0] * others, *[-1.0] * others, *[-3.0] * others])
    high = np.array([4.0, 16.0, 2.0, *[14.0] * others, *[16.0] * others, *[2.0] * others])
    if start is None:
        middle = np.log(np.maximum([np.median(c[c > 0]) if (c > 0).any() else 1 for c in counts.T], 1))
        rng = np.random.default_rng(0)
        first = np.concatenate([[-2.0, middle[-1], 0.0], middle[:-1], middle[:-1], np.zeros(others)])
        starts = [first, *(first + rng.standard_normal(3 * k) for _ in range(_STARTS - 1))]
    else:
        share = np.clip(start.floor / (1 - chance), 1e-6, 1 - 1e-6)
        rest = np.log([*start.worth, *start.scales, *start.exponents])
        starts = [np.array([np.log(share / (1 - share)), np.log(start.scale), np.log(start.exponent), *rest])]
    fits = [least_squares(residual, np.clip(p, low, high), bounds=(low, high), max_nfev=200) for p in starts]
    best = min(fits, key=lambda fit: fit.cost)
    return replace(law(best.x), rmse=float(np.sqrt(np.mean(best.fun**2))))


def fit_gaussian_process(
    counts: Float[np.ndarray, "runs K"],
    accuracy: Float[np.ndarray, " runs"],
    sources: Sequence[str],
    *,
    start: GaussianProcess | None = None,
) -> GaussianProcess:
    """Hyperparameters by maximum likelihood, or those of `start` (for resamples).

    Raises `SondeError` for fewer than four runs.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    counts, accuracy = _checked(counts, accuracy, sources)
    if len(accuracy) < 4:
        raise SondeError(f"{len(accuracy)} runs are too few for a Gaussian process: pilot at least 4")
    mean = float(accuracy.mean())
    lengths: Any = np.full(len(sources), 3.0)  # the stubs know of one length only
    kernel = ConstantKernel(0.02, (1e-4, 1.0)) * RBF(lengths, (0.5, 30.0)) + WhiteKernel(1e-4, (1e-7, 1e-2))
    given: dict[str, Any] = {"n_restarts_optimizer": 2, "random_state": 0}
    if start is not None:
        kernel, given = start.model.kernel_, {"optimizer": None}
    model = GaussianProcessRegressor(kernel, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is an answer here
        model.fit(np.log1p(counts), accuracy - mean)
    return GaussianProcess(tuple(sources), model, mean)


def slopes(surface: Surface, counts: Mapping[str, float]) -> dict[str, float]:
    """Accuracy per next label of each source: the difference over the next 1 % of labels, at least one."""
    at = np.array([[float(counts.get(name, 0)) for name in surface.sources]])
    base = float(surface.predict(at)[0])
    found = {}
    for k, name in enumerate(surface.sources):
        step = max(1.0, 0.01 * at[0, k])
        ahead = at.copy()
        ahead[0, k] += step
        found[name] = (float(surface.predict(ahead)[0]) - base) / step
    return found


def rate_of_substitution(surface: Surface, counts: Mapping[str, float], *, weak: str, oracle: str) -> float:
    """How many weak labels the next oracle label is worth; infinite where a further weak label adds nothing."""
    slope = slopes(surface, counts)
    if slope[weak] <= 0:
        return float("inf") if slope[oracle] > 0 else float("nan")
    return max(0.0, slope[oracle]) / slope[weak]


def _checked(counts: Any, accuracy: Any, sources: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    counts, accuracy = np.asarray(counts, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if counts.shape != (len(accuracy), len(sources)):
        raise SondeError(f"counts of shape {counts.shape} for {len(accuracy)} runs and {len(sources)} sources")
    return counts, accuracy
