"""Finite groups by their tables, and the task of multiplying in them: all pairs, the products, a split.

A group of n elements is its Cayley table T[a, b] = ab. Addition modulo P is the cyclic one; the symmetries of a polygon
(dihedral) and the permutations (symmetric) do not commute (Chughtai, Chan & Nanda 2023, arXiv:2302.03025).
"""

import itertools
import re
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sonde.data.modular import all_pairs, train_split
from sonde.errors import SondeError

_MOST = 6  # of S_n: 720 elements


def group_table(name: str) -> Int[Tensor, "n n"]:
    """The Cayley table of C_n ("c12"), D_n ("d7", of order 2n) or S_n ("s4", n up to 6), element 0 the identity.

    Raises `SondeError` for another name.
    """
    match = re.fullmatch(r"([cds])(\d+)", name.lower())
    n = int(match[2]) if match else 0
    if match is None or n < (2 if match[1] != "d" else 3) or (match[1] == "s" and n > _MOST):
        raise SondeError(f"{name!r} names no group: give c2, c3, … (cyclic), d3, d4, … (dihedral) or s2 to s{_MOST}")
    if match[1] == "c":
        t = torch.arange(n)
        return (t[:, None] + t) % n
    if match[1] == "d":  # r^i s^j is i + n j, and s r = r^-1 s
        i, j = torch.arange(2 * n) % n, torch.arange(2 * n) // n
        turned = torch.where(j[:, None] == 1, -i[None], i[None])
        return (i[:, None] + turned) % n + n * ((j[:, None] + j) % 2)
    elements = list(itertools.permutations(range(n)))
    place = {element: index for index, element in enumerate(elements)}
    return torch.tensor([[place[tuple(a[x] for x in b)] for b in elements] for a in elements])


def check_table(table: Int[Tensor, "n n"]) -> None:
    """Raise `SondeError` where a table is not that of a group: closure, identity, inverses, associativity."""
    n = len(table)
    if table.ndim != 2 or table.shape[1] != n or n < 1 or table.min() < 0 or table.max() >= n:
        raise SondeError(
            f"a group of n elements has a table of n x n numbers from 0 to n - 1, not {tuple(table.shape)}"
        )
    ordered = torch.arange(n)
    if not ((table.sort(0).values == ordered[:, None]).all() and (table.sort(1).values == ordered).all()):
        raise SondeError("the table is not of a group: an element occurs twice in a row or a column")
    identity = [e for e in range(n) if torch.equal(table[e], ordered) and torch.equal(table[:, e], ordered)]
    if not identity:
        raise SondeError("the table is not of a group: it has no identity")
    for a in range(n):  # (ab)c = a(bc)
        if not torch.equal(table[table[a]], table[a][table]):
            raise SondeError(f"the table is not of a group: element {a} does not associate")


@dataclass(frozen=True)
class GroupTask:
    """Multiplication in a finite group: the product of two elements, a share of the pairs trained on.

    Attributes:
        group: a name that `group_table` takes.
        share: of the n² pairs that are trained on.
        seed: of the split.

    """

    group: str
    share: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        train_split(len(self.table), self.share, self.seed)

    @cached_property
    def table(self) -> Int[Tensor, "n n"]:
        """The product ab of every a (rows) and b."""
        return group_table(self.group)

    @property
    def modulus(self) -> int:
        """n, how many elements there are."""
        return len(self.table)

    @property
    def pairs(self) -> Int[Tensor, "pairs 2"]:
        """All pairs (a, b), row-major: a is the slow index."""
        return all_pairs(self.modulus)

    @property
    def labels(self) -> Int[Tensor, " pairs"]:
        """The products, in the order of `pairs`."""
        return self.table.flatten()

    @property
    def trained(self) -> Bool[Tensor, " pairs"]:
        """Which pairs are trained on, in the order of `pairs`."""
        return train_split(self.modulus, self.share, self.seed)
