"""Does the same strength give the same behaviour, whatever the prompt?

At every strength a: the rate of the behaviour on prompts of D₊ and of D₋, with the quartiles over prompts, the gap

    G(a) = |rate(D₊) - rate(D₋)|

and what the edit costs on neutral text: KL from the unedited model and the rise of the loss. A good edit has G = 0 with
rate 0 at a = 0 and rate 1 at a = 1 (Marshall et al. 2024, arXiv:2411.09003). A strength at which the loss on neutral
text rises by more than a limit is flagged incoherent: a behaviour that comes with gibberish is no success.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.concepts.judges import Judge
from sonde.concepts.site_edits import SiteEdits
from sonde.concepts.strength_sweep import first_token_sweep, neutral_sweep, reply_sweep
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, prompt_ids
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean

LOSS_LIMIT = 0.5  # nats per token


@dataclass(frozen=True)
class Rates:
    """Rates of a behaviour by strength: the mean over prompts with its interval, and the quartiles over prompts."""

    mean: tuple[Interval, ...]
    quartiles: tuple[tuple[float, float], ...]
    scores: Float[np.ndarray, "strengths prompts"]


@dataclass(frozen=True)
class Standardisation:
    """What one edit does at every strength.

    positive, negative: rates on prompts of D₊ and D₋. gap: |difference of the two|. drift: KL(plain || edited) on
    neutral text and loss_rise, both in nats per token (empty where no neutral text was given). incoherent: whether the
    loss rises by more than `loss_limit`. undecided: share of replies that the judge could not decide, left out.
    """

    strengths: tuple[float, ...]
    positive: Rates
    negative: Rates
    gap: tuple[Interval, ...]
    drift: tuple[Interval, ...]
    loss_rise: tuple[Interval, ...]
    incoherent: tuple[bool, ...]
    loss_limit: float
    undecided: float

    def place(self, strength: float) -> int:
        """The number of the strength nearest to `strength`."""
        return int(np.abs(np.array(self.strengths) - strength).argmin())

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain lists and dicts."""

        def plain(interval: Interval) -> dict[str, float]:
            return {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "n": interval.n}

        rates = {
            side: {"mean": [plain(i) for i in own.mean], "quartiles": [list(q) for q in own.quartiles]}
            for side, own in (("positive", self.positive), ("negative", self.negative))
        }
        curves = {name: [plain(i) for i in getattr(self, name)] for name in ("gap", "drift", "loss_rise")}
        return {
            "strengths": list(self.strengths),
            **rates,
            **curves,
            "incoherent": list(self.incoherent),
            "loss_limit": self.loss_limit,
            "undecided": self.undecided,
        }

    def state(self) -> dict[str, Any]:
        """A tree for `sonde.files.save_bundle`; `from_state` makes the same object of it."""
        kept = self.to_json()
        for side, own in (("positive", self.positive), ("negative", self.negative)):
            kept[side] = {"scores": torch.from_numpy(own.scores), **kept[side]}
        return kept

    @staticmethod
    def from_state(state: dict[str, Any]) -> "Standardisation":
        """What `state` was taken from."""
        curves = {name: tuple(Interval(**one) for one in state[name]) for name in ("gap", "drift", "loss_rise")}
        sides = {
            side: Rates(
                tuple(Interval(**one) for one in state[side]["mean"]),
                tuple((low, high) for low, high in state[side]["quartiles"]),
                state[side]["scores"].numpy(),
            )
            for side in ("positive", "negative")
        }
        return Standardisation(
            strengths=tuple(state["strengths"]),
            incoherent=tuple(state["incoherent"]),
            loss_limit=state["loss_limit"],
            undecided=state["undecided"],
            positive=sides["positive"],
            negative=sides["negative"],
            **curves,
        )


