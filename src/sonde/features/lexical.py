"""What can be said of a latent without any language model: the set of tokens that best tells its windows from others.

A window is predicted to be active where it holds a token of the set. The set grows one token at a time, each time by
the one that raises F1 on the explainer's windows most, among the tokens at which the latent fires, and ends where none
does. It is the baseline for explanations in words, and it runs on any latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from tqdm import tqdm

from sonde.features.latent_cache import LatentCache
from sonde.features.samplers import LatentExamples, Sampling, examples
from sonde.features.windows import Window

_MOST = 20


@dataclass(frozen=True)
class TokenSet:
    """An explanation by tokens, strongest first, and its F1 on the windows that it was learned from."""

    ids: tuple[int, ...]
    f1: float

    def sentence(self, strings: Sequence[str]) -> str:
        """The explanation in words, given the text of its tokens."""
        return "fires on " + ", ".join(f'"{text}"' for text in strings)

    def fires(self, windows: Sequence[Window]) -> Bool[np.ndarray, " n"]:
        """The windows that hold a token of the set."""
        if not windows:
            return np.zeros(0, dtype=bool)
        return np.asarray(np.isin(np.stack([window.tokens for window in windows]), self.ids).any(1))


@dataclass(frozen=True)
class LexicalScore:
    """How well a token set tells held-out windows apart: shares of the positives and of the negatives told right.

    `by_quantile` is the share of the positives of each tenth of strength, 1 the weakest.
    """

    true_positive: float
    true_negative: float
    by_quantile: dict[int, float]
    positives: int
    negatives: int

    @property
    def balanced_accuracy(self) -> float:
        """(TPR + TNR) / 2: 0.5 is chance."""
        return (self.true_positive + self.true_negative) / 2


def lexical_explanation(examples: LatentExamples, *, most: int = _MOST) -> TokenSet:
    """The token set of highest F1 on the train windows, grown greedily to `most` tokens.

    Of tokens that raise F1 alike, the one that stands in more active windows is taken, and then the lower id. The set
    is empty only where there is no train window.
    """
    positives, negatives = examples.train, examples.train_negatives
    marked = {int(token) for window in positives for token in window.tokens[window.marked]}
    candidates = np.array(sorted(marked), dtype=np.int64)
    active, silent = (_presence(windows, candidates) for windows in (positives, negatives))
    covered, wrong = np.zeros(len(positives), dtype=bool), np.zeros(len(negatives), dtype=bool)
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < most and len(candidates):
        right = (active | covered).sum(1)
        f1 = 2 * right / (right + (silent | wrong).sum(1) + len(positives))
        place = int(np.lexsort((active.sum(1), f1))[-1])
        ties = np.flatnonzero((f1 == f1[place]) & (active.sum(1) == active[place].sum()))
        place = int(ties[0])
        if f1[place] <= best:
            break
        best = float(f1[place])
        chosen.append(int(candidates[place]))
        covered, wrong = covered | active[place], wrong | silent[place]
    return TokenSet(tuple(chosen), best)


def lexical_score(explanation: TokenSet, examples: LatentExamples) -> LexicalScore:
    """The explanation's score on the test windows and the negatives."""
    found, mistaken = explanation.fires(examples.test), explanation.fires(examples.negatives)
    quantile = np.array([window.quantile for window in examples.test])
    return LexicalScore(
        true_positive=float(found.mean()),
        true_negative=float(1 - mistaken.mean()),
        by_quantile={int(q): float(found[quantile == q].mean()) for q in np.unique(quantile)},
        positives=len(found),
        negatives=len(mistaken),
    )


@dataclass(frozen=True)
class Surveyed:
    """One latent of a survey: its explanation and score, or the reason why there is none.

    `dealt` is the balanced accuracy of another latent's explanation on this one's windows: the control.
    """

    latent: int
    explanation: TokenSet | None = None
    score: LexicalScore | None = None
    dealt: float | None = None
    reason: str = ""


def lexical_survey(
    cache: LatentCache,
    hookpoint: str,
    latents: Sequence[int],
    *,
    config: Sampling | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> list[Surveyed]:
    """Explain and score latents; those too rare or too dense are listed with their reason."""
    found: list[Surveyed] = []
    before: TokenSet | None = None
    for latent in tqdm(latents, desc=progress, disable=progress is None, unit="latent"):
        one = examples(cache, hookpoint, latent, config=config, seed=seed)
        if not isinstance(one, LatentExamples):
            found.append(Surveyed(latent, reason=one.reason))
            continue
        explanation = lexical_explanation(one)
        dealt = None if before is None else lexical_score(before, one).balanced_accuracy
        found.append(Surveyed(latent, explanation, lexical_score(explanation, one), dealt))
        before = explanation
    return found


def _presence(windows: Sequence[Window], candidates: Int[np.ndarray, " k"]) -> Bool[np.ndarray, "k n"]:
    """Which windows hold which token."""
    present = np.zeros((len(candidates), len(windows)), dtype=bool)
    if len(windows) and len(candidates):
        tokens = np.stack([window.tokens for window in windows])
        place = np.minimum(np.searchsorted(candidates, tokens), len(candidates) - 1)
        window, position = (candidates[place] == tokens).nonzero()
        present[place[window, position], window] = True
    return present
