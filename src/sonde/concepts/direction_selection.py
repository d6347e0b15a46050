"""Which of the many differences of means mediates a behaviour? Candidates are tried, discarded by rule, and ranked.

Candidates: r = mu₊ - mu₋ at the input of every block and at every token of the template after the instruction. For
each, on prompts that were not fitted on (Arditi et al. 2024, arXiv:2406.11717):

    bypass   mean log-odds of the behaviour on D₊ prompts with the direction ablated everywhere
    induce   the same on D₋ prompts with r added at its layer
    KL       from the clean to the ablated next-token distribution on D₋ prompts

Discarded: KL > 0.1, induce < 0, layer >= 0.8 L, and whatever is not a number; the lowest bypass score is chosen.
Candidates are rows of one batch, each with its own direction. Induce and KL come first, on a few prompts: what fails
there by a wide margin is never tried on the rest. Ablation sets the projection to 0; where harmless prompts have
another one, that changes them too. `affine` sets it to theirs instead, at the candidate's own layer, because that
projection differs from layer to layer (Marshall et al. 2024, arXiv:2411.09003).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sonde.concepts.affine import AffineEdit
from sonde.concepts.contrast import PLAIN, contrast
from sonde.concepts.judges import log_odds
from sonde.concepts.site_edits import SiteEdits
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids

KL_LIMIT, INDUCE_LIMIT, DEPTH_LIMIT = 0.1, 0.0, 0.8
_FEW = 4  # prompts of the first look
_KL_MARGIN, _INDUCE_MARGIN = 3.0, 2.0  # times the limit, log-odds below it: what is discarded at the first look
_ROWS = 256


@dataclass(frozen=True)
class Candidate:
    """One difference of means and its scores; those that were not needed are NaN.

    `discarded` is the reason why it cannot be chosen, or None. `n` is the number of D₋ prompts that it was tried on.
    """

    layer: int
    position: int
    induce: float
    kl: float
    bypass: float
    n: int
    discarded: str | None
    vector: Float[Tensor, " d"] = field(repr=False)
    negative_mean: Float[Tensor, " d"] = field(repr=False)

    @property
    def site(self) -> str:
        """Where the vector was read and is added."""
        return f"resid_pre.{self.layer}"


@dataclass(frozen=True)
class Selection:
    """All candidates in order of layer and position.

    `baseline_positive`, `baseline_negative`: mean log-odds without any edit. `rows` counts prompts that were run under
    a candidate, `rows_without_pruning` what trying every candidate on every prompt would have taken.
    """

    candidates: tuple[Candidate, ...]
    affine: bool
    baseline_positive: float
    baseline_negative: float
    rows: int
    rows_without_pruning: int

    @property
    def usable(self) -> tuple[Candidate, ...]:
        """The candidates that pass the rule."""
        return tuple(one for one in self.candidates if one.discarded is None)

    @property
    def chosen(self) -> Candidate:
        """The usable candidate with the lowest bypass score.

        Raises `SondeError` where none passes, naming the scores of the best ones.
        """
        if not self.usable:
            raise SondeError(self.why_none)
        return min(self.usable, key=lambda one: one.bypass)

    @property
    def why_none(self) -> str:
        """What the best candidates lack where none passes."""
        return _none_left(self.candidates)

    def ablation(self, lm: LanguageModel) -> SiteEdits:
        """The chosen direction ablated, as it was tried."""
        return ablation(lm, self.chosen, affine=self.affine)


def ablation(lm: LanguageModel, candidate: Candidate, *, affine: bool = False) -> SiteEdits:
    """A candidate ablated everywhere; with `affine`, its projection at its layer becomes that of the negative mean."""
    if affine:
        return SiteEdits({candidate.site: AffineEdit.mean_ablate(candidate.vector, candidate.negative_mean)})
    return SiteEdits.everywhere(lm, candidate.vector)


@torch.no_grad()
def select_direction(
    lm: LanguageModel,
    positive: Prompts,
    negative: Prompts,
    *,
    held_positive: Prompts,
    held_negative: Prompts,
    tokens: Int[Tensor, " n"],
    positions: int = 1,
    affine: bool = False,
    kl_limit: float = KL_LIMIT,
    prune: bool = True,
    template: str = PLAIN,
    rows: int = _ROWS,
    progress: str | None = None,
) -> Selection:
    """Fit all candidates on `positive` and `negative`, and choose one on the held-out prompts.

    Args:
        lm: the model.
        positive: prompts that show the behaviour (harmful ones that are refused).
        negative: prompts that do not.
        held_positive: others like `positive`, to choose by.
        held_negative: others like `negative`.
        tokens: first tokens of the behaviour.
        positions: how many of the last tokens of the prompt give candidates; all prompts share these tokens.
        affine: ablate at the candidate's layer alone, to the projection of the negative mean.
        kl_limit: KL above which a candidate is discarded, in nats.
        prune: discard at the first look what fails by a wide margin.
        template: how the prompts were rendered, kept with what is fitted.
        rows: most rows of a batch.
        progress: label of a progress bar.

    Raises:
        SondeError: for an empty set, sets that share a prompt with their held-out set, and sets that do not differ.

    """
    sides = {"positive": positive, "negative": negative, "held_positive": held_positive, "held_negative": held_negative}
    ids = {name: prompt_ids(lm, prompts) for name, prompts in sides.items()}
    for side in ("positive", "negative"):
        if not ids[f"held_{side}"] or not ids[side]:
            raise SondeError(f"there are no {side} prompts, or none held out: selection needs both")
        if {tuple(row) for row in ids[side]} & {tuple(row) for row in ids[f"held_{side}"]}:
            raise SondeError(f"a {side} prompt is also held out: choose on prompts that the vectors were not fitted on")
    if positions < 1:
        raise SondeError(f"positions is {positions}: candidates come from at least the last token")
    found = _candidates(lm, ids["positive"], ids["negative"], positions, template)
    up, down = ids["held_positive"], ids["held_negative"]
    trial = _Trial(lm, tokens, rows, affine, progress)
    clean = {side: trial.clean(prompts) for side, prompts in (("positive", up), ("negative", down))}
    baseline = {side: float(log_odds(logits, tokens).mean()) for side, logits in clean.items()}
    reasons = {i: _too_deep(one, lm.n_layers) for i, one in enumerate(found)}
    alive = [i for i, reason in reasons.items() if reason is None]
    few = len(down) if not prune else min(_FEW, len(down))
    scores: dict[int, dict[str, float]] = {i: {"induce": 0.0, "kl": 0.0, "n": 0} for i in alive}
    for part in (slice(0, few), slice(few, len(down))):
        prompts = down[part]
        if not prompts or not alive:
            break
        induce = trial.induce([found[i] for i in alive], prompts)
        kl = trial.kl([found[i] for i in alive], prompts, clean["negative"][part])
        last = part.stop == len(down)
        for place, i in enumerate(alive):
            one, n = scores[i], scores[i]["n"] + len(prompts)
            for name, value in (("induce", induce[place]), ("kl", kl[place])):
                one[name] += (float(value) - one[name]) * len(prompts) / n
            one["n"] = n
            reasons[i] = _failed(one, kl_limit, *((0.0, 1.0) if last else (_INDUCE_MARGIN, _KL_MARGIN)))
        alive = [i for i in alive if reasons[i] is None]
    bypass = dict(zip(alive, trial.bypass([found[i] for i in alive], up).tolist(), strict=True)) if alive else {}
    candidates = [
        Candidate(
            one["layer"],
            one["position"],
            scores.get(i, {}).get("induce", math.nan),
            scores.get(i, {}).get("kl", math.nan),
            bypass.get(i, math.nan),
            int(scores.get(i, {}).get("n", 0)),
            reasons[i] or (None if math.isfinite(bypass.get(i, math.nan)) else "not a number"),
            one["vector"],
            one["negative"],
        )
        for i, one in enumerate(found)
    ]
    shallow = sum(_too_deep(one, lm.n_layers) is None for one in found)
    return Selection(
        tuple(candidates),
        affine,
        baseline["positive"],
        baseline["negative"],
        trial.rows_run,
        shallow * (2 * len(down) + len(up)),
    )


def _candidates(
    lm: LanguageModel, positive: list[list[int]], negative: list[list[int]], positions: int, template: str
) -> list[dict[str, Any]]:
    found = []
    for position in range(-positions, 0):
        means = contrast(lm, positive, negative, sites="resid_pre.*", position=position, template=template)
        for layer in range(lm.n_layers):
            site = f"resid_pre.{layer}"
            one = {"layer": layer, "position": position, "negative": means.negative[site]}
            found.append({**one, "vector": means.difference(site)})
    # A block's input does not differ where the token and all that it has read are the same.
    real = [one for one in found if one["vector"].norm() > 1e-6 * one["negative"].norm()]
    return sorted(real, key=lambda one: (one["layer"], one["position"]))


class _PerRow(nn.Module):
    """A vector for each row that is added to it; or, with projections `to`, what its projection on it becomes."""

    def __init__(self, vectors: Float[Tensor, "rows d"], to: Float[Tensor, " rows"] | None = None) -> None:
        super().__init__()
        self.vectors = vectors[:, None]
        self.to_projection = None if to is None else to[:, None, None]

    def forward(self, h: Float[Tensor, "rows pos d"]) -> Float[Tensor, "rows pos d"]:
        vectors = self.vectors.to(h)
        if self.to_projection is None:
            return h + vectors
        return h + (self.to_projection.to(h) - (h * vectors).sum(-1, keepdim=True)) * vectors


class _Trial:
    """Runs prompts under many candidates at once and counts the rows."""

    def __init__(
        self, lm: LanguageModel, tokens: Int[Tensor, " n"], rows: int, affine: bool, progress: str | None
    ) -> None:
        self.lm, self.tokens, self.rows, self.affine, self.progress = lm, tokens, rows, affine, progress
        self.rows_run = 0

    def clean(self, prompts: list[list[int]]) -> Float[Tensor, "prompts vocab"]:
        """Logits at the last token without any edit."""
        return self._logits(prompts, None, [{}])[0]

    def induce(self, candidates: list[dict[str, Any]], prompts: list[list[int]]) -> Float[Tensor, " candidates"]:
        """Mean log-odds with each candidate added at its layer."""
        return log_odds(self._logits(prompts, "add", candidates), self.tokens).mean(1)

    def bypass(self, candidates: list[dict[str, Any]], prompts: list[list[int]]) -> Float[Tensor, " candidates"]:
        """Mean log-odds with each candidate ablated."""
        return log_odds(self._logits(prompts, "ablate", candidates), self.tokens).mean(1)

    def kl(
        self, candidates: list[dict[str, Any]], prompts: list[list[int]], clean: Float[Tensor, "prompts vocab"]
    ) -> Float[Tensor, " candidates"]:
        """Mean KL from the clean distribution to that under ablation, in nats."""
        ablated = self._logits(prompts, "ablate", candidates).double().log_softmax(-1)
        true = clean.double().log_softmax(-1)
        return (true.exp() * (true - ablated)).sum(-1).mean(1)

    def _logits(
        self, prompts: list[list[int]], how: str | None, candidates: list[dict[str, Any]]
    ) -> Float[Tensor, "candidates prompts vocab"]:
        lm = self.lm
        out = torch.empty(len(candidates), len(prompts), lm.vocab_size)
        size = max(1, self.rows // len(prompts))
        starts = range(0, len(candidates), size)
        for start in tqdm(starts, desc=self.progress, disable=self.progress is None or how is None, leave=False):
            part = candidates[start : start + size]
            for numbers in like_lengths([len(row) for row in prompts], max(1, self.rows // len(part))):
                own = [prompts[i] for i in numbers]
                width = max(map(len, own))
                tokens = torch.tensor([row + [0] * (width - len(row)) for row in own]).repeat(len(part), 1)
                ends = torch.tensor([len(row) for row in own]).repeat(len(part))
                mask = torch.arange(width) < ends[:, None]
                with lm.editing(self._edits(how, part, len(own))):
                    logits = lm(tokens, mask).logits
                assert logits is not None
                last = logits[torch.arange(len(ends)), (ends - 1).to(logits.device)]
                out[start : start + len(part), numbers] = last.view(len(part), len(own), -1).float().cpu()
                self.rows_run += len(ends) if how else 0
        return out

    def _edits(self, how: str | None, part: list[dict[str, Any]], each: int) -> dict[str, nn.Module]:
        if how is None:
            return {}
        vectors = torch.stack([one["vector"] for one in part])
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        if how == "ablate" and not self.affine:
            everywhere = _PerRow(unit.repeat_interleave(each, 0), torch.zeros(each * len(part)))
            return dict.fromkeys(SiteEdits.everywhere(self.lm, part[0]["vector"]).edits, everywhere)
        edits: dict[str, nn.Module] = {}
        for layer in {one["layer"] for one in part}:
            own = torch.tensor([[one["layer"] == layer] for one in part], device=vectors.device)
            # A row of another layer has the vector 0, which changes nothing.
            moved = torch.where(own, unit if how == "ablate" else vectors, 0.0).repeat_interleave(each, 0)
            to = (unit * torch.stack([one["negative"] for one in part])).sum(-1).repeat_interleave(each)
            edits[f"resid_pre.{layer}"] = _PerRow(moved, to if how == "ablate" else None)
        return edits


def _too_deep(one: dict[str, Any], n_layers: int) -> str | None:
    deep = one["layer"] >= DEPTH_LIMIT * n_layers
    return f"layer {one['layer']} is in the last fifth" if deep else None


def _failed(scores: dict[str, float], kl_limit: float, slack: float, factor: float) -> str | None:
    if not math.isfinite(scores["induce"]) or not math.isfinite(scores["kl"]):
        return "not a number"
    if scores["induce"] < INDUCE_LIMIT - slack:
        return "does not induce"
    return "changes harmless prompts" if scores["kl"] > factor * kl_limit else None


def _none_left(candidates: Sequence[Candidate]) -> str:
    tried = [one for one in candidates if math.isfinite(one.induce)]
    if not tried:
        return "no candidate gave finite scores: the model's logits are not finite under the edits"
    best, mildest = max(tried, key=lambda one: one.induce), min(tried, key=lambda one: one.kl)
    return (
        f"no direction passes: the most inducing one ({best.site}) reaches log-odds {best.induce:.2f} at KL "
        f"{best.kl:.3f}, the mildest ({mildest.site}) KL {mildest.kl:.3f} at {mildest.induce:.2f}; affine=True keeps "
        "harmless prompts as they are"
    )
