"""Language models elsewhere, reached through one call: prompts in, replies out.

inspect-ai knows the providers, retries and caches; it is an extra, and imported when it is first asked. Whatever takes
a provider's name also takes any function of the same form, which is how it is tested and how a local model is used.
"""

import asyncio
from collections.abc import Callable, Sequence

from sonde.errors import MissingExtra, SondeError

Ask = Callable[[Sequence[str]], list[str]]


def provider(name: str, *, max_tokens: int = 16, temperature: float = 0.0) -> Ask:
    """A function that sends prompts to the model `name`, such as "openai/gpt-4o-mini", and returns its replies.

    Raises `MissingExtra` without inspect-ai and, when it is called, `SondeError` where the provider fails.
    """
    try:
        from inspect_ai.model import GenerateConfig, get_model  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("asking an outside language model", "agents") from error

    async def all_of(prompts: Sequence[str]) -> list[str]:
        model = get_model(name)
        config = GenerateConfig(max_tokens=max_tokens, temperature=temperature)
        outputs = await asyncio.gather(*(model.generate(prompt, config=config) for prompt in prompts))
        return [output.completion for output in outputs]

    def ask(prompts: Sequence[str]) -> list[str]:
        try:
            return asyncio.run(all_of(prompts))
        except Exception as error:
            raise SondeError(
                f"{name} could not be asked: {(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error

    return ask
