"""Two classes that differ in their means a little, in their covariances more, and in their third moments decisively.

With s = ±1 the class, a row has `cues` of each order:

    order 1   m s + noise                                  one coordinate a cue
    order 2   (a, r s a + (1 - r²)^½ b), a and b normal    two: a correlation of r or -r
    order 3   (e, f, s e f) of random signs, plus noise    three: any two of them say nothing

Rows of one order alone have the cues of that order for their class; those of each other order are for a class that is
drawn at random, so that its moments are the same in both classes.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError

_BLUR = 0.3  # sd of the noise on signs


@dataclass(frozen=True)
class ThreeOrders:
    """Number of cues of each order, shift m of the mean (in standard deviations) and correlation r."""

    cues: int = 4
    shift: float = 0.3
    correlation: float = 0.6

    def __post_init__(self) -> None:
        if self.cues < 1 or not 0 <= self.correlation <= 1 or self.shift < 0:
            raise SondeError(f"{self}: cues take 1 or more, the correlation 0 to 1, the shift 0 or more")

    @property
    def width(self) -> int:
        """Coordinates of a row: 6 a cue."""
        return 6 * self.cues

    def draw(
        self, n: int, seed: int, *, orders: Collection[int] = (1, 2, 3)
    ) -> tuple[Float[Tensor, "n width"], Int[Tensor, " n"]]:
        """Rows and classes 0 and 1, with the cues of `orders` for the class. Raises `SondeError` for other orders."""
        if not set(orders) <= {1, 2, 3}:
            raise SondeError(f"orders {sorted(orders)}: there are 1, 2 and 3")
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(n, self.cues, *shape, generator=generator)

        def signs(*shape: int) -> Tensor:
            return 2.0 * torch.randint(2, (n, *shape), generator=generator) - 1

        own = signs(1)
        s = {order: own if order in orders else signs(1) for order in (1, 2, 3)}
        first = self.shift * s[1] + normal()
        a, b = normal(2).unbind(-1)
        second = torch.stack([a, self.correlation * s[2] * a + (1 - self.correlation**2) ** 0.5 * b], -1)
        e, f = signs(self.cues, 2).unbind(-1)
        third = torch.stack([e, f, s[3] * e * f], -1) + _BLUR * normal(3)
        return torch.cat([first, second.flatten(1), third.flatten(1)], 1), (own[:, 0] > 0).long()
