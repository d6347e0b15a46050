"""Hidden progress of a network on a sum modulo P, from its logits on all pairs alone (arXiv:2301.05217, section 5).

L [P², P] are logits on the whole grid, S the span of cos w_k(a+b), sin w_k(a+b) for the key frequencies k, P_S the
projection onto it along the pairs, and L̄ the mean of L over the pairs. Products in any other finite group have
components in the place of frequencies (`sonde.dynamics.harmonics`); every measure is the same.

    restricted loss    cross entropy of P_S L + L̄           what the circuit alone would do
    excluded loss      cross entropy of L - P_S L            what is left without it: memory
    wide restriction   the same with {1, cos, sin} x {1, cos, sin} of each k
    trigonometric fit  centred L on cos w_k(a+b-c): coefficients, share of variance, loss

Cross entropy is taken in float64, as log(1 + what the other classes have over the right one): in float32 no
log-probability is smaller than 1.2e-7, and one that is subtracted from 0 in float64 none below 1e-16.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from sonde.dynamics.harmonics import Harmonics
from sonde.errors import SondeError

SHARE = 0.02  # of the centred logits' variance, from which a frequency is a key
_GENERALISES = 0.9


def cross_entropy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean cross entropy in float64, exact however small it is."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return softplus(others - own).mean()


@dataclass(frozen=True)
class Grid:
    """Logits of a network on all pairs of a task, in float64.

    Attributes:
        modulus: P, or the number of elements of a group.
        logits: [P², P], pairs row-major, the class `=` dropped.
        labels: the right classes.
        trained: which pairs were trained on.
        harmonics: the components that a circuit may use; those of a + b modulo P where not given.

    Raises:
        SondeError: when the logits are not of the whole grid.

    """

    modulus: int
    logits: Float[Tensor, "pairs classes"]
    labels: Int[Tensor, " pairs"]
    trained: Bool[Tensor, " pairs"]
    harmonics: Harmonics = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        pairs, p = self.modulus**2, self.modulus
        if self.logits.ndim != 2 or len(self.logits) != pairs:
            raise SondeError(f"the projection needs the whole grid: got {len(self.logits)} of {pairs} pairs")
        if self.logits.shape[1] not in (p, p + 1):
            raise SondeError(f"logits have {self.logits.shape[1]} classes: expected {p}, or {p + 1} with `=` last")
        if len(self.labels) != pairs or len(self.trained) != pairs:
            raise SondeError(f"labels ({len(self.labels)}) and split ({len(self.trained)}) are of {pairs} pairs")
        if self.logits.dtype in (torch.float16, torch.bfloat16):
            warnings.warn(f"logits in {self.logits.dtype} have no digits for losses below 1e-3", stacklevel=3)
        object.__setattr__(self, "logits", self.logits.detach().double()[:, :p])
        if self.harmonics is None:
            object.__setattr__(self, "harmonics", Harmonics.modulo(p))

    def loss(self, which: str = "all", logits: Float[Tensor, "pairs classes"] | None = None) -> float:
        """Cross entropy in nats over "all", "train" or "test" pairs; of the network's own logits, or of others."""
        logits = self.logits if logits is None else logits
        rows = self._rows(which)
        return float(cross_entropy(logits[rows], self.labels[rows]))

    def accuracy(self, which: str = "all", logits: Float[Tensor, "pairs classes"] | None = None) -> float:
        """Share of pairs whose most likely class is right."""
        logits = self.logits if logits is None else logits
        rows = self._rows(which)
        return float((logits[rows].argmax(-1) == self.labels[rows]).double().mean())

    def _rows(self, which: str) -> Bool[Tensor, " pairs"]:
        if which == "all":
            return torch.ones_like(self.trained)
        if which not in ("train", "test"):
            raise ValueError(f"which is {which!r}: use all, train or test")
        return self.trained if which == "train" else ~self.trained

    @property
    def mean(self) -> Float[Tensor, "1 classes"]:
        """L̄, the constant component."""
        return self.logits.mean(0, keepdim=True)

    def centred(self) -> Float[Tensor, "pairs classes"]:
        """Logits without what softmax does not see (their mean over classes) and without their mean over pairs."""
        logits = self.logits - self.logits.mean(1, keepdim=True)
        return logits - logits.mean(0, keepdim=True)

    def shares(self) -> dict[int, float]:
        """Share of the centred logits' variance that is a function of the sum (product) at each frequency."""
        centred = self.centred()
        sums, total = self.harmonics.by_product(centred), centred.square().sum()
        return {
            k: float((q.T @ sums).square().sum() / total) if total > 0 else 0.0
            for k, q in self.harmonics.components.items()
        }

    def key_frequencies(self, *, threshold: float = SHARE) -> tuple[int, ...]:
        """Frequencies whose share is above the threshold, by size. Warns of a network that does not generalise.

        Raises `SondeError` with the five largest shares when there is none.
        """
        shares = self.shares()
        order = sorted(shares, key=shares.__getitem__, reverse=True)
        keys = tuple(k for k in order if shares[k] > threshold)
        noun = self.harmonics.noun
        if not keys:
            largest = ", ".join(f"{k}: {shares[k]:.2g}" for k in order[:5])
            raise SondeError(f"no {noun} has a share above {threshold}: the largest are {largest}")
        right = self.accuracy("test")
        if right < _GENERALISES:
            warnings.warn(
                f"the test accuracy is {right:.2f}: what stands out in a network that does not generalise means little",
                stacklevel=2,
            )
        return keys


