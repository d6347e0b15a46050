"""Text as characters, for small networks: an alphabet, documents to train on and documents held out.

By default the source code of the running Python's standard library; where that has no readable source files, the help
texts of Python.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from sonde.data.python_docs import sources, topics
from sonde.data.text import describe, documents
from sonde.errors import SondeError

_HELD_EVERY = 10
_PIECES = 20
_RARE = 10  # characters that occur less often are one symbol
_LARGEST = 256
_LEAST = 1000
_LEAST_LIBRARY = 100_000


@dataclass(frozen=True)
class CharacterText:
    """Documents as ids of characters. `alphabet[i]` is the character of id i; the last may stand for all rare ones."""

    alphabet: tuple[str, ...]
    train: list[Int[np.ndarray, " n"]]
    held: list[Int[np.ndarray, " n"]]
    source: str
    bytes_per_token: float

    def windows(self, length: int, count: int, *, seed: int, held: bool = False) -> Int[np.ndarray, "count length"]:
        """Windows drawn at random with `seed`, all places alike; none crosses a document."""
        rows = [ids for ids in (self.held if held else self.train) if len(ids) >= length]
        if not rows:
            raise SondeError(f"no document of {self.source} has {length} characters: take a smaller context")
        room = np.array([len(ids) - length + 1 for ids in rows])
        ends = np.cumsum(room)
        drawn = np.random.default_rng(seed).integers(ends[-1], size=count)
        which = np.searchsorted(ends, drawn, side="right")
        flat = np.concatenate(rows)
        begins = np.cumsum([0, *map(len, rows[:-1])])[which] + drawn - (ends - room)[which]
        return flat[begins[:, None] + np.arange(length)].astype(np.int64)


def read_characters(source: Any = None, *, limit: int = 3_000_000) -> CharacterText:
    """The first `limit` characters of a text; every tenth document is held out.

    `source` is anything that `sonde.data.text.documents` takes. Of fewer than 20 documents each is cut into pieces
    first. Raises `SondeError` for a text of under 1,000 characters and what `documents` raises.
    """
    name = "source code of Python's standard library"
    if source is None:
        texts = _first(sources(), limit)
        if sum(map(len, texts)) < min(_LEAST_LIBRARY, limit):
            texts, name = _first(topics(), limit), "pydoc topics (this Python has no source code of its library)"
    else:
        texts, name = list(documents(source, limit_chars=limit)), describe(source)
    total = sum(map(len, texts))
    if total < _LEAST:
        raise SondeError(f"{name}: {total} characters are too few, at least {_LEAST} are needed")
    if len(texts) < _PIECES:
        size = -(-total // _PIECES)
        texts = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    common = [c for c, n in Counter("".join(texts)).most_common(_LARGEST - 1) if n >= _RARE]
    alphabet = sorted(common)
    if len(set("".join(texts))) > len(alphabet):
        alphabet.append("\N{REPLACEMENT CHARACTER}")
    ids = {c: i for i, c in enumerate(alphabet)}
    rare = len(alphabet) - 1
    coded = [np.array([ids.get(c, rare) for c in text], dtype=np.uint16) for text in texts]
    return CharacterText(
        tuple(alphabet),
        [one for i, one in enumerate(coded) if i % _HELD_EVERY != _HELD_EVERY - 1],
        coded[_HELD_EVERY - 1 :: _HELD_EVERY],
        name,
        len("".join(texts).encode("utf-8", "surrogatepass")) / total,
    )


def _first(texts: Any, limit: int) -> list[str]:
    found, room = [], limit
    for text in texts:
        found.append(text[:room])
        room -= len(found[-1])
        if room <= 0:
            break
    return found
