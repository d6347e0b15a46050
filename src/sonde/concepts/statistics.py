"""What erasers need to know of activations x and a concept z: moments that pass once, merge and can fade.

For integer labels (-1: unknown, left out) the cross-covariance is a matter of class means,

    Cov(x, 1[z = c]) = p_c (mu_c - mu),        Cov(1[z = c], 1[z = c']) = p_c (1[c = c'] - p_c'),

so that classes are summed by index in O(n d) and no one-hot matrix is made; class means that are rounded in the last
digit still give a cross-covariance whose columns sum to 0. For real-valued z, `sonde.stats.moments.Moments` of x and z
together. Sums are float64 whatever the input is.
"""

import copy
import warnings
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.stats.moments import Moments

Covariance = Literal["pooled", "class", "none"]
Rows = tuple[Float[Tensor, "n d"], Int[Tensor, " n"] | Float[Tensor, "n k"]]
_SLICE = 1 << 18  # numbers summed by class in float64 at once


class ConceptStatistics:
    """Means, covariances and class means of x with a concept z, from any number of batches.

    Args:
        categorical: whether z are class labels; None: integers and booleans with one label a row (or a sequence) are.
        covariance: "pooled" keeps the covariance of x, "class" that of each class (labels only), "none" neither.
        decay: weight of all earlier rows at each update, for an exponential moving average; None for 1.
        precision: of products within a batch; None is float64 for float64 rows, else float32.

    Attributes:
        n: rows taken in.
        k: width of z, or number of classes so far.

    """

    def __init__(
        self,
        *,
        categorical: bool | None = None,
        covariance: Covariance = "pooled",
        decay: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        if covariance not in ("pooled", "class", "none"):
            raise ValueError(f"covariance {covariance!r} is unknown: use pooled, class or none")
        if decay is not None and not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}: expected more than 0 and at most 1")
        self.categorical, self.covariance_kind, self.decay, self.precision = categorical, covariance, decay, precision
        self.n = self.k = 0
        self.dtype = torch.float32
        """Type for what is made from these: that of the rows, at least float32."""
        self._dim: int | None = None
        self._pooled: Moments | None = None
        self._classes: list[Moments] = []
        self._joint: Moments | None = None
        self._weights = torch.zeros(0, dtype=torch.float64)
        self._means = torch.zeros(0, 0, dtype=torch.float64)
        self._power = 0.0

    @property
    def dim(self) -> int:
        """Width of x. Raises `ValueError` before the first batch."""
        if self._dim is None:
            raise ValueError("no data yet: give rows to update(x, z) first")
        return self._dim

    @torch.no_grad()
    def update(self, x: Any, z: Any, mask: Any = None) -> "ConceptStatistics":
        """Take in rows of x `[... d]` with z, where `mask [...]` is true; returns itself.

        z is one label for each row, or for each sequence (its shape is the first axes of x's), or real values
        `[... k]`. Raises `ValueError` for shapes that do not fit, another width than before, rows that are not finite.
        """
        x, z, self.categorical = concept_rows(x, z, mask, categorical=self.categorical)
        if self._dim is None:
            self._begin(x, z)
        if x.shape[1] != self._dim:
            raise ValueError(f"rows of width {x.shape[1]}: those before had {self._dim}")
        if not self.categorical and z.shape[1] != self.k:
            raise ValueError(f"z of width {z.shape[1]}: that before had {self.k}")
        if len(x) == 0:
            return self
        if self.decay is not None and self.n:
            self._fade(self.decay)
        self.dtype = torch.promote_types(self.dtype, x.dtype)
        self.n += len(x)
        if self.covariance_kind == "none":
            self._power += float(torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)))) ** 2
        if self.categorical:
            self._update_classes(x, z)
        elif self._pooled is not None:
            assert self._joint is not None
            self._pooled.update(x, z)
            self._joint.update(z)
        else:
            assert self._joint is not None
            self._joint.update(z, x)
        return self

    @torch.no_grad()
    def merge(self, other: "ConceptStatistics") -> "ConceptStatistics":
        """Take in those of another shard; returns itself. Raises `ValueError` where the two do not fit."""
        if other._dim is None:
            return self
        if self._dim is None and self.covariance_kind == other.covariance_kind:
            decay = self.decay
            self.__dict__.update(copy.deepcopy(other.__dict__))
            self.decay = decay
            return self
        ours = (self._dim, self.categorical, self.covariance_kind, None if self.categorical else self.k)
        theirs = (other._dim, other.categorical, other.covariance_kind, None if other.categorical else other.k)
        if ours != theirs:
            raise ValueError(f"statistics of (width, labels, covariance, k) = {ours} cannot take in those of {theirs}")
        self.n += other.n
        self._power += other._power
        self.dtype = torch.promote_types(self.dtype, other.dtype)
        for mine, its in ((self._pooled, other._pooled), (self._joint, other._joint)):
            if mine is not None and its is not None:
                mine.merge(its)
        if self.categorical:
            self._grow(other.k)
            for c, moments in enumerate(other._classes):
                self._classes[c].merge(moments)
            weights = torch.zeros_like(self._weights)
            weights[: other.k] = other._weights.to(weights.device)
            means = torch.zeros_like(self._means, dtype=torch.promote_types(self._means.dtype, other._means.dtype))
            means[: other.k] = other._means.to(means.device)
            self._join_means(weights, means)
        return self

    @property
    def weight(self) -> float:
        """What the rows count for: n, or less with decay."""
        if self.categorical:
            return float(self._weights.sum())
        return 0.0 if self._joint is None else self._joint.weight

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of x."""
        self._needs(1)
        if self.categorical:
            return (self._weights / self._weights.sum()).to(self._means.dtype) @ self._means
        assert self._joint is not None
        return self._joint.other_mean if self._pooled is None else self._pooled.mean

    @property
    def z_mean(self) -> Float[Tensor, " k"]:
        """Mean of z, or the share of each class."""
        self._needs(1)
        if self.categorical:
            return self._weights / self._weights.sum()
        assert self._joint is not None
        return self._joint.mean

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased covariance of x."""
        self._needs(2)
        if self._pooled is not None:
            return self._pooled.covariance
        if self.covariance_kind == "none":
            raise ValueError("these statistics were collected with covariance='none'")
        within = sum(moments.scatter for moments in self._classes)
        between = self._means - self.mean
        return (within + (self._weights * between.T) @ between.conj()) / (self.weight - 1)

    @property
    def cross_covariance(self) -> Float[Tensor, "d k"]:
        """Unbiased covariance of x with z (one-hot for labels)."""
        self._needs(2)
        if self.categorical:
            return (self._weights[:, None] * (self._means - self.mean)).T / (self.weight - 1)
        if self._pooled is not None:
            return self._pooled.cross_covariance
        assert self._joint is not None
        return self._joint.cross_covariance.mH

    @property
    def z_covariance(self) -> Float[Tensor, "k k"]:
        """Unbiased covariance of z (one-hot for labels)."""
        self._needs(2)
        if self.categorical:
            share = self.z_mean
            return (share.diag() - torch.outer(share, share)) * (self.weight / (self.weight - 1))
        assert self._joint is not None
        return self._joint.covariance

    @property
    def standardised_cross_covariance(self) -> Float[Tensor, "d k"]:
        """Cov(x, z / std z): what does not depend on the units of z or on how rare a class is; constants give 0.

        For labels the columns are divided by the root of the class's share, so that after whitening x the singular
        values are the canonical correlations. Raises `ValueError` where all of z is constant.
        """
        cross = self.cross_covariance
        if self.categorical:
            if int((self._weights > 0).sum()) < 2:
                raise ValueError("nothing to erase: z is constant")
            share = self.z_mean * (self.weight / (self.weight - 1))
            return cross / share.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        deviation = self.z_deviation
        return torch.where(deviation > 0, cross / torch.where(deviation > 0, deviation, 1), 0)

    @property
    def z_deviation(self) -> Float[Tensor, " k"]:
        """Standard deviation of each column of z, 0 for a constant. Raises `ValueError` where all are constant."""
        deviation = self.z_covariance.diagonal().real.sqrt()
        # Rounding leaves a constant with a deviation of about 1e-8 of its size.
        deviation = torch.where(deviation > 1e-7 * self.z_mean.abs(), deviation, 0)
        if not bool((deviation > 0).any()):
            raise ValueError("nothing to erase: z is constant")
        return deviation

    @property
    def class_weights(self) -> Float[Tensor, " k"]:
        """What the rows of each class count for. Raises `ValueError` for real-valued z."""
        self._needs_classes()
        return self._weights.clone()

    @property
    def class_means(self) -> Float[Tensor, "k d"]:
        """Mean of each class; 0 for a class without rows. Raises `ValueError` for real-valued z."""
        self._needs_classes()
        return self._means.clone()

    @property
    def class_covariances(self) -> Float[Tensor, "k d d"]:
        """Unbiased covariance of each class. Raises `ValueError` for a class with fewer than two rows."""
        self._needs_classes()
        if self.covariance_kind != "class":
            raise ValueError(f"these statistics were collected with covariance={self.covariance_kind!r}, not 'class'")
        for c, moments in enumerate(self._classes):
            if moments.n < 2:
                raise ValueError(f"class {c} has {moments.n} row(s): its covariance needs at least 2")
        return torch.stack([moments.covariance for moments in self._classes])

    @property
    def root_mean_square(self) -> float:
        """Of the rows' coordinates: the size against which sums of them are rounded."""
        if self.covariance_kind == "none":
            return (self._power / max(1, self.n) / self.dim) ** 0.5
        spread = float(self.covariance.diagonal().real.sum()) + float(self.mean.abs().square().sum())
        return (spread / self.dim) ** 0.5

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`; `ConceptStatistics.from_state` continues from it."""
        return {
            "settings": self._settings(),
            "categorical": self.categorical,
            "n": self.n,
            "k": self.k,
            "dim": self._dim,
            "dtype": _name(self.dtype),
            "pooled": None if self._pooled is None else self._pooled.state(),
            "joint": None if self._joint is None else self._joint.state(),
            "classes": [moments.state() for moments in self._classes],
            "weights": self._weights.clone(),
            "means": self._means.clone(),
            "power": self._power,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ConceptStatistics":
        """The statistics that `state` was taken from."""
        settings = state["settings"]
        precision = settings["precision"]
        new = cls(
            categorical=state["categorical"],
            covariance=settings["covariance"],
            decay=settings["decay"],
            precision=None if precision is None else getattr(torch, precision),
        )
        new.n, new.k, new._dim, new._power = state["n"], state["k"], state["dim"], state["power"]
        new.dtype = getattr(torch, state["dtype"])
        new._pooled = None if state["pooled"] is None else Moments.from_state(state["pooled"])
        new._joint = None if state["joint"] is None else Moments.from_state(state["joint"])
        new._classes = [Moments.from_state(moments) for moments in state["classes"]]
        new._weights, new._means = state["weights"].clone(), state["means"].clone()
        return new

    def _settings(self) -> dict[str, Any]:
        precision = None if self.precision is None else _name(self.precision)
        return {"covariance": self.covariance_kind, "decay": self.decay, "precision": precision}

    def _begin(self, x: Tensor, z: Tensor) -> None:
        if self.covariance_kind == "class" and not self.categorical:
            raise ValueError("covariances by class need labels: z is real-valued (pass categorical=True if it is not)")
        self._dim = x.shape[1]
        if self.precision is None:
            self.precision = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
        self._weights = self._weights.to(x.device)
        self._means = torch.zeros(0, self._dim, dtype=torch.float64, device=x.device)
        if not self.categorical:
            self.k = z.shape[1]
            self._joint = Moments(self.k, None if self.covariance_kind == "pooled" else self._dim)
        if self.covariance_kind == "pooled":
            self._pooled = Moments(self._dim, None if self.categorical else self.k, precision=self.precision)

    def _update_classes(self, x: Float[Tensor, "n d"], z: Int[Tensor, " n"]) -> None:
        if len(z):
            self._grow(int(z.max()) + 1)
        counts = torch.bincount(z, minlength=self.k)
        if self.covariance_kind == "class":
            for c in counts.nonzero().flatten().tolist():
                self._classes[c].update(x[z == c])
                self._weights[c] = self._classes[c].weight
            self._means = torch.stack([m.mean if m.n else torch.zeros_like(self._means[0]) for m in self._classes])
            return
        if self._pooled is not None:
            self._pooled.update(x)
        kind = torch.complex128 if x.is_complex() else self._means.dtype
        shift = x[0].to(kind)
        sums = torch.zeros(self.k, self.dim, dtype=kind, device=x.device)
        for start in range(0, len(x), step := max(1, _SLICE // self.dim)):
            sums.index_add_(0, z[start : start + step], x[start : start + step].to(kind) - shift)
        weights = counts.to(torch.float64)
        self._join_means(weights, sums / weights.clamp(min=1)[:, None] + shift)

    def _join_means(self, weights: Float[Tensor, " k"], means: Float[Tensor, "k d"]) -> None:
        total = self._weights + weights
        share = weights / torch.where(total > 0, total, 1)
        self._means = self._means + share[:, None] * (means - self._means)
        self._weights = total

    def _grow(self, k: int) -> None:
        if k <= self.k:
            return
        new = k - self.k
        self._weights = torch.cat([self._weights, self._weights.new_zeros(new)])
        self._means = torch.cat([self._means, self._means.new_zeros(new, self.dim)])
        if self.covariance_kind == "class":
            assert self.precision is not None
            self._classes += [
                Moments(self.dim, precision=self.precision, device=self._means.device) for _ in range(new)
            ]
        self.k = k

    def _fade(self, factor: float) -> None:
        self._weights = self._weights * factor
        for moments in (self._pooled, self._joint, *self._classes):
            if moments is not None:
                moments.fade(factor)

    def _needs(self, rows: int) -> None:
        if self.n < rows:
            raise ValueError(f"{self.n} labelled row(s): at least {rows} are needed")

    def _needs_classes(self) -> None:
        self._needs(1)
        if not self.categorical:
            raise ValueError("classes need labels: z is real-valued (pass categorical=True if it is not)")


def concept_rows(x: Any, z: Any, mask: Any = None, *, categorical: bool | None = None) -> tuple[Tensor, Tensor, bool]:
    """Rows of x `[n d]`, their labels `[n]` or values `[n k]`, and which of the two; unknown and masked rows left out.

    Raises `ValueError` for lengths that differ, labels below -1 and the first row that is not finite.
    """
    x, z = as_tensor(x, "x"), as_tensor(z, "z")
    if x.ndim < 2:
        raise ValueError(f"x has the shape {tuple(x.shape)}: expected rows, (n, d)")
    if not (x.is_floating_point() or x.is_complex()):
        x = x.double()
    lead = x.shape[:-1]
    z = z.to(x.device)
    whole = not (z.is_floating_point() or z.is_complex())
    by_row = z.shape == lead[: z.ndim]
    if categorical and not by_row and z.shape == (*lead, 1):
        z, by_row = z[..., 0], True
    if categorical is None:
        categorical = whole and by_row
    if z.shape[0] != lead[0] or not (by_row or (z.shape[:-1] == lead[: z.ndim - 1] and not categorical)):
        raise ValueError(f"z has the shape {tuple(z.shape)} for x of shape {tuple(x.shape)}: expected a z for each row")
    keep = None if mask is None else as_tensor(mask, "mask").to(x.device, torch.bool)
    if keep is not None and keep.shape != lead:
        raise ValueError(f"a mask of shape {tuple(keep.shape)} for x of shape {tuple(x.shape)}")
    if categorical:
        if not whole and not bool((z == z.round()).all()):
            raise ValueError("labels must be whole numbers: z has others, or nan")
        z = z.long()[(...,) + (None,) * (len(lead) - z.ndim)].expand(lead).reshape(-1)
        if len(z) and int(z.min()) < -1:
            raise ValueError(f"a label of {int(z.min())}: expected 0 and up, or -1 for unknown")
        known = z >= 0
        if not bool(known.all()):
            keep = known if keep is None else keep.reshape(-1) & known
    else:
        if by_row:
            z = z[..., None]
        if z.is_complex() and not x.is_complex():
            z = torch.view_as_real(z.resolve_conj()).flatten(-2)
        z = z.to(torch.promote_types(z.dtype, torch.float32)) if not whole else z.double()
        z = z[(slice(None),) * (z.ndim - 1) + (None,) * (len(lead) + 1 - z.ndim)].expand(*lead, z.shape[-1])
        z = z.reshape(-1, z.shape[-1])
        _warn_labels(z)
    x = x.reshape(-1, x.shape[-1])
    places = None
    if keep is not None:
        keep = keep.reshape(-1)
        places = keep.nonzero().flatten()
        x, z = x[places], z[places]
    for name, rows in (("x", x), ("z", z)):
        if rows.is_floating_point() or rows.is_complex():
            _check_finite(name, rows, places)
    return x, z, bool(categorical)


def as_tensor(values: Any, name: str) -> Tensor:
    """A tensor that shares memory with `values` where it can. Raises `TypeError` for what is no array of numbers."""
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"{name} holds {array.dtype}: expected numbers (labels as integers: numpy.unique(..., return_inverse=True))"
        )
    return torch.as_tensor(array if array.flags.writeable else array.copy())


def _check_finite(name: str, rows: Tensor, places: Tensor | None) -> None:
    # One pass that reads only: a sum is finite unless a term is not, or the sum overflows.
    if rows.dtype not in (torch.float16, torch.bfloat16) and bool(rows.sum().isfinite()):
        return
    bad = (~rows.isfinite()).any(-1).nonzero().flatten()
    if len(bad):
        first = int(bad[0] if places is None else places[bad[0]])
        raise ValueError(f"row {first} of {name} holds nan or infinity ({len(bad)} such row(s))")


def _warn_labels(z: Float[Tensor, "n k"]) -> None:
    if z.shape[1] == 1 and not z.is_complex() and bool((z == z.round()).all()) and len(z.unique()) > 2:
        warnings.warn("the values of z look categorical; pass categorical=True if they are labels", stacklevel=4)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
