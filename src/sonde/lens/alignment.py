"""Does the model respond to a change of its hidden state as a lens says that it should? Stimulus-response alignment.

The component of h_l in a subspace is replaced by that of another row of text. The *stimulus* is what this does to the
lens, the *response* what it does to the model, which runs on from the treated state:

    s = log q(treated) - log q(clean)        r = log p(treated) - log p(clean)

Alignment is the Aitchison similarity <s, r>_w / (|s|_w |r|_w), with <a, b>_w = Σ w clr_w(a) clr_w(b) and w the mean of
the model's clean and treated prediction (Belrose et al. 2303.08112, section 4.2). The control holds each stimulus
against the response of another token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.lens.ablation import ablate, check_orthonormal
from sonde.lens.fused import Readout
from sonde.lens.rows import paired
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatch
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import first_block, run_from
from sonde.lm.surgery import derangement
from sonde.stats import information
from sonde.stats.intervals import Interval, bootstrap_ratio

_AWAY = (
    17  # tokens between stimulus and response of the control: in one row mostly, for two rows may exchange components
)


@dataclass(frozen=True)
class Alignment:
    """Means over tokens at one layer, with intervals over rows of text.

    similarity, control: of stimulus and response of the same token, and of different tokens; between -1 and 1.
    stimulus, response: KL(clean || treated) of lens and model, in nats.
    loss_change: cross entropy of the model to the next token, treated minus clean, in nats.
    """

    site: str
    similarity: Interval
    control: Interval
    stimulus: Interval
    response: Interval
    loss_change: Interval


@torch.no_grad()
def alignment(
    lm: LanguageModel,
    lens: TunedLens,
    directions: Mapping[str, Float[Tensor, "k d_model"]],
    batches: Iterable[TokenBatch],
    *,
    seed: int = 0,
    progress: str | None = None,
) -> list[Alignment]:
    """Alignment at every site of `directions`, in the mapping's order.

    Args:
        lm: the model.
        lens: whose reading is the stimulus.
        directions: orthonormal rows that span the subspace, by site of the residual stream that the lens reads.
        batches: text; each batch needs at least two rows, which exchange their components.
        seed: of the exchange.
        progress: label of a progress bar; None for no bar.

    Raises:
        SondeError: for batches of one row, directions that are not orthonormal, sites beside the residual stream or the
            lens, and no text.

    """
    firsts = {site: first_block(lm, site) for site in directions}
    for site, vectors in directions.items():
        lens.layer(site)
        check_orthonormal(vectors)
    readout, last = Readout(lm.unembedding), f"resid_post.{lm.n_layers - 1}"
    sums: dict[str, list[Tensor]] = {site: [] for site in directions}
    for number, batch in enumerate(batches):
        mask, rows = batch.mask.to(lm.device), len(batch.mask)
        order = derangement(rows, seed=seed + number).to(lm.device)
        with lm.reading(*directions, last) as acts:
            lm(batch.tokens, batch.mask)
        both = mask & mask[order]
        row = torch.arange(rows, device=mask.device)[:, None].expand_as(mask)[both]
        labels = torch.full_like(batch.tokens, -1)
        here, there = paired(batch.mask, 1)
        labels[here] = batch.tokens[there]
        labels = labels.to(lm.device)[both]
        clean = readout.normed(acts[last][both].to(readout.dtype))
        for site in tqdm(directions, desc=progress, unit="layer", disable=progress is None, leave=False):
            hidden = acts[site]
            treated = ablate(hidden, directions[site].to(hidden), hidden[order])
            treated = torch.where(both[..., None], treated, hidden)
            ends = run_from(lm, firsts[site], treated, batch.tokens, batch.mask)[both].to(readout.dtype)
            before, after = (
                readout.normed(lens.translate(h[both].float(), site).to(readout.dtype)) for h in (hidden, treated)
            )
            values = _compare(readout, before, after, clean, readout.normed(ends), labels)
            by_row = values.new_zeros(len(values), rows, dtype=torch.float64)
            sums[site].append(by_row.index_add_(-1, row, values.double()).cpu())
    if any(not parts for parts in sums.values()):
        raise SondeError("no text was given, so no state could be treated")
    return [_summary(site, torch.cat(parts, -1).numpy()) for site, parts in sums.items()]


def _compare(
    readout: Readout,
    before: Float[Tensor, "n d_head"],
    after: Float[Tensor, "n d_head"],
    clean: Float[Tensor, "n d_head"],
    treated: Float[Tensor, "n d_head"],
    labels: Int[Tensor, " n"],
) -> Float[Tensor, "8 n"]:
    """By token: tokens, defined, similarity, control, stimulus and response KL, labelled, change of loss."""
    parts = []
    for part in readout.chunks(len(clean)):
        q, q_after, p, p_after = (readout.logits(x[part]).log_softmax(-1) for x in (before, after, clean, treated))
        stimulus, response = q_after - q, p_after - p
        weight = (p.exp() + p_after.exp()) / 2
        same = information.aitchison(stimulus, response, weight)
        other = information.aitchison(stimulus, response.roll(_AWAY, 0), weight)
        # a treatment that changes nothing has no direction
        defined = same.isfinite() & other.isfinite()
        label = labels[part].clamp(min=0)[:, None]
        labelled = labels[part] >= 0
        change = -response.gather(-1, label).squeeze(-1) * labelled
        ones = torch.ones_like(same)
        parts.append(
            torch.stack(
                [
                    ones,
                    defined.to(ones),
                    same.where(defined, 0 * ones),
                    other.where(defined, 0 * ones),
                    information.kl(q, q_after),
                    information.kl(p, p_after),
                    labelled.to(ones),
                    change,
                ]
            )
        )
    return torch.cat(parts, -1)


def _summary(site: str, sums: Float[np.ndarray, "8 rows"]) -> Alignment:
    tokens, defined, same, other, stimulus, response, labelled, change = sums
    if not defined.any():
        raise SondeError(
            f"replacing the component at {site} changes no prediction, so there is no alignment to measure"
        )
    return Alignment(
        site=site,
        similarity=bootstrap_ratio(same, defined),
        control=bootstrap_ratio(other, defined),
        stimulus=bootstrap_ratio(stimulus, tokens),
        response=bootstrap_ratio(response, tokens),
        loss_change=bootstrap_ratio(change, labelled),
    )
