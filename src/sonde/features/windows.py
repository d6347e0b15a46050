"""Pieces of text in which a latent fires: one window for every slot of the text's grid that holds an activation.

In *slot* mode a window is its slot. In *centred* mode it is cut again so that the slot's strongest activation stands at
three quarters of it (at the edge of a context as near to that as the context allows), and the tokens that come in from
neighbouring slots bring their true activations along. Windows are in the order of their slot's strongest activation.
Normalised activations are ceil(10 a / a_max) from 0 to 10, with a_max over all windows of the latent (Paulo et al.
2410.13928).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from sonde.errors import SondeError
from sonde.features.latent_cache import Activations, LatentCache
from sonde.features.marking import SHARE as MARKED
from sonde.features.marking import strengths

Mode = Literal["slot", "centred"]
Kind = Literal["active", "random", "neighbours", "hard"]


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of text and what the latent does in it.

    Attributes:
        tokens: Int[np.ndarray, "length"].
        activations: Float[np.ndarray, "length"] of the latent; all 0 where the window is a negative.
        max: the largest of them.
        slot: number of the window's slot in the grid over all sequences.
        sequence: where it is: row of the cache's tokens,
        start: and its first token in that row.
        kind: "active", or how a negative was found.
        quantile: of an active window, 1 (weakest tenth) to 10 (strongest), None where that does not matter.
        distance: of a negative, how far it was taken from the latent: 1 - similarity of the neighbour that fires in it,
            or 1 - cosine of its embedding with the nearest of the strongest windows; None for random ones.
        neighbour: the latent that fires in a negative of kind "neighbours".
        marks: Float[np.ndarray, "length"]: that latent's activations.

    """

    tokens: Int[np.ndarray, " length"]
    activations: Float[np.ndarray, " length"]
    max: float
    slot: int
    sequence: int
    start: int
    kind: Kind = "active"
    quantile: int | None = None
    distance: float | None = None
    neighbour: int | None = None
    marks: Float[np.ndarray, " length"] | None = None

    @property
    def positive(self) -> bool:
        """Whether the latent fires in it."""
        return self.kind == "active"

    @property
    def marked(self) -> Bool[np.ndarray, " length"]:
        """The tokens at which the latent fires with more than .3 of the window's maximum."""
        return self.activations > MARKED * self.max

    def normalised(self, largest: float) -> Int[np.ndarray, " length"]:
        """Activations from 0 to 10, where `largest` is that of all windows of the latent."""
        return np.array(strengths(self.activations.tolist(), largest))


