"""How good are lenses on text that they were not trained on?

By layer, with intervals over rows of text: KL(p || q_l) from the model's prediction, cross entropy to the next token,
the share of tokens whose top token is the model's, and the share that is decided (see `sonde.lens.trajectory`). *Bias*
is KL(E p || E q_l), the divergence of mean predictions. *Transfer penalty* i -> j is the cross entropy of translator i
on h_j minus that of translator j; Belrose et al. (2303.08112) found it small where the covariances of h_i and h_j are
similar (Frobenius cosine, also without the dimensions of largest variance).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lens.fused import Readout, Target, divergence, read_layer
from sonde.lens.rows import LensRows, paired
from sonde.lens.trajectory import prediction_depth
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch, feed
from sonde.stats import information
from sonde.stats.intervals import Interval, bootstrap_ratio
from sonde.stats.moments import Moments
from sonde.stats.ranks import spearman


@dataclass(frozen=True)
class LensScores:
    """What a lens scored, by site; the last entry of `cross_entropy` and `decided` is the model's own output.

    Everything in nats a token or shares; intervals are bootstraps over rows of text.
    """

    sites: tuple[str, ...]
    kl: list[Interval]
    cross_entropy: list[Interval]
    agreement: list[Interval]
    decided: list[Interval]
    bias: list[float]
    n_tokens: int
    """Tokens that have something to be predicted from."""
    n_bytes: int
    """Bytes of text that they cover."""

    def bits_per_byte(self, nats: float) -> float:
        """A mean in nats a token as bits per byte of this text."""
        return information.bits_per_byte(nats, self.n_tokens, self.n_bytes)


class LensEvaluation:
    """Scores of several lenses in one pass: a consumer of a stream, which several processes may feed.

    Args:
        lm: the model.
        lenses: by name, all with the same sites.
        draws: bootstrap resamples of each interval.

    """

    def __init__(self, lm: LanguageModel, lenses: Mapping[str, TunedLens] | TunedLens, *, draws: int = 1000) -> None:
        self.lenses = {"lens": lenses} if isinstance(lenses, TunedLens) else dict(lenses)
        self.lens_sites = next(iter(self.lenses.values())).sites if self.lenses else ()
        if not self.lenses or any(lens.sites != self.lens_sites for lens in self.lenses.values()):
            raise SondeError("lenses that are compared must read the same sites, and there must be one at least")
        for name, lens in self.lenses.items():
            lens.check_fits(lm, f"the lens {name!r}")
        self._last = f"resid_post.{lm.n_layers - 1}"
        self.sites = (*self.lens_sites, self._last)
        self._readout = Readout(lm.unembedding)
        self._draws = draws
        layers, vocab = len(self.lens_sites), lm.vocab_size
        # Sums over each row of text. In common: tokens, scored tokens, bytes, cross entropy of the model's output; of a
        # lens, by layer: KL, cross entropy, agreement, decided.
        self._common: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {name: [] for name in self.lenses}
        self._mean_p = torch.zeros(vocab, dtype=torch.float64)
        self._mean_q = {name: torch.zeros(layers, vocab, dtype=torch.float64) for name in self.lenses}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Score a batch."""
        readout, mask = self._readout, batch.mask
        row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
        here, there = paired(mask, 1) if mask.shape[1] > 1 else (torch.zeros_like(mask), torch.zeros_like(mask))
        labels = torch.full_like(batch.tokens, -1)
        labels[here] = batch.tokens[there]
        labels = labels[mask]
        scored = labels >= 0
        rows = len(mask)

        def by_row(values: Float[Tensor, "... n"]) -> Float[Tensor, "... rows"]:
            sums = torch.zeros(*values.shape[:-1], rows, dtype=torch.float64, device=values.device)
            return sums.index_add_(-1, row, values.double())

        final = batch.acts[self._last][mask]
        target = Target.model(readout, final)
        own = read_layer(readout.normed(final.to(readout.dtype)), target, labels, readout)
        ones = torch.ones_like(scored)
        common = [by_row(ones), by_row(scored), batch.n_bytes.to(row.device).double(), by_row(own.cross_entropy)]
        self._common.append(torch.stack(common).cpu())
        self._mean_p += own.total.cpu()
        hidden = torch.stack([batch.acts[site][mask] for site in self.lens_sites])
        for name, lens in self.lenses.items():
            normed = readout.normed(lens.translate_all(hidden).to(readout.dtype))
            seen = [read_layer(x, target, labels, readout) for x in normed]
            top = torch.stack([*(layer.top for layer in seen), own.top])
            depth = prediction_depth(top)
            decided = depth[None] <= torch.arange(len(top) - 1, device=depth.device)[:, None]
            sums = [
                by_row(torch.stack([layer.kl for layer in seen])),
                by_row(torch.stack([layer.cross_entropy for layer in seen])),
                by_row(top[:-1] == own.top),
                by_row(decided),
            ]
            self._sums[name].append(torch.stack(sums).cpu())
            self._mean_q[name] += torch.stack([layer.total for layer in seen]).cpu()

    def scores(self) -> dict[str, LensScores]:
        """Scores of each lens.

        Raises `SondeError` before the first batch, and `ValueError` for a single row of text.
        """
        tokens, scored, n_bytes, own = self._common_sums()
        mean_p = (self._mean_p / self._mean_p.sum()).log()
        output = self._ratio(own, scored)
        whole = Interval(1.0, 1.0, 1.0, len(tokens))
        found = {}
        for name in self.lenses:
            kl, ce, agreement, decided = torch.cat(self._sums[name], -1).numpy()
            mean_q = self._mean_q[name] / self._mean_q[name].sum(-1, keepdim=True)
            # predictions are summed in float32, where what is far below all else is 0: the bias stays finite
            mean_q = mean_q.clamp(min=torch.finfo(torch.float32).tiny).log()
            found[name] = LensScores(
                sites=self.lens_sites,
                kl=[self._ratio(layer, tokens) for layer in kl],
                cross_entropy=[*(self._ratio(layer, scored) for layer in ce), output],
                agreement=[self._ratio(layer, tokens) for layer in agreement],
                decided=[*(self._ratio(layer, tokens) for layer in decided), whole],
                bias=information.kl(mean_p.expand_as(mean_q), mean_q).tolist(),
                n_tokens=int(scored.sum()),
                n_bytes=int(n_bytes.sum()),
            )
        return found

    def difference(self, first: str, second: str, *, of: Literal["kl", "cross_entropy"] = "kl") -> list[Interval]:
        """KL (or cross entropy) of one lens minus that of another by site, in nats a token, paired by rows of text."""
        which = ("kl", "cross_entropy").index(of)
        counted = self._common_sums()[which]
        a, b = (torch.cat(self._sums[name], -1)[which].numpy() for name in (first, second))
        return [self._ratio(layer, counted) for layer in a - b]

    def state(self) -> dict[str, Any]:
        """All sums so far."""
        return {
            "common": torch.cat(self._common, -1) if self._common else None,
            "sums": {name: torch.cat(parts, -1) for name, parts in self._sums.items() if parts},
            "mean_p": self._mean_p,
            "mean_q": self._mean_q,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Forget what was seen, and hold what `state` says."""
        self._common, self._sums = [], {name: [] for name in self.lenses}
        self._mean_p = torch.zeros_like(self._mean_p)
        self._mean_q = {name: torch.zeros_like(mean) for name, mean in self._mean_q.items()}
        self.merge_state(state)

    def merge_state(self, state: dict[str, Any]) -> None:
        """Add what another process has seen."""
        if state["common"] is not None:
            self._common.append(state["common"])
        for name, sums in state["sums"].items():
            self._sums[name].append(sums)
        self._mean_p = self._mean_p + state["mean_p"]
        self._mean_q = {name: mean + state["mean_q"][name] for name, mean in self._mean_q.items()}

    def _common_sums(self) -> Float[np.ndarray, "4 rows"]:
        if not self._common:
            raise SondeError("no text has been read, so the lenses have no scores")
        return torch.cat(self._common, -1).numpy()

    def _ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval:
        return bootstrap_ratio(numerator, denominator, draws=self._draws)


class LensSample:
    """A consumer that keeps the hidden states of the first `tokens` tokens that have a next one."""

    def __init__(self, lm: LanguageModel, sites: Sequence[str], *, tokens: int = 4096) -> None:
        self.lens_sites = lm.match(*sites)
        self._last = f"resid_post.{lm.n_layers - 1}"
        self.sites = (*self.lens_sites, self._last)
        self._wanted = tokens
        self._parts: list[LensRows] = []

    def update(self, batch: Batch) -> None:
        """Keep what is still wanted of a batch."""
        room = self._wanted - sum(len(part) for part in self._parts)
        if room > 0:
            self._parts.append(LensRows.of(batch, self.lens_sites, self._last, labels_shift=1)[:room])

    def rows(self) -> LensRows:
        """The sample; `labels` are the next tokens."""
        if not self._parts:
            raise SondeError("no text has been read, so there is no sample of hidden states")
        return LensRows.cat(self._parts)


@torch.no_grad()
def transfer_penalty(lens: TunedLens, rows: LensRows) -> Float[Tensor, "translator layer"]:
    """Cross entropy in nats of translator i on states of layer j minus that of translator j; 0 on the diagonal."""
    readout = Readout(lens.unembedding)
    target = Target.tokens(readout, rows.labels)
    losses = []
    for translator in range(len(lens)):
        moved = torch.stack([lens.translate(hidden.float(), translator) for hidden in rows.hidden])
        losses.append(divergence(readout.normed(moved), target, readout).double().mean(-1))
    loss = torch.stack(losses)
    return (loss - loss.diagonal()).cpu()


def covariance_similarity(
    hidden: Float[Tensor, "layers n d_model"], *, without: int = 0
) -> Float[Tensor, "layers layers"]:
    """Frobenius cosine of the covariances of hidden states of all pairs of layers, between 0 and 1.

    `without` leaves out that many dimensions: those with the largest mean share of a layer's variance ("rogue"
    dimensions, which alone can make any two layers look alike).
    """
    covariances = torch.stack([Moments(layer.shape[-1]).update(layer).covariance for layer in hidden])
    if not 0 <= without < covariances.shape[-1]:
        raise SondeError(f"without is {without}; it must be between 0 and {covariances.shape[-1] - 1} dimensions")
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    order = (variances / variances.sum(-1, keepdim=True)).mean(0).argsort(descending=True)
    kept = order[without:]
    flat = covariances[:, kept][:, :, kept].flatten(1)
    flat = flat / flat.norm(dim=-1, keepdim=True)
    return (flat @ flat.T).cpu()


def transfer_correlation(penalty: Float[Tensor, "layers layers"], similarity: Float[Tensor, "layers layers"]) -> float:
    """Spearman's correlation of transfer penalty and covariance similarity over ordered pairs of different layers."""
    if len(penalty) < 3:
        raise SondeError(f"a correlation over pairs of layers needs at least 3 layers, not {len(penalty)}")
    pairs = ~torch.eye(len(penalty), dtype=torch.bool)
    return float(spearman(penalty[pairs].numpy(), similarity[pairs].numpy()))


