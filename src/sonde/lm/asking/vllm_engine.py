"""A model in vLLM's engine in this process: prefix caching, log-probabilities of answers and prompts, JSON schemas.

vLLM is no extra of this package, because it fixes the versions of half an environment: it is used where it is
installed. A vLLM server is reached by its address instead (`openai_http`).
"""

from collections.abc import Sequence
from typing import Any

from sonde.errors import SondeError
from sonde.lm.asking.batching import Batched
from sonde.lm.asking.completion import Completion, Message, Offers, Params, Token, Usage


class VllmEngine:
    """The model `model`, a folder or a name on the hub; `options` go to `vllm.LLM`.

    Raises `SondeError` where vLLM is not installed.
    """

    def __init__(self, model: str, *, batch: int = 256, **options: Any) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise SondeError(
                "vLLM is not installed here: install it, or start a server and give its address"
            ) from error
        self._vllm = vllm
        self._engine = vllm.LLM(model=model, enable_prefix_caching=True, **options)
        self.name = f"{model}@vllm"
        self._batched = Batched(self._answer, batch)

    @property
    def offers(self) -> Offers:
        """All of it."""
        return Offers(logprobs=True, prompt_logprobs=True, schema=True, context=self._context())

    async def complete(self, messages: Sequence[Message], params: Params) -> Completion:
        """Answer with the next batch."""
        return await self._batched.ask(messages, params)

    async def close(self) -> None:
        """Wait for the batch that is being answered."""
        await self._batched.close()

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt as the model gets it."""
        tokenizer = self._engine.get_tokenizer()
        written = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return len(tokenizer(written, add_special_tokens=False)["input_ids"])

    def _context(self) -> int | None:
        config = getattr(getattr(self._engine, "llm_engine", None), "model_config", None)
        return getattr(config, "max_model_len", None)

    def _answer(self, prompts: Sequence[Sequence[Message]], params: Params) -> list[Completion]:
        import json

        held = {}
        if params.schema is not None:
            sampling = self._vllm.sampling_params
            held = {"structured_outputs": sampling.StructuredOutputsParams(json=json.loads(params.schema))}
        sampling = self._vllm.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            seed=params.seed,
            logprobs=params.top_logprobs or None,
            prompt_logprobs=params.prompt_logprobs or None,
            **held,
        )
        conversations = [[dict(message) for message in messages] for messages in prompts]
        return [_completion(one) for one in self._engine.chat(conversations, sampling, use_tqdm=False)]


def _completion(reply: Any) -> Completion:
    (out,) = reply.outputs
    return Completion(
        out.text,
        Usage(len(reply.prompt_token_ids), int(reply.num_cached_tokens or 0), len(out.token_ids)),
        _tokens(out.token_ids, out.logprobs),
        _tokens(reply.prompt_token_ids, reply.prompt_logprobs),
        truncated=out.finish_reason == "length",
    )


def _tokens(ids: Sequence[int], places: Sequence[Any] | None) -> tuple[Token, ...] | None:
    """Tokens with alternatives from one mapping id -> Logprob a token; the first of a prompt has None."""
    if not places:
        return None
    found = []
    for token, place in zip(ids, places, strict=True):
        if place is None:
            found.append(Token("", 0.0))
            continue
        top = tuple((one.decoded_token or "", float(one.logprob)) for one in place.values())
        found.append(Token(place[token].decoded_token or "", float(place[token].logprob), top))
    return tuple(found)
