"""Does a dictionary find directions that are known? Data from a planted dictionary, and what is recovered of it.

Row: x = Σ_i b_i a_i v_i + μ with unit directions v_i, b_i ~ Bernoulli(p_i), p_i ∝ exp(-decay i / n) scaled to a mean
L0, a_i ~ U[low, high]. For each true direction, the best cosine with a decoder row says whether it was found (Sharkey
et al. 2022, "Taking features out of superposition").
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.features.dictionary import Dictionary
from sonde.stats.intervals import Interval, bootstrap_mean, wilson


@dataclass(frozen=True)
class PlantedDictionary:
    """Directions, how often each is active, and how strongly.

    Attributes:
        directions: v, Float[Tensor, "n d"], of length 1.
        rates: p, Float[Tensor, "n"].
        low, high: bounds of the amplitudes.
        offset: μ, Float[Tensor, "d"].

    """

    directions: Float[Tensor, "n d"]
    rates: Float[Tensor, " n"]
    low: float
    high: float
    offset: Float[Tensor, " d"]

    @staticmethod
    def random(
        d: int,
        n: int,
        *,
        l0: float,
        decay: float = 3.0,
        low: float = 0.5,
        high: float = 1.5,
        offset: bool = False,
        seed: int = 0,
    ) -> "PlantedDictionary":
        """Random directions; with `offset`, μ ~ N(0, I).

        Raises `ValueError` when a rate would be above 1, which is when `l0` is too large for `n` and `decay`.
        """
        generator = _generator(seed, 1)
        directions = torch.randn(n, d, generator=generator)
        rates = torch.exp(-decay * torch.arange(n) / n)
        rates *= l0 / rates.sum()
        if rates.max() > 1:
            raise ValueError(f"l0 is {l0}: with {n} directions and decay {decay} one would be active in every row")
        drawn = torch.randn(d, generator=generator)
        return PlantedDictionary(
            directions / directions.norm(dim=1, keepdim=True), rates, low, high, drawn if offset else torch.zeros(d)
        )

    def sample(self, rows: int, *, seed: int) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows n"]]:
        """Rows and the amplitudes that made them, 0 where a direction is not active."""
        generator = _generator(seed, 2)
        active = torch.rand(rows, len(self.rates), generator=generator) < self.rates
        sizes = self.low + (self.high - self.low) * torch.rand(rows, len(self.rates), generator=generator)
        amplitudes = active * sizes
        return amplitudes @ self.directions + self.offset, amplitudes


@dataclass(frozen=True)
class Recovery:
    """How well known directions were found.

    Attributes:
        cosines: Float[Tensor, "n"], of each true direction with the best decoder row.
        latents: Int[Tensor, "n"], which row that is.
        mean: of the cosines, with a bootstrap interval over directions.
        found: share of directions with a cosine above the bound, with its interval.
        bound: that bound.
        chance: the mean of the best cosines with as many random directions: the control.

    """

    cosines: Float[Tensor, " n"]
    latents: Int[Tensor, " n"]
    mean: Interval
    found: Interval
    bound: float
    chance: float


@torch.no_grad()
def recovery(
    dictionary: Dictionary | Float[Tensor, "latents d"],
    directions: Float[Tensor, "n d"],
    *,
    bound: float = 0.9,
    seed: int = 0,
) -> Recovery:
    """Compare decoder rows with known directions. Rows of zeros count as cosine 0."""
    rows = dictionary.w_dec if isinstance(dictionary, Dictionary) else dictionary
    wanted = directions / directions.norm(dim=1, keepdim=True)

    def best(candidates: Tensor) -> tuple[Tensor, Tensor]:
        units = candidates / candidates.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return tuple((wanted.to(units) @ units.T).max(1))  # type: ignore[return-value]

    cosines, latents = best(rows)
    random = torch.randn(rows.shape, generator=_generator(seed, 3))
    return Recovery(
        cosines,
        latents,
        bootstrap_mean(cosines.double().cpu().numpy(), seed=seed),
        wilson(int((cosines > bound).sum()), len(cosines)),
        bound,
        float(best(random)[0].mean()),
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    """A stream of its own: a dictionary that is initialised from the same seed must not start at what is planted."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, stream)).generate_state(1)[0]))
