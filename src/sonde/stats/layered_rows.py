"""Rows of features, layer by layer: what every novelty detector is fitted on and scores.

Features come as `[n, d]`, or as `[layers, n, d]` with a matrix for each layer; all layers are worked on at once. A
detector is fitted on trusted rows alone. Its *offline* form scores rows one by one; its *online* form may also look at
a batch of untrusted rows, of which nobody says which are normal. Scores rise with strangeness.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError


def layered(x: ArrayLike | Tensor, *, least: int = 1) -> Float[Tensor, "layers n d"]:
    """Features `[n, d]` or `[layers, n, d]` as a stack of matrices in float64.

    Raises `SondeError` for other shapes, fewer than `least` rows and values that are not finite, naming the first row
    and its layer.
    """
    rows = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
    if rows.ndim == 2:
        rows = rows[None]
    if rows.ndim != 3 or rows.shape[1] < least or not len(rows) or (rows.shape[1] and not rows.shape[2]):
        given = tuple(rows.shape[1:] if rows.ndim == 3 and len(rows) == 1 else rows.shape)
        raise SondeError(
            "features are a matrix with a row for each question (or a stack of them, one for each layer), not of shape "
            f"{given}"
        )
    rows = rows.double()
    if not rows.isfinite().all():
        bad = ~rows.isfinite()
        layer, row, _ = bad.nonzero()[0].tolist()
        raise SondeError(
            f"{int(bad.sum())} of {rows.numel()} features are not finite: the first is in row {row} of layer {layer}"
        )
    return rows


class Novelty(ABC):
    """A detector: `fit(trusted).score(rows)`, or online `score(batch, untrusted=batch)`.

    `untrusted` says whether a batch of untrusted rows is not looked at ("no"), may be ("may") or has to be ("must").
    `score` gives `[n]` for rows `[n, d]` and `[layers, n]` for rows of several layers, in float64. Untrusted rows that
    are the scored ones themselves are recognised, so that no row is its own neighbour.

    `fit` raises `SondeError` for rows that `layered` refuses and for too few of them; `score` before `fit`, for another
    number of layers or features, and for untrusted rows that are missing or not looked at.
    """

    untrusted: ClassVar[Literal["no", "may", "must"]] = "no"
    least: ClassVar[int] = 2
    shape_: tuple[int, int] | None = None
    """Layers and features of the trusted rows."""

    def fit(self, trusted: ArrayLike | Tensor) -> Self:
        """Learn what is normal from trusted rows `[n, d]` or `[layers, n, d]`."""
        rows = layered(trusted)
        if rows.shape[1] < self.least:
            raise SondeError(f"{rows.shape[1]} trusted rows are too few for {self._name}: give at least {self.least}")
        self._fit(rows)
        self.shape_ = (rows.shape[0], rows.shape[2])
        return self

    def score(
        self, rows: ArrayLike | Tensor, untrusted: ArrayLike | Tensor | None = None
    ) -> Float[np.ndarray, "*layers n"]:
        """Strangeness of each row, larger is stranger; of each layer where there are several."""
        given = self._checked(rows)
        if untrusted is None and self.untrusted == "must":
            raise SondeError(f"{self._name} compares with untrusted rows: score(batch, untrusted=batch)")
        if untrusted is not None and self.untrusted == "no":
            raise SondeError(f"{self._name} does not look at untrusted rows: leave untrusted= out")
        batch = None if untrusted is None else (given if untrusted is rows else self._checked(untrusted))
        if batch is not None and batch.shape[1] < 2:
            raise SondeError(f"{batch.shape[1]} untrusted row says nothing about a batch: give at least 2")
        with torch.no_grad():
            scores = self._score(given, batch)
        return (scores if np.ndim(rows) == 3 and scores.ndim == 2 else scores.reshape(-1)).numpy()

    @abstractmethod
    def _fit(self, trusted: Float[Tensor, "layers n d"]) -> None: ...

    @abstractmethod
    def _score(
        self, rows: Float[Tensor, "layers n d"], untrusted: Float[Tensor, "layers m d"] | None
    ) -> Float[Tensor, "layers n"]: ...

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _checked(self, rows: ArrayLike | Tensor) -> Float[Tensor, "layers n d"]:
        if self.shape_ is None:
            raise SondeError(f"this {self._name} has seen no trusted rows: call fit first")
        given = layered(rows)
        layers, width = self.shape_
        if given.shape[0] != layers:
            raise SondeError(f"rows of {given.shape[0]} layers for a {self._name} fitted on {layers}")
        if given.shape[2] != width:
            raise SondeError(f"rows of {given.shape[2]} features for a {self._name} fitted on {width}")
        return given
