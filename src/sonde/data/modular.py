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
        train_split(self.modulus, self.share, self.seed)

    @property
    def pairs(self) -> Int[Tensor, "pairs 2"]:
        """All pairs (a, b), row-major: a is the slow index."""
        return all_pairs(self.modulus)

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
        return train_split(self.modulus, self.share, self.seed)


def all_pairs(n: int) -> Int[Tensor, "pairs 2"]:
    """All pairs (a, b) of n elements, row-major: a is the slow index."""
    elements = torch.arange(n)
    return torch.cartesian_prod(elements, elements)


def train_split(n: int, share: float, seed: int) -> Bool[Tensor, " pairs"]:
    """Which of the n² pairs are trained on. Raises `SondeError` for a share that leaves none, or none to test."""
    count = int(share * n**2)
    if not 0 < share < 1 or not 1 <= count < n**2:
        raise SondeError(f"a share of {share} of {n**2} pairs leaves none to train on or none to test")
    order = list(range(n**2))
    random.Random(seed).shuffle(order)
    mask = torch.zeros(n**2, dtype=torch.bool)
    mask[order[:count]] = True
    return mask
