"""Which windows of a latent are shown to the one who explains it, and which to those who test the explanation?

Active windows, in the order of their strength, fall into ten bins of equal count. Test windows are drawn first, the
same number from every bin, so that they do not depend on how the explainer's windows are chosen. Those come from what
is left: the strongest (`top`), any (`random`), the same number from every bin (`quantiles`), or a fifth strongest and
the rest from the bins (`mix`). What is left excludes every window that shares a token with a test window or is the same
text, so train and test are disjoint by construction. Negatives are windows of the grid in which the latent never fires:
`random` ones; ones in which a neighbour fires (`neighbours`); or those nearest in an embedding to the strongest windows
(`hard`). None is drawn twice (Paulo et al. 2410.13928).
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from sonde.errors import SondeError
from sonde.features.latent_cache import LatentCache
from sonde.features.windows import ActiveWindows, Mode, Window, active_windows, check_length, gathered, slot_windows

Sampler = Literal["top", "random", "quantiles", "mix"]
NegativeKind = Literal["random", "neighbours", "hard"]
Embed = Callable[[Sequence[str]], np.ndarray]
_TOP_SHARE = 0.2  # of `mix`


@dataclass(frozen=True)
class Sampling:
    """How windows are cut and chosen.

    length: tokens in a window. mode: "slot" or "centred". sampler: of the explainer's windows. train, test, negatives:
    how many windows. train_negatives: silent windows for the explainer, always random ones. bins: of equal count.
    negative_kind: how the test's negatives are found. per_neighbour: most negatives from one neighbour. strongest:
    windows that hard negatives are near to. min_examples: fewer active windows make a latent too rare.
    """

    length: int = 32
    mode: Mode = "centred"
    sampler: Sampler = "quantiles"
    train: int = 40
    test: int = 50
    negatives: int = 50
    train_negatives: int = 40
    bins: int = 10
    negative_kind: NegativeKind = "random"
    per_neighbour: int = 10
    strongest: int = 10
    min_examples: int = 200

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("sampler", Sampler), ("negative_kind", NegativeKind)):
            if getattr(self, name) not in get_args(choices):
                raise SondeError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(get_args(choices))}")
        for name in ("length", "train", "test", "negatives", "bins", "per_neighbour", "strongest"):
            if getattr(self, name) < 1:
                raise SondeError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.train_negatives < 0:
            raise SondeError(f"train_negatives is {self.train_negatives}: it must not be negative")
        if self.min_examples < 2:
            raise SondeError(f"min_examples is {self.min_examples}: train and test need at least 2")


@dataclass(frozen=True, eq=False, repr=False)
class LatentExamples:
    """Windows of one latent. Fewer than were asked for where the text has no more: the lists' lengths say so.

    Attributes:
        hookpoint: of the latent.
        latent: its number.
        largest: its strongest activation.
        active: number of windows in which it fires.
        train: for the explainer, strongest first.
        train_negatives: silent windows for the explainer.
        test: held-out windows in which it fires, with their quantile, strongest first.
        negatives: held-out windows in which it is silent.

    """

    hookpoint: str
    latent: int
    largest: float
    active: int
    train: list[Window]
    train_negatives: list[Window]
    test: list[Window]
    negatives: list[Window]

    def __post_init__(self) -> None:
        length = len(self.train[0].tokens) if self.train else 1
        places = np.array([(w.sequence, w.start) for w in self.train], dtype=np.int64).reshape(-1, 2)
        for window in self.test:
            near = (places[:, 0] == window.sequence) & (np.abs(places[:, 1] - window.start) < length)
            assert not near.any(), f"latent {self.latent}: a test window shares tokens with a train window"
        silent = [window.slot for window in (*self.train_negatives, *self.negatives)]
        assert len(set(silent)) == len(silent), f"latent {self.latent}: a negative was drawn twice"

    def __repr__(self) -> str:
        parts = ("train", "train_negatives", "test", "negatives")
        counts = ", ".join(f"{part}: {len(getattr(self, part))}" for part in parts)
        return f"LatentExamples({self.hookpoint!r}, {self.latent}, active in {self.active} windows, {counts})"


@dataclass(frozen=True)
class TooRare:
    """A latent that fires in too few windows to be explained and tested."""

    hookpoint: str
    latent: int
    active: int
    needed: int

    @property
    def reason(self) -> str:
        """In words."""
        return f"fires in {self.active} windows, fewer than {self.needed}"


@dataclass(frozen=True)
class TooDense:
    """A latent that fires in every window, so that nothing is a negative: its scores are withheld."""

    hookpoint: str
    latent: int
    active: int

    @property
    def reason(self) -> str:
        """In words."""
        return f"fires in all {self.active} windows, so there are no negatives"


class HardPool:
    """Windows of the grid and their embeddings, made once for a cache, from which hard negatives are taken.

    Args:
        cache: of the latents.
        embed: texts to vectors.
        decode: token ids to text.
        length: tokens in a window.
        size: windows drawn.
        seed: of the draw.

    """

    def __init__(
        self,
        cache: LatentCache,
        embed: Embed,
        decode: Callable[[Sequence[int]], str],
        *,
        length: int = 32,
        size: int = 2000,
        seed: int = 0,
    ) -> None:
        check_length(length, cache.context)
        total = cache.n_tokens // length
        self.slots = np.sort(np.random.default_rng(seed).choice(total, min(size, total), replace=False))
        self._embed = lambda rows: unit(embed([decode(row.tolist()) for row in rows]))
        self._vectors = self._embed(gathered(cache.tokens, self.slots * length, length))

    def nearest(
        self, strongest: Iterable[Window], silent: Bool[np.ndarray, " pool"], count: int
    ) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Slots of the `count` silent windows nearest to any of the strongest ones, and 1 - their cosine."""
        queries = self._embed([window.tokens for window in strongest])
        near = (self._vectors @ queries.T).max(1)
        order = np.argsort(np.where(silent, -near, np.inf), kind="stable")[: min(count, int(silent.sum()))]
        return self.slots[order], 1 - near[order]


