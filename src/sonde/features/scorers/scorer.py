"""What all scorers have in common: a latent and a sentence go in, a record for each example and measures come out."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sonde.features.cases import Case, Subject
from sonde.features.scorers.measures import Measure
from sonde.lm.asking.client import Client

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """What one scorer found about one latent.

    records: one for each example, with example, kind, quantile, distance, label, answer, probability and parsed.
    measures: by name; `main` is the scorer's own.
    """

    records: Sequence[Mapping[str, Any]]
    measures: Mapping[str, Measure]
    main: str

    @property
    def score(self) -> Measure:
        """The measure that stands for this scorer."""
        return self.measures[self.main]


class Scorer(Protocol):
    """A test of an explanation."""

    name: str
    explained: bool
    """Whether it needs an explanation."""
    logprobs: bool
    """Whether it needs log-probabilities of answers."""

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Test an explanation ("" where it needs none) on a latent."""
        ...


_TURN = threading.Lock()


async def alone(work: Callable[[], T]) -> T:
    """Do something with a model of this process in a thread, nothing else at the time: edits act on all its passes."""

    def locked() -> T:
        with _TURN:
            return work()

    return await asyncio.to_thread(locked)


def record(case: Case, *, label: bool, kind: str | None = None) -> dict[str, Any]:
    """What is known about an example before anybody is asked."""
    window = case.window
    return {
        "example": case.name,
        "kind": kind or window.kind,
        "quantile": window.quantile,
        "distance": window.distance,
        "label": label,
        "answer": None,
        "probability": None,
        "parsed": False,
    }
