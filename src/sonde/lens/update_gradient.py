"""Does each block move the residual stream down the gradient of the loss? The cosine of update and gradient.

Block l adds u_l = h_{l+1} - h_l. With L(h) the loss when the blocks after l run on h, to first order

    L(h_l + u_l) = L(h_l) + u_l · ∂L/∂h (h_l)

so that blocks which refine a prediction step by step have negative cosines (Jastrzębski et al. 1710.04773; Belrose et
al. 2303.08112, appendix). The gradient is taken where the block is left out: at h_{l+1}, after training, it tells
nothing, for a loss that no scaling of u_l lowers any more has u_l · ∂L/∂h = 0 on average.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.lens.fused import Readout, Target, divergence
from sonde.lens.rows import paired
from sonde.lm.batches import TokenBatch
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import run_from
from sonde.stats.intervals import Interval, bootstrap_ratio


@dataclass(frozen=True)
class UpdateGradient:
    """Of one block: the mean cosine over tokens, and the share of tokens where it is negative."""

    layer: int
    cosine: Interval
    negative: Interval


def update_gradient(
    lm: LanguageModel, batches: Iterable[TokenBatch], *, progress: str | None = None
) -> list[UpdateGradient]:
    """Cosines of update and gradient of every block over the tokens of a text, with intervals over its rows.

    Raises `SondeError` without text.
    """
    stream = [*(f"resid_pre.{i}" for i in range(lm.n_layers)), f"resid_post.{lm.n_layers - 1}"]
    readout = Readout(lm.unembedding)
    sums: list[Tensor] = []
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        # the last token of a row predicts nothing that is known
        here, there = (side.to(lm.device) for side in paired(batch.mask, 1))
        target = Target.tokens(readout, batch.tokens.to(lm.device)[there])
        with torch.no_grad(), lm.reading(*stream) as acts:
            lm(batch.tokens, batch.mask)
        rows = []
        for layer in range(lm.n_layers):
            before, after = acts[stream[layer]], acts[stream[layer + 1]]
            with torch.enable_grad():
                free = before.detach().requires_grad_()
                ends = run_from(lm, layer + 1, free, batch.tokens, batch.mask)
                normed = readout.normed(ends[here].to(readout.dtype))
                (gradient,) = torch.autograd.grad(divergence(normed[None], target, readout).sum(), free)
            cosine = cosine_similarity((after - before).float(), gradient.float(), dim=-1) * here
            rows.append(torch.stack([cosine.sum(-1), (cosine < 0).sum(-1)]))
        rows.append(torch.stack([here.sum(-1)] * 2))
        sums.append(torch.stack(rows).double().cpu())
    if not sums:
        raise SondeError("no text was given, so there is no gradient of its loss")
    *layers, counts = torch.cat(sums, -1).numpy()
    return [
        UpdateGradient(layer, bootstrap_ratio(cosine, counts[0]), bootstrap_ratio(negative, counts[0]))
        for layer, (cosine, negative) in enumerate(layers)
    ]
