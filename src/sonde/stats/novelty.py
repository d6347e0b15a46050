"""Which rows are unlike the trusted ones? Every detector by its name, and the simple ones.

A detector is fitted on trusted rows and scores others: `fit(trusted).score(rows)`, larger is stranger; rows are
`[n, d]`, or `[layers, n, d]` for all layers at once. Online forms take `score(batch, untrusted=batch)`. Here are the
isolation forest and the one-class SVM of scikit-learn, and two scores for sparse codes: L0 counts the codes that are on
in a row and were off in all trusted ones, L2 is the mean square of codes standardised by the trusted rows. The others
stand in `gaussian_novelty`, `abstraction`, `local_outliers` and `flow`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sonde.stats.abstraction import Abstraction
from sonde.stats.flow import CouplingFlow
from sonde.stats.gaussian_novelty import (
    LikelihoodRatio,
    Mahalanobis,
    QuantumEntropy,
    SpectralSignature,
    TwoGaussians,
)
from sonde.stats.layered_rows import Novelty
from sonde.stats.local_outliers import LocalOutlierFactor, Topological

_FLAT = 1e-3  # smallest standard deviation, as a share of the root mean variance


class _ByLayer(Novelty):
    """An estimator of scikit-learn for each layer; each takes a second to import, and a process uses one or two."""

    def _fit(self, trusted: Tensor) -> None:
        self._models = [self._estimator().fit(layer.numpy()) for layer in trusted]

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        found = [-model.score_samples(layer.numpy()) for model, layer in zip(self._models, rows, strict=True)]
        return torch.stack([torch.from_numpy(scores) for scores in found])

    def _estimator(self) -> Any:
        raise NotImplementedError


class IsolationForest(_ByLayer):
    """How few random cuts set a row apart (Liu et al. 2008)."""

    least = 1

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def _estimator(self) -> Any:
        from sklearn import ensemble

        return ensemble.IsolationForest(random_state=self.seed)


class OneClassSVM(_ByLayer):
    """One-class support vector machine with a radial kernel (Schölkopf et al. 2001)."""

    least = 1

    def _estimator(self) -> Any:
        from sklearn import svm

        return svm.OneClassSVM(gamma="scale")


class NewlyActive(Novelty):
    """L0 of sparse codes: how many are on that were off in every trusted row."""

    least = 1

    def _fit(self, trusted: Tensor) -> None:
        self._known = (trusted != 0).any(1, keepdim=True)

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        return ((rows != 0) & ~self._known).sum(-1).double()


class StandardisedSquare(Novelty):
    """L2 of sparse codes: mean square after standardisation by the trusted rows.

    A code that is flat in the trusted rows has 1e-3 of the root mean variance for its standard deviation.
    """

    def _fit(self, trusted: Tensor) -> None:
        self._mean, deviation = trusted.mean(1, keepdim=True), trusted.std(1, keepdim=True)
        floor = _FLAT * deviation.square().mean(-1, keepdim=True).sqrt()
        self._deviation = torch.maximum(deviation, floor.clamp(min=torch.finfo(deviation.dtype).tiny))

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        return ((rows - self._mean) / self._deviation).square_().mean(-1)


DETECTORS: Mapping[str, Callable[[], Novelty]] = MappingProxyType(
    {
        "mahalanobis": Mahalanobis,
        "relative-mahalanobis": lambda: Mahalanobis(relative=True),
        "lof": LocalOutlierFactor,
        "isolation-forest": IsolationForest,
        "one-class-svm": OneClassSVM,
        "flow": CouplingFlow,
        "abstraction": Abstraction,
        "l2": StandardisedSquare,
        "l0": NewlyActive,
        "topological": Topological,
        "likelihood-ratio": LikelihoodRatio,
        "two-gaussians": TwoGaussians,
        "quantum-entropy": QuantumEntropy,
        "spectral": SpectralSignature,
    }
)
"""Makers of detectors by name; the last four have to see untrusted rows."""
