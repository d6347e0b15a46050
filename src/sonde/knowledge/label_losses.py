"""Losses for labels that may be wrong: what a student that knows better than its supervisor should be taught.

With labels y, own prediction p and c rising linearly from 0 to its limit over the warm-up steps:

    cross-entropy        CE(y, p)
    log-confidence       CE((1 - c) y + c h, p)     h: own prediction, hardened at the quantile of the labels' prior
    entropy              CE((1 - c) y + c p, p)     p as a target takes part in the gradient: own entropy falls
    confidence window    CE(y, p) on rows whose largest p is below .5 + radius
    KL                   KL(y || p): the gradient of cross-entropy, 0 where the labels are matched

Log-confidence at c = 0 is cross-entropy. Sources: Burns et al. 2023, Weak-to-Strong Generalization (arXiv:2312.09390);
EleutherAI, "Experiments in Weak-to-Strong Generalization".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sonde.errors import SondeError

LossOfBatch = Callable[[Float[Tensor, "b K"], Float[Tensor, "b C"], int], Float[Tensor, ""]]
"""From the logits and labels of a batch and the number of the step; K is 1 (log-odds) for two classes, else C."""

_LEAST_BATCH = 8


class Loss(Protocol):
    """A loss that may remember earlier batches: `begin` starts one stage."""

    @property
    def name(self) -> str:
        """What a user types."""
        ...

    def begin(self, labels: Float[Tensor, "n C"], *, batch: int) -> LossOfBatch:
        """The loss of one stage on `labels`, in batches of `batch`. Raises `SondeError` for a batch it cannot use."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """With soft targets."""

    name: str = "xent"

    def begin(self, labels: Float[Tensor, "n C"], *, batch: int) -> LossOfBatch:
        """See `Loss`."""
        return lambda logits, targets, step: _xent(log_probabilities(logits), targets)


@dataclass(frozen=True)
class Divergence:
    """KL divergence of the prediction from the label."""

    name: str = "kl"

    def begin(self, labels: Float[Tensor, "n C"], *, batch: int) -> LossOfBatch:
        """See `Loss`."""
        return lambda logits, targets, step: _xent(log_probabilities(logits), targets) - _entropy(targets).mean()


@dataclass(frozen=True)
class LogConfidence:
    """Own hardened predictions as a growing part of the target.

    limit: what c rises to. warmup: steps until then; 0 is at once. buffer: how many earlier predictions set the
    threshold beside those of the batch, 0 for the batch alone (which then has at least 8 rows).
    """

    limit: float = 0.5
    warmup: int = 200
    buffer: int = 32
    name: str = "log-confidence"

    def begin(self, labels: Float[Tensor, "n C"], *, batch: int) -> LossOfBatch:
        """See `Loss`. Raises `SondeError` for batches of 1, and of less than 8 without a buffer."""
        if batch < 2 or (batch < _LEAST_BATCH and self.buffer < _LEAST_BATCH):
            raise SondeError(
                f"log-confidence hardens predictions at a quantile of the batch, which has {batch} rows: use at least "
                f"{_LEAST_BATCH}, or at least 2 with a buffer of {_LEAST_BATCH} or more"
            )
        past: list[Tensor] = []

        def of_batch(logits: Tensor, targets: Tensor, step: int) -> Tensor:
            logs = log_probabilities(logits)
            with torch.no_grad():
                seen = torch.cat([*past, logs])
                hard = hardened(logs, targets.mean(0), seen)
                if self.buffer:
                    past[:] = [seen[-self.buffer :]]
            c = _risen(self.limit, self.warmup, step)
            return _xent(logs, (1 - c) * targets + c * hard)

        return of_batch


@dataclass(frozen=True)
class ConfidenceEntropy:
    """Own soft predictions as a growing part of the target."""

    limit: float = 0.5
    warmup: int = 200
    name: str = "entropy"

    def begin(self, labels: Float[Tensor, "n C"], *, batch: int) -> LossOfBatch:
        """See `Loss`."""

        def of_batch(logits: Tensor, targets: Tensor, step: int) -> Tensor:
            logs = log_probabilities(logits)
            c = _risen(self.limit, self.warmup, step)
            return _xent(logs, (1 - c) * targets + c * logs.exp())

        return of_batch


@dataclass(frozen=True)
class ConfidenceWindow:
    """Rows about which the student is sure are left out. radius "median": that of the supervisor's |label - .5|."""

    radius: float | Literal["median"] = 0.15
    name: str = "window"

    def begin(self, labels: Float[Tensor, "n C"], *, batch: int) -> LossOfBatch:
        """See `Loss`."""
        radius = float((labels.amax(1) - 0.5).median()) if self.radius == "median" else self.radius

        def of_batch(logits: Tensor, targets: Tensor, step: int) -> Tensor:
            logs = log_probabilities(logits)
            inside = (logs.detach().exp().amax(1) < 0.5 + radius).to(logs)
            each = -(targets * logs).sum(1)
            return (each * inside).sum() / inside.sum().clamp(min=1)

        return of_batch


LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (CrossEntropy(), LogConfidence(), ConfidenceWindow(), ConfidenceEntropy(), Divergence())
}


def log_probabilities(logits: Float[Tensor, "b K"]) -> Float[Tensor, "b C"]:
    """Of all classes, from log-odds `[b 1]` or logits `[b C]`."""
    if logits.shape[1] == 1:
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
    return logits.log_softmax(1)


def hardened(
    logs: Float[Tensor, "b C"], prior: Float[Tensor, " C"], seen: Float[Tensor, "m C"]
) -> Float[Tensor, "b C"]:
    """One-hot predictions, such that `prior` is the share of each class among `seen`, which holds these and earlier.

    Two classes: the threshold is that quantile of `seen`. More: each class is divided by its mean prediction.
    """
    if logs.shape[1] == 2:
        threshold = torch.quantile(seen[:, 1] - seen[:, 0], (1 - prior[1]).clamp(0, 1).to(seen))
        predicted = (logs[:, 1] - logs[:, 0] > threshold).long()
    else:
        balance = prior.clamp(min=1e-9).log().to(logs) - torch.logsumexp(seen, 0)
        predicted = (logs + balance).argmax(1)
    return F.one_hot(predicted, logs.shape[1]).to(logs)


def _xent(logs: Float[Tensor, "b C"], targets: Float[Tensor, "b C"]) -> Float[Tensor, ""]:
    return -(targets * logs).sum(1).mean()


def _entropy(targets: Float[Tensor, "b C"]) -> Float[Tensor, " b"]:
    return torch.special.entr(targets).sum(1)


def _risen(limit: float, warmup: int, step: int) -> float:
    return limit * min(1.0, step / warmup) if warmup else limit
