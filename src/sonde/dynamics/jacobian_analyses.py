"""What the directions of a training Jacobian do: how weights answer to them, and what the function makes of them.

    response            train again from θ₀ + s v: r = ⟨Δθ_T, w⟩ / ‖w‖ against s ‖w‖ (w = Jv), and what is orthogonal
    functional_effect   KL(p_θ ‖ p_{θ + v}) for a unit step along each direction, its maximum and mean over inputs
    parameter_function  P = ∂ outputs(X; θ) / ∂θ, a row for each input and output; its null space is what X cannot see
    restricted          training of c in θ = θ₀ + Bc, from c = 0, by the same recipe, for subspaces B of many sizes

Trainings that differ by where they start, or in which subspace they move, run as one batch in one training loop.
Source: Belrose & Scherlis 2024, arXiv:2412.07003, sections 3 to 5; restricted training is that of Li et al. 2018.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import jacrev, vmap

from sonde.dynamics.fused_mlp import fusible
from sonde.dynamics.training_map import TrainingMap
from sonde.dynamics.update_rules import RuleOptimizer
from sonde.errors import SondeError
from sonde.nets.loop import train


class Response(NamedTuple):
    """How the end of training answers to steps of sizes `scale` [s] along each of d directions of unit length.

    along: ⟨Δθ_T, w⟩ / ‖w‖ with w = Jv. expected: s ‖w‖. across: ‖Δθ_T - along · w / ‖w‖‖. loss: of the perturbed
    training's end, on held-out rows. Trainings that diverged are nan.
    """

    scale: Float[Tensor, " s"]
    along: Float[Tensor, "d s"]
    expected: Float[Tensor, "d s"]
    across: Float[Tensor, "d s"]
    loss: Float[Tensor, "d s"]


class Effect(NamedTuple):
    """KL divergence in nats that a unit step along each of k directions makes: maximum and mean over inputs."""

    maximum: Float[Tensor, " k"]
    mean: Float[Tensor, " k"]


class Restricted(NamedTuple):
    """Losses and accuracy of trainings inside subspaces, in the order of the masks."""

    train_loss: Float[Tensor, " m"]
    test_loss: Float[Tensor, " m"]
    test_accuracy: Float[Tensor, " m"]


class _Cohort(nn.Module):
    """Many weight vectors in training: start + (c ⊙ mask) Bᵀ, one row of c for each."""

    def __init__(self, map: TrainingMap, start: Tensor, c: Tensor, mask: Tensor | None, basis: Tensor | None) -> None:
        super().__init__()
        self.map, self.start, self.mask, self.basis = map, start, mask, basis
        self.c = nn.Parameter(c.clone())

    def thetas(self) -> Float[Tensor, "m N"]:
        c = self.c if self.mask is None else self.c * self.mask
        return self.start + (c if self.basis is None else c @ self.basis.T)

    def loss(self, step: int) -> Tensor:
        """The sum of the members' losses. One that has diverged is left out, so that the others go on."""
        with self.map.draws(step):
            if len(self.c) == 1:
                return self.map.loss_at(self.thetas()[0], step)
            each = vmap(lambda theta: self.map.loss_at(theta, step))(self.thetas())
        return each.nan_to_num(nan=0.0, posinf=0.0).sum()

    def fit(self, progress: str | None) -> Float[Tensor, "m N"]:
        map = self.map
        optimizer = RuleOptimizer(self.parameters(), map.rule)
        train(
            self,
            self.loss,
            [optimizer],
            steps=map.steps,
            schedule=map.schedule,
            clip=map.clip,
            progress=progress,
        )
        return self.thetas().detach()


def invariants(map: TrainingMap) -> tuple[Float[Tensor, "N a"], Float[Tensor, "N b"]]:
    """Directions that training of a perceptron on labels must carry through unchanged: a known truth for every J.

    First the weights of inputs that are 0 in every row, then equal shifts of all outputs' weights from one hidden unit
    and of all outputs' biases, which the softmax does not see. The second are kept by gradient descent, not by Adam;
    neither is under a penalty. Raises `SondeError` for other modules.
    """
    if not fusible(map):
        raise SondeError(f"{type(map.module).__name__} is no perceptron under cross entropy: invariants unknown")
    weights = [p for p in map.module.parameters() if p.ndim == 2]
    hidden, n_in = weights[0].shape
    classes, last = weights[-1].shape
    still = (map.inputs == 0).all(0).nonzero()[:, 0]
    rows = (torch.arange(hidden)[:, None] * n_in + still).flatten()
    pixels = torch.zeros(map.n, len(rows), dtype=map.start.dtype)
    pixels[rows, torch.arange(len(rows))] = 1
    shifts = torch.zeros(map.n, last + 1, dtype=map.start.dtype)
    first = map.n - classes * (last + 1)
    shifts[first : map.n - classes] = torch.eye(last, last + 1, dtype=map.start.dtype).repeat(classes, 1)
    shifts[map.n - classes :, last] = 1
    return pixels, shifts / classes**0.5


def retrain(map: TrainingMap, starts: Float[Tensor, "m N"], *, progress: str | None = None) -> Float[Tensor, "m N"]:
    """Where training ends from each of m starting points, as one batch (one by one with clipping or dropout)."""
    if starts.ndim != 2 or starts.shape[1] != map.n:
        raise SondeError(f"starts of shape {tuple(starts.shape)}: give [m, {map.n:,}]")
    zero = torch.zeros_like(map.start)
    rows = [starts] if map.clean else starts.split(1)
    return torch.cat([_Cohort(map, zero, some, None, None).fit(progress) for some in rows])


