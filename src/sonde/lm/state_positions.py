"""What a recurrent network remembers after every token of a passage, and its state as a vector of features.

Models return the state after their last token alone, so a passage is run one token at a time from its own cache: the
states are those of the model, in every family that continues rightly, in canonical form (see `sonde.lm.state_algebra`).
A state has many times the width of the residual stream; as features for probes it is pooled (the mean over the state
dimension of each channel) or projected to a chosen width by a seeded Gaussian matrix that keeps lengths and angles on
average (Johnson and Lindenstrauss 1984), never held in memory as a whole.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.continuation import call, continuation
from sonde.lm.model import LanguageModel
from sonde.lm.state import Cache
from sonde.lm.state_algebra import states

Features = Callable[[Float[Tensor, "batch ..."]], Tensor]

_ROWS = 4096  # of a projection at a time


@torch.no_grad()
def states_by_position(
    lm: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    layers: Sequence[int] | None = None,
    *,
    part: str = "recurrent",
    features: Features | None = None,
) -> dict[int, Float[Tensor, "batch pos ..."]]:
    """The canonical state of layers after each token, by stepping.

    Args:
        lm: a model with a recurrence.
        tokens: rows of equal length, without pads.
        layers: by default all that have the part.
        part: recurrent, conv or shift.
        features: what is kept of a state (batch, …), such as `pooled` or a `Projection`; by default all of it.

    Returns:
        Tensors (batch, pos, …) by layer. They equal the state of a run that ends there, in one call, to rounding.

    Raises:
        SondeError: for a model that continues wrongly, a layer without the part, and ids that are not (batch, pos).

    """
    if tokens.ndim != 2 or not tokens.numel():
        raise SondeError(f"tokens are ids of shape (batch, pos), not {tuple(tokens.shape)}")
    continuation(lm.model).require(lm.name)
    tokens = tokens.to(lm.device)
    cache: Cache | None = None
    found: dict[int, list[Tensor]] = {}
    for i in range(tokens.shape[1]):
        _, cache = call(lm.model, tokens[:, i : i + 1], cache=cache)
        if not found:
            found = {layer: [] for layer in _layers(lm, cache, layers, part)}
        for layer, kept in found.items():
            (state,) = states(cache, layer, part).values() if part != "shift" else [_joined(cache, layer)]
            kept.append(state if features is None else features(state))
    return {layer: torch.stack(kept, 1) for layer, kept in found.items()}


def pooled(state: Float[Tensor, "... d_state"]) -> Float[Tensor, "batch channels"]:
    """The mean over the state dimension, one number for each channel; a state without one (RWKV-4) is as it is."""
    return state.mean(-1).flatten(1) if state.ndim > 2 else state


class Projection:
    """A seeded Gaussian projection of a flattened state to `width` numbers: the same matrix at every call.

    The matrix is drawn in blocks of rows, so that a state of millions of numbers needs no more memory than itself.
    """

    def __init__(self, width: int, *, seed: int = 0) -> None:
        if width < 1:
            raise SondeError(f"a projection to {width} numbers is none: give 1 or more")
        self.width, self.seed = width, seed

    def __call__(self, state: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch width"]:
        """`state` in `width` numbers; inner products are kept on average."""
        flat = state.flatten(1).float()
        generator = torch.Generator().manual_seed(self.seed)
        out = flat.new_zeros(len(flat), self.width)
        for part in flat.split(_ROWS, dim=1):
            matrix = torch.randn(part.shape[1], self.width, generator=generator)
            out += part @ matrix.to(part.device)
        return out / self.width**0.5


def _layers(lm: LanguageModel, cache: Cache, layers: Sequence[int] | None, part: str) -> list[int]:
    having = [layer for layer in range(cache.n_layers) if part in cache.parts(layer)]
    if not having:
        raise SondeError(
            f"{lm.name} has no {part} memory in any layer: it keeps {', '.join(_kinds(cache)) or 'nothing'}"
        )
    wrong = [layer for layer in layers or () if layer not in having]
    if wrong:
        raise SondeError(f"state.{wrong[0]} of {lm.name} has no {part} memory: layers {', '.join(map(str, having))} do")
    return list(layers) if layers is not None else having


def _kinds(cache: Cache) -> list[str]:
    return sorted({part for layer in range(cache.n_layers) for part in cache.parts(layer)})


def _joined(cache: Cache, layer: int) -> Tensor:
    """The last tokens of mixer and MLP beside each other."""
    return torch.cat(list(states(cache, layer, "shift").values()), -1)
