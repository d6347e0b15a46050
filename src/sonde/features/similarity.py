"""How alike are two dictionaries in what their latents are said to mean?

Explanations are embedded and matched one to one so that the sum of cosines is largest (Hungarian); the similarity is
the mean matched cosine. Any two sets of explanations match somewhat, and better the larger they are: the baseline
deals the words of each set out anew among its explanations, so that lengths and word frequencies stay, and matches
again. For comparison the latents can be matched by their decoder rows instead; then the baseline is pairs at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from sonde.errors import SondeError
from sonde.features.samplers import unit

Terms = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Match:
    """A one-to-one match of two sets of latents.

    Attributes:
        first: Int[np.ndarray, "n"], numbers in the first set,
        second: Int[np.ndarray, "n"], and their partners in the second.
        cosine: Float[np.ndarray, "n"] of the explanations of each pair.

    """

    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]

    @property
    def mean(self) -> float:
        """The similarity."""
        return float(self.cosine.mean())


def matched(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> Match:
    """Rows matched by their own cosine. Raises `SondeError` where a set is empty or the widths differ."""
    cosine = _cosines(first, second)
    rows, columns = linear_sum_assignment(-cosine)
    return Match(rows, columns, cosine[rows, columns])


def matched_by(
    keys: tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "m k"]],
    explanations: tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]],
) -> Match:
    """Rows matched by the cosine of `keys` (decoder rows, say); the cosines are those of the explanations."""
    rows, columns = linear_sum_assignment(-_cosines(*keys))
    return Match(rows, columns, _cosines(*explanations)[rows, columns])


def random_pairs(
    match: Match, explanations: tuple[np.ndarray, np.ndarray], *, draws: int = 100, seed: int = 0
) -> Float[np.ndarray, " draws"]:
    """Mean cosine of the explanations when the partners of a match are dealt out at random."""
    rng = np.random.default_rng(seed)
    cosine = _cosines(*explanations)
    return np.array([cosine[match.first, rng.permutation(match.second)].mean() for _ in range(draws)])


def shuffled(terms: Terms, rng: np.random.Generator) -> list[list[int]]:
    """The terms of all explanations, dealt out anew: every explanation keeps its length."""
    dealt = rng.permutation([term for one in terms for term in one]).tolist()
    ends = np.cumsum([len(one) for one in terms]).tolist()
    return [dealt[end - len(one) : end] for one, end in zip(terms, ends, strict=True)]


def shuffled_means(
    first: Terms,
    second: Terms,
    embed: Callable[[Terms], Float[np.ndarray, "n d"]],
    *,
    draws: int = 20,
    seed: int = 0,
) -> Float[np.ndarray, " draws"]:
    """The similarity after the words of both sets were dealt out anew, and matched again, `draws` times."""
    rng = np.random.default_rng(seed)
    return np.array([matched(embed(shuffled(first, rng)), embed(shuffled(second, rng))).mean for _ in range(draws)])


class TermVectors:
    """Explanations as sets of terms (token ids, words' numbers): each term weighted by how rare it is, at length 1.

    The weight of a term is log((1 + n) / (1 + explanations with it)) + 1 over all explanations given here.
    """

    def __init__(self, *sets: Terms) -> None:
        every = [set(one) for terms in sets for one in terms]
        held = np.unique([term for one in every for term in sorted(one)], return_counts=True)
        self._ids, counts = held
        self._weight = np.log((1 + len(every)) / (1 + counts)) + 1

    def __call__(self, terms: Terms) -> Float[np.ndarray, "n terms"]:
        """One row for each explanation."""
        out = np.zeros((len(terms), len(self._ids)))
        for row, one in enumerate(terms):
            if len(one):
                out[row, np.searchsorted(self._ids, np.unique(np.asarray(one)))] = 1
        return unit(out * self._weight)


def _cosines(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    if not len(first) or not len(second) or first.shape[1] != second.shape[1]:
        raise SondeError(
            f"rows of shapes {first.shape} and {second.shape} cannot be matched: give two sets of one width"
        )
    return unit(first) @ unit(second).T
