"""What does a dictionary lose? Reconstruction, the auxiliary loss of dead latents and the penalty of kinds without k.

FVU = Σ‖y - ŷ‖² / Σ‖y - ȳ‖², with ȳ and the denominator of the whole batch. Aux-k (Gao et al. 2406.04093): e = y - ŷ is
held fixed; of the dead latents the k_aux = min(d/2, #dead) with the largest pre predict it, without the bias, and
L_aux = min(#dead / (d/2), 1) ‖ê - e‖² / ‖e - ē‖². The dead latents' pre come from their own rows of the encoder, and
their gradients reach it. Latents of a cross-layer transcoder's layers add up before the error is taken, so a loss is
that of `Part`s, each with its own columns of the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.features import selection
from sonde.features.dictionary import Active, Dictionary
from sonde.features.sparse_ops import Pattern, decode, read
from sonde.features.step_config import StepConfig
from sonde.features.straight_through import step_above


@dataclass
class Part:
    """A dictionary in a loss: what it reads, the first column of the target that it writes, and its dead latents."""

    dictionary: Dictionary
    x: Float[Tensor, "n inputs"]
    dead: Bool[Tensor, " latents"]
    column: int = 0


class Scale(NamedTuple):
    """What the sums over the rows of a micro-batch are divided by: those of the whole batch."""

    variance: Tensor | float  # Σ‖y - ȳ‖²
    rows: int


class Code(NamedTuple):
    """Latents of a part, and what follows from them."""

    outputs: list[Float[Tensor, "n outputs"]]  # one, or one for each prefix, the last with all latents
    wider: Float[Tensor, "n outputs"] | None  # with 4k latents
    gate: Float[Tensor, "n outputs"] | None  # of kind "gated": what its open gates alone say, decoder held fixed
    penalty: Tensor | None  # λ-free, a mean over rows
    fired: Bool[Tensor, " latents"]
    l0: Tensor
    smallest: Tensor | None  # the smallest positive value that was kept, where θ follows it


class Losses(NamedTuple):
    """The loss of a micro-batch, its terms (numbers that add up over micro-batches) and which latents fired."""

    total: Tensor
    terms: dict[str, Tensor]
    fired: list[Bool[Tensor, " latents"]]
    smallest: list[Tensor | None]


def variance(y: Float[Tensor, "n outputs"]) -> Tensor:
    """Σ‖y - ȳ‖² over the rows."""
    return (y - y.mean(0)).square().sum()


def losses(
    parts: Sequence[Part],
    y: Float[Tensor, "n outputs"],
    config: StepConfig,
    scale: Scale,
    *,
    k: int | None = None,
    sparsity: float = 0.0,
) -> Losses:
    """The loss of `parts` that together predict `y`.

    Args:
        parts: one dictionary, or the layers of a cross-layer transcoder.
        y: the targets.
        config: as `StepConfig.for_design` filled it.
        scale: sums of the whole batch.
        k: stands for the designs' own.
        sparsity: λ now.

    """
    codes = [_code(part, config, k) for part in parts]
    divisor = scale.variance if config.reconstruction == "fvu" else scale.rows
    weights = parts[0].dictionary.design.prefix_weights or (1.0,)
    total = y.new_zeros(())
    terms: dict[str, Tensor] = {}
    error = y
    for place, weight in enumerate(weights):
        error = y - _sum([code.outputs[place] for code in codes], parts, y)
        total = total + weight * error.square().sum() / divisor
    terms["fvu"] = error.detach().square().sum() / scale.variance
    if parts[0].dictionary.design.multi_topk:
        wider = _sum([code.wider for code in codes if code.wider is not None], parts, y)
        terms["multi"] = (y - wider).square().sum() / divisor
        total = total + terms["multi"] / 8
    share = len(y) / scale.rows
    for part, code in zip(parts, codes, strict=True):
        if config.aux_weight:
            missed = error.detach()[:, part.column :]
            aux = auxiliary(part, missed, k=config.aux_k or 1, rectify=config.aux_rectify)
            if aux is not None:
                terms["aux"] = terms.get("aux", 0) + share * aux
                total = total + config.aux_weight * share * aux
        if code.penalty is not None:
            terms["penalty"] = terms.get("penalty", 0) + share * code.penalty.detach()
            total = total + sparsity * share * code.penalty
        if code.gate is not None:
            total = total + (y[:, part.column :] - code.gate).square().sum() / divisor
        if config.dead_penalty:
            total = total + config.dead_penalty * share * _dead_penalty(part)
    terms["l0"] = share * torch.stack([code.l0 for code in codes]).sum()
    terms["loss"] = total
    return Losses(
        total,
        {name: term.detach() for name, term in terms.items()},
        [code.fired for code in codes],
        [code.smallest for code in codes],
    )


def auxiliary(part: Part, error: Float[Tensor, "n outputs"], *, k: int, rectify: bool = True) -> Tensor | None:
    """L_aux of a part, for what is missed; None without dead latents."""
    dead = part.dead.nonzero()[:, 0]
    if not len(dead):
        return None
    dictionary = part.dictionary
    x = dictionary.encoder_input(part.x).detach()
    few = selection.top_k(x, dictionary.w_enc[dead].detach(), dictionary.b_enc[dead].detach(), min(k, len(dead)))
    pattern = Pattern(dead[few.pattern.latents], few.pattern.starts, dictionary.design.latents)
    values = read(part.x, dictionary.w_enc, dictionary.b_enc, pattern, few.pre, centre=dictionary.centre)
    predicted = decode(values.relu() if rectify else values, dictionary.w_dec, pattern)
    spread = variance(error)
    return (
        min(len(dead) / k, 1.0) * (predicted - error).square().sum() / spread.clamp(min=torch.finfo(spread.dtype).tiny)
    )


def _sum(outputs: Sequence[Tensor], parts: Sequence[Part], y: Tensor) -> Tensor:
    """Outputs of the parts, each in its own columns, with biases and skips."""
    if len(parts) == 1:
        return parts[0].dictionary.finished(outputs[0], parts[0].x)
    whole = torch.zeros_like(y)
    for part, output in zip(parts, outputs, strict=True):
        finished = part.dictionary.finished(output, part.x)
        whole = whole + torch.nn.functional.pad(finished, (part.column, 0))
    return whole


def _code(part: Part, config: StepConfig, k: int | None) -> Code:
    dictionary = part.dictionary
    if dictionary.design.k is None:
        return _dense_code(part, config)
    if dictionary.design.multi_topk:
        active, wider = _nested(part, k or dictionary.design.k)
    else:
        active, wider = dictionary.active(part.x, k=k), None
    pattern, values = active
    fires = values.detach() > 0
    fired = torch.zeros(pattern.size, dtype=torch.bool, device=values.device)
    fired[pattern.latents[fires]] = True
    smallest = None
    if dictionary.design.chooses_across_rows:
        worth = dictionary.worth()
        ranks = values.detach() if worth is None else values.detach() * worth[pattern.latents]
        smallest = ranks[fires].min() if bool(fires.any()) else None
    outputs = _prefixes(dictionary, active)
    return Code(outputs, wider, None, None, fired, fires.sum().double() / pattern.n, smallest)


def _prefixes(dictionary: Dictionary, active: Active) -> list[Tensor]:
    """What the latents of each prefix say; without prefixes, what all say."""
    pattern, values = active
    ends = dictionary.design.prefixes
    if not ends:
        return [decode(values, dictionary.w_dec, pattern)]
    outputs: list[Tensor] = []
    for start, end in zip((0, *ends), ends, strict=False):
        here = (pattern.latents >= start) & (pattern.latents < end)
        starts = torch.cat([here.new_zeros(1, dtype=torch.int64), here.cumsum(0)])[pattern.starts]
        own = Pattern(pattern.latents[here], starts, pattern.size)
        added = decode(values[here], dictionary.w_dec, own)
        outputs.append(outputs[-1] + added if outputs else added)
    return outputs


def _nested(part: Part, k: int) -> tuple[Active, Tensor]:
    """The k largest, and the output of the 4k largest, from one selection."""
    dictionary = part.dictionary
    many = min(4 * k, dictionary.design.latents)
    active = dictionary.active(part.x, k=many)
    pattern, values = active
    worth = dictionary.worth()
    ranks = values.detach() if worth is None else values.detach() * worth[pattern.latents]
    places = torch.topk(ranks.view(-1, many), k, sorted=False)[1]
    latents = pattern.latents.view(-1, many).gather(1, places)
    few = Active(Pattern.of_indices(latents, pattern.size), values.view(-1, many).gather(1, places).view(-1))
    return few, decode(values, dictionary.w_dec, pattern)


def _dense_code(part: Part, config: StepConfig) -> Code:
    dictionary = part.dictionary
    values, pre = dictionary.dense(part.x)
    fires = values.detach() > 0
    free, gates = config.norm == "free", None
    if dictionary.design.kind == "gated":
        gate = pre.relu()
        weights = dictionary.decoder_norms() if free else None
        penalty = (gate if weights is None else gate * weights).sum(1).mean()
        gates = gate @ dictionary.w_dec.detach() + dictionary.b_dec.detach()
    elif config.penalty == "l1":
        penalty = (values * dictionary.decoder_norms() if free else values).sum(1).mean()
    elif config.penalty == "tanh":
        penalty = torch.tanh(config.tanh_scale * values * dictionary.decoder_norms()).sum(1).mean()
    else:
        penalty = _l0_penalty(dictionary, pre, config)
    output = values @ dictionary.w_dec
    return Code([output], None, gates, penalty, fires.any(0), fires.sum().double() / len(values), None)


def _l0_penalty(dictionary: Dictionary, pre: Tensor, config: StepConfig) -> Tensor:
    design = dictionary.design
    threshold = dictionary.get_parameter("threshold")
    l0 = step_above(pre, threshold, design.bandwidth, to_input=design.ste_to_input).sum(1).mean()
    target = config.target_l0
    if config.penalty == "l0" or target is None:
        return l0
    return (l0 / target - 1).square() if config.penalty == "l0_target" else 2 / target * (l0 - target).square()


def _dead_penalty(part: Part) -> Tensor:
    dictionary = part.dictionary
    dead = part.dead.nonzero()[:, 0]
    pre = torch.addmm(dictionary.b_enc[dead], dictionary.encoder_input(part.x), dictionary.w_enc[dead].T)
    short = (dictionary.get_parameter("threshold")[dead] - pre).relu()
    return (short * dictionary.decoder_norms()[dead]).sum(1).mean()
