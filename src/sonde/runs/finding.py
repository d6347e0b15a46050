"""What was found, how sure it is and against what: the one form in which results leave a run.

A finding is an estimate with its 95 % interval, its n, its control and the command that makes it again; it checks
itself when it is made. Its status is computed, never claimed: `found` when the interval is clear of the control's on
the better side (on either side where no side is better), `not found` when it is clear on the worse side, `unclear` when
the two overlap or there is no control to be clear of, `refused` when the number could not be had.
`findings.schema.json` describes the JSON (version 1; later versions only add).
"""

import json
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from sonde.stats.intervals import Interval

SCHEMA_VERSION = 1

Status = Literal["found", "not found", "unclear", "refused"]
Better = Literal["lower", "higher", "none"]
IntervalMethod = Literal["bootstrap", "wilson", "exact", "bayes"]

_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
# How far rounding may carry an estimate out of its interval, relative to the larger of the two.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Control:
    """What the estimate is held against, such as a random direction; without an interval it is a known value."""

    name: str
    estimate: float
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        owner = f"control {self.name!r}"
        if not self.name.strip():
            raise ValueError("a control needs a name: say what it is, such as 'random direction'")
        _set(self, "estimate", _finite(owner, "estimate", self.estimate))
        if self.interval is not None:
            _set(self, "interval", _interval(owner, self.interval, self.estimate))

    @classmethod
    def of(cls, name: str, measured: Interval) -> "Control":
        """A control that was measured."""
        return cls(name, measured.estimate, measured.bounds)

    def to_json(self) -> dict[str, Any]:
        """Name, estimate and interval (or null)."""
        return {
            "name": self.name,
            "estimate": self.estimate,
            "interval": None if self.interval is None else list(self.interval),
        }


