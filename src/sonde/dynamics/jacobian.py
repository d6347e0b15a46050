"""How final weights depend on initial ones: the Jacobian J = ∂θ_T/∂θ₀ of a whole training, exactly.

Training is done once and its path recorded. A change v of θ₀ is then carried forward through the derivative of every
step, and a covector u backward through its transpose; both need Hessian-vector products alone, and both take columns in
blocks. J is never formed unless `dense` is asked for it. Source: Belrose & Scherlis 2024, arXiv:2412.07003.
"""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sonde.dynamics.curvature import AutogradCurve, Curve
from sonde.dynamics.fused_mlp import FusedMLP, fusible
from sonde.dynamics.trajectory import Trajectory
from sonde.dynamics.update_rules import Adam, Parts, Product, StepTaken, clip_factor
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle

_MEMORY = 4 << 30


class TrainingJacobian:
    """J of a recorded training, as products with it and its transpose, or whole.

    `fused=False` forbids the fast path of perceptrons; `block` is the number of columns that are walked at once.
    Warns where Adam without `eps_root` meets weights whose gradient was always 0.
    """

    def __init__(self, path: Trajectory, *, fused: bool = True, block: int | None = None) -> None:
        if block is not None and block < 1:
            raise SondeError(f"block is {block}; give 1 column or more")
        self.path = path
        kind = FusedMLP if fused and fusible(path.map) else AutogradCurve
        self.curve: Curve = kind(path) if block is None else kind(path, block=block)
        _warn_of_infinite(path)

    @property
    def n(self) -> int:
        """N, the number of parameters."""
        return self.path.map.n

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return self.path.end.dtype

    def jvp(self, v: Float[Tensor, "N k"], *, step: int | None = None) -> Float[Tensor, "N k"]:
        """J v: where changes v of the initial weights end, after `step` steps or at the end of training."""
        step = self._step(step)
        rows = self._rows(v, "v")
        return torch.cat([_push(self.curve, some, [step])[step] for some in rows.split(self.curve.block)]).T

    def vjp(self, u: Float[Tensor, "N k"], *, step: int | None = None) -> Float[Tensor, "N k"]:
        """Jᵀ u: which initial weights the direction u of final weights depends on."""
        step = self._step(step)
        rows = self._rows(u, "u")
        return torch.cat([_pull(self.curve, some, step) for some in rows.split(self.curve.block)]).T

    def dense(
        self, *, folder: Path | None = None, memory: int = _MEMORY, progress: str | None = None
    ) -> Float[Tensor, "N N"]:
        """The whole of J. See `during`."""
        (found,) = self.during([self.path.map.steps], folder=folder, memory=memory, progress=progress).values()
        return found

    def during(
        self,
        steps: Collection[int],
        *,
        folder: Path | None = None,
        memory: int = _MEMORY,
        progress: str | None = None,
    ) -> dict[int, Float[Tensor, "N N"]]:
        """∂θ_t/∂θ₀ for every t of `steps`, from one pass. Finished blocks of columns are kept in `folder` and reused.

        Raises `SondeError` where the matrices need more than `memory` bytes, and for a folder of another training.
        """
        steps = sorted({self._step(step) for step in steps})
        n, size = self.n, torch.finfo(self.dtype).bits // 8
        if (needed := n * n * size * len(steps)) > memory:
            raise SondeError(
                f"{len(steps)} Jacobian(s) of {n:,} parameters take {needed:,} bytes, more than the limit of "
                f"{memory:,}: use top_singular(jacobian, k) and spectral_density(jacobian), which form no matrix, or "
                "raise memory=…"
            )
        if folder is not None:
            _own_folder(folder, self.path, steps)
        kept = {step: torch.empty(n, n, dtype=self.dtype) for step in steps}
        bar = tqdm(total=n, desc=progress, unit="column", disable=progress is None)
        with bar:
            for first in range(0, n, self.curve.block):
                last = min(n, first + self.curve.block)
                for step, rows in self._block(first, last, steps, folder).items():
                    kept[step][first:last] = rows
                bar.update(last - first)
        return {step: rows.T for step, rows in kept.items()}

    def _block(self, first: int, last: int, steps: list[int], folder: Path | None) -> dict[int, Tensor]:
        path = None if folder is None else folder / f"columns-{first:06d}-{last:06d}.safetensors"
        if path is not None and path.exists():
            return {int(step): rows for step, rows in load_bundle(path).items()}
        rows = torch.zeros(last - first, self.n, dtype=self.dtype)
        rows[torch.arange(last - first), torch.arange(first, last)] = 1
        found = _push(self.curve, rows, steps)
        if path is not None:
            save_bundle(path, {str(step): rows for step, rows in found.items()})
        return found

    def _rows(self, columns: Tensor, name: str) -> Float[Tensor, "k N"]:
        if columns.ndim != 2 or len(columns) != self.n:
            raise SondeError(f"{name} has shape {tuple(columns.shape)}: give [{self.n:,}, columns]")
        if columns.dtype != self.dtype:
            raise SondeError(f"{name} is {columns.dtype}, the parameters are {self.dtype}: convert it")
        return columns.T.contiguous()

    def _step(self, step: int | None) -> int:
        if step is None:
            return self.path.map.steps
        if not 0 <= step <= self.path.map.steps:
            raise SondeError(f"step {step} is outside this training of {self.path.map.steps} steps")
        return step


