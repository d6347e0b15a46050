"""How well does a probe do that is drawn at random? The control of every probe, as a distribution over draws.

Weights are uniform on the unit sphere of the last token's state, the same at all layers; the sign of each is that of
the difference of its classes' mean scores on the training rows. Drawn weights are multiplied out a block at a time and
forgotten, so that the memory is that of one block, not of draws x width; kept are the AUROCs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sonde.errors import SondeError
from sonde.knowledge.states import States
from sonde.stats.ranks import auroc

_BLOCK = 256


@dataclass(frozen=True)
class RandomProbes:
    """Test AUROC of every draw at every layer; `mean` and `quantiles` of it over draws."""

    aurocs: Float[np.ndarray, "draws layers"]

    @property
    def mean(self) -> Float[np.ndarray, " layers"]:
        """Mean over draws."""
        return self.aurocs.mean(0, dtype=np.float64)

    def quantiles(self, *shares: float) -> Float[np.ndarray, "shares layers"]:
        """Quantiles over draws, by default 0.025, 0.5 and 0.975."""
        return np.quantile(self.aurocs, shares or (0.025, 0.5, 0.975), axis=0)


@torch.no_grad()
def random_probes(
    train: States,
    train_labels: ArrayLike | Tensor,
    test: States,
    test_labels: ArrayLike | Tensor,
    *,
    draws: int = 1024,
    seed: int = 0,
) -> RandomProbes:
    """AUROC on `test` of `draws` random directions, labels 1 for true and 0 for false.

    Raises `SondeError` for states of other sites or widths, for no draws, and for training labels of one class;
    `ValueError` for test labels of one class, which have no AUROC.
    """
    test.require_like(train.sites, train.d, "what signs come from")
    known, y = (np.asarray(labels).astype(bool) for labels in (train_labels, test_labels))
    if draws < 1:
        raise SondeError(f"{draws} draws: ask for one at least")
    if known.all() or not known.any():
        raise SondeError(f"all {len(known)} training labels are {known[0]}: they decide no sign")
    truth = torch.from_numpy(known)
    here = train.by_layer("last")
    apart = torch.stack([x[truth].mean(0) - x[~truth].mean(0) for x in here])
    generator = torch.Generator().manual_seed(seed)
    found = np.empty((draws, len(train.sites)), dtype=np.float32)
    for start in range(0, draws, _BLOCK):
        weights = torch.randn(min(_BLOCK, draws - start), train.d, generator=generator)
        for layer, (x, own) in enumerate(zip(test.by_layer("last"), apart, strict=True)):
            signed = weights * torch.where(weights @ own < 0, -1.0, 1.0)[:, None]
            scores = (signed @ (x - x.mean(0)).T).numpy()
            found[start : start + len(weights), layer] = auroc(scores, np.broadcast_to(y, scores.shape))
    return RandomProbes(found)