@dataclass(frozen=True)
class Paper:
    """The number that the paper reports, in which setting, and how to cite it."""

    value: float
    setting: str
    cite: str

    def __post_init__(self) -> None:
        _set(self, "value", _finite(f"paper {self.cite!r}", "value", self.value))
        if not self.setting.strip() or not self.cite.strip():
            raise ValueError("a paper's number needs its setting and how to cite it")

    def to_json(self) -> dict[str, Any]:
        """Value, setting and citation."""
        return {"value": self.value, "setting": self.setting, "cite": self.cite}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence with its number.

    id, chapter: lower-case, made from the names of study and metric, so that links survive reruns.
    sentence: complete, for a reader who was not there. The page prints the number itself from the fields below.
    metric, unit: what the estimate is, and in what ("" for a pure number). `better` is the direction that is better.
    estimate, interval, level, interval_method, n: the number, its interval, how that was made, from how many items.
    control: what it is held against; where there can be none, `control_reason` says why (the status is then `unclear`).
    command: makes the same number again.
    figures, tables: ids of the blocks that show it.
    refused: the reason why there is no number; estimate, interval, interval_method, n and control then stay away.

    Raises `ValueError` naming the field that is missing or wrong.
    """

    id: str
    chapter: str
    sentence: str
    metric: str
    command: str
    unit: str = ""
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    level: float = 0.95
    interval_method: IntervalMethod | None = None
    n: int | None = None
    better: Better = "none"
    control: Control | None = None
    control_reason: str | None = None
    paper: Paper | None = None
    figures: Sequence[str] = ()
    tables: Sequence[str] = ()
    refused: str | None = None

    def __post_init__(self) -> None:
        owner = f"finding {self.id!r}"
        for name in ("id", "chapter"):
            if not _ID.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"{owner}: {name} {getattr(self, name)!r} should be lower-case letters, digits, '.', '-' and '_'"
                )
        for name in ("sentence", "metric", "command"):
            if not getattr(self, name).strip():
                raise ValueError(f"{owner} has no {name!r}")
        if self.better not in get_args(Better):
            raise ValueError(f"{owner}: better is {self.better!r}, expected one of {', '.join(get_args(Better))}")
        for name in ("figures", "tables"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{owner}: {name} is a sequence of ids, not one string")
            _set(self, name, tuple(getattr(self, name)))
        if self.refused is None:
            self._check_numbers(owner)
        else:
            self._check_refusal(owner)

    def _check_numbers(self, owner: str) -> None:
        for name in ("estimate", "interval", "interval_method", "n"):
            if getattr(self, name) is None:
                raise ValueError(f"{owner} has no {name!r}: give it, or the reason why there is none as `refused`")
        assert self.interval is not None and self.n is not None
        _set(self, "estimate", _finite(owner, "estimate", self.estimate))
        _set(self, "interval", _interval(owner, self.interval, self.estimate))
        if self.interval_method not in get_args(IntervalMethod):
            raise ValueError(
                f"{owner}: interval_method is {self.interval_method!r}, expected one of "
                + ", ".join(get_args(IntervalMethod))
            )
        _set(self, "n", operator.index(self.n))
        if self.n < 1:
            raise ValueError(f"{owner}: n is {self.n}, expected at least 1")
        if not 0 < self.level < 1:
            raise ValueError(f"{owner}: level is {self.level}, expected a number between 0 and 1 such as 0.95")
        if self.control is None and not (self.control_reason or "").strip():
            raise ValueError(f"{owner} has no 'control': give one, or say in 'control_reason' why there can be none")
        if self.control is not None and self.control_reason is not None:
            raise ValueError(f"{owner} has a control, so 'control_reason' has nothing to explain")

    def _check_refusal(self, owner: str) -> None:
        if not (self.refused or "").strip():
            raise ValueError(f"{owner} is refused without a reason: say it in 'refused'")
        for name in ("estimate", "interval", "interval_method", "n", "control", "control_reason"):
            if getattr(self, name) is not None:
                raise ValueError(f"{owner} is refused, so it cannot have {name!r}")

    @classmethod
    def of(cls, measured: Interval, **fields: Any) -> "Finding":
        """A finding whose estimate, interval, level, method and n are those of `measured`; `fields` are the others."""
        return cls(
            estimate=measured.estimate,
            interval=measured.bounds,
            level=measured.level,
            interval_method=measured.method,
            n=measured.n,
            **fields,
        )

    @property
    def status(self) -> Status:
        """`found`, `not found`, `unclear` or `refused`, from the interval, the control's interval and `better`."""
        if self.refused is not None:
            return "refused"
        if self.control is None or self.interval is None:
            return "unclear"
        control_low, control_high = self.control.interval or (self.control.estimate, self.control.estimate)
        low, high = self.interval
        below, above = high < control_low, low > control_high
        if not below and not above:
            return "unclear"
        return "found" if self.better == "none" or below == (self.better == "lower") else "not found"

    def to_json(self) -> dict[str, Any]:
        """The finding as `findings.schema.json` describes it."""
        known: dict[str, Any] = {
            "id": self.id,
            "chapter": self.chapter,
            "sentence": self.sentence,
            "status": self.status,
            "metric": self.metric,
            "unit": self.unit,
            "better": self.better,
            "estimate": self.estimate,
            "interval": None if self.interval is None else list(self.interval),
            "level": self.level,
            "interval_method": self.interval_method,
            "n": self.n,
            "control": None if self.control is None else self.control.to_json(),
            "paper": None if self.paper is None else self.paper.to_json(),
            "command": self.command,
            "figures": list(self.figures),
            "tables": list(self.tables),
        }
        if self.refused is not None:
            known["reason"] = self.refused
        if self.control_reason is not None:
            known["control_reason"] = self.control_reason
        return known


def findings_json(
    run_info: Mapping[str, Any], findings: Iterable[Finding], skipped: Iterable[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The content of findings.json: the run, its findings, and the steps that were skipped as (step, reason).

    Raises `ValueError` when two findings share an id.
    """
    findings = list(findings)
    twice = [given for given, times in Counter(finding.id for finding in findings).items() if times > 1]
    if twice:
        raise ValueError(f"two findings have the id {twice[0]!r}: an id names one number, such as 'depth.tuned-kl'")
    return {
        "schema": SCHEMA_VERSION,
        "run": dict(run_info),
        "findings": [finding.to_json() for finding in findings],
        "skipped": [{"step": step, "reason": reason} for step, reason in skipped],
    }


def schema() -> dict[str, Any]:
    """The JSON Schema of findings.json, as it is shipped."""
    return json.loads(resources.files("sonde.runs").joinpath("findings.schema.json").read_text(encoding="utf-8"))


def _set(frozen: Any, name: str, value: Any) -> None:
    object.__setattr__(frozen, name, value)


def _finite(owner: str, name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{owner}: {name} is {number}, expected a finite number")
    return number


def _interval(owner: str, given: Sequence[Any], estimate: Any) -> tuple[float, float]:
    if len(given) != 2:
        raise ValueError(f"{owner}: interval has {len(given)} ends, expected (low, high)")
    low, high = (_finite(owner, "interval", end) for end in given)
    slack = _ROUNDING * max(abs(low), abs(high), abs(estimate))
    if not low - slack <= estimate <= high + slack:
        raise ValueError(f"{owner}: the interval {low:g} to {high:g} does not contain the estimate {estimate:g}")
    return min(low, estimate), max(high, estimate)