@dataclass(frozen=True)
class Measures:
    """The progress measures of one checkpoint, in nats.

    Attributes:
        train, test: loss of the network. accuracy_train, accuracy_test: its accuracies.
        restricted: loss by "all", "train", "test" of the restricted logits; the headline is "test".
        excluded: on trained pairs, all key frequencies removed together. excluded_by: each alone.
        wide: of the wide restriction, on test pairs.
        trig_loss, trig_fve, trig_coefficients: of the trigonometric fit.
        share: of the centred logits' variance in S.

    """

    train: float
    test: float
    accuracy_train: float
    accuracy_test: float
    restricted: dict[str, float]
    restricted_accuracy: float
    excluded: float
    excluded_by: dict[int, float]
    wide: float
    trig_loss: float
    trig_fve: float
    trig_coefficients: dict[int, float]
    share: float


def measures(grid: Grid, keys: Sequence[int]) -> Measures:
    """All measures of a checkpoint for key frequencies that were chosen on one of them, usually the last.

    Raises `SondeError` for no key frequency and for ones that do not exist.
    """
    if not keys:
        raise SondeError("no key frequency was given: choose them on a checkpoint that generalises")
    harmonics = grid.harmonics
    inside = harmonics.project(grid.logits, keys)
    restricted = inside + grid.mean
    excluded_by = {k: grid.loss("train", grid.logits - harmonics.project(grid.logits, [k])) for k in keys}
    wide = harmonics.project_wide(grid.logits, keys) + grid.mean
    coefficients, fitted = trigonometric(grid, keys)
    centred = grid.centred()
    total = centred.square().sum()
    return Measures(
        train=grid.loss("train"),
        test=grid.loss("test"),
        accuracy_train=grid.accuracy("train"),
        accuracy_test=grid.accuracy("test"),
        restricted={which: grid.loss(which, restricted) for which in ("all", "train", "test")},
        restricted_accuracy=grid.accuracy("test", restricted),
        excluded=grid.loss("train", grid.logits - inside),
        excluded_by=excluded_by,
        wide=grid.loss("test", wide),
        trig_loss=grid.loss("all", fitted),
        trig_fve=float(1 - (centred - fitted).square().sum() / total),
        trig_coefficients=coefficients,
        share=float(harmonics.project(centred, keys).square().sum() / total),
    )


def trigonometric(grid: Grid, keys: Sequence[int]) -> tuple[dict[int, float], Float[Tensor, "pairs classes"]]:
    """Least squares of the centred logits on cos w_k(a+b-c): the coefficients, and the fitted logits.

    In a group that is no sum, on the character of the product and the inverse of the class, 1 where they are equal.
    """
    coefficients = grid.harmonics.fit(grid.centred(), keys)
    kernel = sum((alpha * grid.harmonics.kernel(k) for k, alpha in coefficients.items()), torch.zeros(()))
    return coefficients, kernel[grid.harmonics.table.flatten()]