@dataclass(frozen=True)
class AttachReport:
    """What a lens of a base model reads in a fine-tuned version of it, on one text; in nats, by site.

    Where a lens of the fine-tuned model itself was given, `tuned` has its scores as "own"; `cost` is how much larger
    the cross entropy of the attached lens is than that of this one, `logit_cost` the same for the logit lens.
    """

    lens: TunedLens
    """Attached to the fine-tuned model."""
    base: LensScores
    """Of the lens on its own model."""
    tuned: dict[str, LensScores]
    """Of "attached" and "logit" on the fine-tuned model, and of "own" where it was given."""
    gain: list[Interval]
    """KL of the attached lens minus that of the logit lens, paired by rows of text."""
    cost: list[Interval] | None
    logit_cost: list[Interval] | None

    @property
    def before(self) -> list[Interval]:
        """KL of the lens on its own model."""
        return self.base.kl

    @property
    def after(self) -> list[Interval]:
        """KL of the attached lens on the fine-tuned model."""
        return self.tuned["attached"].kl

    @property
    def logit_lens(self) -> list[Interval]:
        """KL of the logit lens on the fine-tuned model."""
        return self.tuned["logit"].kl


def attach_report(
    lens: TunedLens,
    base: LanguageModel,
    tuned: LanguageModel,
    batches: TokenBatches,
    *,
    own: TunedLens | None = None,
    force: bool = False,
    progress: str | None = None,
) -> AttachReport:
    """Attach a lens of `base` to a fine-tuned version of it, and measure on the same text what it reads there.

    `own` is a lens of the fine-tuned model to compare with. Raises `SondeError` as `TunedLens.attach` does.
    """
    attached = lens.attach(tuned, force=force)
    on_base = LensEvaluation(base, lens)
    feed(base, batches, [on_base], progress=progress)
    lenses = {"attached": attached, "logit": TunedLens.logit(tuned, sites=lens.sites)}
    there = LensEvaluation(tuned, lenses if own is None else {**lenses, "own": own})
    feed(tuned, batches, [there], progress=progress)
    return AttachReport(
        attached,
        on_base.scores()["lens"],
        there.scores(),
        there.difference("attached", "logit"),
        *(
            None if own is None else there.difference(lens_name, "own", of="cross_entropy")
            for lens_name in ("attached", "logit")
        ),
    )
