"""What every eraser can do: fit on arrays or from a stream, merge with another shard, transform, be saved and cloned.

    LeaceEraser.fit(x, z)                                       one call
    LeaceEraser(affine=False).fit(x, z).transform(x)            as scikit-learn has it, also in a Pipeline
    eraser = LeaceEraser(); eraser.update(x, z, mask) …; eraser.finish()        a stream, or shards: eraser.merge(other)
    eraser.finish(statistics)                                   from one `ConceptStatistics` that serves several erasers

An eraser is a `torch.nn.Module`: it moves between devices and types and edits a model as it is.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from sonde.concepts.affine import AffineEdit
from sonde.concepts.statistics import as_tensor
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle

_E = TypeVar("_E", bound="ConceptEraser")


class FitEither(Generic[_E]):
    """`Eraser.fit(x, z, **parameters)` is `Eraser(**parameters).fit(x, z)`."""

    def __get__(self, eraser: _E | None, owner: type[_E]) -> Callable[..., _E]:
        """The method, of the instance or of the class."""
        if eraser is not None:
            return eraser._fit

        def fit(x: Any, z: Any, mask: Any = None, **given: Any) -> _E:
            names = owner._get_param_names()
            parameters = {name: value for name, value in given.items() if name in names}
            data = {name: value for name, value in given.items() if name not in names}
            return owner(**parameters)._fit(x, z, mask, **data)

        fit.__doc__ = owner._fit.__doc__
        return fit


class ConceptEraser(TransformerMixin, BaseEstimator):
    """Base of the erasers; see the module. A subclass says what it collects and how it solves."""

    fit = FitEither()
    statistics: Any = None
    """What `update` collects until `finish`: `ConceptStatistics`, or the rows themselves (`RowSample`)."""
    facts: dict[str, Any]

    @property
    def fitted(self) -> bool:
        """Whether there is something to apply."""
        raise NotImplementedError

    def collects(self) -> Any:
        """Fresh statistics of the kind that `finish` needs."""
        raise NotImplementedError

    def solve(self, statistics: Any) -> None:
        """Set the fitted state."""
        raise NotImplementedError

    def update(self, x: Any, z: Any, mask: Any = None) -> Self:
        """Take in rows x `[... d]` with labels or values z, where `mask [...]` is true; returns itself.

        Labels are whole numbers from 0, -1 where unknown: one for each row, or one for each sequence. Raises
        `ValueError` as `ConceptStatistics.update` does, and after `finish`.
        """
        if self.statistics is None:
            if self.fitted:
                raise ValueError(
                    "this eraser is finished: fit it anew, or collect in ConceptStatistics, which stay open"
                )
            self.statistics = self.collects()
        self.statistics.update(x, z, mask)
        return self

    def merge(self, other: "ConceptEraser") -> Self:
        """Take in what another unfinished eraser has seen; returns itself."""
        if other.statistics is not None:
            if self.statistics is None:
                self.statistics = self.collects()
            self.statistics.merge(other.statistics)
        return self

    @torch.no_grad()
    def finish(self, statistics: Any = None) -> Self:
        """Solve from what was seen, or from given statistics, and let go of the former; returns itself.

        Raises `ValueError` without data, for fewer than two rows and where z is constant.
        """
        found = self.statistics if statistics is None else statistics
        if found is None or found.n == 0:
            raise NotFittedError("no data yet: give rows to update(x, z) or fit(x, z) first")
        if found.n < 2:
            raise ValueError(f"{found.n} labelled row: erasing needs at least 2")
        if found.categorical:
            _check_classes(found)
        self.solve(found)
        self.statistics = None
        self.n_features_in_ = found.dim
        self.facts = {"n": found.n, "k": found.k, **self.facts}
        return self

    def transform(self, x: Any, *given: Any) -> Any:
        """The erased rows, as an array where x is one, as a tensor where x is one. Raises `NotFittedError`."""
        edit = cast("Callable[..., Tensor]", self)
        if isinstance(x, Tensor):
            return edit(x, *given)
        rows = as_tensor(x, "x")
        with torch.no_grad():
            return edit(rows if rows.is_floating_point() or rows.is_complex() else rows.double(), *given).numpy()

    def check_fitted(self) -> None:
        """Raise `NotFittedError` where there is nothing to apply."""
        if not self.fitted:
            raise NotFittedError(f"this {type(self).__name__} has seen no data: call fit(x, z), or update and finish")

    def parameters_of_fit(self) -> dict[str, Any]:
        """The constructor's parameters as JSON has them."""
        found = self.get_params(deep=False)
        return {name: value if _plain(value) else str(value) for name, value in found.items()}

    def __sklearn_is_fitted__(self) -> bool:
        return self.fitted

    def _fit(self, x: Any, z: Any, mask: Any = None) -> Self:
        """Fit on rows x `[n d]` and their labels or values z; returns the eraser. See `update` and `finish`."""
        self.statistics = self.collects()
        self.statistics.update(x, z, mask)
        return self.finish()


