"""Which rows are worth an oracle label? By uncertainty, by margin, by density and diversity, and by gain per price.

    entropy   H(p) of the prediction                          margin   1 - (largest p - second largest)
    density   H(p) times the mean similarity to other candidates (information density, Settles & Craven 2008)
    diverse   greedy: the most uncertain row that is far from those chosen already (k-centre weighted by entropy)

Temperature 0 takes the top n and shuffles them; above it rows are drawn without replacement with weight score^(1/t), by
Gumbel's trick. `best_offers` compares sources: the gain in expected accuracy of a label over its price.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError

_NEIGHBOURS = 512  # candidates that stand for all in the density


class Choice(Protocol):
    """What makes a row worth asking. `scores` are log-odds `[n 1]` or logits `[n C]` of the candidates."""

    @property
    def name(self) -> str:
        """What a user types."""
        ...

    def choose(
        self,
        scores: Float[Tensor, "n K"],
        count: int,
        *,
        features: Float[Tensor, "n d"] | None,
        temperature: float,
        seed: int,
    ) -> Int[np.ndarray, " count"]:
        """Places of the chosen candidates, in random order. Raises `SondeError` for more than there are."""
        ...


class _ByWorth(ABC):
    """Each row has a worth of its own, by which rows are drawn."""

    def choose(
        self,
        scores: Float[Tensor, "n K"],
        count: int,
        *,
        features: Float[Tensor, "n d"] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Int[np.ndarray, " count"]:
        """See `Choice`."""
        return draw(self._worth(scores, features, seed), count, temperature=temperature, seed=seed)

    @abstractmethod
    def _worth(self, scores: Tensor, features: Tensor | None, seed: int) -> Float[Tensor, " n"]: ...


@dataclass(frozen=True)
class Entropy(_ByWorth):
    """The entropy of the prediction."""

    name: str = "entropy"

    def _worth(self, scores: Tensor, features: Tensor | None, seed: int) -> Float[Tensor, " n"]:
        return entropy(scores)


@dataclass(frozen=True)
class Margin(_ByWorth):
    """How close the second most likely class comes to the most likely one."""

    name: str = "margin"

    def _worth(self, scores: Tensor, features: Tensor | None, seed: int) -> Float[Tensor, " n"]:
        return margin(scores)


@dataclass(frozen=True)
class Density(_ByWorth):
    """Entropy times how much a row is like other candidates, so that outliers are not asked about. Needs features."""

    name: str = "density"

    def _worth(self, scores: Tensor, features: Tensor | None, seed: int) -> Float[Tensor, " n"]:
        x = _required(features, self.name)
        unit = torch.nn.functional.normalize(x, dim=1)
        sample = np.random.default_rng(seed).permutation(len(x))[:_NEIGHBOURS]
        likeness = (1 + unit @ unit[torch.from_numpy(sample)].mean(0)) / 2
        return entropy(scores) * likeness.double()


@dataclass(frozen=True)
class Diverse:
    """Greedy: at every step the row with the largest entropy times distance to the nearest chosen row."""

    name: str = "diverse"

    def choose(
        self,
        scores: Float[Tensor, "n K"],
        count: int,
        *,
        features: Float[Tensor, "n d"] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Int[np.ndarray, " count"]:
        """See `Choice`. Raises `SondeError` without features and for a temperature above 0, which it has no use for."""
        x = _required(features, self.name)
        if temperature:
            raise SondeError(f"choice {self.name!r} is greedy: temperature {temperature} has no meaning for it")
        _check_count(count, len(x))
        weight = entropy(scores).to(x)
        nearest = torch.full((len(x),), torch.inf, dtype=x.dtype)
        square = x.square().sum(1)
        chosen = [int(weight.argmax())]
        while len(chosen) < count:
            last = chosen[-1]
            nearest = torch.minimum(nearest, (square + square[last] - 2 * (x @ x[last])).clamp(min=0))
            value = weight * nearest.sqrt()
            value[chosen] = -1
            chosen.append(int(value.argmax()))
        return np.random.default_rng(seed).permutation(np.array(chosen[:count], dtype=np.int64))


CHOICES: Mapping[str, Choice] = {choice.name: choice for choice in (Entropy(), Margin(), Density(), Diverse())}


def entropy(scores: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """Nats of uncertainty of each prediction."""
    if scores.shape[1] == 1:
        one = scores.double()[:, 0].sigmoid()
        return torch.special.entr(one) + torch.special.entr(1 - one)
    p = probabilities(scores)
    return torch.special.entr(p).sum(1)


def margin(scores: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """1 less the lead of the most likely class over the second, between 0 and 1."""
    top = probabilities(scores).topk(2, 1).values
    return 1 - (top[:, 0] - top[:, 1])


def probabilities(scores: Float[Tensor, "n K"]) -> Float[Tensor, "n C"]:
    """Class probabilities in float64 from log-odds `[n 1]` or logits `[n C]`."""
    scores = scores.double()
    if scores.shape[1] == 1:
        scores = torch.cat([torch.zeros_like(scores), scores], 1)
    return scores.softmax(1)


def draw(
    scores: Float[Tensor, " n"], count: int, *, temperature: float = 0.0, seed: int = 0
) -> Int[np.ndarray, " count"]:
    """`count` places by score: the top ones at temperature 0, else without replacement with weight score^(1/t).

    Ties go to the earlier place. Raises `SondeError` for a negative temperature and for more than there are.
    """
    _check_count(count, len(scores))
    if temperature < 0:
        raise SondeError(f"temperature {temperature}: expected 0 (the most uncertain rows) or more")
    rng = np.random.default_rng(seed)
    value = scores.double().numpy()
    if temperature == 0:
        return rng.permutation(_top(value, count))
    with np.errstate(divide="ignore"):
        keys = np.log(value) / temperature + rng.gumbel(size=len(value))
    return keys.argsort()[::-1][:count]


def best_offers(
    scores: Float[Tensor, "n K"], accuracies: Mapping[str, float], prices: Mapping[str, Fraction]
) -> tuple[np.ndarray, Float[Tensor, " n"]]:
    """For every candidate the source whose label is worth most for its price, and that gain per unit of price.

    A label of a source that is right with probability a moves a prediction p to its posterior; the gain is the expected
    rise of the probability of the likeliest class, E[max posterior] - max p, as if one row were all that it taught. A
    source that is no better than the prediction is worth nothing. Two classes.

    Raises `SondeError` for another number of classes, for an accuracy outside [0, 1] and for a price of 0.
    """
    p = probabilities(scores)
    if p.shape[1] != 2:
        raise SondeError(f"gain per price is for two classes, not {p.shape[1]}")
    names = list(accuracies)
    gains = []
    for name in names:
        right = accuracies[name]
        if not 0 <= right <= 1:
            raise SondeError(f"the accuracy of {name!r} is {right}: expected a share between 0 and 1")
        if not prices[name]:
            raise SondeError(f"labels of {name!r} are free: buy them all, gain per price has no meaning")
        said_one = torch.maximum(p[:, 1] * right, p[:, 0] * (1 - right))
        said_zero = torch.maximum(p[:, 1] * (1 - right), p[:, 0] * right)
        gains.append((said_one + said_zero - p.amax(1)).clamp(min=0) / float(prices[name]))
    table = torch.stack(gains, 1)
    best = table.argmax(1)
    return np.array(names)[best.numpy()], table.gather(1, best[:, None])[:, 0]


def _required(features: Float[Tensor, "n d"] | None, name: str) -> Float[Tensor, "n d"]:
    if features is None:
        raise SondeError(f"choice {name!r} compares rows by their features, and there are none")
    return features


def _top(value: Float[np.ndarray, " n"], count: int) -> Int[np.ndarray, " count"]:
    """Places of the largest values, by partition; of those that tie at the border the earliest."""
    if not count:
        return np.empty(0, dtype=np.int64)
    border = np.partition(value, len(value) - count)[len(value) - count]
    above = np.flatnonzero(value > border)
    return np.concatenate([above, np.flatnonzero(value == border)[: count - len(above)]])


def _check_count(count: int, there: int) -> None:
    if count > there:
        raise SondeError(f"{count} rows are to be chosen from {there} candidates")
