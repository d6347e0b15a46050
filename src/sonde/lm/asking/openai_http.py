"""A model behind any server that speaks OpenAI's chat protocol: OpenAI itself, vLLM, llama.cpp, Ollama.

POST {base URL}/chat/completions. The key is read from the environment for every call and kept nowhere.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sonde.errors import SondeError
from sonde.lm.asking.completion import (
    Completion,
    Message,
    Offers,
    Params,
    Temporary,
    Token,
    Usage,
    as_error,
    rough_count,
)  # fmt: skip

_SCHEMA_WORDS = ("response_format", "json_schema", "schema", "guided", "structured")


class OpenAiHttp:
    """The model `model` at `base_url`, such as "https://api.openai.com/v1" or "http://localhost:8000/v1".

    `key_variable` names the environment variable that holds the key; a server without keys needs none. `context` is the
    number of tokens that prompt and answer share, where it is known; it is checked before the first call.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        context: int | None = None,
        connections: int = 64,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise SondeError(f"{base_url!r} is no base URL: give one such as http://localhost:8000/v1")
        self.model, self._url, self._key = model, base_url.rstrip("/"), key_variable
        self.name = f"{model}@{self._url}"
        self._offers = Offers(logprobs=None, schema=True, context=context)
        self._connections = connections
        self._client: Any = None

    @property
    def offers(self) -> Offers:
        """Log-probabilities are known after the first call; a schema is dropped once the server has refused one."""
        return self._offers

    def count(self, messages: Sequence[Message]) -> int:
        """A rough count: the tokenizer is not at hand."""
        return rough_count(messages)

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """One POST. Raises `Temporary`, `Unanswered` and `Refused` by the status."""
        if params.prompt_logprobs:
            raise SondeError(f"{self.name} speaks the chat protocol, which gives no log-probabilities of prompts")
        schema = params.schema if self._offers.schema else None
        status, body, headers = await self._post(self._body(messages, replace(params, schema=schema)))
        if status == 400 and schema is not None and any(word in body.lower() for word in _SCHEMA_WORDS):
            self._offers = replace(self._offers, schema=False)
            status, body, headers = await self._post(self._body(messages, replace(params, schema=None)))
        if status != 200:
            raise as_error(status, " ".join(body.split())[:200] or "no reason given", headers.get("retry-after"))
        return self._read(body, params)

    def _body(self, messages: Sequence[Message], params: Params) -> dict[str, Any]:
        import json

        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
        }
        if params.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": params.top_logprobs}
        if params.schema is not None:
            form = {"name": "answer", "strict": True, "schema": json.loads(params.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    async def _post(self, body: dict[str, Any]) -> tuple[int, str, Any]:
        import httpx2

        if self._client is None:
            self._client = httpx2.AsyncClient(
                # The client's own timeout is the one that counts.
                timeout=None,
                limits=httpx2.Limits(max_connections=self._connections, max_keepalive_connections=self._connections),
            )
        key = os.environ.get(self._key)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            reply = await self._client.post(f"{self._url}/chat/completions", json=body, headers=headers)
        except httpx2.ConnectError as error:
            raise Temporary(f"{self._url} cannot be reached: {error}") from error
        except httpx2.HTTPError as error:
            raise Temporary(f"the connection to {self._url} broke: {error!r}", charged=True) from error
        return reply.status_code, reply.text, reply.headers

    def _read(self, body: str, params: Params) -> Completion:
        import json

        try:
            reply = json.loads(body)
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
            used = reply.get("usage") or {}
            details = used.get("prompt_tokens_details") or {}
            usage = Usage(
                int(used.get("prompt_tokens", 0)),
                int(details.get("cached_tokens") or 0),
                int(used.get("completion_tokens", 0)),
            )
            logprobs = (choice.get("logprobs") or {}).get("content")
            tokens = None if logprobs is None else tuple(_token(one) for one in logprobs)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Temporary(
                f"the reply of {self.name} is not a chat completion: {body[:80]!r}", charged=True
            ) from error
        if params.top_logprobs:
            self._offers = replace(self._offers, logprobs=tokens is not None)
        return Completion(text, usage, tokens, truncated=choice.get("finish_reason") == "length")


def _token(one: dict[str, Any]) -> Token:
    top = tuple((other["token"], float(other["logprob"])) for other in one.get("top_logprobs") or ())
    return Token(one["token"], float(one["logprob"]), top)
