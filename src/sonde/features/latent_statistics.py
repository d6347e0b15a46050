"""What kind of latent is it, as far as counting tells: how often it fires, on one token, at one place?

    single-token   90 % of its 50 strongest activations stand on one token
    weakly so      75 % of 100 activations drawn from its stronger half do
    unigram        its strongest 80 % stand on no more than 20 different tokens
    positional     firing and position in the context share more than .05 nats of information

All are read from a cache, latent by latent (the rules of Paulo et al. 2410.13928 and of the authors' report, with the
strongest activations taken for strong).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from sonde.features.latent_cache import Activations, LatentCache

_STRONGEST, _SINGLE = 50, 0.9
_DRAWN, _WEAK = 100, 0.75
_UNIGRAM, _STRONG_SHARE = 20, 0.8
POSITIONAL = 0.05


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Statistics of all latents of a hookpoint.

    Attributes:
        hookpoint: of the latents.
        tokens: number of tokens that were read.
        counts: Int[np.ndarray, "latents"], tokens at which each fires.
        single_token, weakly_single_token, unigram: Bool[np.ndarray, "latents"].
        position_information: Float[np.ndarray, "latents"], in nats.

    """

    hookpoint: str
    tokens: int
    counts: Int[np.ndarray, " latents"]
    single_token: Bool[np.ndarray, " latents"]
    weakly_single_token: Bool[np.ndarray, " latents"]
    unigram: Bool[np.ndarray, " latents"]
    position_information: Float[np.ndarray, " latents"]

    @property
    def alive(self) -> Bool[np.ndarray, " latents"]:
        """The latents that fire at all."""
        return self.counts > 0

    @property
    def positional(self) -> Bool[np.ndarray, " latents"]:
        """The latents whose firing tells the position."""
        return self.position_information > POSITIONAL

    def summary(self) -> dict[str, Any]:
        """Shares of all latents (alive, dense), and of those alive (the rest)."""
        density, alive = self.counts / self.tokens, max(1, int(self.alive.sum()))
        shares = {
            "alive": float(self.alive.mean()),
            "over 1 % of tokens": float((density > 0.01).mean()),
            "over 10 % of tokens": float((density > 0.1).mean()),
        }
        kinds = ("single_token", "weakly_single_token", "unigram", "positional")
        return shares | {kind.replace("_", " "): float(getattr(self, kind).sum() / alive) for kind in kinds}


def latent_statistics(
    cache: LatentCache, hookpoint: str, *, seed: int = 0, progress: str | None = None
) -> LatentStatistics:
    """Read every latent of a hookpoint once. `seed` draws the samples of the weak rule."""
    counts = cache.counts(hookpoint)
    flags = np.zeros((3, len(counts)), dtype=bool)
    information = np.zeros(len(counts))
    for latent in tqdm(np.flatnonzero(counts).tolist(), desc=progress, disable=progress is None, unit="latent"):
        found = cache.latent(hookpoint, latent)
        flags[:, latent] = _kinds(cache.tokens, found, np.random.default_rng([seed, latent]))
        information[latent] = _position_information(found.position, *cache.tokens.shape)
    single, weak, unigram = flags
    return LatentStatistics(hookpoint, cache.n_tokens, counts, single, weak, unigram, information)


def _kinds(
    tokens: Int[np.ndarray, "sequences context"], found: Activations, rng: np.random.Generator
) -> tuple[bool, bool, bool]:
    order = np.argsort(-found.value, kind="stable")
    ids = tokens[found.sequence[order], found.position[order]]
    stronger = ids[: max(1, len(ids) // 2)]
    drawn = rng.choice(stronger, min(_DRAWN, len(stronger)), replace=False)
    strong = ids[: max(1, round(_STRONG_SHARE * len(ids)))]
    return (
        _commonest(ids[:_STRONGEST]) >= _SINGLE,
        _commonest(drawn) >= _WEAK,
        len(np.unique(strong)) <= _UNIGRAM,
    )


def _commonest(ids: Int[np.ndarray, " n"]) -> float:
    """Share of the commonest token."""
    return float(np.unique(ids, return_counts=True)[1].max() / len(ids))


def _position_information(position: Int[np.ndarray, " n"], sequences: int, context: int) -> float:
    """Mutual information of firing with a uniform position, in nats; the plug-in estimate."""
    at = np.bincount(position, minlength=context) / sequences
    mean = at.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = at * np.log(at / mean), (1 - at) * np.log((1 - at) / (1 - mean))
    return float(max(0.0, sum(np.nan_to_num(term, posinf=0.0, neginf=0.0).mean() for term in terms)))
