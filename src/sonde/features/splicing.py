"""A dictionary in the place of the activations that it explains, while the model runs.

An autoencoder replaces its site. A transcoder reads its site and replaces its target, later in the same pass. Tokens
that are left out keep their own activations, as do those of an ablation that the splice is compared with.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.features.dictionary import Dictionary
from sonde.lm.taps import Edit

Predict = Callable[[Float[Tensor, "n inputs"]], Float[Tensor, "n outputs"]]


def splice(
    dictionary: Dictionary | Predict, site: str, target: str, taken: Bool[Tensor, "batch pos"] | None = None
) -> dict[str, Edit]:
    """Edits that put what `dictionary` says of `site` in the place of `target` (the same, for an autoencoder).

    Tokens where `taken` is false keep what they have. The edits are for one pass at a time over rows of that shape.
    """
    if site == target:
        return {site: _where(taken, dictionary)}
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen[:] = [x]
        return x

    def put(y: Tensor) -> Tensor:
        return _where(taken, dictionary, source=seen.pop())(y)

    return {site: keep, target: put}


def ablation(
    target: str, value: Float[Tensor, " d"] | float, taken: Bool[Tensor, "batch pos"] | None = None
) -> dict[str, Edit]:
    """Edits that put one vector (or number) in the place of every activation at `target`: 0, or their mean."""
    return {target: _where(taken, lambda x: torch.zeros_like(x) + torch.as_tensor(value, device=x.device).to(x.dtype))}


def _where(taken: Tensor | None, change: Predict, *, source: Tensor | None = None) -> Edit:
    def edit(x: Tensor) -> Tensor:
        read = x if source is None else source
        if taken is None:
            return change(read).to(x.dtype)
        out = x.clone()
        out[taken] = change(read[taken]).to(x.dtype)
        return out

    return edit
