"""Prompts in, replies out: asking where neither a bill nor kept answers are wanted, as a judge of texts does.

Whatever takes a model's name here also takes any function of the same form, which is how it is tested.
"""

import asyncio
from collections.abc import Callable, Sequence

from sonde.errors import SondeError
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Backend, Params

Ask = Callable[[Sequence[str]], list[str]]


def replies(model: str | Backend, *, max_tokens: int = 16, temperature: float = 0.0) -> Ask:
    """A function that sends prompts to a back end, or to a model that inspect-ai knows by name, and returns replies.

    Raises `MissingExtra` for a name without inspect-ai and, when it is called, `SondeError` where the model fails.
    """
    if isinstance(model, str):
        from sonde.lm.asking.inspect_models import InspectModel

        model = InspectModel(model)
    client = Client(model)
    params = Params(max_tokens=max_tokens, temperature=temperature)

    def ask(prompts: Sequence[str]) -> list[str]:
        async def work() -> list[str]:
            asked = (client.complete([{"role": "user", "content": prompt}], params) for prompt in prompts)
            return [answer.text for answer in await asyncio.gather(*asked)]

        try:
            return client.run(work)
        except SondeError as error:
            name = client.backend.name
            raise error if name in str(error) else SondeError(f"{name} could not be asked: {error}") from error

    return ask
