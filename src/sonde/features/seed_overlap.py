"""Do two dictionaries find the same directions? Cosines between their rows, one to one and best to best.

Mean max cosine: of each decoder row of one, the largest cosine with any row of the other, averaged; it counts one row
of the other several times. Seed overlap pairs latents one to one, so that the sum of cosines is largest (Hungarian
algorithm), once by encoder rows and once by decoder rows: a latent is *shared* where both pairings give it the same
partner and both cosines exceed 0.7 (EleutherAI, "SAEs trained on the same data don't learn the same features").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary
from sonde.features.similarity import matched
from sonde.stats.intervals import Interval, bootstrap_mean, wilson

THRESHOLD = 0.7
_MOST = 1 << 14  # latents whose matrix of cosines still fits: 2 GB in float64
_ROWS = 4096


@dataclass(frozen=True)
class Overlap:
    """What two dictionaries share.

    shared: share of the first one's latents. partner: of each latent, its partner where it is shared, otherwise -1.
    encoder, decoder: cosines of each latent with its partner in the pairing by encoders, and by decoders.
    """

    shared: Interval
    partner: Int[np.ndarray, " latents"]
    encoder: Float[np.ndarray, " latents"]
    decoder: Float[np.ndarray, " latents"]


def mean_max_cosine(
    first: Dictionary, second: Dictionary, *, alive: Bool[Tensor, " latents"] | None = None
) -> Interval:
    """Mean over decoder rows of `first` of the largest cosine with a decoder row of `second`.

    `alive` says which latents of `first` count. The interval is a bootstrap over them. Raises `SondeError` for
    dictionaries that write to different widths.
    """
    _comparable(first, second)
    rows = first.w_dec if alive is None else first.w_dec[alive]
    return bootstrap_mean(best_cosines(rows, second.w_dec).numpy())


@torch.no_grad()
def best_cosines(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, " n"]:
    """Of each row, the largest cosine with one of `others`; no more than a few thousand rows are compared at once."""
    a, b = _unit(rows), _unit(others)
    return torch.cat([(a[start : start + _ROWS] @ b.T).amax(1) for start in range(0, len(a), _ROWS)])


@torch.no_grad()
def seed_overlap(first: Dictionary, second: Dictionary, *, threshold: float = THRESHOLD) -> Overlap:
    """Pair the latents of two dictionaries and count those that are shared.

    Raises `SondeError` for dictionaries of different widths, for more than 16,384 latents (the pairing needs the matrix
    of all cosines), and for a threshold outside 0 to 1.
    """
    _comparable(first, second)
    if not 0 < threshold < 1:
        raise SondeError(f"threshold is {threshold}: give a cosine between 0 and 1, such as {THRESHOLD}")
    size, other = first.design.latents, second.design.latents
    if max(size, other) > _MOST:
        raise SondeError(f"{max(size, other):,} latents are more than the {_MOST:,} that can be paired one to one")
    pairs = []
    for a, b in ((first.w_enc, second.w_enc), (first.w_dec, second.w_dec)):
        match = matched(_unit(a).numpy(), _unit(b).numpy())
        partner, value = np.full(size, -1), np.zeros(size)
        partner[match.first], value[match.first] = match.second, match.cosine
        pairs.append((partner, value))
    (by_encoder, encoder), (by_decoder, decoder) = pairs
    shared = (by_encoder == by_decoder) & (by_encoder >= 0) & (encoder > threshold) & (decoder > threshold)
    return Overlap(wilson(int(shared.sum()), size), np.where(shared, by_encoder, -1), encoder, decoder)


def unshared(first: Dictionary, others: Sequence[Dictionary], *, threshold: float = THRESHOLD) -> Interval:
    """Share of the latents of `first` that no one of `others` shares. Raises `SondeError` as `seed_overlap` does."""
    if not others:
        raise SondeError("give one other dictionary at least")
    alone = np.all([seed_overlap(first, other, threshold=threshold).partner < 0 for other in others], axis=0)
    return wilson(int(alone.sum()), len(alone))


def _comparable(first: Dictionary, second: Dictionary) -> None:
    for what in ("inputs", "outputs"):
        a, b = getattr(first.design, what), getattr(second.design, what)
        if a != b:
            raise SondeError(f"dictionaries with {what} of {a} and {b} cannot be compared: they are of different sites")


def _unit(rows: Tensor) -> Float[Tensor, "n d"]:
    rows = rows.detach().double().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
