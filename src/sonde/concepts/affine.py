"""Every edit of a residual vector in this wing: take something out, put something in.

    h  ->  h - (h - m) Rᵀ Lᵀ + a t

Right [q d] reads q coordinates of h - m, left [d q] says which vectors they are taken back along, t is added with
strength a. With u a unit vector, r = mu₊ - mu₋ and u = r / |r| the rows of Marshall et al. 2024 (arXiv:2411.09003) are

    activation addition      L = R = none           t = r            h + a r
    directional ablation     L = Rᵀ = u   m = 0     t = none         h - u uᵀ h
    directional patching     L = Rᵀ = u   m = 0     t = u, a = c     h - u uᵀ h + c u
    mean ablation            L = Rᵀ = u   m = mu₋   t = none         h - u uᵀ (h - mu₋)
    ACE                      L = Rᵀ = u   m = mu₋   t = r            h - u uᵀ (h - mu₋) + a r
    oblique (LEACE, SAL)     L R = the eraser's projector

No d x d matrix is formed: a token costs 2 q d multiplications and additions. The result is a new tensor, so gradients
flow and what was given stays as it was.
"""

import copy
import json
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.files import replacing, write_json

FORMAT = "sonde edit 1"
_CONFIG, _TENSORS = "config.json", "edit.safetensors"
_LEAST = 1e-6  # |r| over |mu| below which two means are one
_PARTS = ("left", "right", "reference", "added")


