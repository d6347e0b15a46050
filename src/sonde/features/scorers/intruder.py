"""Intruder: among passages in which a latent fires, can a reader tell the one in which it does not?

No explanation is needed, so the score is the latent's own: whether what it responds to is one thing (Paulo and Belrose
2025, arXiv:2507.08473). n - 1 windows of one quantile and one other; the others' marks stand where the latent fires,
the odd one's at wrong tokens. The score is the share of odd ones that were found, chance 1/n.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sonde.errors import SondeError
from sonde.features import questions
from sonde.features.cases import Case, Subject
from sonde.features.scorers.measures import share
from sonde.features.scorers.scorer import Scored, record
from sonde.features.scorers.verdicts import wrong_marks
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Params, Unanswered


@dataclass(frozen=True)
class Intruder:
    """Which of `shown` passages is the odd one? Asked `rounds` times.

    odd: a window in which the latent is silent, or one of another quantile in which it fires.
    """

    shown: int = 5
    rounds: int = 20
    odd: Literal["silent", "quantile"] = "silent"
    seed: int = 0
    name: str = "intruder"
    explained: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.shown < 2 or self.rounds < 1:
            raise SondeError(f"an intruder hides among at least 2 passages in at least 1 round, not {self.shown}")
        if self.odd not in ("silent", "quantile"):
            raise SondeError(f"the odd one is of a silent window or of another quantile, not {self.odd!r}")

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Ask all rounds; quantiles take turns, and no silent window is used twice."""
        rounds = self._rounds(subject)
        records = await asyncio.gather(*(self._ask(cases, place, marks, client) for cases, place, marks in rounds))
        read = [one for one in records if one["parsed"]]
        right = sum(one["answer"] == one["label"] for one in read)
        measures = {
            "accuracy": share(
                right, len(read), 1 / self.shown,
                "no answer could be read" if records else f"no quantile has {self.shown - 1} test windows",
            ),
            "parsed": share(len(read), len(records), None, "nothing was asked"),
        }  # fmt: skip
        return Scored(records, measures, "accuracy")

    def _rounds(self, subject: Subject) -> list[tuple[list[Case], int, list[list[bool]]]]:
        """The passages of every round, where the odd one stands, and the marks."""
        rng = subject.random(self.seed, "intruder")
        bins: dict[int | None, list[Case]] = {}
        for case in subject.test:
            bins.setdefault(case.window.quantile, []).append(case)
        full = [name for name, cases in bins.items() if len(cases) >= self.shown - 1]
        silent = [subject.negatives[i] for i in rng.permutation(len(subject.negatives))]
        rounds = []
        for number in range(self.rounds if full else 0):
            quantile = full[number % len(full)]
            own = [bins[quantile][i] for i in rng.permutation(len(bins[quantile]))[: self.shown - 1]]
            marks = [case.window.marked.tolist() for case in own]
            if self.odd == "silent":
                if number >= len(silent):
                    break
                other = silent[number]
                wrong = wrong_marks(other, subject.marks, rng)
            else:
                others = [case for name, cases in bins.items() if name != quantile for case in cases]
                if not others:
                    break
                other = others[int(rng.integers(len(others)))]
                wrong = other.window.marked.tolist()
            place = int(rng.integers(self.shown))
            rounds.append(([*own[:place], other, *own[place:]], place, [*marks[:place], wrong, *marks[place:]]))
        return rounds

    async def _ask(
        self, cases: Sequence[Case], place: int, marks: Sequence[Sequence[bool]], client: Client
    ) -> dict[str, Any]:
        one = record(cases[place], label=True)
        one |= {"quantile": cases[place - 1].window.quantile, "label": place + 1}
        messages = questions.intrude([case.marked(row) for case, row in zip(cases, marks, strict=True)])
        again = f"{questions.AGAIN} with a number from 1 to {self.shown}, and nothing else."
        try:
            number, _ = await client.parsed(messages, Params(max_tokens=16), self._read, again)
        except Unanswered:
            return one
        return one | {"answer": number, "parsed": number is not None}

    def _read(self, answer: Completion) -> int | None:
        numbers = re.findall(r"\d+", answer.text)
        return int(numbers[-1]) if numbers and 1 <= int(numbers[-1]) <= self.shown else None
