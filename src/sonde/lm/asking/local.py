"""A language model in this process, asked like any other: questions in batches, what they share read once.

A prompt is written by the tokenizer's chat template, or plainly ("role: text") where there is none. The tokens that all
prompts of a batch begin with go through the model once; its cache is copied for every row, because one that rows share
and change would spoil the batches after it. It is kept for the next batch with the same beginning.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.asking.batching import Batched
from sonde.lm.asking.completion import Completion, Message, Offers, Params, Token, Unanswered, Usage
from sonde.lm.continuation import continuation
from sonde.lm.generation import continue_rows
from sonde.lm.prompt_rows import like_lengths

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel, Past

_LEAST_PREFIX = 16


class LocalModel:
    """`lm` as something to ask; `batch` questions at most go through it together.

    Raises `SondeError` for a model without a tokenizer.
    """

    def __init__(self, lm: "LanguageModel", *, batch: int = 16) -> None:
        if lm.tokenizer is None:
            raise SondeError(f"{lm.name} has no tokenizer, so it cannot be asked: save one beside the weights")
        self._lm, self._batch = lm, batch
        self.name = f"{lm.name}@{lm.hash[:16]}"
        self._batched = Batched(self._answer, batch)
        self._prefix: tuple[tuple[int, ...], Past] | None = None

    @property
    def offers(self) -> Offers:
        """Log-probabilities of answers and prompts."""
        return Offers(logprobs=True, prompt_logprobs=True, schema=False, context=self._lm.max_positions)

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """Answer with the next batch."""
        return await self._batched.ask(messages, params)

    async def close(self) -> None:
        """Wait for the batch that is being answered."""
        await self._batched.close()

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt as the model gets it."""
        return len(self._ids(messages))

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self._lm.tokenizer
        assert tokenizer is not None
        if getattr(tokenizer, "chat_template", None):
            written = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
            return list(tokenizer(str(written), add_special_tokens=False)["input_ids"])
        turns = [f"{message['role']}: {message['content']}\n\n" for message in messages]
        return self._lm.encode("".join(turns) + "assistant:")

    def _answer(self, prompts: Sequence[Sequence[Message]], params: Params) -> list[Completion]:
        rows = [self._ids(messages) for messages in prompts]
        limit = self._lm.max_positions
        longest = max(map(len, rows))
        if limit is not None and longest + 1 > limit:
            raise Unanswered(
                f"the prompt and one token of an answer need {longest + 1} tokens, {self._lm.name} has {limit}"
            )
        found: list[Completion | None] = [None] * len(rows)
        shared = self._shared(rows)
        # After a cache there is no place for pads: rows of one length go together.
        equal = shared > 0 or continuation(self._lm.model).ignores_mask
        for numbers in like_lengths([len(row) for row in rows], self._batch, equal=equal):
            for i, answer in zip(numbers, self._group([rows[i] for i in numbers], shared, params), strict=True):
                found[i] = answer
        return [answer for answer in found if answer is not None]

    def _group(self, rows: list[list[int]], shared: int, params: Params) -> list[Completion]:
        steps: list[tuple[Tensor, Tensor, Tensor]] = []

        def watch(logits: Float[Tensor, "batch vocab"], drawn: Int[Tensor, " batch"]) -> None:
            if params.top_logprobs:
                logp = logits.float().log_softmax(-1)
                values, ids = logp.topk(params.top_logprobs)
                steps.append((logp.gather(-1, drawn[:, None])[:, 0].cpu(), values.cpu(), ids.cpu()))

        past = self._past(tuple(rows[0][:shared]), len(rows)) if shared else None
        suffixes = [row[shared:] for row in rows]
        new = continue_rows(
            self._lm, suffixes, params.max_tokens, params.temperature, params.seed, past=past, watch=watch
        )
        answers = []
        for i, ids in enumerate(new):
            tokens = None
            if params.top_logprobs:
                tokens = tuple(
                    self._token(token, float(steps[t][0][i]), steps[t][1][i], steps[t][2][i])
                    for t, token in enumerate(ids)
                )
            answers.append(
                Completion(
                    self._lm.decode(ids).removeprefix(" "),
                    Usage(len(rows[i]), shared, len(ids)),
                    tokens,
                    self._prompt_tokens(rows[i], params.prompt_logprobs) if params.prompt_logprobs else None,
                    truncated=len(ids) >= params.max_tokens,
                )
            )
        return answers

    def _shared(self, rows: list[list[int]]) -> int:
        """How many tokens the rows begin with that are worth reading once: at least half of the shortest row."""
        least = max(_LEAST_PREFIX, min(map(len, rows)) // 2)
        if continuation(self._lm.model).mode == "none":
            return 0
        known = () if self._prefix is None else self._prefix[0]
        if len(known) >= least and all(len(row) > len(known) and tuple(row[: len(known)]) == known for row in rows):
            return len(known)
        first, last = min(rows), max(rows)  # what these two share, all share
        most = min(map(len, rows)) - 1
        shared = next((i for i in range(most) if first[i] != last[i]), most)
        return shared if shared >= least and len(rows) > 1 else 0

    def _past(self, beginning: tuple[int, ...], rows: int) -> "Past":
        """The cache of a beginning, copied for every row."""
        if self._prefix is None or self._prefix[0] != beginning:
            with torch.no_grad():
                read = self._lm(torch.tensor([beginning]), use_cache=True).past
            assert read is not None
            self._prefix = (beginning, read)
        return self._prefix[1].select(torch.zeros(rows, dtype=torch.long))

    @torch.no_grad()
    def _prompt_tokens(self, row: Sequence[int], alternatives: int) -> tuple[Token, ...]:
        """Every token of a prompt with what stood in its place; the first has no alternatives."""
        logits = self._lm(torch.tensor([row])).logits
        assert logits is not None
        logp = logits[0, :-1].float().log_softmax(-1)
        values, ids = (part.cpu() for part in logp.topk(alternatives))
        rest = [self._token(token, float(logp[t, token]), values[t], ids[t]) for t, token in enumerate(row[1:])]
        return (Token(self._lm.token_strings(row[:1])[0], 0.0), *rest)

    def _token(self, token: int, logprob: float, values: Tensor, ids: Tensor) -> Token:
        text, *others = self._lm.token_strings([token, *ids.tolist()])
        return Token(text, logprob, tuple(zip(others, values.tolist(), strict=True)))
