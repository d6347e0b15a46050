"""What asking costs: a price per token, what was spent, and a budget that stops before the next call.

A call reserves the most that it can cost, prompt and `max_tokens` at full price, before it is made; when it is done,
the reservation becomes what it did cost. A call that does not fit beside what is spent and reserved waits for those in
flight, and stops the work where none is left to wait for. So a budget is kept, up to the error of a rough prompt count.
"""

import asyncio
import math
from dataclasses import dataclass

from sonde.errors import SondeError
from sonde.lm.asking.completion import Usage

_MILLION = 1_000_000


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens of prompts, of prompts that the server had cached, and of answers."""

    prompt: float
    completion: float
    cached: float | None = None

    def __post_init__(self) -> None:
        given = (self.prompt, self.completion, self.cached or 0.0)
        if not all(math.isfinite(one) and one >= 0 for one in given):
            raise SondeError(f"prices are dollars per million tokens, 0 or more, not {given}")

    def of(self, usage: Usage) -> float:
        """Dollars for so many tokens."""
        cached = self.prompt if self.cached is None else self.cached
        whole = (usage.prompt - usage.cached) * self.prompt + usage.cached * cached
        return (whole + usage.completion * self.completion) / _MILLION


FREE = Price(0.0, 0.0)

# List prices in July 2024, at which the costs of the published study were computed; give --price for today's.
PRICES = {
    "gpt-4o-mini": Price(0.15, 0.60, 0.075),
    "gpt-4o": Price(5.0, 15.0, 2.5),
    "claude-3-5-sonnet-20240620": Price(3.0, 15.0, 0.3),
}


def price_of(model: str) -> Price | None:
    """The price of a model by its name without the provider; None where the table has none."""
    return PRICES.get(model.split("@")[0].rsplit("/", 1)[-1])


class BudgetSpent(SondeError):
    """The next call could cost more than is left. What was answered is kept."""


class Ledger:
    """Money spent and reserved. `budget` None is none; with a budget, a price is needed.

    Raises `SondeError` for a budget of 0 or less, and for one without a price.
    """

    def __init__(self, price: Price | None, budget: float | None, *, spent: float = 0.0) -> None:
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise SondeError(f"a budget of {budget:g} dollars buys nothing: give --budget DOLLARS, or --no-budget")
        if budget is not None and price is None:
            raise SondeError("a budget needs a price: give --price PROMPT COMPLETION, or --no-budget")
        self.price, self.budget, self.spent = price, budget, spent
        self._reserved = 0.0
        self._in_flight = 0
        self._over = ""
        self._settled: asyncio.Event | None = None

    def cost(self, usage: Usage) -> float | None:
        """Dollars for so many tokens; None without a price."""
        return None if self.price is None else self.price.of(usage)

    async def reserve(self, usage: Usage) -> float:
        """Set aside what a call may cost, once it fits. Raises `BudgetSpent` where it never will."""
        most = self.cost(usage) or 0.0
        if self._over:
            raise BudgetSpent(self._over)
        while self.budget is not None and self.spent + self._reserved + most > self.budget:
            if not self._in_flight:
                self._over = (
                    f"the budget of ${self.budget:g} is reached: ${self.spent:.4f} spent, and the next call may cost "
                    f"${most:.4f}; all answers are kept, so go on with a larger --budget and --resume"
                )
                raise BudgetSpent(self._over)
            self._settled = self._settled or asyncio.Event()
            await self._settled.wait()
        self._reserved += most
        self._in_flight += 1
        return most

    def settle(self, reserved: float, cost: float | None) -> None:
        """Replace a reservation by what the call did cost."""
        self._reserved -= reserved
        self._in_flight -= 1
        self.spent += cost or 0.0
        if self._settled is not None:
            self._settled.set()
            self._settled = None
