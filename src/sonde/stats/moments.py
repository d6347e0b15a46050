"""Means, covariances and cross-covariances of activations that pass once and are never stored.

Every batch is centred on its own mean in float64 and merged by Chan's update: with d = mean_b - mean_a,
S = S_a + S_b + d dᵀ n_a n_b / (n_a + n_b) (Chan, Golub & LeVeque 1979). It loses no digits to a large mean, and two
shards merge as two batches do, so the result does not depend on how the data were cut.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 8192  # rows converted to float64 at once


class Moments:
    """Running mean and covariance of x `[... dim]`, with the cross-covariance to y `[... other]` where there is one.

    `n` counts the rows taken in. Everything is kept in float64 on `device` (default: where the first batch is).
    """

    def __init__(self, dim: int, other: int | None = None, *, device: torch.device | str | None = None) -> None:
        if dim < 1 or (other is not None and other < 1):
            raise ValueError(f"moments of {dim} by {other} dimensions: expected at least 1")
        self.dim, self.other = dim, other
        self.n = 0
        self._device = None if device is None else torch.device(device)
        width = dim + (other or 0)
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "... dim"],
        y: Float[Tensor, "... other"] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> "Moments":
        """Take in the rows of x (and of y beside them) where `mask` is true; returns itself.

        Raises `ValueError` for shapes that do not fit, for a missing or unexpected y and for rows that are not finite.
        """
        if (y is None) != (self.other is None):
            raise ValueError(f"these moments were made with other={self.other}, but y is {'not ' * (y is None)}given")
        parts = [_rows(x, self.dim, mask, x.shape[:-1])]
        if y is not None and self.other is not None:
            parts.append(_rows(y, self.other, mask, x.shape[:-1]))
        if self._device is None:
            self._place(x.device)
        for start in range(0, len(parts[0]), _ROWS):
            rows = torch.cat([p[start : start + _ROWS].to(self._mean.device, torch.float64) for p in parts], dim=-1)
            mean = rows.mean(0)
            if not mean.isfinite().all():
                raise ValueError(f"{int((~rows.isfinite()).any(-1).sum())} of {len(rows)} rows hold nan or infinity")
            rows -= mean
            self._join(len(rows), mean, rows[:, : self.dim].T @ rows)
        return self

    @torch.no_grad()
    def merge(self, other: "Moments") -> "Moments":
        """Take in another shard's moments; returns itself. Raises `ValueError` for other dimensions."""
        if (self.dim, self.other) != (other.dim, other.other):
            raise ValueError(f"moments of {self.dim}, {self.other} cannot take in those of {other.dim}, {other.other}")
        if self._device is None:
            self._place(other._mean.device)
        self._join(other.n, other._mean.to(self._mean.device), other._scatter.to(self._mean.device))
        return self

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        """Mean of x. Raises `ValueError` before the first row."""
        self._needs(1)
        return self._mean[: self.dim].clone()

    @property
    def other_mean(self) -> Float[Tensor, " other"]:
        """Mean of y. Raises `ValueError` before the first row or without y."""
        self._needs(1)
        self._needs_other()
        return self._mean[self.dim :].clone()

    @property
    def scatter(self) -> Float[Tensor, "dim dim"]:
        """Sum over rows of (x - mean)(x - mean)ᵀ: what sums across shards and enters a ridge regression."""
        return self._scatter[:, : self.dim]

    @property
    def cross_scatter(self) -> Float[Tensor, "dim other"]:
        """Sum over rows of (x - mean)(y - other_mean)ᵀ."""
        self._needs_other()
        return self._scatter[:, self.dim :]

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Unbiased covariance of x: scatter / (n - 1). Raises `ValueError` below two rows."""
        self._needs(2)
        return self.scatter / (self.n - 1)

    @property
    def cross_covariance(self) -> Float[Tensor, "dim other"]:
        """Unbiased covariance of x with y. Raises `ValueError` below two rows or without y."""
        self._needs(2)
        return self.cross_scatter / (self.n - 1)

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`; `Moments.from_state` continues from it with the same numbers."""
        return {
            "dim": self.dim,
            "other": self.other,
            "n": self.n,
            "mean": self._mean.clone(),
            "scatter": self._scatter.clone(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Moments":
        """The moments that `state` was taken from, on the device of its tensors."""
        moments = cls(state["dim"], state["other"], device=state["mean"].device)
        moments.n = state["n"]
        moments._mean, moments._scatter = state["mean"].clone(), state["scatter"].clone()
        return moments

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if n == 0:
            return
        total = self.n + n
        delta = mean - self._mean
        self._scatter += scatter + torch.outer(delta[: self.dim], delta) * (self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total

    def _place(self, device: torch.device) -> None:
        self._device = device
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)

    def _needs(self, rows: int) -> None:
        if self.n < rows:
            raise ValueError(f"moments of {self.n} rows: at least {rows} needed")

    def _needs_other(self) -> None:
        if self.other is None:
            raise ValueError("these moments were made without other=: there is no y")


def _rows(x: Tensor, dim: int, mask: Tensor | None, lead: torch.Size) -> Float[Tensor, "n dim"]:
    if x.shape[-1] != dim or x.shape[:-1] != lead:
        raise ValueError(f"rows of shape {tuple(x.shape)}: expected {(*lead, dim)}")
    if mask is None:
        return x.reshape(-1, dim)
    if mask.shape != lead:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for rows of shape {tuple(lead)}")
    return x[mask.to(x.device, torch.bool)]