def examples(
    cache: LatentCache,
    hookpoint: str,
    latent: int,
    *,
    config: Sampling | None = None,
    seed: int = 0,
    neighbours: Sequence[tuple[int, float]] = (),
    pool: HardPool | None = None,
) -> LatentExamples | TooRare | TooDense:
    """Train and test windows of one latent; the same for every order in which latents are asked for.

    Args:
        cache: where the latent fires.
        hookpoint: of the latent.
        latent: its number.
        config: how windows are cut and chosen.
        seed: of the draws.
        neighbours: latents and their similarity, nearest first, where negatives are of kind "neighbours".
        pool: where negatives are of kind "hard".

    Raises:
        SondeError: for a length that does not divide the context, and negatives that lack their neighbours or pool.

    """
    config = config or Sampling()
    windows = active_windows(cache, hookpoint, latent, length=config.length, mode=config.mode)
    if len(windows) < config.min_examples:
        return TooRare(hookpoint, latent, len(windows), config.min_examples)
    if len(windows) == cache.n_tokens // config.length:
        return TooDense(hookpoint, latent, len(windows))
    rng = np.random.default_rng([seed, latent, zlib.crc32(hookpoint.encode())])
    bins = np.arange(len(windows)) * config.bins // len(windows)  # 0 the strongest
    test = _by_bins(rng, bins, np.ones(len(windows), dtype=bool), config.test, config.bins)
    allowed = ~_touching(windows, test)
    train = _train(rng, bins, allowed, config)
    silent = _silent(rng, cache, windows, config.train_negatives + config.negatives)
    share = config.train_negatives / (config.train_negatives + config.negatives)
    kept = min(config.train_negatives, int(share * len(silent)))
    negatives = _negatives(rng, cache, hookpoint, windows, silent[kept:], silent[:kept], config, neighbours, pool)
    return LatentExamples(
        hookpoint=hookpoint,
        latent=latent,
        largest=windows.largest,
        active=len(windows),
        train=windows.cut(train),
        train_negatives=slot_windows(cache, silent[:kept], length=config.length, kind="random"),
        test=windows.cut(test, (config.bins - bins[test]).tolist()),
        negatives=negatives,
    )


