"""Move rows from one class to another, coordinate by coordinate: the counterfactual for a class of any shape.

Per coordinate j, with F the distribution function of a class, x_j -> F_target⁻¹(F_source(x_j)): after the edit every
coordinate has the target class's whole distribution, not only its mean and variance, but what coordinates have to do
with each other is the source's (`sonde.concepts.quadratic` moves covariances, and only Gaussians whole). F is a table
of quantiles with straight lines between them; beyond the ends it is moved along.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.estimator import LabelledEraser, labels_for
from sonde.concepts.row_sample import RowSample


class QuantileEditor(LabelledEraser):
    """`QuantileEditor.fit(x, z)(x, source, target)`; rows whose source is -1 stay.

    Args:
        bins: of a table, each with the same share of a class's rows.
        capacity: most rows of a class to hold while a stream is read; a uniform sample of those seen.
        seed: of the sample.

    Attributes:
        tables: quantiles, Float[Tensor, "k d edges"].

    """

    tables: Float[Tensor, "k d edges"] | None

    def __init__(self, *, bins: int = 256, capacity: int = 65536, seed: int = 0) -> None:
        super().__init__()
        self.bins, self.capacity, self.seed = bins, capacity, seed
        self.register_buffer("tables", None)

    @property
    def fitted(self) -> bool:
        """Whether there is something to apply."""
        return self.tables is not None

    def collects(self) -> RowSample:
        """A sample of each class's rows."""
        return RowSample(capacity=self.capacity, categorical=True, seed=self.seed)

    def solve(self, statistics: RowSample) -> None:
        """Quantiles of each class. Raises `ValueError` for a class with fewer than two rows and for complex rows."""
        x, z = statistics.rows
        if x.is_complex():
            raise ValueError("complex numbers have no order: give the quantile editor real rows")
        if self.bins < 1:
            raise ValueError(f"bins is {self.bins}: expected at least 1")
        levels = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=x.device)
        tables = []
        for c in range(statistics.k):
            rows = x[z == c].double().T.sort().values
            if rows.shape[1] < 2:
                raise ValueError(f"class {c} has {rows.shape[1]} row(s): its quantiles need at least 2")
            # torch.quantile refuses more than 2^24 numbers
            place = levels * (rows.shape[1] - 1)
            below = place.long().clamp(max=rows.shape[1] - 2)
            tables.append(rows[:, below].lerp(rows[:, below + 1], place - below))
        self.tables = torch.stack(tables).to(torch.promote_types(x.dtype, torch.float32))
        self.facts = {}

    def forward(self, x: Float[Tensor, "*batch d"], source: Any, target: Any) -> Float[Tensor, "*batch d"]:
        """Every row moved from its class to another; `source` and `target` are one label, or one for each row."""
        self.check_fitted()
        assert self.tables is not None
        k = len(self.tables)
        labels = [
            labels_for(x, torch.full(x.shape[:1], given) if isinstance(given, int) else given, k)
            for given in (source, target)
        ]
        if len(labels[1]) and int(labels[1].min()) < 0:
            raise ValueError("a target of -1: expected a class")
        tables = self.tables.to(torch.promote_types(x.dtype, self.tables.dtype))
        flat = x.reshape(-1, x.shape[-1]).to(tables.dtype)
        result = flat.clone()
        for c, to in torch.stack(labels).unique(dim=1).T.tolist():
            if c >= 0 and c != to:
                rows = ((labels[0] == c) & (labels[1] == to)).nonzero().flatten()
                result[rows] = _move(flat[rows].T.contiguous(), tables[c], tables[to]).T
        return result.reshape(x.shape).to(x.dtype)


def _move(
    x: Float[Tensor, "d n"], source: Float[Tensor, "d edges"], target: Float[Tensor, "d edges"]
) -> Float[Tensor, "d n"]:
    source, target = source.contiguous(), target.contiguous()
    # where several quantiles are one value, its rows go to the middle of their range
    first = torch.searchsorted(source, x).clamp(1, source.shape[1] - 1)
    last = torch.searchsorted(source, x, right=True).clamp(1, source.shape[1] - 1)
    level = (_level(x, source, first) + _level(x, source, last)) / 2
    below = level.floor().long().clamp(0, source.shape[1] - 2)
    low, high = target.gather(1, below), target.gather(1, below + 1)
    moved = low + (level - below) * (high - low)
    under, over = (x - source[:, :1]).clamp(max=0), (x - source[:, -1:]).clamp(min=0)
    return moved + under + over


def _level(x: Tensor, table: Tensor, above: Tensor) -> Tensor:
    """Where x stands in a table, in bins."""
    low, high = table.gather(1, above - 1), table.gather(1, above)
    width = high - low
    return above - 1 + torch.where(width > 0, (x - low) / torch.where(width > 0, width, 1), 0.5).clamp(0, 1)
