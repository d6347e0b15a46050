"""Six claims about decay, declared before anything was run, and the tests that decide them.

    H1  half-life in mixture B (same map) > in A (unrelated)     H4  half-life falls with weight decay
    H2  half-life in C (B with translation) > in B               H5  held-out pair in D no slower than trained pairs
    H3  savings ratio above 5 everywhere                         H6  half-life rises with width

The unit is the seed, which draws data, weights and order together; mixtures are paired by it. Effects are mean
differences of log half-lives, with a bootstrap interval over seeds and a sign-flip p, and Holm's correction over all
six whether or not they could be run. Half-lives that are censored enter at the last step, which pulls ratios towards 1;
the log-rank test beside takes the censoring as what it is. Below three seeds there is no interval, and where every run
of a claim is censored no number. A ratio whose interval lies within x1.25 of 1 is called equivalent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sonde.dynamics.decay_metrics import compare_budgets
from sonde.errors import SondeError
from sonde.stats.intervals import Interval, bootstrap_mean
from sonde.stats.paired_tests import holm, least_p, sign_flip
from sonde.stats.survival import log_rank

MARGIN = 1.25
LEAST_SEEDS = 3
_SAVINGS = 5.0
_ALPHA, _DRAWS = 0.05, 10_000

Row = Mapping[str, Any]
Verdict = Literal["supported", "contradicted", "equivalent", "open", "not run"]

CLAIMS = {
    "H1": "a skill lasts longer where other languages run the same map (B over A)",
    "H2": "translation makes it last longer still (C over B)",
    "H3": "bringing it back is more than five times cheaper than learning it",
    "H4": "weight decay makes it go faster",
    "H5": "a translation that was never trained decays no slower than those that were",
    "H6": "wider networks keep it longer",
}


@dataclass(frozen=True)
class Tested:
    """One claim: the ratio of half-lives (of savings to 5 in H3) over seeds, and what it says.

    `interval` is of the ratio, None below three seeds; `adjusted` is Holm's p over the six; `why` says what is missing
    or to be kept in mind.
    """

    name: str
    claim: str
    verdict: Verdict
    n: int = 0
    ratio: float | None = None
    interval: Interval | None = None
    p: float | None = None
    adjusted: float | None = None
    log_rank_p: float | None = None
    censored: int = 0
    why: str = ""


def interval_of(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Bootstrap interval of a mean over seeds, 10,000 resamples. Raises `SondeError` for fewer than three."""
    if len(values) < LEAST_SEEDS:
        raise SondeError(f"an interval over {len(values)} seeds would mean nothing: run {LEAST_SEEDS} or more")
    return bootstrap_mean(np.asarray(values), draws=_DRAWS, seed=seed)


def mean_log_half_life(rows: Sequence[Row], *, measure: str = "exact") -> Interval:
    """Mean log half-life over seeds with its interval.

    Raises `SondeError` where every run is censored, and below three seeds.
    """
    usable = [row for row in rows if row.get(f"half_life_{measure}") is not None]
    if usable and all(row[f"censored_{measure}"] for row in usable):
        raise SondeError(_all_censored(usable, measure))
    return interval_of([_log(row, measure) for row in usable])


def declared(rows: Sequence[Row], *, measure: str = "exact", forced: bool = False) -> list[Tested]:
    """All six claims on the summaries of units (`Unit.summary`), in order.

    `measure` names the half-lives: exact, skill or masked_skill. Raises `SondeError` where units that are paired were
    trained for different numbers of tokens and it is not `forced`.
    """
    if not rows:
        raise SondeError("there are no units to test")
    base, width = min(row["weight_decay"] for row in rows), min(row["width"] for row in rows)
    at_base = [row for row in rows if row["weight_decay"] == base and row["width"] == width]
    found = [
        _paired("H1", _of(at_base, "B"), _of(at_base, "A"), measure, forced),
        _paired("H2", _of(at_base, "C"), _of(at_base, "B"), measure, forced),
        _savings([row for row in rows if row["weight_decay"] == base]),
        _trend("H4", [row for row in rows if row["width"] == width], "weight_decay", measure, forced, falls=True),
        _held_out([row for row in at_base if row["mixture"] == "D"]),
        _trend("H6", [row for row in rows if row["weight_decay"] == base], "width", measure, forced, falls=False),
    ]
    adjusted = holm([1.0 if one.p is None else one.p for one in found])
    return [_judged(replace(one, adjusted=float(p))) if one.p is not None else one for one, p in zip(
        found, adjusted, strict=True)]  # fmt: skip


def _judged(one: Tested) -> Tested:
    assert one.ratio is not None and one.adjusted is not None
    if one.name == "H5":
        ends = one.interval
        if ends is not None and ends.high <= MARGIN:
            return replace(one, verdict="supported")
        return replace(one, verdict="contradicted" if ends is not None and ends.low > MARGIN else "open")
    if one.adjusted < _ALPHA:
        return replace(one, verdict="supported" if one.ratio > 1 else "contradicted")
    if one.interval is not None and one.interval.low >= 1 / MARGIN and one.interval.high <= MARGIN:
        return replace(one, verdict="equivalent")
    least = holm([least_p(one.n), *[1.0] * (len(CLAIMS) - 1)])[0]
    short = f"{one.n} seeds cannot reach p < {_ALPHA} over six claims; run 8 or more" if least >= _ALPHA else ""
    return replace(one, verdict="open", why="; ".join(filter(None, (one.why, short))))


