"""Texts in which it is known where latents fire: random tokens, and latents that fire on sets of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sonde.features.latent_cache import LatentCache

VOCAB = 200


@dataclass(frozen=True)
class Projection:
    """An encoder by random directions: the k largest of `latents`, and what is below 0 left out."""

    latents: int
    width: int
    k: int = 4
    seed: int = 0
    site: str | None = None

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and indices."""
        rows = torch.randn(self.latents, self.width, generator=torch.Generator().manual_seed(self.seed))
        values, indices = (x @ rows.T).topk(self.k, dim=-1)
        return values.relu(), indices


def planted(
    folder: Path,
    sets: list[tuple[int, ...]],
    *,
    sequences: int = 400,
    context: int = 64,
    seed: int = 0,
    strengths: tuple[float, float] = (0.5, 4),
) -> LatentCache:
    """A cache of the hookpoint "planted" in which latent i fires on the tokens of set i, with random strengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (sequences, context))
    columns = []
    for latent, members in enumerate(sets):
        sequence, position = np.isin(tokens, members).nonzero()
        columns.append((sequence, position, np.full(len(sequence), latent), rng.uniform(*strengths, len(sequence))))
    triples = tuple(np.concatenate(column) for column in zip(*columns, strict=True))
    return LatentCache.write(folder, tokens, {"planted": (len(sets), triples)})