def _by_bins(
    rng: np.random.Generator, bins: Int[np.ndarray, " n"], allowed: Bool[np.ndarray, " n"], count: int, n_bins: int
) -> Int[np.ndarray, " k"]:
    """`count` allowed windows spread evenly over the bins, in the order of strength; what a bin lacks, others give."""
    order = np.lexsort((rng.random(len(bins)), ~allowed, bins))
    first = np.searchsorted(bins[order], np.arange(n_bins))
    rank = np.arange(len(bins)) - first[bins[order]]
    quota = np.full(n_bins, count // n_bins)
    quota[rng.permutation(n_bins)[: count % n_bins]] += 1
    usable = allowed[order]
    chosen = order[usable & (rank < quota[bins[order]])]
    if len(chosen) < count:
        rest = np.setdiff1d(np.flatnonzero(allowed), chosen)
        chosen = np.concatenate([chosen, rng.permutation(rest)[: count - len(chosen)]])
    return np.sort(chosen)


def _touching(windows: ActiveWindows, test: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " n"]:
    """Windows that share a token with a test window, or are the same text."""
    starts = np.sort(windows.starts[test])
    right = np.searchsorted(starts, windows.starts)
    padded = np.concatenate([[-windows.length], starts, [np.iinfo(np.int64).max]])
    near = (windows.starts - padded[right] < windows.length) | (padded[right + 1] - windows.starts < windows.length)
    return near | np.isin(windows.texts, windows.texts[test])


def _train(
    rng: np.random.Generator, bins: Int[np.ndarray, " n"], allowed: Bool[np.ndarray, " n"], config: Sampling
) -> Int[np.ndarray, " k"]:
    left = np.flatnonzero(allowed)
    if config.sampler == "top":
        return left[: config.train]
    if config.sampler == "random":
        return np.sort(rng.permutation(left)[: config.train])
    top = left[: round(_TOP_SHARE * config.train)] if config.sampler == "mix" else left[:0]
    allowed = allowed.copy()
    allowed[top] = False
    return np.sort(np.concatenate([top, _by_bins(rng, bins, allowed, config.train - len(top), config.bins)]))


def _silent(rng: np.random.Generator, cache: LatentCache, windows: ActiveWindows, count: int) -> Int[np.ndarray, " k"]:
    """Distinct slots in which the latent never fires, in random order."""
    active = windows.active_slots
    free = cache.n_tokens // windows.length - len(active)
    rank = rng.choice(free, min(count, free), replace=False)
    # the slot of rank r has passed as many active ones as have fewer silent ones before them
    return rank + np.searchsorted(active - np.arange(len(active)), rank, side="right")


def _negatives(
    rng: np.random.Generator,
    cache: LatentCache,
    hookpoint: str,
    windows: ActiveWindows,
    random: Int[np.ndarray, " k"],
    taken: Int[np.ndarray, " j"],
    config: Sampling,
    neighbours: Sequence[tuple[int, float]],
    pool: HardPool | None,
) -> list[Window]:
    if config.negative_kind == "random":
        return slot_windows(cache, random, length=config.length, kind="random")
    if config.negative_kind == "hard":
        if pool is None:
            raise SondeError("hard negatives are near in an embedding: give a HardPool")
        free = ~np.isin(pool.slots, np.concatenate([windows.slots, taken]))
        strongest = windows.cut(np.arange(min(config.strongest, len(windows))))
        slots, distances = pool.nearest(strongest, free, config.negatives)
        return slot_windows(cache, slots, length=config.length, kind="hard", distances=distances.tolist())
    if not neighbours:
        raise SondeError("negatives of neighbours need the list of the latent's neighbours, nearest first")
    found: list[Window] = []
    used = np.concatenate([windows.slots, taken])
    for other, similarity in neighbours:
        count = min(config.per_neighbour, config.negatives - len(found))
        if count < 1:
            break
        theirs = active_windows(cache, hookpoint, other, length=config.length, mode="slot")
        slots = rng.permutation(np.setdiff1d(theirs.slots, used))[:count]
        used = np.concatenate([used, slots])
        marks = theirs.activations_at(slots * config.length)
        for window, mark in zip(
            slot_windows(cache, slots, length=config.length, kind="neighbours"), marks, strict=True
        ):
            found.append(replace(window, distance=1 - similarity, neighbour=other, marks=mark))
    return found


def unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows at length 1; rows of zeros stay."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
