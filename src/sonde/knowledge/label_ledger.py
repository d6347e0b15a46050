"""What do the labels of a run cost? Every row that a source was asked about is paid for once, however often it is used.

    cost = sum over sources s of price_s * |distinct rows that s has labelled|

That includes rows held out for early stopping and rows shown in a prompt. Prices are exact fractions (0.1 is 1/10), so
that a budget is kept to the last label. A label that nobody paid for cannot be read: a method sees labels only through
the `Ledger` of its purchase.
"""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from sonde.errors import SondeError

Price = int | float | str | Fraction


def exact_price(price: Price, source: str = "a label") -> Fraction:
    """The price as a fraction: 0.1, "0.1" and "1/10" are one tenth. Raises `SondeError` for what is no price."""
    try:
        exact = price if isinstance(price, Fraction) else Fraction(str(price))
    except (ValueError, ZeroDivisionError) as error:
        raise SondeError(f"the price of {source} is {price!r}: expected a number such as 0.1 or 1/10") from error
    if exact < 0:
        raise SondeError(f"the price of {source} is {price}: a label cannot cost less than nothing")
    return exact


class Ledger:
    """Who has labelled which rows, and what that costs; see the module.

    prices: by source. budget: the most that may be spent, or None.
    """

    def __init__(self, prices: Mapping[str, Price], *, budget: Price | None = None) -> None:
        self.prices = {name: exact_price(price, name) for name, price in prices.items()}
        self.budget = None if budget is None else exact_price(budget, "the budget")
        self._paid: dict[str, set[int]] = {name: set() for name in self.prices}

    @property
    def cost(self) -> Fraction:
        """What has been spent."""
        return sum((self.prices[name] * len(rows) for name, rows in self._paid.items()), Fraction(0))

    @property
    def counts(self) -> dict[str, int]:
        """Distinct rows by source."""
        return {name: len(rows) for name, rows in self._paid.items()}

    def bought(self, source: str) -> Int[np.ndarray, " n"]:
        """The rows that `source` has labelled, ascending."""
        return np.array(sorted(self._rows(source)), dtype=np.int64)

    def pay(self, source: str, rows: ArrayLike) -> Fraction:
        """Pay for the labels of `rows` by `source` and return what was new to pay: rows paid for before are free.

        Raises `SondeError` for an unknown source and, without paying anything, where the budget would be exceeded.
        """
        new = {int(row) for row in np.asarray(rows).ravel()} - self._rows(source)
        price = self.prices[source] * len(new)
        if self.budget is not None and self.cost + price > self.budget:
            raise SondeError(
                f"{len(new)} labels of {source!r} cost {float(price):g}, but only "
                f"{float(self.budget - self.cost):g} of the budget of {float(self.budget):g} is left"
            )
        self._paid[source] |= new
        return price

    def require(self, source: str, rows: ArrayLike) -> None:
        """Raise `SondeError` unless every one of `rows` has been paid for at `source`."""
        unpaid = sorted({int(row) for row in np.asarray(rows).ravel()} - self._rows(source))
        if unpaid:
            shown = ", ".join(map(str, unpaid[:5])) + (", …" if len(unpaid) > 5 else "")
            raise SondeError(f"{len(unpaid)} labels of {source!r} were not paid for: rows {shown}; buy them first")

    def _rows(self, source: str) -> set[int]:
        if source not in self._paid:
            raise SondeError(f"there is no label source {source!r}: there are {', '.join(self._paid)}")
        return self._paid[source]


def total_cost(counts: Mapping[str, int], prices: Mapping[str, Price]) -> Fraction:
    """What these numbers of distinct labels cost."""
    return sum((exact_price(prices[name], name) * count for name, count in counts.items()), Fraction(0))


def affordable(budget: Price, shares: Mapping[str, Price], prices: Mapping[str, Price]) -> dict[str, int]:
    """How many labels of each source `budget` buys when `shares` of it (adding up to 1) go to each; rounded down.

    Raises `SondeError` for shares that are negative or do not add up to 1, for a budget below the cheapest label that
    has a share, and for a source that is free: its number of labels must be said, money does not limit it.
    """
    whole = exact_price(budget, "the budget")
    exact = {name: exact_price(share, f"the share of {name}") for name, share in shares.items()}
    if abs(float(sum(exact.values())) - 1) > 1e-9:
        raise SondeError(f"the shares of the budget add up to {float(sum(exact.values())):g}, expected 1")
    known = {name: exact_price(prices[name], name) for name in exact}
    free = [name for name, share in exact.items() if share and not known[name]]
    if free:
        raise SondeError(f"labels of {free[0]!r} are free, so no budget limits them: give a cap on their number")
    used = [known[name] for name, share in exact.items() if share]
    if whole < min(used):
        raise SondeError(
            f"the budget of {float(whole):g} is below the cheapest label, which costs {float(min(used)):g}"
        )
    return {name: int(whole * share / known[name]) if share else 0 for name, share in exact.items()}
