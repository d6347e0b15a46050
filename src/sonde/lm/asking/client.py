"""Ask many questions at once, within limits and a budget, and never pay for an answer twice.

A question whose answer is kept costs nothing; two that are asked at the same time are asked once. Failures that may
pass are tried again after backoff * 2^attempt * U(0.5, 1.5) seconds, at most a minute, or after what Retry-After says,
and then nobody asks in the meantime. Interrupted work lets calls in flight come home, because they are paid for.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sonde.errors import SondeError
from sonde.lm.asking.answers import Answers
from sonde.lm.asking.completion import (
    Backend,
    Completion,
    Message,
    Params,
    Temporary,
    Unanswered,
    Usage,
    chat,
    request_key,
)  # fmt: skip
from sonde.lm.asking.ledger import Ledger, Price
from sonde.lm.asking.pace import Pace

_LONGEST = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How hard a server is pushed.

    concurrency: calls in flight.
    requests_per_minute, tokens_per_minute: None is no limit; a call counts its prompt and its `max_tokens`.
    attempts: calls for one question, the first included.
    timeout: seconds after which a call is given up.
    backoff: seconds before the second attempt, doubled before each further one.
    """

    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    attempts: int = 8
    timeout: float = 120.0
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or self.timeout <= 0 or self.backoff < 0:
            raise SondeError("concurrency and attempts are at least 1, timeout above 0 and backoff 0 or more")


class Client:
    """Questions to one model.

    Args:
        backend: how the model is reached.
        answers: the file of kept answers; None keeps them for this process.
        price: dollars per million tokens; None where there is none to pay.
        budget: dollars at most, over all runs that share `answers`; None is no limit.
        limits: how hard the server is pushed.
        seed: of the jitter.

    Raises `SondeError` for a budget without a price or of nothing.

    """

    def __init__(
        self,
        backend: Backend,
        *,
        answers: str | Path | None = None,
        price: Price | None = None,
        budget: float | None = None,
        limits: Limits = Limits(),
        seed: int = 0,
    ) -> None:
        Ledger(price, budget)
        self.backend, self.limits, self.answers = backend, limits, Answers(answers)
        *_, cost, _, possible = self.answers.totals()
        self.ledger = Ledger(price, budget, spent=cost + possible)
        self.counts: Counter[str] = Counter()
        """`asked`, `kept` (answers found), `calls` (attempts sent), `retries`, `lost`."""
        self._pace = Pace(limits.requests_per_minute, limits.tokens_per_minute)
        self._free = asyncio.Semaphore(limits.concurrency)
        self._flying: dict[str, asyncio.Task[Completion]] = {}
        self._sent: set[asyncio.Task[Any] | None] = set()
        self._closing = False
        self._random = random.Random(seed)

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` in an event loop of its own. When it fails, calls in flight come home before the error."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._run(work))
        # A notebook has a loop already, and a thread no more than one.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._run(work)).result()

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """The answer to one question.

        Raises `Unanswered` where every attempt failed, `Refused` where none will succeed, `BudgetSpent` before a call
        that might exceed the budget.
        """
        self.counts["asked"] += 1
        key = request_key(self.backend.name, messages, params)
        if (kept := self.answers.get(key)) is not None:
            self.counts["kept"] += 1
            return kept
        task = self._flying.get(key)
        if task is None:
            task = asyncio.create_task(self._asked(key, messages, params))
            self._flying[key] = task
            task.add_done_callback(lambda _: self._flying.pop(key, None))
        # A caller that is cancelled leaves the call alone: it is paid for, and its answer will be kept.
        return await asyncio.shield(task)

    async def parsed(
        self, messages: Sequence[Message], params: Params, parse: Callable[[Completion], T | None], again: str
    ) -> tuple[T | None, Completion]:
        """The answer as `parse` reads it, and as it was given; None where it cannot be read.

        A server that holds answers to `params.schema` is asked once. Others are not shown the schema, and are asked
        once more, with `again` after the answer that could not be read.
        """
        if params.schema is not None and not self.backend.offers.schema:
            params = replace(params, schema=None)
        answer = await self.complete(messages, params)
        found = parse(answer)
        if found is None and params.schema is None:
            spoken = [{"role": "assistant", "content": answer.text}, {"role": "user", "content": again}]
            answer = await self.complete([*messages, *spoken], params)
            found = parse(answer)
        return found, answer

    async def require_logprobs(self) -> None:
        """Raise `SondeError` where the model gives no log-probabilities; where only a call can tell, one tells."""
        offered = self.backend.offers.logprobs
        if offered is None:
            params = Params(max_tokens=1, top_logprobs=5)
            offered = (await self.complete(chat("Answer with one digit.", "1"), params)).tokens is not None
        if not offered:
            raise SondeError(
                f"{self.backend.name} gives no log-probabilities, and the scores asked for need them: leave out "
                "--probabilities, or ask a model that gives them"
            )

    def totals(self) -> dict[str, Any]:
        """The bill: answers, tokens, dollars, and calls that were lost but may have been charged; over all runs."""
        count, usage, cost, lost, possible = self.answers.totals()
        return {
            "answers": count,
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "dollars": None if self.ledger.price is None else round(cost, 6),
            "lost_calls": lost,
            "lost_dollars_at_most": None if self.ledger.price is None else round(possible, 6),
        }

    async def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        # Semaphores and events belong to one loop.
        self._free, self._closing = asyncio.Semaphore(self.limits.concurrency), False
        try:
            return await work()
        finally:
            self._closing = True
            for task in self._flying.values():
                if task not in self._sent:
                    task.cancel()
            await asyncio.gather(*self._flying.values(), return_exceptions=True)
            await self.backend.close()

    async def _asked(self, key: str, messages: Sequence[Message], params: Params) -> Completion:
        async with self._free:
            prompt = self.backend.count(messages)
            most = Usage(prompt=prompt, completion=params.max_tokens)
            for attempt in range(self.limits.attempts):
                await self._pace.turn(most.prompt + most.completion)
                reserved = await self.ledger.reserve(most)
                cost = None
                self.counts["calls"] += 1
                self._sent.add(asyncio.current_task())
                try:
                    async with asyncio.timeout(self.limits.timeout):
                        answer = await self.backend.complete(messages, params)
                    cost = self.ledger.cost(answer.usage)
                    self.answers.put(key, self.backend.name, answer, cost)
                    return answer
                except (Temporary, TimeoutError) as error:
                    failure = self._temporary(error)
                    if failure.charged:
                        cost = self.ledger.cost(most)
                        self.counts["lost"] += 1
                        self.answers.lose(self.backend.name, prompt, cost, str(failure))
                finally:
                    self._sent.discard(asyncio.current_task())
                    self.ledger.settle(reserved, cost)
                if attempt + 1 == self.limits.attempts or self._closing:
                    raise Unanswered(
                        f"{self.backend.name} gave no answer in {attempt + 1} attempts: {failure}"
                    ) from failure
                await self._wait(failure, attempt)
        raise AssertionError("unreachable")

    def _temporary(self, error: Temporary | TimeoutError) -> Temporary:
        if isinstance(error, Temporary):
            return error
        return Temporary(f"no answer within {self.limits.timeout:g} seconds", charged=True)

    async def _wait(self, failure: Temporary, attempt: int) -> None:
        self.counts["retries"] += 1
        seconds = min(_LONGEST, self.limits.backoff * 2**attempt) * self._random.uniform(0.5, 1.5)
        if failure.retry_after is not None:
            seconds = failure.retry_after
        if failure.pause:
            self._pace.pause(seconds)
        else:
            await asyncio.sleep(seconds)
