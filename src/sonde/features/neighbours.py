"""Which latents are near a latent: in what they read, in what they write, or in when they fire?

Nearness is the cosine of encoder rows, the cosine of decoder rows, or the Jaccard index of firing,
c_ij / (c_i + c_j - c_ij), with c_ij the tokens at which both fire. A cache holds the firing matrix F by columns, so
the counts FᵀF come a block of latents at a time from a product of sparse matrices: k² work a token, and no more than
a block of rows in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csc_matrix

from sonde.features.latent_cache import LatentCache

KEPT = 250
_BLOCK = 512
_ENTRIES = 1 << 26  # activations of the sequences that co-occurrence is counted on


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest latents of every latent, nearest first, without itself.

    Attributes:
        ids: Int[np.ndarray, "latents kept"].
        similarity: Float[np.ndarray, "latents kept"].
        tokens: tokens that co-occurrence was counted on; 0 for cosines.

    """

    ids: Int[np.ndarray, "latents kept"]
    similarity: Float[np.ndarray, "latents kept"]
    tokens: int = 0

    def of(self, latent: int) -> list[tuple[int, float]]:
        """The neighbours of one latent that are near at all (a similarity above 0), nearest first."""
        near = self.similarity[latent] > 0
        return list(zip(self.ids[latent][near].tolist(), self.similarity[latent][near].tolist(), strict=True))


def by_cosine(rows: Float[np.ndarray, "latents d"], *, kept: int = KEPT) -> Neighbours:
    """Neighbours by the cosine of encoder or decoder rows. Rows of zeros are near nothing."""
    unit = np.asarray(rows, dtype=np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    pieces = (unit[start : start + _BLOCK] @ unit.T for start in range(0, len(unit), _BLOCK))
    return _nearest(pieces, len(unit), kept)


def by_cooccurrence(cache: LatentCache, hookpoint: str, *, kept: int = KEPT, entries: int = _ENTRIES) -> Neighbours:
    """Neighbours by the Jaccard index of firing, on as many sequences as have no more than `entries` activations.

    Sequences are in random order, so the first ones are a sample of the text.
    """
    latents, context = cache.latents(hookpoint), cache.context
    share = min(1.0, entries / max(1, int(cache.counts(hookpoint).sum())))
    sequences = max(1, int(share * len(cache.tokens)))
    columns, starts = [], [0]
    for latent in range(latents):
        found = cache.latent(hookpoint, latent)
        inside = int(np.searchsorted(found.sequence, sequences))
        columns.append((found.sequence[:inside] * context + found.position[:inside]).astype(np.int32))
        starts.append(starts[-1] + inside)
    rows = np.concatenate(columns)
    fires = csc_matrix(
        (np.ones(len(rows), dtype=np.int32), rows, np.array(starts)), shape=(sequences * context, latents)
    )
    by_token = fires.tocsr()
    counts = np.diff(fires.indptr)

    def pieces() -> Iterator[Float[np.ndarray, "block latents"]]:
        for start in range(0, latents, _BLOCK):
            both = (fires[:, start : start + _BLOCK].T @ by_token).toarray()
            either = counts[start : start + _BLOCK, None] + counts - both
            yield both / np.maximum(either, 1)

    return _nearest(pieces(), latents, kept, tokens=sequences * context)


def _nearest(
    pieces: Iterable[Float[np.ndarray, "block latents"]], latents: int, kept: int, *, tokens: int = 0
) -> Neighbours:
    kept = min(kept, latents - 1)
    ids, similarity, start = [], [], 0
    for piece in pieces:
        own = np.arange(len(piece))
        piece[own, start + own] = -np.inf
        found = np.argpartition(-piece, max(0, kept - 1), axis=1)[:, :kept]
        near = np.take_along_axis(piece, found, 1)
        order = np.lexsort((found, -near), axis=1)
        ids.append(np.take_along_axis(found, order, 1))
        similarity.append(np.take_along_axis(near, order, 1))
        start += len(piece)
    return Neighbours(np.concatenate(ids), np.concatenate(similarity), tokens)
