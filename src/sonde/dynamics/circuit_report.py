"""What exactly a grokked network computes: neurons by frequency, logit directions, attention, and what each is worth.

A neuron belongs to the frequency whose {1, cos, sin} x {1, cos, sin} block explains most of its centred activations,
where that is 0.85 or more. The logit map W_L is close to sum_k cos(w_k c) u_k + sin(w_k c) v_k, and u_k, v_k read
cos w_k(a+b) and sin w_k(a+b) off the MLP (arXiv:2301.05217, section 4). Each step is held against the network: the loss
when only it is kept, or when it is replaced by what it is claimed to be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.data.groups import GroupTask
from sonde.data.modular import ModularTask, all_pairs
from sonde.dynamics.fourier import basis, block_directions, frequencies, sum_directions
from sonde.dynamics.grokking import grid_of, key_frequencies_by_embedding
from sonde.dynamics.progress_measures import Grid
from sonde.errors import SondeError
from sonde.nets.one_layer import OneLayer
from sonde.nets.pair_networks import PairNetwork, logit_map

_EXPLAINED = 0.85
_LEAST = 5  # neurons that make a cluster


@dataclass(frozen=True)
class Check:
    """One claim about the circuit: variance explained (None where it is none), and the loss on all pairs with it."""

    what: str
    explained: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class CircuitReport:
    """Frequencies by three rules, neurons by frequency, and the checks in the order of the network."""

    keys: tuple[int, ...]
    keys_by_neurons: tuple[int, ...]
    keys_by_embedding: tuple[int, ...]
    clusters: dict[int, int]
    clustered: float
    checks: tuple[Check, ...]

    @property
    def agree(self) -> bool:
        """Whether shares of the logits and clusters of neurons name the same frequencies."""
        return set(self.keys) == set(self.keys_by_neurons)


@torch.no_grad()
def circuit_report(net: PairNetwork, task: ModularTask | GroupTask, keys: Sequence[int] | None = None) -> CircuitReport:
    """All checks of one checkpoint. `keys` are by default the frequencies with over 2 % of the logits' variance.

    Raises `SondeError` for a network without key frequencies, for another than the one-layer transformer, and for an
    operation other than addition.
    """
    if not isinstance(net, OneLayer):
        raise SondeError(f"the checks are of the one-layer transformer, not of a {type(net).__name__}")
    operation = task.operation if isinstance(task, ModularTask) else task.group
    if not isinstance(task, ModularTask) or operation != "add":
        raise SondeError(f"the checks are of a + b, not of {operation!r}")
    net = _double(net)
    grid = grid_of(net, task)
    keys = tuple(keys) if keys is not None else grid.key_frequencies()
    stream, activations = net.parts(task.pairs)
    best, frequency = neuron_frequencies(activations, task.modulus)
    belongs = best >= _EXPLAINED
    counts = {k: int((belongs & (frequency == k)).sum()) for k in frequencies(task.modulus)}
    clusters = {k: n for k, n in sorted(counts.items(), key=lambda item: -item[1]) if n >= _LEAST}
    return CircuitReport(
        keys=keys,
        keys_by_neurons=tuple(clusters),
        keys_by_embedding=key_frequencies_by_embedding(net),
        clusters=clusters,
        clustered=float(belongs.double().mean()),
        checks=tuple(_checks(net, task, grid, keys, stream, activations, frequency)),
    )


def neuron_frequencies(
    activations: Float[Tensor, "pairs hidden"], modulus: int
) -> tuple[Float[Tensor, " hidden"], Float[Tensor, " hidden"]]:
    """For each neuron the largest share of variance that one frequency's block explains, and that frequency.

    The block of k is spanned by cosine and sine of a + b, of a - b, of a and of b: four sums over pairs and one small
    transform give every share, without the transform of the whole grid.
    """
    centred = (activations - activations.mean(0)).double()
    a, b = all_pairs(modulus).unbind(1)
    rows = basis(modulus)[1 : 1 + 2 * len(frequencies(modulus))]
    square = centred.view(modulus, modulus, -1)
    sums = [square.sum(1), square.sum(0)]
    for place in ((a + b) % modulus, (a - b) % modulus):
        sums.append(torch.zeros_like(sums[0]).index_add_(0, place, centred))
    energy = (rows @ torch.stack(sums)).square().sum(0) / modulus
    shares = energy.view(len(rows) // 2, 2, -1).sum(1)
    best, k = (shares / centred.square().sum(0).clamp(min=1e-300)).max(0)
    return best, k + 1


def _checks(
    net: OneLayer,
    task: ModularTask,
    grid: Grid,
    keys: Sequence[int],
    stream: Tensor,
    activations: Tensor,
    frequency: Tensor,
) -> list[Check]:
    def loss(stream: Tensor, activations: Tensor) -> float:
        return grid.loss("all", net.logits(stream, activations)[:, : task.modulus])

    p = task.modulus
    readers = torch.linalg.qr(logit_directions(net, keys).T).Q  # hidden, 2K
    mean = activations.mean(0, keepdim=True)
    inside = (activations - mean) @ readers @ readers.T
    sums = sum_directions(p, keys)
    polynomial = _by_own_frequency(activations, frequency, p)
    attention = net.attention(task.pairs)
    linear, explained = _linear_attention(attention, p, keys)
    read = (activations - mean) @ logit_directions(net, keys).T
    residual = logit_map(net) - logit_map(net).mean(0)
    kept = _on_key_rows(residual, p, keys)
    return [
        Check("the network itself", loss=grid.loss("all")),
        Check(
            "attention to the first number is ½ + a sum of cosines and sines of the key frequencies",
            explained,
            loss(*_with_attention(net, task, linear)),
        ),
        Check(
            "every neuron is a function of its own frequency alone",
            _explained(activations, polynomial),
            loss(stream, polynomial),
        ),
        Check(
            "the logit directions read cosines and sines of a + b",
            _explained(read, sums @ (sums.T @ read)),
        ),
        Check("the logit map has the key frequencies alone", float(kept.square().sum() / residual.square().sum())),
        Check("the MLP on the logit directions alone", loss=loss(stream, mean + inside)),
        Check("the MLP on everything but the logit directions", loss=loss(stream, activations - inside)),
        Check(
            "the logits on functions of a + b alone",
            loss=grid.loss("all", grid.harmonics.project(grid.logits, keys) + grid.mean),
        ),
        Check(
            "the logits on products of the key frequencies (wide)",
            loss=grid.loss("all", grid.harmonics.project_wide(grid.logits, keys) + grid.mean),
        ),
    ]


def logit_directions(net: OneLayer, keys: Sequence[int]) -> Float[Tensor, "two_k hidden"]:
    """u_k and v_k: the cosine and sine rows of W_L over the classes."""
    f = basis(net.shape.modulus)
    rows = [row for k in keys for row in (2 * k - 1, 2 * k)]
    return f[rows] @ logit_map(net)


def _on_key_rows(matrix: Tensor, p: int, keys: Sequence[int]) -> Tensor:
    f = basis(p)[[row for k in keys for row in (2 * k - 1, 2 * k)]]
    return f.T @ (f @ matrix)


def _explained(x: Tensor, fitted: Tensor) -> float:
    """Share of the centred variance of x that `fitted` explains."""
    centred = x - x.mean(0)
    return float(1 - (centred - (fitted - fitted.mean(0))).square().sum() / centred.square().sum())


def _by_own_frequency(activations: Tensor, frequency: Tensor, p: int) -> Tensor:
    """Each neuron's activations on the nine products of its own frequency, the constant among them."""
    fitted = activations.mean(0, keepdim=True).repeat(len(activations), 1)
    for k in frequency.unique().tolist():
        own = frequency == k
        directions = block_directions(p, [int(k)])
        fitted[:, own] += directions @ (directions.T @ activations[:, own])
    return fitted


def _linear_attention(attention: Tensor, p: int, keys: Sequence[int]) -> tuple[Tensor, float]:
    """Attention to a, b and `=` by regression on cosines and sines of each number at the key frequencies."""
    f = basis(p)[[row for k in keys for row in (2 * k - 1, 2 * k)]].T  # p, 2K
    numbers = torch.arange(p)
    a, b = torch.cartesian_prod(numbers, numbers).unbind(1)
    design = torch.cat([torch.ones(p * p, 1, dtype=torch.float64), f[a], f[b]], 1)
    flat = attention.flatten(1)
    fitted = design @ torch.linalg.lstsq(design, flat).solution
    heads = attention.shape[2]
    return fitted.view_as(attention), _explained(flat[:, :heads], fitted[:, :heads])


def _with_attention(net: OneLayer, task: ModularTask, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Stream and activations when attention is given."""
    own = net.attention
    net.attention = lambda pairs: attention  # type: ignore[method-assign]
    try:
        return net.parts(task.pairs)
    finally:
        net.attention = own  # type: ignore[method-assign]


def _double(net: OneLayer) -> OneLayer:
    copy = OneLayer(net.shape)
    copy.load_state_dict(net.state_dict())
    return copy.double().eval().requires_grad_(False)
