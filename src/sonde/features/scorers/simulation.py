"""Simulation: how well does a reader of the explanation predict the activation at every token?

The score is Pearson's correlation of predicted and true activations over the concatenated tokens of a group of windows:
each quantile, all in which the latent fires, and those with the silent ones (Bills et al. 2023, "Language models can
explain neurons in language models"). Predictions are a list of whole numbers from 0 to 10, or, where a server gives the
log-probabilities of a prompt, the expected number at every token of one prompt. Intervals: bootstrap over windows.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sonde.errors import SondeError
from sonde.features import questions
from sonde.features.cases import Case, Subject
from sonde.features.scorers.measures import Measure, share
from sonde.features.scorers.scorer import Scored, record
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Params, Token, Unanswered
from sonde.stats.intervals import bootstrap

LEVELS = 10
_ALTERNATIVES = 20
_DRAWS = 500
_EXPLANATION_WORDS = 30


@dataclass(frozen=True)
class Simulation:
    """What number from 0 to 10 has each token? `at_once` reads it from the log-probabilities of one prompt."""

    at_once: bool = False
    seed: int = 0
    name: str = "simulation"
    explained: bool = True
    logprobs: bool = False

    async def score(self, subject: Subject, explanation: str, client: Client) -> Scored:
        """Ask about all held-out windows, one to a question.

        Raises `SondeError` with both numbers where a prompt does not fit into the reader's context, and where a server
        gives no log-probabilities of prompts.
        """
        cases = subject.held_out(self.seed)
        self._fits(cases, explanation, client)
        predicted = await asyncio.gather(*(self._predicted(case, explanation, client) for case in cases))
        records = []
        for case, found in zip(cases, predicted, strict=True):
            one = record(case, label=case.window.positive)
            records.append(one | {"answer": found, "parsed": found is not None})
        return Scored(records, _measures(cases, predicted), "all")

    def check(self, subject: Subject, client: Client) -> None:
        """Raise what `score` would for an explanation of usual length, before anybody is asked for one."""
        self._fits([*subject.test, *subject.negatives], " ".join(["word"] * _EXPLANATION_WORDS), client)

    def _fits(self, cases: Sequence[Case], explanation: str, client: Client) -> None:
        offers = client.backend.offers
        if self.at_once and not offers.prompt_logprobs:
            raise SondeError(
                f"{client.backend.name} gives no log-probabilities of prompts: let simulation ask for lists instead"
            )
        for case in cases if offers.context is not None else ():
            answer = 1 if self.at_once else _answer_tokens(case)
            needed = client.backend.count(self._messages(case, explanation)) + answer
            if needed > (offers.context or 0):
                raise SondeError(
                    f"simulation needs {needed} tokens for a window of {len(case.tokens)}, but {client.backend.name} "
                    f"has {offers.context}: cut shorter windows, or ask a model with a longer context"
                )

    def _messages(self, case: Case, explanation: str) -> Any:
        return (questions.simulate_at_once if self.at_once else questions.simulate)(explanation, case.tokens)

    async def _predicted(self, case: Case, explanation: str, client: Client) -> list[float] | None:
        count = len(case.tokens)
        messages = self._messages(case, explanation)
        try:
            if self.at_once:
                params = Params(max_tokens=1, prompt_logprobs=_ALTERNATIVES)
                return expected(await client.complete(messages, params), count)
            params = Params(max_tokens=_answer_tokens(case), schema=questions.digits_schema(count, highest=LEVELS))
            again = f"{questions.AGAIN} with a list of {count} whole numbers from 0 to {LEVELS}, and nothing else."
            digits, _ = await client.parsed(
                messages, params, lambda reply: questions.read_digits(reply.text, count, highest=LEVELS), again
            )
        except Unanswered:
            return None
        return None if digits is None else [float(digit) for digit in digits]


def expected(answer: Completion, count: int) -> list[float] | None:
    """The expected number at each of the last `count` unknowns of a prompt; None where they cannot be told apart."""
    places = [i for i, token in enumerate(answer.prompt_tokens or ()) if _unknown(token)][-count:]
    if len(places) < count or answer.prompt_tokens is None:
        return None
    found = [_expected(answer.prompt_tokens[i]) for i in places]
    return None if any(value is None for value in found) else [value for value in found if value is not None]


def _unknown(token: Token) -> bool:
    return token.text.strip("\t \n") == questions.UNKNOWN


def _expected(token: Token) -> float | None:
    numbers = {str(level): level for level in range(LEVELS + 1)}
    mass = total = 0.0
    for text, logprob in token.top:
        if (level := numbers.get(text.strip())) is not None:
            mass += math.exp(logprob)
            total += level * math.exp(logprob)
    return total / mass if mass > 0 else None


def correlation(cases: Sequence[Case], predicted: Sequence[Sequence[float]]) -> Measure:
    """Pearson's correlation over all tokens of some windows, or why there is none; chance is 0."""
    if len(cases) < 2:
        return Measure.missing(f"{len(cases)} window(s) with predictions: at least 2 are needed", 0.0)
    truth = np.array([case.window.activations for case in cases], dtype=np.float64)
    guess = np.array(predicted, dtype=np.float64)
    for name, values in (("activation", truth), ("prediction", guess)):
        if np.ptp(values) == 0:
            return Measure.missing(f"undefined: every {name} is {values.flat[0]:g}", 0.0)
    sums = [np.full(len(truth), truth.shape[1]), *(a.sum(1) for a in (truth, guess, truth**2, guess**2, truth * guess))]
    interval = bootstrap(_pearson, np.stack(sums, 1), batched=True, draws=_DRAWS)
    return Measure(interval, 0.0)


def _pearson(sums: Float[np.ndarray, "*draws n 6"]) -> Float[np.ndarray, "*draws"]:
    """Pearson's correlation from sums over windows; nan where it is undefined."""
    n, x, y, xx, yy, xy = np.moveaxis(sums.sum(-2), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)), -1, 1)


def _measures(cases: Sequence[Case], predicted: Sequence[list[float] | None]) -> dict[str, Measure]:
    read = [(case, found) for case, found in zip(cases, predicted, strict=True) if found is not None]
    groups = {"all": read, "positive": [one for one in read if one[0].window.positive]}
    for quantile in sorted({case.window.quantile for case, _ in read if case.window.quantile is not None}):
        groups[f"q{quantile}"] = [one for one in read if one[0].window.quantile == quantile]
    found = {"parsed": share(len(read), len(cases), None, "nothing was asked")}
    for name, members in groups.items():
        found[name] = _defined(members)
    return found


def _defined(members: Sequence[tuple[Case, list[float]]]) -> Measure:
    try:
        return correlation([case for case, _ in members], [found for _, found in members])
    except ValueError as error:  # undefined on too many resamples
        return Measure.missing(str(error), 0.0)


def _answer_tokens(case: Case) -> int:
    return 4 * len(case.tokens) + 16
