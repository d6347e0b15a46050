"""Models that inspect-ai has a provider for: "openai/gpt-4o-mini", "anthropic/…", "google/…", "hf/…" and others.

inspect-ai is the extra `agents` and imported when it is first asked for. Its own retries are switched off: the client's
are the ones that count.
"""

from collections.abc import Sequence
from typing import Any

from sonde.errors import MissingExtra, SondeError
from sonde.lm.asking.completion import (
    Completion,
    Message,
    Offers,
    Params,
    Refused,
    Token,
    Usage,
    as_error,
    rough_count,
)  # fmt: skip


class InspectModel:
    """The model `name` as inspect-ai knows it. Raises `MissingExtra` without inspect-ai."""

    def __init__(self, name: str) -> None:
        try:
            import inspect_ai.model as models  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("asking an outside language model", "agents") from error
        self._models, self.name = models, name

    @property
    def offers(self) -> Offers:
        """Log-probabilities are known after a call."""
        return Offers(logprobs=None, schema=False)

    def count(self, messages: Sequence[Message]) -> int:
        """A rough count: the tokenizer is not at hand."""
        return rough_count(messages)

    async def close(self) -> None:
        """Providers close their own connections."""

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """One call; errors by the status that the provider's exception carries, `Refused` where it has none."""
        if params.prompt_logprobs:
            raise SondeError(f"{self.name} is reached through a provider, which gives no log-probabilities of prompts")
        wanted = {"logprobs": True, "top_logprobs": params.top_logprobs} if params.top_logprobs else {}
        config = self._models.GenerateConfig(
            max_tokens=params.max_tokens, temperature=params.temperature, seed=params.seed, max_retries=0, **wanted
        )
        try:
            output = await self._models.get_model(self.name).generate(self._input(messages), config=config)
        except Exception as error:
            status = getattr(error, "status_code", None)
            line = (str(error) or type(error).__name__).splitlines()[0]
            if status is None:
                raise Refused(f"{self.name} could not be asked: {line}") from error
            headers = getattr(getattr(error, "response", None), "headers", None) or {}
            raise as_error(int(status), line, headers.get("retry-after")) from error
        return _completion(output)

    def _input(self, messages: Sequence[Message]) -> Any:
        if len(messages) == 1:
            return messages[0]["content"]
        kinds = {
            "system": self._models.ChatMessageSystem,
            "user": self._models.ChatMessageUser,
            "assistant": self._models.ChatMessageAssistant,
        }
        return [kinds[message["role"]](content=message["content"]) for message in messages]


def _completion(output: Any) -> Completion:
    used = getattr(output, "usage", None)
    usage = Usage()
    if used is not None:
        cached = int(getattr(used, "input_tokens_cache_read", None) or 0)
        # Providers that tell cached tokens apart leave them out of the input.
        usage = Usage(int(used.input_tokens) + cached, cached, int(used.output_tokens))
    choices = getattr(output, "choices", None) or ()
    logprobs = getattr(choices[0], "logprobs", None) if choices else None
    tokens = None
    if logprobs is not None:
        tokens = tuple(
            Token(one.token, one.logprob, tuple((other.token, other.logprob) for other in one.top_logprobs or ()))
            for one in logprobs.content
        )
    return Completion(output.completion, usage, tokens, truncated=getattr(output, "stop_reason", None) == "max_tokens")
