"""Do few latents carry one concept and not the next? Ablate them, and see which probes suffer.

Rows are texts, activations averaged over tokens. Zeroing latents S at every token moves a row by -Σ_{i in S} f̄_i
W_dec[i], with f̄ the latents averaged over the same tokens; what the dictionary misses stays. The effect of latent i on
a class is (mean of f̄_i in it - in the rest) times (probe weight · W_dec[i]).

*TPP*, targeted probe perturbation: one probe for each class against the rest. Ablating the n latents of the largest
effects on class i, among those that are larger in it, should cost the accuracy of probe i and of no other:
TPP = mean_i (ΔA_ii - mean_{j≠i} ΔA_ij), with ΔA the accuracy before less that after.

*SCR*, spurious correlation removal (SHIFT, Marks et al. 2403.19647): a probe is trained where two concepts say the
same, and so uses both. Ablating the n latents of the largest absolute effects on a probe of the one should restore its
accuracy for the other on rows where they are independent: SCR = (A_ablated - A_biased) / (A_clean - A_biased), with
A_clean of a probe trained without the correlation. Of the two directions, the one in which the biased probe is worse is
reported. Both are SAEBench's (Karvonen et al. 2503.09532), with L2 logistic probes on balanced rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.activation_rows import Selection, selected
from sonde.features.dictionary import Dictionary
from sonde.features.recorded import places
from sonde.features.spliced_loss import Share
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import stream
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean
from sonde.stats.logistic import logistic

NS = (2, 5, 10, 20, 50)
_LEAST = 20
_GAP = 0.001  # of accuracy: less bias than this leaves nothing to remove


@dataclass(frozen=True)
class PooledRows:
    """Texts: activations and latents averaged over tokens, and what a unit of each latent adds to a row."""

    x: Float[Tensor, "n d"]
    latents: csr_matrix
    directions: Float[Tensor, "latents d"]

    @staticmethod
    def of(dictionary: Dictionary, x: Float[Tensor, "n d"], text: Int[Tensor, " n"] | None = None) -> "PooledRows":
        """Rows of tokens, averaged over those of the same `text` (0, 1, …); each its own text where it is not given.

        Raises `SondeError` for a transcoder and for standardised rows, whose latents do not add to the activations.
        """
        if dictionary.design.transcodes or dictionary.design.layer_norm:
            raise SondeError(f"{dictionary!r}: ablations need latents that add to the activations that are read")
        text = torch.arange(len(x)) if text is None else text.cpu()
        texts = int(text.max()) + 1
        size = torch.bincount(text, minlength=texts)
        if int(size.min()) == 0:
            raise SondeError(f"text {int(size.argmin())} has no token left: give texts of a token or more")
        mean = torch.zeros(texts, x.shape[1], dtype=torch.float64).index_add_(0, text, x.double().cpu())
        with torch.no_grad():
            pattern, values = dictionary.active(dictionary.rows(x.to(dictionary.device))[0])
        of = text[pattern.rows.cpu()]
        shares = (values.double().cpu() / size[of]).numpy()
        pooled = csr_matrix(
            (shares, (of.numpy(), pattern.latents.cpu().numpy())), shape=(texts, dictionary.design.latents)
        )
        return PooledRows(mean / size[:, None], pooled, dictionary.w_dec.detach().double().cpu())

    def without(self, latents: Int[np.ndarray, " k"], rows: Int[np.ndarray, " m"]) -> Float[Tensor, "m d"]:
        """Some rows after `latents` were put to 0 at every token."""
        gone = torch.from_numpy(self.latents[rows][:, latents].toarray())
        return self.x[rows] - gone @ self.directions[latents]

    def effects(
        self, weight: Float[Tensor, " d"], one: Int[np.ndarray, " a"], rest: Int[np.ndarray, " b"]
    ) -> tuple[Float[np.ndarray, " latents"], Float[np.ndarray, " latents"]]:
        """Difference of the means of latents between two sets of rows, and its effect on a probe."""
        difference = np.asarray(self.latents[one].mean(0) - self.latents[rest].mean(0)).ravel()
        return difference, difference * (self.directions @ weight).numpy()


def pooled_rows(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    site: str | None = None,
    context: int = 128,
    selection: Selection | None = None,
) -> PooledRows:
    """Texts as a model reads them at the dictionary's site; the first `context` tokens of each count.

    Raises `SondeError` for a text of which no token is left, and as `PooledRows.of` does.
    """
    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text")
    where, _ = places(dictionary, lm, site=site)
    batches = TokenBatches(texts, lm.tokenizer, context=min(context, lm.context), join=False, rank=0, world=1)
    selection = selection or Selection()
    skipped = selection.ids(lm)
    parts, of = [], []
    seen: set[int] = set()
    for batch in stream(lm, batches, sites=[where]):
        rows, taken = selected(batch, [where], selection, skipped)
        document = batch.documents.clone()
        for i, number in enumerate(document.tolist()):  # later pieces of a long text are left out
            document[i] = -1 if number in seen else number
            seen.add(number)
        text = document.to(taken.device)[:, None].expand_as(taken)[taken]
        parts.append(rows[where][text >= 0].cpu())
        of.append(text[text >= 0].cpu())
    text = torch.cat(of)
    if len(seen) < len(texts):
        raise SondeError(f"{len(texts) - len(seen)} of {len(texts)} texts have fewer than two tokens: leave them out")
    return PooledRows.of(dictionary, torch.cat(parts), text)


@dataclass(frozen=True)
class Tpp:
    """TPP by the number of latents, its two parts (own probe, mean of the others), and accuracies before by class."""

    score: dict[int, Interval]
    own: dict[int, Interval]
    others: dict[int, Interval]
    before: dict[str, float]


@dataclass(frozen=True)
class Scr:
    """SCR by the number of latents, and which ones were ablated; accuracies of the biased and the clean probe.

    direction: what was predicted, "concept", or "spurious" where the biased probe is worse at that.
    """

    score: dict[int, Share]
    biased: float
    clean: float
    direction: str
    latents: dict[int, tuple[int, ...]] = field(default_factory=dict)


def tpp(rows: PooledRows, classes: Sequence[str], *, ns: Sequence[int] = NS, test: float = 0.3, seed: int = 0) -> Tpp:
    """Targeted probe perturbation. The intervals are bootstraps over test rows.

    Raises `SondeError` for fewer than two classes, a class of fewer than 20 rows, and n out of range.
    """
    names, number = np.unique(np.asarray(classes), return_inverse=True)
    _check(rows, len(classes), ns)
    counts = np.bincount(number)
    if len(names) < 2 or counts.min() < _LEAST:
        given = dict(zip(names.tolist(), counts.tolist(), strict=True))
        raise SondeError(f"the classes have rows as {given}: at least two classes of {_LEAST} rows are needed")
    rng = np.random.default_rng(seed)
    held = _held(number, test, rng)
    train, tested = np.flatnonzero(~held), np.flatnonzero(held)
    probes, ranks, weights = [], [], []
    for i in range(len(names)):
        one = train[number[train] == i]
        rest = train[number[train] != i]
        rest = rng.permutation(rest)[: len(one)]
        probe = _probe(rows.x, one, rest)
        difference, effect = rows.effects(probe.weight, one, rest)
        probes.append(probe)
        able = np.where(difference > 0, effect, 0.0)
        ranks.append(np.argsort(-able, kind="stable")[: int((able > 0).sum())])
        mine = number[tested] == i
        weights.append(len(tested) * np.where(mine, 0.5 / mine.sum(), 0.5 / (~mine).sum()))
    truth = np.stack([number[tested] == i for i in range(len(names))], 1)
    weight = np.stack(weights, 1)  # both sides of each probe count alike
    before = _right(probes, rows.x[tested], truth) * weight
    found: dict[str, dict[int, Interval]] = {"score": {}, "own": {}, "others": {}}
    for n in ns:
        own, others = np.zeros(len(tested)), np.zeros(len(tested))
        for i in range(len(names)):
            change = before - _right(probes, rows.without(ranks[i][:n], tested), truth) * weight
            own += change[:, i] / len(names)
            others += np.delete(change, i, 1).mean(1) / len(names)
        for key, values in (("score", own - others), ("own", own), ("others", others)):
            found[key][n] = bootstrap_mean(values, seed=seed)
    return Tpp(**found, before=dict(zip(names.tolist(), before.mean(0).tolist(), strict=True)))


def scr(
    rows: PooledRows,
    concept: Bool[np.ndarray, " n"],
    spurious: Bool[np.ndarray, " n"],
    *,
    ns: Sequence[int] = NS,
    test: float = 0.3,
    seed: int = 0,
) -> Scr:
    """Spurious correlation removal. The intervals are bootstraps over test rows.

    Rows of all four combinations are needed: training takes as many of each for clean probes, and those in which both
    agree for the biased one. Raises `SondeError` for a combination of fewer than 20 rows and n out of range.
    """
    labels = np.stack([np.asarray(concept, dtype=bool), np.asarray(spurious, dtype=bool)])
    _check(rows, labels.shape[1], ns)
    cell = 2 * labels[0] + labels[1]
    counts = np.bincount(cell, minlength=4)
    if counts.min() < _LEAST:
        raise SondeError(
            f"the four combinations of both labels have {counts.tolist()} rows: at least {_LEAST} of each are needed"
        )
    rng = np.random.default_rng(seed)
    held = _held(cell, test, rng)
    train, tested = (_even(np.flatnonzero(part), cell, rng) for part in (~held, held))
    biased = _probe(rows.x, train[cell[train] == 3], train[cell[train] == 0])
    clean = [_probe(rows.x, train[side[train]], train[~side[train]]) for side in labels]
    accuracy = [float(_right([biased], rows.x[tested], side[tested, None]).mean()) for side in labels]
    which = int(np.argmin(accuracy))  # predicted; the other one is to be removed
    wanted, unwanted = labels[which], labels[1 - which]
    truth = wanted[tested, None]
    _, effect = rows.effects(clean[1 - which].weight, train[unwanted[train]], train[~unwanted[train]])
    rank = np.argsort(-np.abs(effect), kind="stable")
    start = _right([biased], rows.x[tested], truth)[:, 0]
    goal = _right([clean[which]], rows.x[tested], truth)[:, 0]
    score = {}
    for n in ns:
        after = _right([biased], rows.without(rank[:n], tested), truth)[:, 0]
        score[n] = _restored(after, start, goal, seed)
    return Scr(
        score,
        biased=float(start.mean()),
        clean=float(goal.mean()),
        direction=("concept", "spurious")[which],
        latents={n: tuple(rank[:n].tolist()) for n in ns},
    )


@dataclass(frozen=True)
class _Probe:
    weight: Float[Tensor, " d"]
    bias: float


def _probe(x: Float[Tensor, "n d"], one: np.ndarray, rest: np.ndarray) -> _Probe:
    rows = torch.cat([x[one], x[rest]])
    y = torch.cat([torch.ones(len(one)), torch.zeros(len(rest))])
    found = logistic(rows[None], y)
    return _Probe(found.weight[0], float(found.bias[0]))


def _right(
    probes: Sequence[_Probe], x: Float[Tensor, "n d"], truth: Bool[np.ndarray, "n probes"]
) -> Float[np.ndarray, "n probes"]:
    """1 where a probe says the truth."""
    said = np.stack([(x @ probe.weight + probe.bias > 0).numpy() for probe in probes], 1)
    return (said == truth).astype(np.float64)


def _restored(after: np.ndarray, start: np.ndarray, goal: np.ndarray, seed: int) -> Share:
    gap = float(goal.mean() - start.mean())
    if gap < _GAP:
        return Share(
            math.nan,
            reason=f"the biased probe is right on {start.mean():.1%} of rows and the clean one on {goal.mean():.1%}: "
            "there is no bias to remove",
        )

    def statistic(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (a.mean(-1) - b.mean(-1)) / (c.mean(-1) - b.mean(-1))

    try:
        interval = bootstrap(statistic, after, start, goal, batched=True, seed=seed)
    except ValueError as error:  # a gap that vanishes in too many resamples
        return Share(math.nan, reason=f"a gap of {gap:.2%} between the probes is too small for these rows: {error}")
    return Share(interval.estimate, interval)


def _check(rows: PooledRows, labels: int, ns: Sequence[int]) -> None:
    if labels != len(rows.x):
        raise SondeError(f"{labels} labels for {len(rows.x)} rows: give one a row")
    latents = len(rows.directions)
    if not ns or min(ns) < 1 or max(ns) > latents:
        raise SondeError(f"ns are {tuple(ns)}: give numbers from 1 to the {latents} latents")


def _held(group: Int[np.ndarray, " n"], test: float, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Rows that are tested on: the same share of every group."""
    if not 0 < test < 1:
        raise SondeError(f"test is {test}: give a share between 0 and 1")
    held = np.zeros(len(group), dtype=bool)
    for value in np.unique(group):
        rows = rng.permutation(np.flatnonzero(group == value))
        held[rows[: max(1, round(test * len(rows)))]] = True
    return held


def _even(rows: Int[np.ndarray, " n"], group: Int[np.ndarray, " all"], rng: np.random.Generator) -> np.ndarray:
    """As many rows of every group."""
    parts = [rng.permutation(rows[group[rows] == value]) for value in np.unique(group[rows])]
    least = min(map(len, parts))
    return np.concatenate([part[:least] for part in parts])
