"""How much of their implementation do two tasks share? Three predictors of how long one outlives its own training.

    CKA               of two languages' activations on the same states, per layer; control: states in another order
    swap              language i's middle state patched into j at the same place: does j go on with i's state?
    gradient cosine   of the two tasks' loss gradients; one step of -lr g_A changes the loss of B by -lr <g_A, g_B>

A swap is scored on pairs of rows of the same length of symbols: with the stream at the last symbol of a state replaced,
the next state should be the successor of i's, written in j's alphabet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.data.task_mixture import Task
from sonde.data.toy_languages import LANGUAGES, MODULUS, alphabet, name_token, runs
from sonde.dynamics.decay_gate import cka
from sonde.dynamics.decay_scores import next_token_loss
from sonde.errors import SondeError

_ROWS = 256


@dataclass(frozen=True)
class Sharing:
    """What two languages share: CKA at every point of the network and its control, swap rate and its control, cosine.

    `swap_control` is how often the same symbols come without the swap; `rate` is -<g_A, g_B>, the first-order change of
    the loss of B for each unit of learning rate that is spent on A.
    """

    cka: tuple[float, ...]
    cka_control: tuple[float, ...]
    swap: float
    swap_control: float
    cosine: float
    rate: float


@torch.no_grad()
def same_states(
    first: str, second: str, *, width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Float[np.ndarray, "rows states"]]:
    """Rows of two map languages that hold the same states, and the states.

    Raises `SondeError` for languages that are no maps or are written in another number of symbols.
    """
    ours, theirs = LANGUAGES[first], LANGUAGES[second]
    if ours.rendering is None or theirs.rendering is None or ours.map is None:
        raise SondeError(f"{first} and {second} hold no states to compare: give two maps")
    if ours.rendering.places != theirs.rendering.places:
        raise SondeError(f"{first} and {second} are written in different numbers of symbols: their places do not match")
    count = (width - 1) // ours.rendering.places
    states, _ = runs(_ROWS, count, ours.map, np.random.default_rng((seed, 7)))
    rows = [
        np.concatenate([np.full((_ROWS, 1), name_token(name)), rendering.write(states) + alphabet(name)[0]], axis=1)
        for name, rendering in ((first, ours.rendering), (second, theirs.rendering))
    ]
    return torch.from_numpy(rows[0]), torch.from_numpy(rows[1]), states


@torch.no_grad()
def cross_cka(
    module: nn.Module, first: str, second: str, *, width: int, seed: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """CKA of two languages on the same states at each point of a `Transformer`; and on rows that are not the same.

    The mean over rows of each place is taken off, which two languages share without sharing anything about states.
    """
    a, b, _ = same_states(first, second, width=width, seed=seed)
    x, y = module.streams(a)[:, :, 1:], module.streams(b)[:, :, 1:]  # type: ignore[operator]
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    other = y[:, torch.randperm(len(b), generator=torch.Generator().manual_seed(seed))]
    same, control = (
        tuple(cka(p.flatten(0, 1), q.flatten(0, 1)) for p, q in zip(x, z, strict=True)) for z in (y, other)
    )
    return same, control


@torch.no_grad()
def swap_rate(module: nn.Module, first: str, second: str, *, width: int, seed: int = 0) -> tuple[float, float]:
    """How often `second` goes on with the state of `first` when the middle stream of one state is taken from it.

    Whole next states right, with the readout limited to `second`'s alphabet, and the same without the swap: what comes
    by chance, where both rows go on alike.
    """
    a, b, states = same_states(first, second, width=width, seed=seed)
    rendering, (factor, constant) = LANGUAGES[second].rendering, LANGUAGES[second].map or (1, 0)
    assert rendering is not None
    b = b.roll(1, 0)  # another row's states, so that both cannot go on alike but by chance
    places = rendering.places
    states_at = 1  # the second state of the row, inside its first run
    last = (states_at + 1) * places  # the token at which it is complete
    middle = len(module.blocks) // 2  # type: ignore[arg-type]
    given = module.streams(a)[middle][:, last - places + 1 : last + 1]  # type: ignore[operator]
    wanted = torch.from_numpy(rendering.write((factor * states[:, [states_at]] + constant) % MODULUS))
    wanted = wanted + alphabet(second)[0]

    def patched(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, last - places + 1 : last + 1] = given
        return x

    found = []
    own = torch.tensor(alphabet(second))
    for edits in ({middle: patched}, None):
        tokens = b.clone()
        for step in range(places):
            tokens[:, last + 1 + step] = wanted[:, step]  # taught: one wrong symbol is one wrong state
        logits = module(tokens, edits)[:, last : last + places][..., own]
        found.append(float((own[logits.argmax(-1)] == wanted).all(1).double().mean()))
    return found[0], found[1]


def gradient(module: nn.Module, tasks: Sequence[Task]) -> Float[Tensor, " parameters"]:
    """Gradient of the mean training loss of some tasks on 256 rows of each, as one vector."""
    loss = torch.stack([next_token_loss(module, task.rows[:_ROWS].long(), task.pad) for task in tasks]).mean()
    found = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def gradient_cosine(module: nn.Module, kept: Sequence[Task], dropped: Sequence[Task]) -> tuple[float, float]:
    """Cosine of the gradients of what is trained and what is not, and -<g_A, g_B>, the first-order rate of decay."""
    a, b = gradient(module, kept), gradient(module, dropped)
    inner = float(a @ b)
    return inner / float(a.norm() * b.norm()), -inner


def sharing(
    module: nn.Module,
    first: str,
    second: str,
    kept: Sequence[Task],
    dropped: Sequence[Task],
    *,
    width: int,
    seed: int = 0,
) -> Sharing:
    """All predictors: of `first`, which is kept, for `second`, which is dropped; cosine of all that is kept."""
    same, other = cross_cka(module, first, second, width=width, seed=seed)
    swapped, control = swap_rate(module, first, second, width=width, seed=seed)
    cosine, rate = gradient_cosine(module, kept, dropped)
    return Sharing(same, other, swapped, control, cosine, rate)
