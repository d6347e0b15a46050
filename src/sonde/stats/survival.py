"""How long until it happens, where for some it had not happened when one stopped looking?

    S(t) = prod_{t_i <= t} (1 - d_i / n_i)                        d_i events among the n_i still at risk at t_i
    log-rank: (O - E)^2 / V over all event times of both groups,  E_i = d_i n_1i / n_i  (hypergeometric variance)

A censored time says only that the event came later. Sources: Kaplan & Meier 1958; Mantel 1966.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Survival:
    """The Kaplan-Meier curve: share that has not had the event after each event time."""

    times: Float[np.ndarray, " events"]
    share: Float[np.ndarray, " events"]
    n: int

    @property
    def median(self) -> float | None:
        """The first time by which half have had the event; None where fewer had it."""
        below = np.flatnonzero(self.share <= 0.5)
        return float(self.times[below[0]]) if len(below) else None

    def at(self, time: float) -> float:
        """The share that is left after `time`."""
        before = np.flatnonzero(self.times <= time)
        return float(self.share[before[-1]]) if len(before) else 1.0


def kaplan_meier(times: Float[ArrayLike, " n"], censored: Bool[ArrayLike, " n"]) -> Survival:
    """The survival curve of times, of which some are censored. Raises `ValueError` for none, and for negative ones."""
    t, event = _checked(times, censored)
    at = np.unique(t[event])
    risk = (t[None] >= at[:, None]).sum(1)
    events = ((t[None] == at[:, None]) & event).sum(1)
    return Survival(at, np.cumprod(1 - events / np.maximum(risk, 1)), len(t))


def log_rank(
    first: Float[ArrayLike, " n"],
    first_censored: Bool[ArrayLike, " n"],
    second: Float[ArrayLike, " m"],
    second_censored: Bool[ArrayLike, " m"],
) -> tuple[float, float]:
    """Chi-square with one degree of freedom and its p that two groups have the same survival.

    Raises `ValueError` where no event was seen in either, and as `kaplan_meier` does.
    """
    from scipy.stats import chi2

    a, a_event = _checked(first, first_censored)
    b, b_event = _checked(second, second_censored)
    at = np.unique(np.concatenate([a[a_event], b[b_event]]))
    if not len(at):
        raise ValueError("all times are censored: nothing was seen that could differ")
    risk_a, risk_b = ((x[None] >= at[:, None]).sum(1) for x in (a, b))
    events_a, events_b = (((x[None] == at[:, None]) & e).sum(1) for x, e in ((a, a_event), (b, b_event)))
    risk, events = risk_a + risk_b, events_a + events_b
    expected = events * risk_a / risk
    variance = expected * (1 - risk_a / risk) * (risk - events) / np.maximum(risk - 1, 1)
    if not variance.sum():
        return 0.0, 1.0
    statistic = float((events_a.sum() - expected.sum()) ** 2 / variance.sum())
    return statistic, float(chi2.sf(statistic, 1))


def _checked(
    times: Float[ArrayLike, " n"], censored: Bool[ArrayLike, " n"]
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    t, c = np.asarray(times, dtype=np.float64), np.asarray(censored, dtype=bool)
    if t.ndim != 1 or t.shape != c.shape or not len(t):
        raise ValueError(f"times of shape {t.shape} and censored of shape {c.shape}: give one or more of each")
    if not (t >= 0).all():
        raise ValueError("times are 0 or more")
    return t, ~c
