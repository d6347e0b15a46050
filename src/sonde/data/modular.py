"""Pairs of numbers and a function of them modulo P: the whole grid, its labels, and a split as the paper makes it.

The split is Python's: `random.seed(s)`, a shuffle of all pairs in row-major order, the first int(share P^2) are trained
on (Nanda et al. 2023, arXiv:2301.05217, released code).
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sonde.errors import SondeError

Operation = Literal["add", "subtract", "quadratic", "random"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True)
class ModularTask:
    """A function of two numbers modulo P.

    Attributes:
        modulus: P.
        operation: a + b, a - b, a² + ab + b², or a random table (which no rule but memory can learn).
        share: of the P² pairs that are trained on.
        seed: of the split and of the random table.

    """

    modulus: int = 113
    operation: Operation = "add"
    share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise SondeError(f"operation {self.operation!r} is unknown: use {', '.join(OPERATIONS)}")
        if self.modulus < 2:
            raise SondeError(f"the modulus is {self.modulus}; give 2 or more")
        if not 0 < self.share < 1 or not 1 <= int(self.share * self.modulus**2) < self.modulus**2:
            raise SondeError(
                f"a share of {self.share} of {self.modulus**2} pairs leaves none to train on or none to test"
            )

    @property
    def pairs(self) -> Int[Tensor, "pairs 2"]:
        """All pairs (a, b), row-major: a is the slow index."""
        numbers = torch.arange(self.modulus)
        return torch.cartesian_prod(numbers, numbers)

    @property
    def labels(self) -> Int[Tensor, " pairs"]:
        """The right answers, in the order of `pairs`."""
        a, b = self.pairs.unbind(1)
        if self.operation == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randint(self.modulus, (self.modulus**2,), generator=generator)
        found = {"add": a + b, "subtract": a - b, "quadratic": a * a + a * b + b * b}[self.operation]
        return found % self.modulus

    @property
    def trained(self) -> Bool[Tensor, " pairs"]:
        """Which pairs are trained on, in the order of `pairs`."""
        order = list(range(self.modulus**2))
        random.Random(self.seed).shuffle(order)
        mask = torch.zeros(self.modulus**2, dtype=torch.bool)
        mask[order[: int(self.share * self.modulus**2)]] = True
        return mask
