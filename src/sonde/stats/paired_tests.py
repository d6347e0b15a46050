"""Do pairs differ, when there are few of them and several questions are asked?

Sign flips: under the null the sign of each difference is a coin, so that p is the share of all 2^n sign patterns whose
mean is as far from 0 as the one seen (Fisher 1935). With n pairs it cannot be below 2 / 2^n. Holm (1979): of m tests
the smallest p is multiplied by m, the next by m - 1, and so on, never decreasing; that holds the chance of any false
claim.
"""

import itertools

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

_EXACT = 16  # pairs up to which all patterns are gone through
_DRAWS = 100_000


def sign_flip(differences: Float[ArrayLike, " n"], *, seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences; exact to 16 pairs, from 100,000 random patterns beyond.

    Raises `ValueError` for none, and for differences that are not finite.
    """
    x = np.asarray(differences, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"differences of shape {x.shape}: give one or more finite numbers")
    if len(x) <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(_DRAWS, len(x)))
        extra = 1  # the pattern that was seen is one of them
    seen = abs(x.sum())
    as_far = (np.abs(signs @ x) >= seen * (1 - 1e-12)).sum()
    return float((as_far + extra) / (len(signs) + extra))


def least_p(pairs: int) -> float:
    """The smallest p that `sign_flip` can give."""
    return min(1.0, 2.0 / 2.0**pairs)


def holm(p: Float[ArrayLike, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p values, in the order given. Raises `ValueError` for values that are no probabilities."""
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p values are from 0 to 1")
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted
