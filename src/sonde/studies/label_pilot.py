"""What the chapters on label economics share: the runs of a pilot and what they were made with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sonde.knowledge.label_problem import Problem
from sonde.knowledge.label_salience import SalienceCurve
from sonde.knowledge.label_score import LabelRun
from sonde.stats.intervals import Interval

if TYPE_CHECKING:
    from sonde.studies.label_economics import LabelEconomicsConfig


@dataclass(frozen=True)
class Pilot:
    """The runs of a study and what they were made with. control: runs whose weak labels mean nothing."""

    config: "LabelEconomicsConfig"
    problem: Problem
    budgets: tuple[float, ...]
    runs: tuple[LabelRun, ...]
    control: tuple[LabelRun, ...]
    curves: tuple[SalienceCurve, ...]
    command: str

    @property
    def method(self) -> str:
        """The method that is planned for: the first."""
        return self.runs[0].method

    @property
    def own(self) -> list[LabelRun]:
        """Its runs."""
        return [run for run in self.runs if run.method == self.method]

    @property
    def sources(self) -> list[str]:
        """The weak source, and the oracle."""
        return [source.name for source in self.problem.sources]

    @property
    def prices(self) -> dict[str, Any]:
        """By source."""
        return self.problem.prices

    @property
    def caps(self) -> dict[str, int] | None:
        """Labels there are of each source in a user's file; the planted task makes as many as are bought."""
        if self.config.data is None:
            return None
        return {source.name: int(source.available.sum()) for source in self.problem.sources}

    @property
    def chance(self) -> float:
        """Accuracy without labels."""
        return 1 / len(self.problem.classes)

    @property
    def control_budget(self) -> float:
        """The budget of the control."""
        return float(self.control[0].budget or 0)


def above_chance(one: Interval, chance: float) -> dict[str, float]:
    """Accuracy as points above chance: estimate, low and high, for charts whose axis starts at 0."""
    return {
        "points": 100 * (one.estimate - chance),
        "low": 100 * (one.low - chance),
        "high": 100 * (one.high - chance),
    }


def in_words(counts: Any) -> str:
    """Numbers of labels by source."""
    return " and ".join(f"{count:,} {name} labels" for name, count in counts.items())


def with_interval(one: Interval) -> str:
    """An estimate and its interval in a cell."""
    return f"{one.estimate:.3f} [{one.low:.3f}, {one.high:.3f}]"
