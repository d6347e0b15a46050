"""Detection and fuzzing: does a passage fit the explanation, and are the right tokens marked?

Held-out passages, a few to a question, are answered by a list of 0 and 1. In detection they are plain. In fuzzing those
in which the latent fires are marked where it does, and the others at wrong tokens: as many as are marked on average; in
a window where it is silent one of them always at three quarters, where the peak of a centred window stands; in a
neighbour's window, where the neighbour fires. With log-probabilities p = P(1) / (P(0) + P(1)) over the alternatives of
each digit (Paulo et al. 2024, arXiv:2410.13928).
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sonde.errors import SondeError
from sonde.features import questions
from sonde.features.cases import Case, Subject
from sonde.features.scorers.measures import of_verdicts
from sonde.features.scorers.scorer import Scored, record
from sonde.features.windows import MARKED
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Message, Params, Token, Unanswered

Wrong = Literal["silent", "active"]
_ALTERNATIVES = 5


@dataclass(frozen=True)
class Detection:
    """Which passages fit the explanation? `shown` passages to a question."""

    shown: int = 5
    logprobs: bool = False
    seed: int = 0
    name: str = "detection"
    explained: bool = True

    def __post_init__(self) -> None:
        _check_shown(self.shown)

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Ask about all held-out passages."""
        cases = subject.held_out(self.seed)
        shown = [(record(case, label=case.window.positive), case.text) for case in cases]
        return await _asked(shown, explanation, client, questions.detect, self.shown, self.logprobs)


@dataclass(frozen=True)
class Fuzzing:
    """In which passages are the right tokens marked? `shown` passages to a question.

    wrong: where tokens are marked wrongly: in passages where the latent is silent, or in those where it fires.
    """

    shown: int = 5
    logprobs: bool = False
    wrong: Wrong = "silent"
    seed: int = 0
    name: str = "fuzzing"
    explained: bool = True

    def __post_init__(self) -> None:
        _check_shown(self.shown)
        if self.wrong not in ("silent", "active"):
            raise SondeError(f"wrong marks stand in silent or active windows, not in {self.wrong!r} ones")

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Ask about all held-out passages."""
        rng = subject.random(self.seed, "marks")
        shown = [(record(case, label=True), case.marked()) for case in subject.test]
        if self.wrong == "silent":
            for case in subject.negatives:
                shown.append((record(case, label=False), case.marked(wrong_marks(case, subject.marks, rng))))
        else:
            for case in subject.test:
                marks = wrong_marks(case, subject.marks, rng)
                shown.append((record(case, label=False, kind="wrong marks"), case.marked(marks)))
        order = subject.random(self.seed, "order").permutation(len(shown))
        return await _asked([shown[i] for i in order], explanation, client, questions.fuzz, self.shown, self.logprobs)


def wrong_marks(case: Case, count: int, rng: np.random.Generator) -> list[bool]:
    """Marks at `count` tokens where the latent does not fire; a neighbour's window keeps the neighbour's own."""
    window = case.window
    if window.marks is not None:
        return (window.marks > MARKED * window.marks.max()).tolist()
    length = len(window.tokens)
    free, marks = ~(window.activations > 0), np.zeros(length, dtype=bool)
    if not window.positive:
        marks[3 * length // 4] = True
        free &= ~marks
        count -= 1
    marks[rng.permutation(np.flatnonzero(free))[: max(0, count)]] = True
    return marks.tolist()


async def _asked(
    shown: Sequence[tuple[dict[str, Any], str]],
    explanation: str,
    client: Client,
    question: Any,
    batch: int,
    logprobs: bool,
) -> Scored:
    batches = [shown[i : i + batch] for i in range(0, len(shown), batch)]
    await asyncio.gather(*(_fill(one, explanation, client, question, logprobs) for one in batches))
    records = [one for one, _ in shown]
    return Scored(records, of_verdicts(records), "balanced_accuracy")


async def _fill(
    shown: Sequence[tuple[dict[str, Any], str]], explanation: str, client: Client, question: Any, logprobs: bool
) -> None:
    """Write answers and probabilities into the records of one question."""
    count = len(shown)
    messages: tuple[Message, ...] = question(explanation, [text for _, text in shown])
    params = Params(
        max_tokens=4 * count + 16,
        top_logprobs=_ALTERNATIVES if logprobs else 0,
        schema=questions.digits_schema(count),
    )
    again = f"{questions.AGAIN} with a list of {count} digits, 0 or 1, and nothing else."
    try:
        digits, answer = await client.parsed(
            messages, params, lambda reply: questions.read_digits(reply.text, count), again
        )
    except Unanswered:
        return
    if digits is None:
        return
    likely = probabilities(answer, digits) if logprobs else [None] * count
    for (one, _), digit, probability in zip(shown, digits, likely, strict=True):
        one |= {"answer": digit, "probability": probability, "parsed": True}


def probabilities(answer: Completion, digits: Sequence[int]) -> list[float | None]:
    """P(1) / (P(0) + P(1)) at every digit of an answer; None for all where its tokens do not hold one digit each."""
    places = [token for token in answer.tokens or () if token.text.strip("[]{} ,\n\"'") in ("0", "1")]
    if [int(token.text.strip("[]{} ,\n\"'")) for token in places] != list(digits):
        return [None] * len(digits)
    return [_probability(token) for token in places]


def _probability(token: Token) -> float | None:
    mass = {"0": 0.0, "1": 0.0}
    for text, logprob in token.top:
        digit = text.strip("[]{} ,\n\"'")
        if digit in mass:
            mass[digit] += math.exp(logprob)
    total = sum(mass.values())
    return mass["1"] / total if total > 0 else None


def _check_shown(shown: int) -> None:
    if shown < 1:
        raise SondeError(f"a question shows at least one passage, not {shown}")