def _not_run(name: str, why: str) -> Tested:
    return Tested(name, CLAIMS[name], "not run", why=why)


def _tested(name: str, differences: Sequence[float], **fields: Any) -> Tested:
    """A claim from log ratios, one for each seed."""
    mean = float(np.mean(differences))
    interval = None
    if len(differences) >= LEAST_SEEDS:
        logs = interval_of(differences)
        ends = (math.exp(logs.low), math.exp(logs.high))
        interval = Interval(math.exp(mean), *ends, n=logs.n)
    return Tested(
        name,
        CLAIMS[name],
        "open",
        n=len(differences),
        ratio=math.exp(mean),
        interval=interval,
        p=sign_flip(np.asarray(differences)),
        **fields,
    )


def _paired(name: str, more: dict[int, Row], less: dict[int, Row], measure: str, forced: bool) -> Tested:
    key = f"half_life_{measure}"
    seeds = [s for s in sorted(set(more) & set(less)) if more[s].get(key) is not None and less[s].get(key) is not None]
    if not seeds:
        return _not_run(name, "no seed has both mixtures with a skill that could decay")
    first, second = [more[s] for s in seeds], [less[s] for s in seeds]
    for a, b in zip(first, second, strict=True):
        compare_budgets(a["tokens"], b["tokens"], forced=forced)
    censored = [row for row in (*first, *second) if row[f"censored_{measure}"]]
    if len(censored) == 2 * len(seeds):
        return _not_run(name, _all_censored(censored, measure))
    _, p = log_rank(*(x for rows in (first, second) for x in (
        [row[key] for row in rows], [row[f"censored_{measure}"] for row in rows])))  # fmt: skip
    differences = [_log(a, measure) - _log(b, measure) for a, b in zip(first, second, strict=True)]
    return _tested(name, differences, log_rank_p=p, censored=len(censored), why=_bounds(len(censored), 2 * len(seeds)))


def _trend(name: str, rows: Sequence[Row], factor: str, measure: str, forced: bool, *, falls: bool) -> Tested:
    levels = sorted({row[factor] for row in rows})
    if len(levels) < 2:
        return _not_run(name, f"there is one {factor.replace('_', ' ')}; give two or more")
    low, high = (
        {(r["seed"], r["mixture"]): r for r in rows if r[factor] == level} for level in (levels[0], levels[-1])
    )
    first, second = (low, high) if falls else (high, low)
    by_seed: dict[int, list[float]] = {}
    used: list[Row] = []
    for key in sorted(set(first) & set(second)):
        a, b = first[key], second[key]
        if a.get(f"half_life_{measure}") is None or b.get(f"half_life_{measure}") is None:
            continue
        compare_budgets(a["tokens"], b["tokens"], forced=forced)
        by_seed.setdefault(key[0], []).append(_log(a, measure) - _log(b, measure))
        used += [a, b]
    if not used:
        return _not_run(name, "no seed has both levels with a skill that could decay")
    censored = [row for row in used if row[f"censored_{measure}"]]
    if len(censored) == len(used):
        return _not_run(name, _all_censored(used, measure))
    differences = [float(np.mean(values)) for values in by_seed.values()]
    why = "; ".join(filter(None, (f"{factor.replace('_', ' ')} {levels[0]:g} against {levels[-1]:g}",
                                  _bounds(len(censored), len(used)))))  # fmt: skip
    return _tested(name, differences, censored=len(censored), why=why)


def _savings(rows: Sequence[Row]) -> Tested:
    by_seed: dict[int, list[float]] = {}
    ratios = []
    for row in rows:
        for key, value in row.items():
            if key.startswith("savings_") and not key.startswith("savings_sign") and value is not None:
                by_seed.setdefault(row["seed"], []).append(math.log(value / _SAVINGS))
                ratios.append(value)
    if not ratios:
        return _not_run("H3", "no run met the criterion from scratch or in revival")
    low = sum(value <= _SAVINGS for value in ratios)
    why = f"{low} of {len(ratios)} ratios are 5 or less; the smallest is {min(ratios):.3g}"
    return _tested("H3", [float(np.mean(values)) for values in by_seed.values()], why=why)


def _held_out(rows: Sequence[Row]) -> Tested:
    pairs = [row for row in rows if row.get("held_out_half_life") is not None and row.get("pair_half_life") is not None]
    if not pairs:
        return _not_run("H5", "no run of mixture D dropped translation with a held-out pair that it could translate")
    differences = [math.log1p(row["held_out_half_life"]) - math.log1p(row["pair_half_life"]) for row in pairs]
    return _tested("H5", differences, why=f"supported where the interval's upper end is at most {MARGIN:g}")


def _of(rows: Sequence[Row], mixture: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["mixture"] == mixture}


def _log(row: Row, measure: str) -> float:
    return math.log1p(row[f"half_life_{measure}"])  # 1 + t: a skill that is gone at once has half-life 0


def _bounds(censored: int, of: int) -> str:
    return f"{censored} of {of} half-lives are censored, so that the ratio is a bound" if censored else ""


def _all_censored(rows: Sequence[Row], measure: str) -> str:
    return f"all {len(rows)} half-lives are above {min(row[f'half_life_{measure}'] for row in rows):g}: drop for longer"
