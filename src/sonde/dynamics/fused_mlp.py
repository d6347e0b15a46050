"""Hessian products of a perceptron under cross entropy, in the layout that makes each one large matrix product.

A column Θ is kept as [unit, column, input + 1], the bias as the last input. With h̃ = (h, 1), z = W h̃ and δ = ∂L/∂z of
the step (cached once for all columns), layer by layer and then back (R-operator, Pearlmutter 1994):

    ż = Θ h̃ + W ḣ          ḣ = φ'(z) ż          δ̇_out = (p ⊙ (ż - Σ p ż)) / batch
    ė = Θᵀ δ + Wᵀ δ̇        δ̇ = φ'(z) ė + φ''(z) e ż          HΘ = δ̇ h̃ᵀ + δ ḣᵀ

Since units and columns are rows of one matrix, Θ h̃ and δ̇ h̃ᵀ are products of (units · columns) x (inputs + 1) x batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.dynamics.training_map import TrainingMap
from sonde.dynamics.trajectory import Trajectory
from sonde.dynamics.update_rules import Parts
from sonde.nets.mlp import MLP, Activation, activate

_CACHE = 1 << 30  # bytes of activations that are kept for all columns


class _Layer(NamedTuple):
    weight: Float[Tensor, "out in"]
    below: Float[Tensor, "in+1 batch"]  # h̃ of the layer below
    delta: Float[Tensor, "out batch"]
    slope: Float[Tensor, "out 1 batch"] | None  # φ'(z), of hidden layers
    bend: Float[Tensor, "out 1 batch"] | None  # φ''(z) e


class _Step(NamedTuple):
    layers: list[_Layer]
    probabilities: Float[Tensor, "classes 1 batch"]


def fusible(map: TrainingMap) -> bool:
    """Whether the map is a perceptron's, with the cross entropy of class labels."""
    labels = map.targets.ndim == 1 and not map.targets.is_floating_point()
    return isinstance(map.module, MLP) and map.loss is nn.functional.cross_entropy and labels


