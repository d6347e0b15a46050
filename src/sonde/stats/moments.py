"""Means, covariances and cross-covariances of activations that pass once and are never stored.

Every batch is centred on its own mean and merged in float64 by Chan's update: with d = mean_b - mean_a,
S = S_a + S_b + d dᴴ n_a n_b / (n_a + n_b) (Chan, Golub & LeVeque 1979). It loses no digits to a large mean, and two
shards merge as two batches do, so the result does not depend on how the data were cut. S is symmetric: only its lower
triangle is multiplied out, by halving, so that nearly all of the work stays in large products.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROWS = 8192  # rows centred at once
_LEAF = 256  # a triangle this small is multiplied out as a square


class Moments:
    """Running mean and covariance of x `[... dim]`, with the cross-covariance to y `[... other]` where there is one.

    `n` counts the rows taken in, `weight` what they count for: n, or less once they `fade`. Everything is kept in
    float64 (complex128 once a row is complex) on `device` (default: where the first batch is).

    Args:
        dim: width of x.
        other: width of y; None for no y.
        device: where sums are kept.
        precision: of the products within a batch. float32 is twice as fast and costs digits of the covariance (about
            1e-6 of its scale), not of sums over batches.

    """

    def __init__(
        self,
        dim: int,
        other: int | None = None,
        *,
        device: torch.device | str | None = None,
        precision: torch.dtype = torch.float64,
    ) -> None:
        if dim < 1 or (other is not None and other < 1):
            raise ValueError(f"moments of {dim} by {other} dimensions: expected at least 1")
        if precision not in (torch.float32, torch.float64):
            raise ValueError(f"products in {precision}: expected torch.float32 or torch.float64")
        self.dim, self.other, self.precision = dim, other, precision
        self.n = 0
        self.weight = 0.0
        self._device = None if device is None else torch.device(device)
        width = dim + (other or 0)
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        # Of the square part, only the lower triangle is true.
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
        kind = self.precision
        if any(part.is_complex() for part in parts):
            self._mean, self._scatter = self._mean.to(torch.complex128), self._scatter.to(torch.complex128)
        if self._mean.is_complex():
            kind = torch.complex64 if kind == torch.float32 else torch.complex128
        room: list[Tensor] = []
        for start in range(0, len(parts[0]), _ROWS):
            rows = [part[start : start + _ROWS].to(self._mean.device, kind) for part in parts]
            means = [part.mean(0) for part in rows]
            if not all(mean.isfinite().all() for mean in means):
                bad = torch.stack([(~part.isfinite()).any(-1) for part in rows]).any(0)
                raise ValueError(f"{int(bad.sum())} of {len(bad)} rows hold nan or infinity")
            # one piece of memory for all chunks: fresh pages cost as much as the subtraction
            room = room or [torch.empty_like(part) for part in rows]
            rows = [torch.sub(p, m, out=r[: len(p)]) for p, m, r in zip(rows, means, room, strict=True)]
            mean = torch.cat([m.to(self._mean.dtype) for m in means])
            if kind != self._mean.dtype:
                # what rounding left of the batch's mean
                mean += torch.cat([part.mean(0) for part in rows])
            self._shift(len(rows[0]), len(rows[0]), mean)
            _add_product(self._scatter[:, : self.dim], rows[0], rows[0])
            if len(rows) > 1:
                self._scatter[:, self.dim :] += rows[0].T @ rows[1].conj()
        return self

    @torch.no_grad()
    def merge(self, other: "Moments") -> "Moments":
        """Take in another shard's moments; returns itself. Raises `ValueError` for other dimensions."""
        if (self.dim, self.other) != (other.dim, other.other):
            raise ValueError(f"moments of {self.dim}, {self.other} cannot take in those of {other.dim}, {other.other}")
        if self._device is None:
            self._place(other._mean.device)
        kind = torch.promote_types(self._mean.dtype, other._mean.dtype)
        self._mean, self._scatter = self._mean.to(kind), self._scatter.to(kind)
        self._shift(other.n, other.weight, other._mean.to(self._mean.device, kind))
        self._scatter += other._scatter.to(self._scatter.device)
        return self

    def fade(self, factor: float) -> "Moments":
        """Let all rows so far count for `factor` of what they did; returns itself.

        Called before every update, it makes an exponential moving average. Raises `ValueError` outside 0 to 1.
        """
        if not 0 < factor <= 1:
            raise ValueError(f"a factor of {factor}: expected more than 0 and at most 1")
        self.weight *= factor
        self._scatter *= factor
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
        """Sum over rows of (x - mean)(x - mean)ᴴ: what sums across shards and enters a ridge regression."""
        lower = self._scatter[:, : self.dim].tril()
        return lower.add_(lower.tril(-1).mH)

    @property
    def cross_scatter(self) -> Float[Tensor, "dim other"]:
        """Sum over rows of (x - mean)(y - other_mean)ᴴ."""
        self._needs_other()
        return self._scatter[:, self.dim :]

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Unbiased covariance of x: scatter / (weight - 1). Raises `ValueError` below two rows."""
        self._needs(2)
        return self.scatter.div_(self.weight - 1)

    @property
    def cross_covariance(self) -> Float[Tensor, "dim other"]:
        """Unbiased covariance of x with y. Raises `ValueError` below two rows or without y."""
        self._needs(2)
        return self.cross_scatter / (self.weight - 1)

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`; `Moments.from_state` continues from it with the same numbers."""
        return {
            "dim": self.dim,
            "other": self.other,
            "n": self.n,
            "weight": self.weight,
            "precision": str(self.precision).removeprefix("torch."),
            "mean": self._mean.clone(),
            "scatter": self._scatter.clone(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Moments":
        """The moments that `state` was taken from, on the device of its tensors."""
        precision = getattr(torch, state["precision"])
        moments = cls(state["dim"], state["other"], device=state["mean"].device, precision=precision)
        moments.n, moments.weight = state["n"], state["weight"]
        moments._mean, moments._scatter = state["mean"].clone(), state["scatter"].clone()
        return moments

    def _shift(self, n: int, weight: float, mean: Tensor) -> None:
        """Move the mean towards that of new rows, whose own scatter is still to be added."""
        if n == 0:
            return
        total = self.weight + weight
        delta = mean - self._mean
        self._scatter += torch.outer(delta[: self.dim], delta.conj()) * (self.weight * weight / total)
        self._mean += delta * (weight / total)
        self.n += n
        self.weight = total

    def _place(self, device: torch.device) -> None:
        self._device = device
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)

    def _needs(self, rows: int) -> None:
        if self.n < rows:
            raise ValueError(f"moments of {self.n} rows: at least {rows} needed")
        if rows > 1 and not self.weight > 1:
            raise ValueError(f"{self.n} rows have faded to the weight of {self.weight:.3g}: more than 1 needed")

    def _needs_other(self) -> None:
        if self.other is None:
            raise ValueError("these moments were made without other=: there is no y")


def _add_product(to: Float[Tensor, "d d"], x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> None:
    """Add the lower triangle of xᵀ y*, for a product that is Hermitian."""
    width = x.shape[1]
    if width <= _LEAF:
        _add(to, x, y)
        return
    half = (width // 2 + 63) // 64 * 64
    _add(to[half:, :half], x[:, half:], y[:, :half])
    _add_product(to[:half, :half], x[:, :half], y[:, :half])
    _add_product(to[half:, half:], x[:, half:], y[:, half:])


def _add(to: Tensor, x: Tensor, y: Tensor) -> None:
    if x.dtype == to.dtype:
        to.addmm_(x.T, y.conj())
    else:
        to += x.T @ y.conj()


def _rows(x: Tensor, dim: int, mask: Tensor | None, lead: torch.Size) -> Float[Tensor, "n dim"]:
    if x.shape[-1] != dim or x.shape[:-1] != lead:
        raise ValueError(f"rows of shape {tuple(x.shape)}: expected {(*lead, dim)}")
    if mask is None:
        return x.reshape(-1, dim)
    if mask.shape != lead:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for rows of shape {tuple(lead)}")
    return x[mask.to(x.device, torch.bool)]