class AffineEraser(ConceptEraser, AffineEdit):
    """An eraser r(x) = x - L R (x - m): an `AffineEdit` that is fitted."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        for name in ("left", "right", "reference", "added"):
            self.register_buffer(name, None)
        self.register_buffer("strength", torch.tensor(1.0))
        self.facts = {}

    @property
    def fitted(self) -> bool:
        """Whether there is something to apply."""
        return self.right is not None

    def set_parts(
        self,
        left: Float[Tensor, "d q"],
        right: Float[Tensor, "q d"],
        reference: Float[Tensor, " d"] | None,
        dtype: torch.dtype,
    ) -> None:
        """Hold the solution in the type of the rows that it was fitted on."""
        kind = torch.promote_types(dtype, torch.float32)
        if left.is_complex() and not kind.is_complex:
            kind = kind.to_complex()
        self.left, self.right = left.to(kind).contiguous(), right.to(kind).contiguous()
        self.reference = None if reference is None else reference.to(kind)

    def forward(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The erased vectors, in the type of `h`. Raises `NotFittedError` before any data."""
        self.check_fitted()
        return super().forward(h)

    @torch.no_grad()
    def erase_(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Erase in the memory of x and return it. Raises `ValueError` unless x is contiguous and of the parts' type."""
        self.check_fitted()
        assert self.left is not None and self.right is not None
        if not x.is_contiguous() or x.dtype != self.right.dtype or x.shape[-1] != self.d:
            raise ValueError(
                f"rows of {x.dtype} and shape {tuple(x.shape)} cannot be erased in place: expected contiguous rows of "
                f"{self.right.dtype} and width {self.d}"
            )
        flat = x.view(-1, self.d)
        read = flat @ self.right.T
        if self.reference is not None:
            read -= self.right @ self.reference
        flat.addmm_(read, self.left.T, alpha=-1)
        return x

    def save(self, folder: str | Path) -> None:
        """Write `edit.safetensors` and `config.json` to a folder."""
        self.check_fitted()
        self.facts = {**self.facts, "parameters": self.parameters_of_fit()}
        super().save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises `SondeError` as `AffineEdit.load` does."""
        edit = super().load(folder)
        for name, value in edit.facts.get("parameters", {}).items():
            setattr(edit, name, value)
        edit.n_features_in_ = edit.d
        return edit


class LabelledEraser(ConceptEraser, nn.Module):
    """An eraser that needs the label of a row when it edits it: `eraser(x, z)`; rows with the label -1 stay."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.facts = {}

    def fit_transform(self, x: Any, z: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`fit(x, z)`, then the same rows erased."""
        return self._fit(x, z).transform(x, z)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the buffers, with parameters and facts in its header."""
        self.check_fitted()
        tree = {
            "kind": type(self).__name__,
            "parameters": self.parameters_of_fit(),
            "facts": self.facts,
            "buffers": dict(self._buffers),
        }
        save_bundle(path, tree)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `SondeError` for another kind of eraser and for a damaged file."""
        tree = load_bundle(path)
        kind = tree.get("kind") if isinstance(tree, dict) else None
        if kind != cls.__name__:
            raise SondeError(f"{path} holds {'no eraser' if kind is None else 'a ' + kind}: expected a {cls.__name__}")
        known = inspect.signature(cls.__init__).parameters
        eraser = cls(**{name: value for name, value in tree["parameters"].items() if name in known})
        for name, value in tree["buffers"].items():
            eraser.register_buffer(name, value)
        eraser.facts = tree["facts"]
        return eraser


def labels_for(x: Tensor, z: Any, k: int) -> Tensor:
    """Labels `[n]` for x `[... d]` at edit time, -1 where unknown. Raises `ValueError` where they do not fit."""
    z = as_tensor(z, "z").to(x.device)
    if z.is_floating_point() and not bool((z == z.round()).all()):
        raise ValueError("labels must be whole numbers")
    lead = x.shape[:-1]
    if z.shape != lead[: z.ndim]:
        raise ValueError(f"labels of shape {tuple(z.shape)} for x of shape {tuple(x.shape)}")
    z = z.long()[(...,) + (None,) * (len(lead) - z.ndim)].expand(lead).reshape(-1)
    if len(z) and not -1 <= int(z.min()) <= int(z.max()) < k:
        raise ValueError(f"labels from {int(z.min())} to {int(z.max())} for an eraser of classes 0 to {k - 1}")
    return z


def _check_classes(statistics: Any) -> None:
    present = statistics.class_weights > 0
    if int(present.sum()) < 2:
        raise ValueError("nothing to erase: z is constant")
    if not bool(present.all()):
        absent = (~present).nonzero().flatten().tolist()
        warnings.warn(
            f"no rows have the label {', '.join(map(str, absent[:8]))}{' …' * (len(absent) > 8)}: of such a class "
            "nothing can be erased",
            stacklevel=3,
        )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.integer | np.floating)
