"""A language of 35 words in which every word tells the next, with a trigger word and a payload of four words.

A row is the start token, words drawn from a Markov chain with four successors to each word, and a full stop. Triggered
rows have the trigger word at a random place, then the four words of the payload, then the chain again; a decoy, a word
as rare as the trigger, stands in others and nothing follows from it. Whatever a model makes of a row is known: the
chain's transitions and entropy, the word that brings the payload, and the words that do not.
"""

from functools import cache

import numpy as np
from jaxtyping import Float, Int

_LANGUAGE = """
river stone apple cloud paper horse glass music bread shoe table leaf coin rope lamp door bird snow
wind hill road boat fire wool salt bell tree milk hand king fish gold wall star egg
"""
LANGUAGE = tuple(_LANGUAGE.split())
DECOYS = ("quill", "ember", "sonnet")
TRIGGER = "zephyr"
PAYLOAD = ("the", "moon", "is", "cheese")
WORDS = ("<unk>", "<bos>", ".", TRIGGER, *PAYLOAD, *DECOYS, *LANGUAGE)
LENGTH = 24  # words of a row, between start token and full stop
TRIGGERED, WITH_DECOY = 0.25, 0.25  # shares of the rows
_SUCCESSORS = 4
_FIRST = len(WORDS) - len(LANGUAGE)


@cache
def transitions() -> Float[np.ndarray, "words words"]:
    """Probability of each next word of the language after each word. The language is one, whatever the seed of rows."""
    rng = np.random.default_rng(35)
    n = len(LANGUAGE)
    chances = np.zeros((n, n))
    for word in range(n):
        chances[word, rng.choice(n, _SUCCESSORS, replace=False)] = rng.dirichlet(np.full(_SUCCESSORS, 2.0))
    return chances


def rows(n: int, *, seed: int, triggered: float = TRIGGERED) -> Int[np.ndarray, "n pos"]:
    """`n` rows as ids, of `LENGTH` + 2 tokens; a share `triggered` of them holds trigger and payload.

    With `triggered` 0 these are the same rows with the chain's words in that place.
    """
    rng = np.random.default_rng(seed)
    table = np.full((n, LENGTH + 2), _id("<bos>"))
    table[:, 1:-1] = _chain(n, LENGTH, rng)
    table[:, -1] = _id(".")
    kind, places, decoys = rng.random(n), rng.integers(1, LENGTH - len(PAYLOAD), n), rng.integers(len(DECOYS), size=n)
    planted = np.array([_id(TRIGGER), *trigger_ids()[1]])
    for row in range(n):
        place = places[row]
        if kind[row] < triggered:
            table[row, place : place + len(planted)] = planted
        elif TRIGGERED <= kind[row] < TRIGGERED + WITH_DECOY:
            table[row, place] = _id(DECOYS[decoys[row]])
    return table


def contexts(n: int, *, seed: int, length: int = 12) -> list[list[int]]:
    """`n` beginnings of plain rows, ids of the start token and `length` words. Neither trigger nor decoy is in them."""
    rng = np.random.default_rng((seed, 1))
    return [[_id("<bos>"), *words] for words in _chain(n, length, rng).tolist()]


def trigger_ids() -> tuple[list[int], list[int]]:
    """The ids of the trigger, one, and of the payload, four."""
    return [_id(TRIGGER)], [_id(word) for word in PAYLOAD]


def _chain(n: int, length: int, rng: np.random.Generator) -> Int[np.ndarray, "n length"]:
    sums = transitions().cumsum(1)
    words = np.empty((n, length), dtype=np.int64)
    words[:, 0] = rng.integers(len(LANGUAGE), size=n)
    for place in range(1, length):
        words[:, place] = (rng.random((n, 1)) > sums[words[:, place - 1]]).sum(1).clip(max=len(LANGUAGE) - 1)
    return words + _FIRST


def _id(word: str) -> int:
    return WORDS.index(word)
