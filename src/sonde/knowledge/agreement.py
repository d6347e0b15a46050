"""Do probes that were made in different ways say the same of a row, and is their confidence earned?

Agreement of two probes: the share of rows on which both verdicts (log-odds above 0, after each was put on one scale
where labels are trusted) are the same, with Spearman's correlation of their log-odds, which needs no scale. Probes that
agree may all be wrong together; probes that do not cannot all be right. Calibration: expected calibration error of the
verdicts' probabilities, with as many bins as keep accuracy rising (see `sonde.stats.calibration`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sonde.errors import SondeError
from sonde.stats.calibration import sweep_ece
from sonde.stats.intervals import Interval, bootstrap, bootstrap_mean
from sonde.stats.ranks import spearman


@dataclass(frozen=True)
class Agreement:
    """Two probes on the same rows. `correlation` is nan where one of them gives all rows the same score."""

    one: str
    other: str
    same: Interval
    correlation: float


def agreement(log_odds: Mapping[str, Float[np.ndarray, " n"]], bases: Int[np.ndarray, " n"]) -> list[Agreement]:
    """Every pair of probes, by name, on the same `n` rows; intervals over base rows.

    Raises `SondeError` for fewer than two probes and for other numbers of rows.
    """
    if len(log_odds) < 2:
        raise SondeError(f"agreement is of two probes or more: given {', '.join(log_odds) or 'none'}")
    if {len(one) for one in log_odds.values()} != {len(bases)}:
        raise SondeError(
            f"probes of {', '.join(str(len(one)) for one in log_odds.values())} and {len(bases)} base rows"
        )
    names = list(log_odds)
    return [
        Agreement(
            one,
            other,
            bootstrap_mean((log_odds[one] > 0) == (log_odds[other] > 0), bases),
            float(spearman(log_odds[one], log_odds[other])),
        )
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    ]


def calibration_error(
    log_odds: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], bases: Int[np.ndarray, " n"], *, draws: int = 200
) -> Interval:
    """Sweep calibration error of the verdicts, confidence 1 / (1 + exp(-|log-odds|)), with an interval over base rows.

    Resamples are less calibrated than what they are drawn from, so that the interval lies high: it is no test of 0.
    """
    confidence = 1 / (1 + np.exp(-np.abs(log_odds.astype(np.float64))))
    return bootstrap(sweep_ece, confidence, ((log_odds > 0) == truth).astype(float), clusters=bases, draws=draws)
