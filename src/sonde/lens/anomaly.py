"""Does the model arrive at its answer in an unusual way? Anomaly detection on trajectories of the answers' probability.

The features of a question are the summed log-probabilities of its choices at every layer and at the output, flattened;
with two choices only their difference. A detector is fitted on *normal* questions alone: an isolation forest, the local
outlier factor or a one-class SVM (Belrose et al. 2303.08112, section on anomaly detection). The baseline needs no lens:
SRM, the simplified relative Mahalanobis distance of the mean hidden state x at one layer (after Ren et al. 2106.09022),

    SRM(x) = (x - m)ᵀ (C + 1e-3 I)⁻¹ (x - m) - (x - m)ᵀ (diag C + 1e-3 I)⁻¹ (x - m),

m and C from normal questions. Scores rise with strangeness. How well a detector tells held-out normal questions from
anomalous ones is an AUROC over splits of the normal questions and bootstraps of the scores.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle, write_json
from sonde.lens.choices import ChoiceScores
from sonde.stats.gaussian_novelty import Gaussian, Mahalanobis
from sonde.stats.intervals import Interval
from sonde.stats.layered_rows import Novelty, layered
from sonde.stats.local_outliers import LocalOutlierFactor
from sonde.stats.novelty import IsolationForest, OneClassSVM
from sonde.stats.ranks import auroc

Kind = Literal["lof", "isolation-forest", "one-class-svm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_REGULARISER = 1e-3


class Fits(Protocol):
    """A detector: fitted on normal rows, then scoring any."""

    def fit(self, x: Any) -> Self:
        """Learn what is normal."""
        ...

    def score(self, x: Any) -> Float[np.ndarray, " n"]:
        """Strangeness of each row."""
        ...


def features(scores: ChoiceScores) -> Float[np.ndarray, "n features"]:
    """Log-probabilities of the choices at every layer and at the output, flattened; of two choices the difference.

    Raises `SondeError` for questions with different numbers of choices.
    """
    table = scores.table.double()
    if table.shape[-1] == 2:
        table = table.diff(dim=-1)
    return table.transpose(0, 1).flatten(1).cpu().numpy()


class Detector:
    """A detector on trajectories: `Detector("lof").fit(normal).score(others)`, larger is stranger.

    `fit` raises `SondeError` for fewer normal rows than neighbours need and for values that are not finite, `score` for
    another number of features and before `fit`.

    Args:
        kind: "lof" (local outlier factor for novelties), "isolation-forest" or "one-class-svm" (radial kernel).
        neighbors: of the local outlier factor.
        seed: of the forest.

    """

    def __init__(self, kind: Kind = "lof", *, neighbors: int = 20, seed: int = 0) -> None:
        if kind not in KINDS:
            raise SondeError(f"detector {kind!r} is unknown: use {', '.join(KINDS)}")
        if neighbors < 1:
            raise SondeError(f"neighbors is {neighbors}; it must be at least 1")
        self.kind: Kind = kind
        self.neighbors, self.seed = neighbors, seed
        self.normal_: Float[np.ndarray, "n features"] | None = None

    def fit(self, x: ArrayLike | Tensor) -> "Detector":
        """Learn what is normal from rows of features `[n, features]`."""
        rows = _matrix(x)
        if self.kind == "lof" and len(rows) <= self.neighbors:
            raise SondeError(
                f"{len(rows)} normal questions are too few for a local outlier factor of {self.neighbors} neighbours: "
                f"give at least {self.neighbors + 1}, or fewer neighbours"
            )
        self.normal_ = rows
        self._model = self._novelty().fit(rows)
        return self

    def score(self, x: ArrayLike | Tensor) -> Float[np.ndarray, " n"]:
        """Strangeness of each row of `x [n, features]`."""
        if self.normal_ is None:
            raise SondeError("this detector has seen no normal questions: call fit first")
        return self._model.score(_matrix(x))

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and the normal rows as `normal.safetensors`; `load` fits the same detector again."""
        if self.normal_ is None:
            raise SondeError("this detector has seen no normal questions: call fit first")
        folder = Path(folder)
        write_json(folder / "config.json", {"kind": self.kind, "neighbors": self.neighbors, "seed": self.seed})
        save_bundle(folder / "normal.safetensors", {"normal": torch.from_numpy(self.normal_)})

    @staticmethod
    def load(folder: str | Path) -> "Detector":
        """Read what `save` wrote. Raises `SondeError` for a folder that is not a detector's."""
        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            made = Detector(config["kind"], neighbors=config["neighbors"], seed=config["seed"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SondeError(f"{folder} is not the folder of a detector: {error}") from error
        return made.fit(load_bundle(Path(folder) / "normal.safetensors")["normal"])

    def _novelty(self) -> Novelty:
        if self.kind == "lof":
            return LocalOutlierFactor(self.neighbors)
        return IsolationForest(seed=self.seed) if self.kind == "isolation-forest" else OneClassSVM()


class SRM:
    """Simplified relative Mahalanobis distance, the baseline: `SRM().fit(normal_states).score(states)`.

    Rows are mean hidden states `[n, d_model]` at one layer (`ChoiceScores.states[layer]`); pads are not in them.
    """

    def __init__(self) -> None:
        self._distance = Mahalanobis(relative=True, rcond=0.0, ridge=_REGULARISER)

    def fit(self, x: ArrayLike | Tensor) -> "SRM":
        """Mean and covariance of normal states. Raises `SondeError` for fewer than two rows or values not finite."""
        rows = _matrix(x)
        if len(rows) < 2:
            raise SondeError(f"{len(rows)} normal question has no covariance: give at least 2")
        self._distance.fit(rows)
        return self

    def score(self, x: ArrayLike | Tensor) -> Float[np.ndarray, " n"]:
        """Mahalanobis² less diagonal Mahalanobis² of each row of `x [n, d_model]`."""
        width, rows = self._fitted(), _matrix(x)
        if rows.shape[1] != width:
            raise SondeError(f"states of width {rows.shape[1]} for an SRM of width {width}")
        return self._distance.score(rows)

    def save(self, path: str | Path) -> None:
        """Write mean and covariance to one safetensors file."""
        self._fitted()
        made = self._distance.gaussian_
        save_bundle(path, {"mean": made.mean, "covariance": made.covariance})

    @staticmethod
    def load(path: str | Path) -> "SRM":
        """Read what `save` wrote."""
        tree, made = load_bundle(path), SRM()
        made._distance.gaussian_ = Gaussian.with_moments(tree["mean"], tree["covariance"], rcond=0.0)
        made._distance.shape_ = (1, tree["mean"].shape[1])
        return made

    def _fitted(self) -> int:
        if self._distance.shape_ is None:
            raise SondeError("SRM has seen no normal states: call fit first")
        return self._distance.shape_[1]


@dataclass(frozen=True)
class Detection:
    """How well a detector tells anomalous from normal, over splits and bootstraps; an AUROC of 0.5 is chance.

    `auroc`: the median with the 2.5 and 97.5 % quantiles; n counts the rows that were scored in a split.
    `control`: the same with held-out normal rows in place of the anomalous ones.
    """

    auroc: Interval
    control: Interval


def detection(
    detector: Callable[[int], Fits],
    normal: ArrayLike | Tensor,
    anomalous: ArrayLike | Tensor,
    *,
    seeds: int = 10,
    draws: int = 1000,
    seed: int = 0,
) -> Detection:
    """Fit on half of the normal rows, score the other half and the anomalous ones; `seeds` splits, `draws` bootstraps.

    Args:
        detector: makes a fresh detector from a seed, such as `lambda seed: Detector("lof", seed=seed)`.
        normal: rows of normal questions `[n, features]`.
        anomalous: rows of anomalous questions; tampered versions are those of other questions than `normal`.
        seeds: splits of the normal rows.
        draws: bootstraps of each split's scores, drawn within each class.
        seed: of splits and bootstraps.

    Raises:
        SondeError: for a class that is missing, or too few normal rows to split or to fit.

    """
    usual, strange = _matrix(normal, least=0), _matrix(anomalous, least=0)
    if len(strange) < 1 or len(usual) < 4:
        raise SondeError(
            f"an AUROC needs both classes: given {len(usual)} normal and {len(strange)} anomalous questions, expected "
            "at least 4 and 1"
        )
    found, control = [], []
    for split in range(seeds):
        rng = np.random.default_rng((seed, split))
        order = rng.permutation(len(usual))
        fitted, held = order[: len(order) // 2], order[len(order) // 2 :]
        made = detector(split).fit(usual[fitted])
        held_scores = made.score(usual[held])
        found.append(bootstrap_auroc(held_scores, made.score(strange), draws=draws, rng=rng))
        half = len(held) // 2
        control.append(bootstrap_auroc(held_scores[:half], held_scores[half:], draws=draws, rng=rng))
    n = len(usual) - len(usual) // 2
    return Detection(_quantiles(found, n + len(strange)), _quantiles(control, n))


def bootstrap_auroc(
    normal: Float[np.ndarray, " n"], anomalous: Float[np.ndarray, " m"], *, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, " draws"]:
    """AUROCs of resampled scores, drawn within each class: W₁ᵀ P W₀ / nm, P the comparisons of all pairs.

    One matrix of comparisons and two of counts in place of `draws` sorts. Raises `ValueError` where a class is missing.
    """
    if not len(normal) or not len(anomalous):
        raise ValueError(f"AUROC needs both classes: given {len(anomalous)} positive and {len(normal)} negative")
    above = (anomalous[:, None] > normal).astype(np.float64) + 0.5 * (anomalous[:, None] == normal)
    ones = rng.multinomial(len(anomalous), np.full(len(anomalous), 1 / len(anomalous)), size=draws)
    zeros = rng.multinomial(len(normal), np.full(len(normal), 1 / len(normal)), size=draws)
    return ((ones @ above) * zeros).sum(-1) / (len(normal) * len(anomalous))


def srm_layer(normal: Float[Tensor, "layers n d_model"], *, seeds: int = 10, seed: int = 0) -> int:
    """The layer for SRM, chosen on normal questions alone.

    SRM sees what breaks the correlations of normal states. Those are broken on purpose: each dimension is shuffled over
    held-out normal questions, and by layer an AUROC says how well SRM tells these from the same states unshuffled, mean
    over splits. Of the layers within 0.01 of the best the deepest is taken: it has seen most of what the model does.
    """
    told = []
    for states in normal:
        rows = _matrix(states)
        found = []
        for split in range(seeds):
            rng = np.random.default_rng((seed, split))
            fitted, held = np.array_split(rows[rng.permutation(len(rows))], 2)
            made = SRM().fit(fitted)
            values = np.concatenate([made.score(held), made.score(rng.permuted(held, axis=0))])
            found.append(float(auroc(values, np.repeat([0, 1], len(held)))))
        told.append(np.mean(found))
    return int(np.flatnonzero(np.array(told) >= max(told) - 0.01)[-1])


def _quantiles(drawn: Sequence[Float[np.ndarray, " draws"]], n: int) -> Interval:
    low, middle, high = np.quantile(np.concatenate(drawn), [0.025, 0.5, 0.975])
    return Interval(float(middle), float(low), float(high), n)


def _matrix(x: ArrayLike | Tensor, *, least: int = 1) -> Float[np.ndarray, "n features"]:
    rows = layered(x, least=least)
    if np.ndim(x) != 2:
        raise SondeError(f"features are a matrix with a row for each question, not of shape {tuple(np.shape(x))}")
    return rows[0].numpy()
