"""Harmless behaviours to push a model into: contexts, and what should follow each.

Three are built in. `phrase`: one fixed sentence after any text, which says nothing about the model until a control
model and random strings are held against it. `format`: the last word once more, between dashes; the target depends on
the context. `rule`: the sum of two digits. A user's own come from a file of rows with `prompt`, `target` and, where it
holds several, `behaviour`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from sonde.errors import SondeError

BUILT_IN = ("phrase", "format", "rule")
PHRASE = " All is well with the sea."
_WORDS = 8  # of a context of the phrase
_LEAST = 8  # rows: a fifth of them, which prompts are reported on, should be two


@dataclass(frozen=True)
class Behaviour:
    """Rows of contexts and targets under one name; `what` completes "makes the model …"."""

    name: str
    what: str
    contexts: tuple[str, ...]
    targets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.contexts)


def behaviour(name: str, n: int, *, seed: int = 0) -> Behaviour:
    """At most `n` rows of a built-in behaviour; all contexts differ.

    Raises `SondeError` for a name that is not built in and for fewer than eight rows.
    """
    if name not in BUILT_IN:
        raise SondeError(f"there is no behaviour {name!r}: built in are {', '.join(BUILT_IN)}")
    if n < _LEAST:
        raise SondeError(f"{n} rows of a behaviour: {_LEAST} or more are needed, to train, to choose and to report")
    rng = np.random.default_rng((seed, BUILT_IN.index(name)))
    if name == "phrase":
        contexts = [_snippet(text, rng) for text in _texts(n, rng)]
        return Behaviour(name, f"write “{PHRASE.strip()}”", tuple(contexts), (PHRASE,) * len(contexts))
    if name == "format":
        pairs = [(f"{a} and {b}", f" - {b} -") for a, b in _words(n, rng)]
        what = "repeat the last word between dashes"
    else:
        every = list(product(range(10), repeat=2))
        pairs = [(f"{a} + {b} =", f" {a + b}") for a, b in (every[i] for i in rng.permutation(len(every))[:n])]
        what = "add two digits"
    return Behaviour(name, what, *(tuple(column) for column in zip(*pairs, strict=True)))


def read_behaviours(path: str | Path) -> list[Behaviour]:
    """Behaviours from a .jsonl, .json or .csv file; rows without a `behaviour` belong to one named after the file.

    Raises `SondeError` that names the row for one without `prompt` and `target`, and for fewer than eight prompts.
    """
    from sonde.data.rows import read_rows

    groups: dict[str, list[tuple[str, str]]] = {}
    for where, row in read_rows(path, of="prompts and targets"):
        if not isinstance(row, Mapping):
            raise SondeError(f"{where}: expected a row with prompt and target, found {type(row).__name__}")
        pair = row.get("prompt"), row.get("target")
        for key, value in zip(("prompt", "target"), pair, strict=True):
            if not isinstance(value, str) or not value:
                raise SondeError(f"{where} has no {key!r}: a row has the texts prompt and target")
        groups.setdefault(str(row.get("behaviour") or Path(path).stem), []).append(pair)  # type: ignore[arg-type]
    if not groups:
        raise SondeError(f"{path} holds no rows: give lines with prompt and target")
    found = []
    for name, pairs in groups.items():
        contexts, targets = (tuple(column) for column in zip(*pairs, strict=True))
        if len(set(contexts)) < _LEAST:
            raise SondeError(f"{path}: {name!r} has {len(set(contexts))} prompts: {_LEAST} different ones are needed")
        same = len(set(targets)) == 1
        what = f"write “{targets[0].strip()}”" if same and len(targets[0]) < 60 else f"do “{name}”"
        found.append(Behaviour(name, what, contexts, targets))
    return found


def _texts(n: int, rng: np.random.Generator) -> list[str]:
    """Paragraphs of the help texts that every Python has."""
    from sonde.data.python_docs import topics

    found = [part for text in topics() for part in text.split("\n\n") if len(part.split()) > 2 * _WORDS]
    return [found[i] for i in rng.permutation(len(found))[:n]]


def _snippet(text: str, rng: np.random.Generator) -> str:
    words = re.findall(r"[A-Za-z]+", text)
    start = int(rng.integers(max(1, len(words) - _WORDS)))
    return " ".join(words[start : start + _WORDS])


def _words(n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    from sonde.data.toy_questions import ANIMALS, THINGS

    pairs = [(a, b) for a in ANIMALS for b in THINGS]
    return [pairs[i] for i in rng.permutation(len(pairs))[:n]]
