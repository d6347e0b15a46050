"""What labels cost: exactly the distinct rows that each source was asked about."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.knowledge.label_ledger import Ledger, affordable, exact_price, total_cost

ROWS = st.lists(st.integers(0, 30), max_size=40)


@given(orders=st.lists(st.tuples(st.sampled_from(["weak", "crowd", "oracle"]), ROWS), max_size=8))
def test_the_cost_is_the_number_of_distinct_rows_by_source_times_its_price(orders):
    prices = {"weak": Fraction(1, 10), "crowd": Fraction(1, 3), "oracle": Fraction(1)}
    ledger = Ledger(prices)
    distinct = {name: set() for name in prices}
    for name, rows in orders:
        before = ledger.cost
        assert ledger.pay(name, rows) == ledger.cost - before
        distinct[name] |= set(rows)
    assert ledger.cost == sum(prices[name] * len(rows) for name, rows in distinct.items())
    assert ledger.counts == {name: len(rows) for name, rows in distinct.items()}
    assert ledger.cost == total_cost(ledger.counts, prices)


def test_a_label_that_was_not_paid_for_is_refused():
    ledger = Ledger({"weak": 0.1, "oracle": 1})
    ledger.pay("oracle", [3, 4])
    ledger.require("oracle", [4, 3, 3])
    with pytest.raises(SondeError, match="2 labels of 'oracle' were not paid for: rows 5, 6; buy them first"):
        ledger.require("oracle", np.array([3, 5, 6]))
    with pytest.raises(SondeError, match="1 labels of 'weak'"):
        ledger.require("weak", [3])
    with pytest.raises(SondeError, match="no label source 'crowd': there are weak, oracle"):
        ledger.pay("crowd", [1])


def test_a_budget_is_kept_to_the_last_label_and_nothing_is_paid_beyond_it():
    ledger = Ledger({"weak": 0.1}, budget=1)
    ledger.pay("weak", range(10))  # ten tenths are one, exactly
    assert ledger.cost == 1
    with pytest.raises(SondeError, match=r"1 labels of 'weak' cost 0\.1, but only 0 of the budget of 1 is left"):
        ledger.pay("weak", [10])
    assert ledger.counts == {"weak": 10}


@given(st.integers(1, 400), st.integers(0, 20))
def test_what_a_share_buys_never_costs_more_than_the_budget(budget, twentieths):
    prices = {"weak": "1/10", "oracle": 1}
    share = Fraction(twentieths, 20)
    counts = affordable(budget, {"weak": share, "oracle": 1 - share}, prices)
    assert budget - Fraction(11, 10) < total_cost(counts, prices) <= budget


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_price(-0.1, "weak"), "the price of weak is -0.1: a label cannot cost less than nothing"),
        (lambda: exact_price("much", "weak"), "'much': expected a number such as 0.1 or 1/10"),
        (lambda: affordable(5, {"weak": 1}, {"weak": 0}), "'weak' are free, so no budget limits them: give a cap"),
        (lambda: affordable(0.05, {"weak": 1}, {"weak": 0.1}), "budget of 0.05 is below the cheapest label"),
        (lambda: affordable(5, {"weak": 0.3}, {"weak": 0.1}), "shares of the budget add up to 0.3"),
    ],
    ids=range(5),
)
def test_prices_and_budgets_that_make_no_sense_are_refused(call, message):
    with pytest.raises(SondeError, match=message):
        call()