def response(
    map: TrainingMap,
    end: Float[Tensor, " N"],
    v: Float[Tensor, "N d"],
    image: Float[Tensor, "N d"],
    *,
    held: tuple[Tensor, Tensor],
    scales: Float[Tensor, " s"] | None = None,
    progress: str | None = None,
) -> Response:
    """Train from θ₀ + s v for every direction and scale, by default 30 from 1e-3 to 1e3.

    `end` is θ_T of the map, `image` is Jv, `held` inputs and targets on which the loss is told. For singular vectors
    give `image = u * sigma`.
    """
    if v.shape != image.shape or v.shape[0] != map.n:
        raise SondeError(f"directions {tuple(v.shape)} and images {tuple(image.shape)}: give two of [{map.n:,}, d]")
    scales = torch.logspace(-3, 3, 30, dtype=v.dtype) if scales is None else scales
    starts = map.start + scales[None, :, None] * v.T[:, None, :]
    ends = retrain(map, starts.flatten(0, 1), progress=progress)
    moved = (ends - end).view(*starts.shape)
    gain = image.norm(dim=0)
    unit = (image / gain).T[:, None, :]
    along = (moved * unit).sum(-1)
    across = (moved - along[..., None] * unit).norm(dim=-1)
    loss, _ = map.evaluate(ends, *held)
    return Response(scales, along, gain[:, None] * scales, across, loss.view(along.shape))


def functional_effect(
    map: TrainingMap, theta: Float[Tensor, " N"], directions: Float[Tensor, "N k"], inputs: Mapping[str, Tensor]
) -> dict[str, Effect]:
    """KL of the predictions at θ from those at θ + v, for every direction v and each set of inputs."""
    if directions.ndim != 2 or len(directions) != map.n:
        raise SondeError(f"directions of shape {tuple(directions.shape)}: give [{map.n:,}, k]")
    found = {}
    for name, x in inputs.items():
        log_p = next(iter(map.logits(theta[None], x)))[0].log_softmax(-1)
        p = log_p.exp()
        maximum, mean = [], []
        for some in directions.T.split(256):
            for logits in map.logits(theta + some, x):
                kl = (p * (log_p - logits.log_softmax(-1))).sum(-1).clamp_min(0)
                maximum.append(kl.amax(-1))
                mean.append(kl.mean(-1))
        found[name] = Effect(torch.cat(maximum), torch.cat(mean))
    return found


def parameter_function(
    map: TrainingMap, theta: Float[Tensor, " N"], x: Float[Tensor, "rows ..."]
) -> Float[Tensor, "r N"]:
    """P, the Jacobian of the outputs on `x` with respect to the weights: a row for each input and output."""
    with torch.no_grad():
        rows = [
            vmap(jacrev(lambda w, one: map.outputs(w, one[None])[0]), (None, 0))(theta, some) for some in x.split(64)
        ]
    return torch.cat(rows).flatten(0, 1)


def null_space(p: Float[Tensor, "rows N"], k: int) -> Float[Tensor, "N k"]:
    """The k directions of weights that P sees least: eigenvectors of PᵀP with the smallest eigenvalues, in float64."""
    if not 1 <= k <= p.shape[1]:
        raise SondeError(f"k is {k}: give 1 to {p.shape[1]:,} directions")
    p = p.double()
    return torch.linalg.eigh(p.T @ p).eigenvectors[:, :k]


def restricted(
    map: TrainingMap,
    basis: Float[Tensor, "N k"],
    masks: Bool[Tensor, "m k"],
    *,
    rows: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    progress: str | None = None,
) -> Restricted:
    """Train inside m subspaces, each spanned by the columns of one orthonormal basis that its mask names.

    All of them are one batch, whose every step is one product with the basis. `rows` are those of the train loss,
    `held` of the others. Raises `SondeError` for a mask that names no column.
    """
    if basis.ndim != 2 or len(basis) != map.n or masks.shape[1] != basis.shape[1] or not masks.any(1).all():
        raise SondeError(
            f"a basis of shape {tuple(basis.shape)} and masks {tuple(masks.shape)}: give [{map.n:,}, k] and "
            "[m, k], and at least one direction in every mask"
        )
    zeros = torch.zeros(len(masks), basis.shape[1], dtype=basis.dtype)
    groups = [slice(None)] if map.clean else [slice(i, i + 1) for i in range(len(masks))]
    ends = torch.cat([_Cohort(map, map.start, zeros[g], masks[g], basis).fit(progress) for g in groups])
    train_loss, _ = map.evaluate(ends, *rows)
    return Restricted(train_loss, *map.evaluate(ends, *held))


def nested_masks(orders: Sequence[Tensor], counts: Sequence[int]) -> Bool[Tensor, "m k"]:
    """Masks of the first k indices of every order, for every k of `counts`: orders vary slowest."""
    masks = torch.zeros(len(orders), len(counts), len(orders[0]), dtype=torch.bool)
    for i, order in enumerate(orders):
        for j, k in enumerate(counts):
            if not 1 <= k <= len(order):
                raise SondeError(f"k is {k}: give 1 to {len(order):,} directions")
            masks[i, j, order[:k]] = True
    return masks.flatten(0, 1)