class FusedMLP:
    """The curve of a perceptron."""

    def __init__(self, path: Trajectory, *, block: int = 64) -> None:
        self.path = path
        self.block = block
        assert isinstance(path.map.module, MLP)
        self._sizes = path.map.module.shape.sizes
        self._activation: Activation = path.map.module.shape.activation
        self._steps: dict[int, _Step] = {}
        self._room = _CACHE
        self._buffers: dict[tuple, Tensor] = {}

    def pack(self, columns: Float[Tensor, "k N"]) -> Parts:
        """[k, N] as a piece [out, k, in + 1] for each layer."""
        parts = []
        for (weight, bias), (n_in, n_out) in zip(self._split(columns), self._pairs(), strict=True):
            part = columns.new_empty(n_out, len(columns), n_in + 1)
            part[..., :-1] = weight.reshape(-1, n_out, n_in).transpose(0, 1)
            part[..., -1] = bias.T
            parts.append(part)
        return parts

    def unpack(self, parts: Parts) -> Float[Tensor, "k N"]:
        """The reverse."""
        pieces = []
        for part in parts:
            flat = part.transpose(0, 1)
            pieces += [flat[..., :-1].flatten(1), flat[..., -1]]
        return torch.cat(pieces, 1)

    def expand(self, vector: Float[Tensor, " N"]) -> Parts:
        """Pieces [out, 1, in + 1]."""
        return self.pack(vector[None])

    def inner(self, vector: Parts, parts: Parts) -> Parts:
        """Inner products, [1, k, 1], the same for every piece."""
        sums = [torch.einsum("oi,oki->k", one[:, 0], part) for one, part in zip(vector, parts, strict=True)]
        total = torch.stack(sums).sum(0)[None, :, None]
        return [total] * len(parts)

    def gradient(self, step: int) -> Float[Tensor, " N"]:
        """δ h̃ᵀ of every layer."""
        return self.unpack([(layer.delta @ layer.below.T)[:, None] for layer in self._at(step).layers])[0]

    def product(self, step: int, x: Parts, out: Parts, beta: float) -> None:
        """Forward through the layers with ż, back with δ̇."""
        at = self._at(step)
        k, batch = x[0].shape[1], at.probabilities.shape[-1]
        raised: list[Tensor] = []  # ż of every layer
        hidden: list[Tensor | None] = [None]  # ḣ below every layer
        for i, (layer, theta) in enumerate(zip(at.layers, x, strict=True)):
            n_out = len(layer.weight)
            z = self._buffer("z", i, n_out, k, batch)
            torch.mm(theta.view(n_out * k, -1), layer.below, out=z.view(n_out * k, batch))
            if (below := hidden[-1]) is not None:
                z.view(n_out, k * batch).addmm_(layer.weight, below.view(len(below), k * batch))
            raised.append(z)
            if layer.slope is not None:
                hidden.append(torch.mul(z, layer.slope, out=self._buffer("h", i, n_out, k, batch)))
        p, back = at.probabilities, raised[-1]
        mean = (back * p).sum(0, keepdim=True)
        back.sub_(mean).mul_(p).div_(batch)
        for i in range(len(x) - 1, -1, -1):
            layer, (n_in, n_out) = at.layers[i], self._pairs()[i]
            rows, deltas = out[i].view(n_out * k, n_in + 1), back.view(n_out * k, batch)
            rows[:, :-1].addmm_(deltas, layer.below[:-1].T, beta=beta)  # the bias apart: widths of 64 are the fast ones
            rows[:, -1].mul_(beta).add_(deltas.sum(1)) if beta else torch.sum(deltas, 1, out=rows[:, -1])
            if (below := hidden[i]) is None:
                continue
            cross = torch.mm(layer.delta, below.view(n_in * k, batch).T).view(n_out, n_in, k)
            out[i][..., :-1].add_(cross.transpose(1, 2))
            upper = at.layers[i - 1]
            turned = x[i][..., :-1].permute(2, 1, 0).reshape(n_in * k, n_out)
            e = self._buffer("h", i - 1, n_in, k, batch)  # ḣ of that layer has been used
            torch.mm(turned, layer.delta, out=e.view(n_in * k, batch))
            e.view(n_in, k * batch).addmm_(layer.weight.T, back.view(n_out, k * batch))
            assert upper.slope is not None and upper.bend is not None
            back = e.mul_(upper.slope).addcmul_(raised[i - 1], upper.bend)

    def _at(self, step: int) -> _Step:
        if step in self._steps:
            return self._steps[step]
        map = self.path.map
        x, y = map.batch(step)
        weights = self._split(self.path[step].theta[None])
        kernels = [w.view(n_out, n_in) for (w, _), (n_in, n_out) in zip(weights, self._pairs(), strict=True)]
        one = x.new_ones(1, len(x))
        below, z = [torch.cat([x.to(kernels[0].dtype).T, one.to(kernels[0].dtype)])], []
        for i, ((_, bias), kernel) in enumerate(zip(weights, kernels, strict=True)):
            z.append(kernel @ below[-1][:-1] + bias.T)
            if i + 1 < len(kernels):
                below.append(torch.cat([activate(z[-1], self._activation), one.to(kernel.dtype)]))
        p = z[-1].softmax(0)
        delta = (p - nn.functional.one_hot(y, len(p)).T) / len(x)
        layers = [_Layer(kernels[-1], below[-1], delta, None, None)]
        for i in range(len(kernels) - 2, -1, -1):
            slope, bend = _derivatives(z[i], self._activation)
            e = kernels[i + 1].T @ delta
            delta = e * slope
            layers.insert(0, _Layer(kernels[i], below[i], delta, slope[:, None], (bend * e)[:, None]))
        made = _Step(layers, p[:, None])
        size = sum(t.numel() * t.element_size() for layer in layers for t in layer if t is not None)
        if size <= self._room:
            self._room -= size
            self._steps[step] = made
        return made

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._sizes, self._sizes[1:], strict=False))

    def _split(self, columns: Float[Tensor, "k N"]) -> list[tuple[Tensor, Tensor]]:
        lengths = [size for n_in, n_out in self._pairs() for size in (n_in * n_out, n_out)]
        pieces = columns.split(lengths, 1)
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def _buffer(self, *key: str | int) -> Tensor:
        """Memory that is used again by every step: fresh megabytes cost more than the arithmetic."""
        if key not in self._buffers:
            if len(self._buffers) > 64:
                self._buffers.clear()
            self._buffers[key] = torch.empty(*[int(size) for size in key[2:]], dtype=self.path.end.dtype)
        return self._buffers[key]


def _derivatives(z: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """φ'(z) and φ''(z)."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(activate(at, activation).sum(), at, create_graph=True)
        if not first.requires_grad:
            return first, torch.zeros_like(first)
        (second,) = torch.autograd.grad(first.sum(), at)
    return first.detach(), second
