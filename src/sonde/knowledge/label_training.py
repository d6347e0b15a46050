"""One stage of training by gradient on bought labels, with a fifth held out to say when to stop.

    per stage   AdamW (beta2 .95, weight decay .01), batch 32, cosine after min(40, steps of an epoch) steps of warm-up,
                max(30,000 / n, 1) epochs; 20 % of the rows (at least 2) held out, validation AUROC every
                min(50, steps of an epoch) steps, stop after 4 checks without +.01, the best checkpoint kept
    "api"       no early stopping; batch 1 / 2 / 8 for n < 1,024 / < 4,096 / more; 100 / (n / batch) epochs for n < 30,
                3, 2 from 4,096 on, 1 from 16,384 on

It trains any module whose rows can be scored: a head on features, or a language model with adapters. The settings of
Mallen & Belrose 2024 (arXiv:2410.13215), appendix.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.knowledge.label_choice import probabilities
from sonde.knowledge.label_losses import CrossEntropy, Loss
from sonde.nets.loop import Schedule, train
from sonde.stats.ranks import auroc

Logits = Callable[[Int[np.ndarray, " b"]], Float[Tensor, "b K"]]
"""Scores of these places among the stage's rows, with gradients."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up (a fraction of all steps), then half a cosine to 0."""

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (0-based) of `steps`."""
        rise = self.warmup * steps
        if step + 1 < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, step - rise) / max(1.0, steps - rise))))


@dataclass(frozen=True)
class StageSettings:
    """How a stage is trained; see the module. `api` are the settings without early stopping.

    passes: row passes that a stage takes at most, but one epoch at least. held_out: share; patience: checks without
    `least_gain` in AUROC.
    """

    lr: float = 2e-3
    batch: int = 32
    passes: int = 30_000
    held_out: float = 0.2
    patience: int = 4
    least_gain: float = 0.01
    weight_decay: float = 0.01
    api: bool = False

    def batch_of(self, n: int) -> int:
        """Rows in a batch of a stage of `n`."""
        return min(n, (1 if n < 1024 else 2 if n < 4096 else 8) if self.api else self.batch)

    def steps_of(self, n: int) -> int:
        """Steps of a stage of `n` rows at most."""
        batch = self.batch_of(n)
        if self.api:
            epochs = 100 / (n / batch) if n < 30 else 3 if n < 4096 else 2 if n < 16_384 else 1
            return max(1, round(epochs * n / batch))
        return math.ceil(max(self.passes / n, 1) * n / batch)


class _Enough(Exception):
    """Validation has stopped rising."""


def train_stage(
    module: nn.Module,
    logits_of: Logits,
    labels: Float[Tensor, "n C"],
    *,
    loss: Loss | None = None,
    settings: StageSettings | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> tuple[str, ...]:
    """Train `module` on one stage in place; returns what a reader must know.

    `logits_of(places)` scores the rows at these places of `labels` through `module`. `optimizer` keeps its state from
    an earlier stage; by default a fresh AdamW. Held-out rows are not trained on. Raises `SondeError` as the loss and
    `sonde.nets.loop.train` do.
    """
    settings = settings or StageSettings()
    n = len(labels)
    if not n:
        return ()
    order = np.random.default_rng([seed, n]).permutation(n)
    held = 0 if settings.api else max(2, round(settings.held_out * n))
    notes: tuple[str, ...] = ()
    if not settings.api and (n - held < 2 or len(labels[torch.from_numpy(order[:held])].argmax(1).unique()) < 2):
        notes = (f"no early stopping: a fifth of {n} rows does not hold two classes",)
        held = 0
    out, kept = order[:held], order[held:]
    batch, steps = settings.batch_of(len(kept)), settings.steps_of(len(kept))
    epoch = max(1, len(kept) // batch)
    of_batch = (loss or CrossEntropy()).begin(labels[torch.from_numpy(kept)], batch=batch)
    given = labels.to(next(module.parameters()).device)

    def of_step(step: int) -> Tensor:
        places = kept[_batch(len(kept), batch, step, seed)]
        return of_batch(logits_of(places), given[torch.from_numpy(places)].to(torch.float32), step)

    watch = _Watch(module, logits_of, out, labels, min(50, epoch), settings)
    warmup = min(max(2, min(40, epoch)), steps) / steps
    if optimizer is None:
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=settings.lr,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
    base = [group["lr"] for group in optimizer.param_groups]
    try:
        train(
            module, of_step, [optimizer], steps=steps, schedule=Cosine(warmup), report=watch.report, progress=progress
        )
    except _Enough:
        pass
    finally:
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr
    watch.restore()
    return notes


class _Watch:
    """Validation AUROC, when to stop, and the best weights."""

    def __init__(
        self,
        module: nn.Module,
        logits_of: Logits,
        out: Int[np.ndarray, " held"],
        labels: Float[Tensor, "n C"],
        every: int,
        settings: StageSettings,
    ) -> None:
        self._module, self._logits_of, self._out, self._every, self._settings = module, logits_of, out, every, settings
        self._truth = labels[torch.from_numpy(out)].argmax(1).numpy()
        self._best, self._mark, self._waited = -1.0, -1.0, 0
        self._weights: dict[str, Tensor] | None = None

    def report(self, step: int, _: float) -> None:
        """Called after each step."""
        if not len(self._out) or (step + 1) % self._every:
            return
        area = self._area()
        if area >= self._best:  # of equals the later one, which has learned more
            self._best = area
            own = self._module.named_parameters()
            self._weights = {name: p.detach().clone() for name, p in own if p.requires_grad}
        if area >= self._mark + self._settings.least_gain:
            self._mark, self._waited = area, 0
        else:
            self._waited += 1
        if self._waited >= self._settings.patience:
            raise _Enough

    def restore(self) -> None:
        """Put the best weights back."""
        if self._weights is None:
            return
        with torch.no_grad():
            for name, p in self._module.named_parameters():
                if name in self._weights:
                    p.copy_(self._weights[name])

    def _area(self) -> float:
        with torch.no_grad():
            parts: Sequence[Tensor] = [self._logits_of(part) for part in _parts(self._out, self._settings.batch)]
        scores = probabilities(torch.cat(list(parts)).cpu()).numpy()
        return float(np.mean([auroc(scores[:, c], self._truth == c) for c in np.unique(self._truth)]))


def _parts(places: Int[np.ndarray, " n"], batch: int) -> list[Int[np.ndarray, " b"]]:
    return [places[start : start + 4 * batch] for start in range(0, len(places), 4 * batch)]


def _batch(n: int, batch: int, step: int, seed: int) -> Int[np.ndarray, " batch"]:
    """The rows of a step: a new order every epoch, a function of the step alone."""
    epoch = n // batch
    if not epoch:
        raise SondeError(f"a batch of {batch} from {n} rows")
    order = np.random.default_rng([seed, n, step // epoch]).permutation(n)
    start = step % epoch * batch
    return order[start : start + batch]
