"""What a model loses when a dictionary stands for its activations, beside what it loses without them.

With CE the next-token cross-entropy in nats of the model as it is (clean), with the dictionary spliced in, and with its
activations put to 0 or to their mean (ablated),

    Δ-CE = CE_spliced - CE_clean,      CE recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean),
    KL recovered = 1 - KL(clean | spliced) / KL(clean | ablated).

A recovered share says against which ablation: against 0 it looks better, because 0 breaks more than the mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.features.dictionary import Dictionary
from sonde.features.reconstruction import ratio_of_sums
from sonde.features.splicing import ablation, splice
from sonde.lm.batches import TokenBatch
from sonde.lm.model import LanguageModel
from sonde.lm.taps import Edit
from sonde.stats.information import cross_entropy, kl, log_probs
from sonde.stats.intervals import Interval, bootstrap_ratio

Ablation = Literal["zero", "mean"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "mean")
_SAME = 1e-3  # nats: an ablation that costs less leaves nothing to recover


@dataclass(frozen=True)
class Share:
    """A recovered share; or NaN, no interval, and the reason."""

    value: float
    interval: Interval | None = None
    reason: str = ""


@dataclass(frozen=True)
class Losses:
    """What the model loses in nats a token, over `tokens` predicted tokens; ablations by their names."""

    tokens: int
    clean: Interval
    spliced: Interval
    delta: Interval
    kl: Interval
    ablated: dict[Ablation, Interval]
    ablated_kl: dict[Ablation, Interval]
    ce_recovered: dict[Ablation, Share]
    kl_recovered: dict[Ablation, Share]


@dataclass(frozen=True)
class Spliced:
    """A dictionary, where it reads and where it writes."""

    dictionary: Dictionary
    site: str
    target: str


class LossSums:
    """Sums over rows of text of all losses of several dictionaries.

    `means` are those of the targets' activations, in whose place the mean ablation puts them.
    """

    def __init__(self, spliced: Mapping[str, Spliced], means: Mapping[str, Float[Tensor, " d"]]) -> None:
        self._spliced = dict(spliced)
        self._means = dict(means)
        self.tokens = 0
        """Predicted tokens so far."""
        self._count: list[Tensor] = []
        self._clean: list[Tensor] = []
        self._sums: dict[tuple[str, str], list[Tensor]] = {}  # (variant, what it belongs to): ce and kl by row

    @torch.no_grad()
    def update(
        self,
        lm: LanguageModel,
        batch: TokenBatch,
        clean: Float[Tensor, "batch pos vocab"],
        taken: Bool[Tensor, "batch pos"],
    ) -> None:
        """Run the model on a batch with every dictionary and ablation; `clean` are its logits without them."""
        tokens, mask, scored = (part.to(lm.device) for part in (batch.tokens, batch.mask, batch.scored))
        self._count.append(scored.sum(1).double().cpu())
        self.tokens += int(scored.sum())

        def run(edits: Mapping[str, Edit]) -> Float[Tensor, "batch 2"]:
            with lm.editing(edits):
                logits = lm(tokens, mask).logits
            assert logits is not None
            return _row_sums(clean, logits, tokens, scored)

        self._clean.append(_row_sums(clean, clean, tokens, scored)[:, 0])
        for name, one in self._spliced.items():
            made = run(splice(one.dictionary, one.site, one.target, taken))
            self._sums.setdefault(("spliced", name), []).append(made)
        for target, mean in self._means.items():
            values: dict[Ablation, Tensor | float] = {"zero": 0.0, "mean": mean}
            for kind, value in values.items():
                made = run(ablation(target, value, taken))
                self._sums.setdefault((kind, target), []).append(made)

    def result(self, name: str, cluster: Int[np.ndarray, " rows"], *, draws: int = 1000, seed: int = 0) -> Losses:
        """All losses of one dictionary; `cluster` says which document each row belongs to.

        Raises `ValueError` for fewer than two clusters.
        """
        by = np.unique(cluster, return_inverse=True)[1]

        def summed(parts: Sequence[Tensor]) -> np.ndarray:
            return np.bincount(by, weights=torch.cat(list(parts)).numpy())

        def both(variant: str, of: str) -> tuple[np.ndarray, np.ndarray]:
            table = torch.cat(self._sums[variant, of])
            return summed([table[:, 0]]), summed([table[:, 1]])

        count, clean = summed(self._count), summed(self._clean)
        used = count > 0
        count, clean = count[used], clean[used]
        ce, divergence = (part[used] for part in both("spliced", name))
        target = self._spliced[name].target
        ablated = {kind: tuple(part[used] for part in both(kind, target)) for kind in ABLATIONS}

        def mean(sums: np.ndarray) -> Interval:
            return bootstrap_ratio(sums, count, draws=draws, seed=seed)

        def share(top: np.ndarray, bottom: np.ndarray, what: str) -> Share:
            return recovered(top, bottom, count, what, draws=draws, seed=seed)

        return Losses(
            tokens=self.tokens,
            clean=mean(clean),
            spliced=mean(ce),
            delta=mean(ce - clean),
            kl=mean(divergence),
            ablated={kind: mean(ablated[kind][0]) for kind in ABLATIONS},
            ablated_kl={kind: mean(ablated[kind][1]) for kind in ABLATIONS},
            ce_recovered={
                kind: share(ablated[kind][0] - ce, ablated[kind][0] - clean, f"{kind} ablation") for kind in ABLATIONS
            },
            kl_recovered={
                kind: share(ablated[kind][1] - divergence, ablated[kind][1], f"{kind} ablation") for kind in ABLATIONS
            },
        )


def recovered(
    top: Float[np.ndarray, " units"],
    bottom: Float[np.ndarray, " units"],
    tokens: Float[np.ndarray, " units"],
    what: str,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Share:
    """Σ top / Σ bottom of sums over units; NaN where `what` costs about nothing, so that there is nothing to recover.

    That is: less than 0.001 nats a token, or an interval that holds 0.
    """
    cost = bootstrap_ratio(bottom, tokens, draws=draws, seed=seed)
    if cost.estimate < _SAME or cost.contains(0.0):
        spent = f"{cost.estimate:.2g} nats a token [{cost.low:.2g}, {cost.high:.2g}]"
        return Share(math.nan, reason=f"{what} costs {spent}: nothing to recover")
    interval = ratio_of_sums(top, bottom, draws=draws, seed=seed)
    return Share(interval.estimate, interval)


def _row_sums(
    clean: Float[Tensor, "batch pos vocab"],
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    scored: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch 2"]:
    """Cross-entropy and divergence from the clean prediction, summed over each row's scored tokens.

    Row by row: log-probabilities of a whole batch would double the memory that its logits take.
    """
    found = torch.zeros(len(tokens), 2, dtype=torch.float64)
    same = logits is clean
    for i, (p, q, ids, real) in enumerate(zip(clean, logits, tokens, scored, strict=True)):
        place = real[1:].nonzero()[:, 0]
        logq = log_probs(q[place])
        found[i, 0] = cross_entropy(logq, ids[1:][place]).double().sum()
        found[i, 1] = 0.0 if same else kl(log_probs(p[place]), logq).double().sum()
    return found