class AffineEdit(nn.Module):
    """An edit `[... d] -> [... d]`, computed in float32 (or float64 parts in float64), returned in the input's type.

    Args:
        left: vectors along which is taken out, Float[Tensor, "d q"]; None to take nothing out.
        right: what is read off, Float[Tensor, "q d"]; given exactly where `left` is.
        reference: m, Float[Tensor, "d"]; None for 0.
        added: t, Float[Tensor, "d"]; None to add nothing.
        strength: a, a number, or one for each row of the batch, Float[Tensor, "batch"].

    Attributes:
        left, right, reference, added, strength: the arguments, as buffers.
        facts: JSON-able facts about where the edit comes from, saved with it.

    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, and an edit without any part.

    """

    left: Float[Tensor, "d q"] | None
    right: Float[Tensor, "q d"] | None
    reference: Float[Tensor, " d"] | None
    added: Float[Tensor, " d"] | None
    strength: Float[Tensor, "*batch"]

    def __init__(
        self,
        *,
        left: Float[Tensor, "d q"] | None = None,
        right: Float[Tensor, "q d"] | None = None,
        reference: Float[Tensor, " d"] | None = None,
        added: Float[Tensor, " d"] | None = None,
        strength: float | Float[Tensor, " batch"] = 1.0,
    ) -> None:
        super().__init__()
        _check_parts(left, right, reference, added)
        for name, part in zip(_PARTS, (left, right, reference, added), strict=True):
            self.register_buffer(name, None if part is None else _working(part))
        self.register_buffer("strength", _strength(strength))
        self.facts: dict[str, Any] = {}

    @classmethod
    def add(cls, vector: Float[Tensor, " d"], strength: float | Float[Tensor, " batch"] = 1.0) -> "AffineEdit":
        """Activation addition (CAA, ActAdd): h + a `vector`."""
        return AffineEdit(added=vector, strength=strength)

    @classmethod
    def ablate(cls, direction: Float[Tensor, " d"]) -> "AffineEdit":
        """Directional ablation: the projection on `direction` becomes 0."""
        unit = _unit(direction)
        return AffineEdit(left=unit[:, None], right=unit[None])

    @classmethod
    def patch(cls, direction: Float[Tensor, " d"], to: float | Float[Tensor, " batch"]) -> "AffineEdit":
        """Directional patching: the projection on `direction` becomes `to`, which is the edit's strength."""
        unit = _unit(direction)
        return AffineEdit(left=unit[:, None], right=unit[None], added=unit, strength=to)

    @classmethod
    def mean_ablate(cls, direction: Float[Tensor, " d"], mean: Float[Tensor, " d"]) -> "AffineEdit":
        """Mean ablation: the projection on `direction` becomes that of `mean`. ACE at strength 0."""
        unit = _unit(direction)
        return AffineEdit(left=unit[:, None], right=unit[None], reference=mean)

    @classmethod
    def ace(
        cls,
        positive_mean: Float[Tensor, " d"],
        negative_mean: Float[Tensor, " d"],
        strength: float | Float[Tensor, " batch"] = 0.0,
    ) -> "AffineEdit":
        """Affine concept editing: strength 0 gives everything the negative mean's projection, 1 the positive mean's.

        Raises `SondeError` where the two means are the same.
        """
        difference = mean_difference(positive_mean, negative_mean)
        unit = _unit(difference)
        return AffineEdit(
            left=unit[:, None], right=unit[None], reference=negative_mean, added=difference, strength=strength
        )

    @property
    def d(self) -> int:
        """Width of the vectors that are edited."""
        return next(part.shape[-1] for part in (self.right, self.added) if part is not None)

    @property
    def rank(self) -> int:
        """Number of dimensions that are taken out; 0 for an edit that only adds."""
        return 0 if self.right is None else len(self.right)

    def forward(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The edited vectors; a strength for each row goes with the first axis of `h`."""
        if h.shape[-1] != self.d:
            raise ValueError(f"vectors of width {h.shape[-1]} for an edit of width {self.d}")
        parts = self.right if self.right is not None else self.added
        assert parts is not None
        x = h.to(torch.promote_types(h.dtype, parts.dtype))
        if self.right is not None and self.left is not None:
            flat = x.reshape(-1, self.d)
            left, right = self.left.to(x.dtype), self.right.to(x.dtype)
            offset = None if self.reference is None else right @ self.reference.to(x.dtype)
            read = flat @ right.T if offset is None else torch.addmm(-offset, flat, right.T)
            x = torch.addmm(flat, read, left.T, alpha=-1).view(h.shape)
        if self.added is not None:
            x = x + self._given(h) * self.added
        return x.to(h.dtype)

    def _given(self, h: Tensor) -> Tensor:
        """The strength, shaped to multiply vectors of `h`."""
        if self.strength.ndim == 0:
            return self.strength
        if h.ndim < 2 or len(h) != len(self.strength):
            raise ValueError(f"an edit with {len(self.strength)} strengths, one a row, met a batch of {len(h)}")
        return self.strength.view(-1, *[1] * (h.ndim - 1))

    def at(self, strength: float | Float[Tensor, " batch"]) -> Self:
        """The same edit at another strength, or at one for each row of a batch; the other buffers are shared."""
        edit = copy.copy(self)
        edit._buffers = {**self._buffers, "strength": _strength(strength).to(self.strength.device)}
        return edit

    def then(self, other: "AffineEdit") -> "AffineEdit":
        """One edit that does this one and then `other`; exact. Both need one strength for all rows.

        With A = I - L R of each: `A₂A₁ = I - [L₁ L₂][R₁; R₂(I - L₁R₁)]`.
        """
        if self.strength.ndim or other.strength.ndim:
            raise ValueError("edits with a strength for each row cannot be joined into one: enter both, in order")
        if self.d != other.d:
            raise ValueError(f"edits of width {self.d} and {other.d} cannot be joined")
        lefts, rights = [], []
        if self.left is not None and self.right is not None:
            lefts, rights = [self.left], [self.right]
        if other.left is not None and other.right is not None:
            right = other.right
            if self.left is not None and self.right is not None:
                right = right - (right @ self.left) @ self.right
            lefts.append(other.left)
            rights.append(right)
        zero = torch.zeros(self.d, dtype=torch.float32, device=self.strength.device)
        return AffineEdit(
            left=torch.cat(lefts, 1) if lefts else None,
            right=torch.cat(rights) if rights else None,
            added=other(self(zero)),
        )

    def save(self, folder: str | Path) -> None:
        """Write `edit.safetensors` and `config.json` to a folder."""
        folder = Path(folder)
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self._buffers.items() if tensor is not None
        }
        with replacing(folder / _TENSORS) as beside:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, beside)
        config = {"format": FORMAT, "kind": type(self).__name__, "d": self.d, "rank": self.rank, "facts": self.facts}
        write_json(folder / _CONFIG, config)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote; any edit can be read as a plain `AffineEdit`.

        Raises `SondeError` when the folder holds no edit, one of another class, or a damaged one.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
        except FileNotFoundError as error:
            raise SondeError(
                f"{folder} is not the folder of an edit: it lacks {Path(error.filename or _TENSORS).name}"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise SondeError(f"the edit in {folder} is damaged: {error}") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise SondeError(f"{folder / _CONFIG} is not the configuration of an edit")
        if cls is not AffineEdit and config["kind"] != cls.__name__:
            raise SondeError(
                f"{folder} holds a {config['kind']}, not a {cls.__name__}: load it as that, or as AffineEdit"
            )
        edit = cls.__new__(cls)
        AffineEdit.__init__(edit, **tensors)
        edit.facts = config["facts"]
        return edit


def mean_difference(positive_mean: Float[Tensor, " d"], negative_mean: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """mu₊ - mu₋. Raises `SondeError` where a mean is not finite or the two are the same (|r| < 1e-6 |mu|)."""
    difference = positive_mean - negative_mean
    if not difference.isfinite().all():
        raise SondeError("a mean of activations holds nan or infinity")
    if difference.norm() <= _LEAST * torch.maximum(positive_mean.norm(), negative_mean.norm()):
        raise SondeError("there is no difference between the positive and the negative mean")
    return difference


def overlap(edits: "dict[str, AffineEdit]") -> dict[tuple[str, str], float]:
    """How far edits at one site touch the same dimensions: the largest cosine between what each pair takes or adds.

    0 for edits that leave each other alone, 1 for two along one line. Order matters for pairs far from 0.
    """
    spans = {name: _span(edit) for name, edit in edits.items()}
    names = list(spans)
    return {
        (a, b): float(torch.linalg.matrix_norm(spans[a].T @ spans[b], ord=2).clamp(max=1))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def _span(edit: AffineEdit) -> Float[Tensor, "d k"]:
    """An orthonormal basis of all directions that the edit reads, takes out or adds."""
    parts = [part for part in (edit.left, None if edit.right is None else edit.right.T) if part is not None]
    parts += [edit.added[:, None]] if edit.added is not None else []
    columns = torch.cat([part.double() for part in parts], 1)
    u, s, _ = torch.linalg.svd(columns / columns.norm(dim=0).clamp(min=1e-300), full_matrices=False)
    return u[:, s > 1e-6 * s[0]]


def _unit(direction: Tensor) -> Float[Tensor, " d"]:
    if direction.ndim != 1:
        raise ValueError(f"a direction has one axis, not the shape {tuple(direction.shape)}")
    norm = direction.norm()
    if not norm > 0 or not norm.isfinite():
        raise ValueError(f"a direction of length {float(norm)} points nowhere")
    return direction / norm


def _strength(strength: float | Tensor) -> Tensor:
    value = torch.as_tensor(strength, dtype=torch.float32)
    if value.ndim > 1 or not value.isfinite().all():
        raise ValueError(f"a strength is a finite number, or one for each row, not {strength}")
    return value


def _working(part: Tensor) -> Tensor:
    return part.detach().to(torch.promote_types(part.dtype, torch.float32))


def _check_parts(left: Tensor | None, right: Tensor | None, reference: Tensor | None, added: Tensor | None) -> None:
    if (left is None) != (right is None):
        raise ValueError("left and right belong together: give both or none")
    if left is None and added is None:
        raise ValueError("an edit takes something out (left, right) or adds something (added)")
    if reference is not None and left is None:
        raise ValueError("a reference belongs to what is taken out: give left and right")
    if left is not None and right is not None and (left.ndim != 2 or right.shape != left.T.shape):
        raise ValueError(f"left is (d, q) and right (q, d), not {tuple(left.shape)} and {tuple(right.shape)}")
    width = added.shape[-1] if left is None and added is not None else left.shape[0] if left is not None else 0
    for name, part in (("reference", reference), ("added", added)):
        if part is not None and part.shape != (width,):
            raise ValueError(f"{name} has shape {tuple(part.shape)}, expected ({width},)")
    for name, part in zip(_PARTS, (left, right, reference, added), strict=True):
        if part is not None and not part.isfinite().all():
            raise ValueError(f"{name} holds nan or infinity")
