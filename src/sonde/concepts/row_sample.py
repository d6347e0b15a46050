"""Rows kept from a stream: all of them, or a uniform sample of each class, for methods that moments are not enough for.

Every row gets a random key, and of each class those with the largest keys stay. The largest keys of two shards together
are those of the whole, so samples merge.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.statistics import concept_rows


class RowSample:
    """Rows of x `[n d]` with labels `[n]` or values `[n k]`; it answers to what erasers ask of `ConceptStatistics`.

    Args:
        capacity: most rows to keep of each class (or of all, for real-valued z); None for no bound.
        categorical: as in `ConceptStatistics`.
        seed: of the choice.

    Attributes:
        n: rows seen.

    """

    def __init__(self, *, capacity: int | None = None, categorical: bool | None = None, seed: int = 0) -> None:
        if capacity is not None and capacity < 2:
            raise ValueError(f"capacity is {capacity}: expected at least 2 rows of each class")
        self.capacity, self.categorical = capacity, categorical
        self.n = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, x: Any, z: Any, mask: Any = None) -> "RowSample":
        """Take in rows, as `ConceptStatistics.update` does; returns itself."""
        x, z, self.categorical = concept_rows(x, z, mask, categorical=self.categorical)
        if self._parts and (x.shape[1] != self.dim or z.shape[1:] != self._parts[0][1].shape[1:]):
            raise ValueError(
                f"rows of width {x.shape[1]} with z of shape {tuple(z.shape)}: those before had the width {self.dim}"
            )
        self.n += len(x)
        keys = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        self._parts.append((x.clone(), z.clone(), keys))
        self._thin()
        return self

    def merge(self, other: "RowSample") -> "RowSample":
        """Take in another shard's rows; returns itself."""
        self.n += other.n
        self.categorical = other.categorical if self.categorical is None else self.categorical
        self._parts += other._parts
        self._thin()
        return self

    @property
    def rows(self) -> tuple[Float[Tensor, "n d"], Tensor]:
        """The rows that were kept, with their labels or values. Raises `ValueError` without any."""
        if not self._parts:
            raise ValueError("no data yet: give rows to update(x, z) first")
        x, z, keys = (torch.cat(part) for part in zip(*self._parts, strict=True))
        self._parts = [(x, z, keys)]
        return x, z

    @property
    def dim(self) -> int:
        """Width of x."""
        return self._parts[0][0].shape[1]

    @property
    def k(self) -> int:
        """Number of classes, or width of z."""
        z = self.rows[1]
        return int(z.max()) + 1 if self.categorical else z.shape[1]

    @property
    def class_weights(self) -> Float[Tensor, " k"]:
        """Rows kept of each class."""
        return torch.bincount(self.rows[1]).double()

    def _thin(self) -> None:
        held = sum(len(part[0]) for part in self._parts)
        if self.capacity is None or held <= self.capacity:
            return
        x, z = self.rows
        keys = self._parts[0][2]
        order = keys.argsort(descending=True)
        if self.categorical:
            order = order[z[order].argsort(stable=True)]
            counts = torch.bincount(z)
            rank = torch.arange(len(z)) - (counts.cumsum(0) - counts)[z[order]]
            kept = order[rank < self.capacity]
        else:
            kept = order[: self.capacity]
        kept = kept.sort().values
        self._parts = [(x[kept], z[kept], keys[kept])]