def standardisation(
    lm: LanguageModel,
    edits: SiteEdits | None,
    positive: Prompts,
    negative: Prompts,
    *,
    strengths: Sequence[float],
    judge: Int[Tensor, " n"] | Judge,
    samples: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    neutral: Int[Tensor, "n pos"] | None = None,
    loss_limit: float = LOSS_LIMIT,
    seed: int = 0,
    progress: str | None = None,
) -> Standardisation:
    """Measure the standardisation curve of an edit.

    Args:
        lm: the model.
        edits: the edits, whose strength is varied; None for the unedited model, which has one strength, 0.
        positive: prompts of D₊, not those that the edit was fitted on.
        negative: prompts of D₋.
        strengths: at least one.
        judge: ids of first tokens of the behaviour (nothing is generated; a prompt's score is their mass), or a judge
            of replies (a prompt's score is its mean over samples).
        samples: replies for each prompt and strength.
        max_new_tokens: length of a reply.
        temperature: of sampling; 0 takes the most likely token.
        neutral: windows of plain text, on which the edit acts at all tokens.
        loss_limit: rise of the loss on neutral text, in nats per token, above which a strength is incoherent.
        seed: of sampling and of the intervals.
        progress: label of progress bars.

    Raises:
        SondeError: for fewer than two prompts a side, and as the sweeps do.

    """
    sides = [prompt_ids(lm, prompts) for prompts in (positive, negative)]
    if min(map(len, sides)) < 2:
        raise SondeError("a rate with an interval needs at least two prompts of each kind")
    scores: list[np.ndarray] = []
    undecided: list[float] = []
    for name, prompts in zip(("D+", "D-"), sides, strict=True):
        label = progress and f"{progress}, {name}"
        if isinstance(judge, Tensor):
            found = first_token_sweep(lm, edits, prompts, strengths, judge, progress=label).numpy()
        else:
            options = {"samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            replies = reply_sweep(lm, edits, prompts, strengths, progress=label, **options)
            found, share = _judged(lm, judge, prompts, replies)
            undecided.append(share)
        scores.append(found)
    drift: list[Interval] = []
    rise: list[Interval] = []
    if neutral is not None and edits is not None:
        kl, worse = neutral_sweep(lm, edits, neutral, strengths, progress=progress and f"{progress}, neutral text")
        drift = [bootstrap_mean(row, seed=seed) for row in kl.numpy()]
        rise = [bootstrap_mean(row, seed=seed) for row in worse.numpy()]
    up, down = scores
    return Standardisation(
        strengths=(0.0,) if edits is None else tuple(map(float, strengths)),
        positive=_rates(up, seed),
        negative=_rates(down, seed),
        gap=tuple(_gap(a, b, seed) for a, b in zip(up, down, strict=True)),
        drift=tuple(drift),
        loss_rise=tuple(rise),
        incoherent=tuple(one.estimate > loss_limit for one in rise) or (False,) * len(up),
        loss_limit=loss_limit,
        undecided=float(np.mean(undecided)) if undecided else 0.0,
    )


def _judged(
    lm: LanguageModel, judge: Judge, prompts: list[list[int]], replies: list[list[list[list[int]]]]
) -> tuple[np.ndarray, float]:
    """Mean score by strength and prompt, and the share of replies that could not be judged."""
    asked = [lm.decode(ids) for ids in prompts]
    scores = np.full((len(replies), len(prompts)), np.nan)
    missing = total = 0
    for s, by_prompt in enumerate(replies):
        flat = [(p, lm.decode(ids)) for p, samples in enumerate(by_prompt) for ids in samples]
        given = judge([asked[p] for p, _ in flat], [text for _, text in flat])
        total += len(flat)
        for p in range(len(prompts)):
            own = [score for (place, _), score in zip(flat, given, strict=True) if place == p and score is not None]
            missing += sum(place == p for place, _ in flat) - len(own)
            if not own:
                raise SondeError(f"the judge could decide no reply to prompt {p}: give it another question or model")
            scores[s, p] = sum(own) / len(own)
    return scores, missing / total


def _rates(scores: np.ndarray, seed: int) -> Rates:
    quartiles = [tuple(map(float, np.quantile(row, [0.25, 0.75]))) for row in scores]
    return Rates(tuple(bootstrap_mean(row, seed=seed) for row in scores), tuple(quartiles), scores)  # type: ignore[arg-type]


def _gap(up: np.ndarray, down: np.ndarray, seed: int) -> Interval:
    """|mean(up) - mean(down)|; both sets are resampled, each by itself."""
    strata = np.repeat([0, 1], [len(down), len(up)])

    def statistic(x: np.ndarray) -> np.ndarray:
        return np.abs(x[..., : len(down)].mean(-1) - x[..., len(down) :].mean(-1))

    return bootstrap(statistic, np.concatenate([down, up]), strata=strata, batched=True, seed=seed)


def neutral_windows(lm: LanguageModel, text: Any = None, *, n: int = 16, context: int = 128) -> Int[Tensor, "n pos"]:
    """`n` windows of plain text: whatever `TokenBatches` reads, by default the help topics of Python.

    Raises `SondeError` for a model without a tokenizer and for a text that is too short.
    """
    from sonde.lm.batches import TokenBatches

    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer, so it reads no text; give token windows")
    context = min(context, lm.context)
    batches = TokenBatches(text, lm.tokenizer, context=context, rows=n, limit_tokens=n * context + context)
    return torch.cat([batch.tokens for batch in batches])[:n]
