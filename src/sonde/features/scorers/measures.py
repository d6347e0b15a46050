"""How good are the answers about one latent? Shares with intervals, and what could not be read beside them.

Balanced accuracy = (TPR + TNR) / 2, its interval from the two Wilson intervals by squaring and adding (Newcombe 1998,
"Interval estimation for the difference between independent proportions"); precision and the rates have Wilson's; F1 =
2 TP / (2 TP + FP + FN) is resampled from the two rates. With probabilities, the area under the ROC curve. Answers that
could not be read are counted and left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sonde.stats.intervals import Interval, percentile_interval, wilson
from sonde.stats.ranks import auroc_interval

_DRAWS = 1000
_interval = lru_cache(maxsize=1 << 14)(wilson)  # few counts, many latents


@dataclass(frozen=True)
class Measure:
    """A number with its interval, or the reason why there is none. `chance` is what an empty explanation would get."""

    interval: Interval | None
    chance: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Estimate, low, high, n and chance; or a null estimate and the reason."""
        if self.interval is None:
            return {"estimate": None, "reason": self.reason, "chance": self.chance}
        low, high = self.interval.bounds
        return {
            "estimate": self.interval.estimate, "low": low, "high": high, "n": self.interval.n, "chance": self.chance,
        }  # fmt: skip

    @staticmethod
    def missing(reason: str, chance: float | None = None) -> "Measure":
        """No number."""
        return Measure(None, chance, reason)


def of_verdicts(records: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """Every measure of yes-or-no answers; records have `label`, `answer`, `probability`, `quantile` and `parsed`."""
    read = [one for one in records if one["parsed"]]
    positive = [bool(one["answer"]) for one in read if one["label"]]
    negative = [bool(one["answer"]) for one in read if not one["label"]]
    found = {"parsed": share(len(read), len(records), None, "nothing was asked")}
    if not positive or not negative:
        lacking = "window in which it fires" if not positive else "window in which it does not"
        reason = f"no {lacking} has an answer that can be read"
        names = ("balanced_accuracy", "f1", "precision", "recall", "specificity")
        return found | {name: Measure.missing(reason, 0.5 if name == "balanced_accuracy" else None) for name in names}
    hits, alarms = sum(positive), sum(negative)
    found["balanced_accuracy"] = Measure(
        balanced(_interval(hits, len(positive)), _interval(len(negative) - alarms, len(negative))), 0.5
    )
    found["f1"] = Measure(f1(hits, len(positive), alarms, len(negative)))
    found["precision"] = share(hits, hits + alarms, None, "no window was said to fit")
    found["recall"] = share(hits, len(positive))
    found["specificity"] = share(len(negative) - alarms, len(negative))
    for quantile in sorted({one["quantile"] for one in read if one["label"] and one["quantile"] is not None}):
        own = [bool(one["answer"]) for one in read if one["label"] and one["quantile"] == quantile]
        found[f"recall_q{quantile}"] = share(sum(own), len(own))
    likely = [one for one in read if one["probability"] is not None]
    if likely:
        found["auc"] = of_scores([one["probability"] for one in likely], [one["label"] for one in likely])
    return found


def of_scores(values: Sequence[float], labels: Sequence[bool]) -> Measure:
    """The area under the ROC curve of values; chance is a half."""
    if len(set(map(bool, labels))) < 2:
        return Measure.missing("only one of the two kinds of windows has a value", 0.5)
    return Measure(auroc_interval(np.asarray(values), np.asarray(labels, dtype=int), draws=_DRAWS), 0.5)


def balanced(first: Interval, second: Interval) -> Interval:
    """The mean of two independent rates."""
    estimate = (first.estimate + second.estimate) / 2
    below = math.hypot(first.estimate - first.low, second.estimate - second.low) / 2
    above = math.hypot(first.high - first.estimate, second.high - second.estimate) / 2
    return Interval(
        estimate, max(0.0, estimate - below), min(1.0, estimate + above), first.n + second.n, method="wilson"
    )


def f1(hits: int, positives: int, alarms: int, negatives: int) -> Interval:
    """2 TP / (2 TP + FP + FN), with both rates resampled."""
    rng = np.random.default_rng(0)
    tp = rng.binomial(positives, hits / positives, _DRAWS)
    fp = rng.binomial(negatives, alarms / negatives, _DRAWS)
    n = positives + negatives
    estimate = 2 * hits / (hits + alarms + positives)
    return percentile_interval(estimate, 2 * tp / (tp + fp + positives), n)


def share(part: int, whole: int, chance: float | None = None, reason: str = "") -> Measure:
    """A share of a count, or the reason why there is nothing to count."""
    return Measure(_interval(part, whole), chance) if whole else Measure.missing(reason, chance)
