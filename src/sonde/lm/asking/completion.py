"""What is asked of a language model and what comes back: complete(messages, params) -> text, log-probabilities, usage.

A back end does one call and nothing else. It raises `Temporary` for what may pass (time-outs, 408, 409, 429, 5xx,
replies that are no JSON), `Unanswered` where this one question cannot be answered (400, 413, 422), and `Refused` where
no question will be (401, 403, 404). Limits, retries, the bill and kept answers are the client's.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sonde.errors import SondeError

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

CHARACTERS_PER_TOKEN = 4
_MESSAGE_TOKENS = 4  # what a chat template puts around a message


@dataclass(frozen=True)
class Params:
    """How one question is answered; a value, so that no two calls share what one of them changes.

    max_tokens: of the answer.
    temperature: 0 takes the likeliest token.
    seed: sent to servers that take one; part of what an answer is kept under.
    top_logprobs: alternatives at every token of the answer whose log-probabilities are wanted; 0 for none.
    prompt_logprobs: alternatives at every token of the prompt; 0 for none. Chat servers do not offer it.
    schema: a JSON schema, as text, that the answer must obey where the server can hold it to one.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    top_logprobs: int = 0
    prompt_logprobs: int = 0
    schema: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or self.top_logprobs < 0 or self.prompt_logprobs < 0:
            raise ValueError(f"an answer takes at least one token, and nothing is negative: {self}")


@dataclass(frozen=True)
class Token:
    """A token of an answer or a prompt, its log-probability (nats) and the likeliest tokens in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one call. `cached` are those of the prompt that the server had already read."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True)
class Completion:
    """An answer: its text, its tokens and those of the prompt where asked for, what it used, and how it ended.

    `truncated` says that it ran into `max_tokens`.
    """

    text: str
    usage: Usage = Usage()
    tokens: tuple[Token, ...] | None = None
    prompt_tokens: tuple[Token, ...] | None = None
    truncated: bool = False

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        fields = {**vars(self), "usage": vars(self.usage)}
        for name in ("tokens", "prompt_tokens"):
            if fields[name] is not None:
                fields[name] = [vars(token) for token in fields[name]]
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> "Completion":
        """What `to_json` wrote."""
        fields = json.loads(line)
        for name in ("tokens", "prompt_tokens"):
            if fields[name] is not None:
                fields[name] = tuple(
                    Token(one["text"], one["logprob"], tuple((text, value) for text, value in one["top"]))
                    for one in fields[name]
                )
        return Completion(**{**fields, "usage": Usage(**fields["usage"])})


@dataclass(frozen=True)
class Offers:
    """What a back end can do beside text. `logprobs` is None where only a call can tell; `context` in tokens."""

    logprobs: bool | None = False
    prompt_logprobs: bool = False
    schema: bool = False
    context: int | None = None


class Backend(Protocol):
    """One way to reach one model."""

    name: str
    """The model and where it is: part of what an answer is kept under."""

    @property
    def offers(self) -> Offers:
        """What it can do beside text."""
        ...

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """Answer one question, or raise `Temporary`, `Unanswered` or `Refused`."""
        ...

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt: exact where the tokenizer is at hand, else `rough_count`."""
        ...

    async def close(self) -> None:
        """Let go of connections. The back end can be used again."""
        ...


class Temporary(SondeError):
    """A call failed in a way that may pass. `charged` where the server may have done the work all the same."""

    def __init__(self, message: str, *, retry_after: float | None = None, pause: bool = False, charged: bool = False):
        super().__init__(message)
        self.retry_after, self.pause, self.charged = retry_after, pause or retry_after is not None, charged


class Unanswered(SondeError):
    """One question got no answer, whatever was tried; others may."""


class Refused(SondeError):
    """No question will be answered: the key, the model or the address is wrong."""


def request_key(model: str, messages: Sequence[Message], params: Params) -> str:
    """SHA-256 of model, messages and parameters with the seed: what an answer is kept under."""
    asked = [model, [[message["role"], message["content"]] for message in messages], sorted(vars(params).items())]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def rough_count(messages: Sequence[Message]) -> int:
    """Tokens of a prompt at four characters a token."""
    letters = sum(len(message["content"]) for message in messages)
    return math.ceil(letters / CHARACTERS_PER_TOKEN) + _MESSAGE_TOKENS * len(messages)


def chat(system: str, *turns: str) -> tuple[dict[str, str], ...]:
    """Messages: the system's text, then user and assistant in turn."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return ({"role": "system", "content": system}, *spoken)


def as_error(status: int, reason: str, retry_after: Any = None) -> SondeError:
    """The exception for an HTTP status. `retry_after` is the header: seconds or an HTTP date."""
    if status in (408, 409, 429) or status >= 500:
        return Temporary(f"{status}: {reason}", retry_after=_seconds(retry_after), pause=status == 429)
    if status in (401, 403, 404):
        return Refused(f"{status}: {reason}")
    return Unanswered(f"{status}: {reason}")


def _seconds(header: Any) -> float | None:
    """Seconds that a Retry-After header asks for; None where there is none that can be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, (parsedate_to_datetime(str(header)) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