class ActiveWindows:
    """All windows in which one latent fires, strongest first. Made by `active_windows`.

    Attributes:
        slots: Int[np.ndarray, "n"], the slot of each window.
        maxima: Float[np.ndarray, "n"], the strongest activation of each slot.
        starts: Int[np.ndarray, "n"], the first token of each window, counted over all sequences.
        length: tokens in a window.

    """

    def __init__(
        self, tokens: Int[np.ndarray, "sequences context"], activations: Activations, *, length: int, mode: Mode
    ) -> None:
        context = tokens.shape[1]
        check_length(length, context)
        self._tokens, self._context = tokens, context
        self._places = activations.sequence * context + activations.position
        self._values = activations.value
        self.length = length
        slot = self._places // length
        begins = np.flatnonzero(np.diff(slot, prepend=-1))
        maxima = np.maximum.reduceat(self._values, begins) if len(begins) else self._values
        order = np.argsort(-maxima, kind="stable")
        self.slots: Int[np.ndarray, " n"] = slot[begins][order]
        self.maxima: Float[np.ndarray, " n"] = maxima[order]
        self.starts: Int[np.ndarray, " n"] = self.slots * length
        if mode == "centred" and len(begins):
            sizes = np.diff(begins, append=len(slot))
            group = np.repeat(np.arange(len(begins)), sizes)
            at_peak = np.flatnonzero(self._values == maxima[group])
            peak = self._places[at_peak[np.flatnonzero(np.diff(group[at_peak], prepend=-1))]][order]
            within = np.clip(peak % context - 3 * length // 4, 0, context - length)
            self.starts = peak - peak % context + within

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def largest(self) -> float:
        """The latent's strongest activation."""
        return float(self.maxima[0]) if len(self) else 0.0

    @cached_property
    def active_slots(self) -> Int[np.ndarray, " n"]:
        """The slots in which the latent fires, in the order of the text."""
        return np.sort(self.slots)

    @cached_property
    def texts(self) -> Int[np.ndarray, " n"]:
        """A number for the tokens of each window: the same tokens have the same number."""
        return text_numbers(gathered(self._tokens, self.starts, self.length))

    def activations_at(self, starts: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k length"]:
        """The latent's activations in windows that begin at these tokens."""
        first = np.searchsorted(self._places, starts)
        sizes = np.searchsorted(self._places, starts + self.length) - first
        row = np.repeat(np.arange(len(starts)), sizes)
        entry = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
        out = np.zeros((len(starts), self.length), dtype=np.float32)
        out[row, self._places[entry] - starts[row]] = self._values[entry]
        return out

    def cut(self, chosen: Int[np.ndarray, " k"], quantiles: Sequence[int | None] | None = None) -> list[Window]:
        """The windows with these numbers (0 the strongest)."""
        starts = self.starts[chosen]
        activations = self.activations_at(starts)
        tokens = gathered(self._tokens, starts, self.length)
        sequence, start = np.divmod(starts, self._context)
        columns = (tokens, activations, activations.max(1).tolist(), self.slots[chosen].tolist())
        places = (sequence.tolist(), start.tolist(), quantiles or [None] * len(starts))
        return [
            Window(row, value, largest, slot, where, first, "active", quantile)
            for row, value, largest, slot, where, first, quantile in zip(*columns, *places, strict=True)
        ]


def active_windows(
    cache: LatentCache, hookpoint: str, latent: int, *, length: int = 32, mode: Mode = "centred"
) -> ActiveWindows:
    """The windows of one latent. Raises `SondeError` where the length does not divide the cache's context."""
    check_length(length, cache.context)
    return ActiveWindows(cache.tokens, cache.latent(hookpoint, latent), length=length, mode=mode)


def slot_windows(
    cache: LatentCache,
    slots: Int[np.ndarray, " k"],
    *,
    length: int,
    kind: Kind,
    distances: Sequence[float] | None = None,
) -> list[Window]:
    """Windows of the grid in which the latent does not fire."""
    tokens = gathered(cache.tokens, slots * length, length)
    silent = np.zeros(length, dtype=np.float32)
    per = cache.context // length
    return [
        Window(row, silent, 0.0, slot, slot // per, slot % per * length, kind, distance=distance)
        for row, slot, distance in zip(tokens, slots.tolist(), distances or [None] * len(slots), strict=True)
    ]


def check_length(length: int, context: int) -> None:
    """Raise `SondeError` where windows of this length do not fill a context."""
    if length < 1 or context % length:
        raise SondeError(
            f"windows of {length} tokens do not divide a context of {context}: give a divisor of {context}"
        )


def gathered(
    tokens: Int[np.ndarray, "sequences context"], starts: Int[np.ndarray, " k"], length: int
) -> Int[np.ndarray, "k length"]:
    """The tokens of windows, which never go over the end of a context."""
    return tokens.reshape(-1)[starts[:, None] + np.arange(length)]


def text_numbers(tokens: Int[np.ndarray, "k length"]) -> Int[np.ndarray, " k"]:
    """A random linear map of the tokens modulo 2^64: equal rows are equal, others differ all but surely."""
    weights = np.random.default_rng(0).integers(1, 1 << 63, tokens.shape[1], dtype=np.uint64)
    return tokens.astype(np.uint64) @ weights