def _push(curve: Curve, rows: Float[Tensor, "k N"], steps: Iterable[int]) -> dict[int, Float[Tensor, "k N"]]:
    """Tangents after each of `steps`."""
    wanted, map = set(steps), curve.path.map
    theta, moments = _columns(curve, rows)
    found = {0: rows.clone()} if 0 in wanted else {}
    with torch.no_grad():
        for t in range(max(wanted)):
            taken, product = _taken(curve, t), _product(curve, t, transposed=False)
            map.rule.forward(theta, moments, product, taken)
            if t + 1 in wanted:
                found[t + 1] = curve.unpack(theta).clone()
    return found


def _pull(curve: Curve, rows: Float[Tensor, "k N"], step: int) -> Float[Tensor, "k N"]:
    """Cotangents at the start of those after `step` steps."""
    theta, moments = _columns(curve, rows)
    with torch.no_grad():
        for t in range(step - 1, -1, -1):
            taken, product = _taken(curve, t), _product(curve, t, transposed=True)
            curve.path.map.rule.backward(theta, moments, product, taken)
    return curve.unpack(theta)


def _columns(curve: Curve, rows: Tensor) -> tuple[Parts, list[Parts]]:
    theta = curve.pack(rows)
    return theta, [[torch.zeros_like(part) for part in theta] for _ in range(curve.path.map.rule.n_moments)]


def _taken(curve: Curve, t: int) -> StepTaken:
    map = curve.path.map
    gradient: Parts = []
    moments: list[Parts] = []
    if map.rule.uses_gradient:
        g = curve.gradient(t)
        if map.clip is not None:
            g = g * clip_factor(g.norm(), map.clip)
        gradient = curve.expand(g + map.rule.l2 * curve.path[t].theta)
        moments = [curve.expand(moment) for moment in curve.path[t + 1].moments]
    return StepTaken(t + 1, map.rate(t), gradient, moments)


def _product(curve: Curve, t: int, *, transposed: bool) -> Product:
    """Products with the Hessian, or with the derivative of the clipped gradient, which is C H: C is symmetric."""

    def plain(x: Parts, out: Parts, beta: float) -> None:
        curve.product(t, x, out, beta)

    limit = curve.path.map.clip
    if limit is None:
        return plain
    g = curve.gradient(t)
    norm = g.norm()
    factor = clip_factor(norm, limit)
    if factor == 1:
        return plain
    expanded, pull = curve.expand(g), factor / (norm * (norm + 1e-6))

    def squeeze(x: Parts) -> Parts:
        dots = curve.inner(expanded, x)
        return [factor * part - pull * dot * one for part, dot, one in zip(x, dots, expanded, strict=True)]

    def clipped(x: Parts, out: Parts, beta: float) -> None:
        if transposed:
            curve.product(t, squeeze(x), out, beta)
            return
        made = [torch.empty_like(part) for part in x]
        curve.product(t, x, made, 0.0)
        for part, new in zip(out, squeeze(made), strict=True):
            part.mul_(beta).add_(new) if beta else part.copy_(new)

    return clipped


def _own_folder(folder: Path, path: Trajectory, steps: list[int]) -> None:
    """Make the folder of this Jacobian's columns, or see that it is."""
    end = path.end.double()
    mine = path.map.identity() | {"at": [str(step) for step in steps], "end": end.square().sum().item()}
    file = folder / "map.safetensors"
    if file.exists() and load_bundle(file) != mine:
        raise SondeError(f"{folder} holds columns of another training or other steps: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_bundle(file, mine)


def _warn_of_infinite(path: Trajectory) -> None:
    rule = path.map.rule
    if not isinstance(rule, Adam) or rule.eps_root:
        return
    still = path.map.values(path[path.map.steps].moments[1])
    names = [f"{name} ({int((v == 0).sum()):,} of {v.numel():,})" for name, v in still.items() if (v == 0).any()]
    if names:
        warnings.warn(
            f"Adam without eps_root has an infinite derivative where a second moment is 0: {', '.join(names)}; it is "
            "left out there. Give eps_root=1e-8",
            stacklevel=3,
        )
