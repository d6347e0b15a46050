"""Which tokens does a direction of the residual stream make likelier, if nothing comes between it and the head?

W_U (norm(√d w/|w|) - norm(0)), projection included: the direction at the length that a normed stream has, through the
final norm, without what the norm adds anyway. A direction of an early layer reaches the head by other ways as well, so
this is its direct effect alone (Dar et al. 2209.02535; the logit weights of Bricken et al. 2023).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.lm.model import LanguageModel

_ROWS = 256


class LogitEffects(NamedTuple):
    """The tokens that each direction moves most, strongest first, and by how many logits."""

    promoted: Int[Tensor, "n k"]
    up: Float[Tensor, "n k"]
    suppressed: Int[Tensor, "n k"]
    down: Float[Tensor, "n k"]


@torch.no_grad()
def logit_effects(lm: LanguageModel, rows: Float[Tensor, "n d_model"], *, kept: int = 10) -> LogitEffects:
    """Tokens that directions promote and suppress. Raises `ValueError` for rows of another width than the stream's."""
    if rows.ndim != 2 or rows.shape[1] != lm.d_model:
        raise ValueError(f"directions have shape {tuple(rows.shape)}; the stream of {lm.name} has width {lm.d_model}")
    unembedding = lm.unembedding
    weight = unembedding.weight
    kept = min(kept, len(weight))
    rest = unembedding.normed(weight.new_zeros(1, 1, lm.d_model))
    parts = []
    for piece in rows.to(weight.device).split(_ROWS):
        unit = piece.float() / piece.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        normed = unembedding.normed((math.sqrt(lm.d_model) * unit)[None].to(weight.dtype)) - rest
        moved = normed[0].float() @ weight.float().T * unembedding.scale
        up, down = moved.topk(kept), moved.topk(kept, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    columns = zip(*parts, strict=True) if parts else [[torch.zeros(0, kept)]] * 4
    ids, up, low, down = (torch.cat(list(column)).cpu() for column in columns)
    return LogitEffects(ids.long(), up, low.long(), down)
