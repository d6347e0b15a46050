"""Questions that come one by one, answered together: a model in this process is fast on batches only.

Questions with the same parameters that wait at the same time are one batch. A batch runs in a thread, so that others
can come in meanwhile, and only one at a time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from sonde.lm.asking.completion import Completion, Message, Params

Question = tuple[Sequence[Message], Params]
Answer = Callable[[Sequence[Sequence[Message]], Params], list[Completion]]


class Batched:
    """Collects calls for `answer`, which takes up to `size` prompts and their common parameters."""

    def __init__(self, answer: Answer, size: int) -> None:
        if size < 1:
            raise ValueError(f"a batch has at least one question, not {size}")
        self._answer, self._size = answer, size
        self._waiting: list[tuple[Question, asyncio.Future[Completion]]] = []
        self._worker: asyncio.Task[None] | None = None

    def ask(self, messages: Sequence[Message], params: Params) -> Awaitable[Completion]:
        """The answer to one question, with that of others."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(((messages, params), future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return future

    async def close(self) -> None:
        """Wait for what is being answered."""
        if self._worker is not None:
            await self._worker
            self._worker = None

    async def _work(self) -> None:
        await asyncio.sleep(0)  # those who ask at the same moment come into the first batch
        while self._waiting:
            params = self._waiting[0][0][1]
            batch = [one for one in self._waiting if one[0][1] == params][: self._size]
            chosen = {id(one) for one in batch}
            self._waiting = [one for one in self._waiting if id(one) not in chosen]
            try:
                answers = await asyncio.to_thread(self._answer, [messages for (messages, _), _ in batch], params)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
