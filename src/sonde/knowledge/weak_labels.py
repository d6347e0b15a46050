"""Weak labellers of a chosen quality: a small model stopped when it is good enough, and errors that cannot be learned.

A labeller is trained on true rows, batch by batch, until it is right on the wanted share of held-out rows; its soft
predictions on other rows are the weak labels. `shuffled_errors` deals the errors anew among the rows: the same labels
are wrong by the same amounts as often, but no rule of the features says where, so that they teach nothing false. The
difference of the two is what errors that are *learnable* do. Mallen & Belrose 2024 (arXiv:2410.13215), section 4.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sonde.errors import SondeError
from sonde.knowledge.label_losses import log_probabilities

_HELD_OUT = 0.2
_SMALL = 0.01


@dataclass(frozen=True)
class WeakLabeller:
    """A linear model that was stopped early. accuracy: on its held-out rows; steps: that it took."""

    weights: Float[Tensor, "d1 K"]
    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    accuracy: float
    steps: int

    def label(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n C"]:
        """Soft labels of rows."""
        return log_probabilities(_padded(x, self.mean, self.scale) @ self.weights).exp()


def stopped_at(
    accuracy: float,
    x: Float[Tensor, "n d"],
    truth: Int[np.ndarray, " n"],
    *,
    classes: int = 2,
    batch: int = 8,
    lr: float = 3e-3,
    epochs: int = 30,
    seed: int = 0,
) -> WeakLabeller:
    """Train on `x` until a fifth that is held out is told right with this share, checked after every batch.

    Raises `SondeError` where the target is not above the largest class's share, which needs no training, and where it
    is never reached, with the best that was.
    """
    labels = torch.as_tensor(np.asarray(truth, dtype=np.int64))
    if len(labels) != len(x) or len(x) < 10:
        raise SondeError(f"{len(x)} rows with {len(labels)} labels: a labeller needs at least 10, as many of both")
    largest = float(torch.bincount(labels, minlength=classes).max() / len(labels))
    if not largest < accuracy <= 1:
        raise SondeError(
            f"a labeller that is right on {accuracy:g} of the rows: expected more than the largest class, which is "
            f"{largest:.3f} of them, and at most 1"
        )
    rows = x.float()
    mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    padded = _padded(rows, mean, scale)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    held = max(2, round(_HELD_OUT * len(x)))
    out, kept = order[:held], order[held:]
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(padded.shape[1], 1 if classes == 2 else classes, bias=False)
    with torch.no_grad():
        head.weight.normal_(0, _SMALL / padded.shape[1] ** 0.5, generator=generator)
    optimiser = torch.optim.SGD(head.parameters(), lr=lr)
    best, steps = 0.0, 0
    for _ in range(epochs):
        for places in kept[torch.randperm(len(kept), generator=generator)].split(batch):
            optimiser.zero_grad()
            logs = log_probabilities(head(padded[places]))
            F.nll_loss(logs, labels[places]).backward()
            optimiser.step()
            steps += 1
            with torch.no_grad():
                right = float((log_probabilities(head(padded[out])).argmax(1) == labels[out]).float().mean())
            best = max(best, right)
            if right >= accuracy:
                return WeakLabeller(head.weight.detach().T.clone(), mean, scale, right, steps)
    raise SondeError(
        f"the labeller never reached {accuracy:g}: its best was {best:.3f} after {steps} steps; ask for less, or give "
        "it more rows or better features"
    )


def shuffled_errors(
    labels: Float[Tensor, "n C"], truth: Int[np.ndarray, " n"], *, seed: int = 0
) -> Float[Tensor, "n C"]:
    """The same errors on other rows: |label - truth| permuted over rows for two classes.

    With C classes a row's probabilities are listed from that of its true class on, in cyclic order, and these lists are
    permuted. Raises `SondeError` for labels and truth of different lengths, and for labels with nan.
    """
    classes = labels.shape[1]
    true = torch.as_tensor(np.asarray(truth, dtype=np.int64))
    if len(true) != len(labels) or labels.isnan().any():
        raise SondeError(f"{len(labels)} labels and {len(true)} true classes: expected as many, and no nan")
    place = torch.arange(classes)
    from_truth = labels.gather(1, (true[:, None] + place) % classes)
    dealt = from_truth[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]
    return dealt.gather(1, (place - true[:, None]) % classes)


def _padded(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"], scale: Float[Tensor, " d"]) -> Float[Tensor, "n d1"]:
    rows = (x.float() - mean) / scale
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
