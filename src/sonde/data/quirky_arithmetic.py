"""Sums that are right, as Bob has them, or wrong: rows of five arithmetic quirks, and of the comparison of two numbers.

Operands are int(b^U), U uniform, below a bound b such as 10,000. Bob's result is the true one with its leading digit
raised by one: r + 10^(digits - 1), away from zero where r is negative. Of every four rows one states the true result
(true for Alice, false for Bob), one Bob's (false, true), and two a distractor (false, false): one random digit of the
true result in the one, of Bob's in the other, drawn again until both are missed. An operand pair, in either order where
the order does not matter, occurs once in a set, so it is in one split only.
"""

from collections.abc import Callable

import numpy as np

from sonde.data.quirky import Quirk, Row
from sonde.data.quirky_templates import statement, templates
from sonde.errors import SondeError

MODULUS = 113
_ROUNDS = 64  # of drawing, before a domain counts as used up

_BELOW = {
    "addition": 10**4,
    "subtraction": 10**4,
    "multiplication": 10**3,
    "modular-addition": 10**4,
    "squaring": 10**5,
}
_RESULT: dict[str, Callable[[int, int], int]] = {
    "addition": lambda a, b: a + b,
    "subtraction": lambda a, b: a - b,
    "multiplication": lambda a, b: a * b,
    "modular-addition": lambda a, b: (a + b) % MODULUS,
    "squaring": lambda a, _: a * a,
}


def arithmetic(operation: str, *, below: int | None = None) -> Quirk:
    """The quirk of an operation on operands below 10,000 (multiplication 1,000, squaring 100,000), or another bound.

    Difficulty is the smaller operand's size. Raises `SondeError` for an unknown operation and a bound below 2.
    """
    if operation not in _RESULT:
        raise SondeError(f"there is no arithmetic set {operation!r}: choose from {', '.join(_RESULT)}")
    bound = _BELOW[operation] if below is None else below
    if not 2 <= bound <= 10**9:
        raise SondeError(f"operands below {bound}: expected a bound from 2 to 1,000,000,000")

    def truth(row: Row) -> bool:
        return row["result"] == _RESULT[operation](row["op1"], row.get("op2", 0))

    def rule(row: Row) -> bool:
        return row["result"] == bobs_result(operation, row["op1"], row.get("op2", 0))

    return Quirk(
        operation,
        truth=truth,
        rule=rule,
        difficulty=lambda row: min(abs(row["op1"]), abs(row.get("op2", row["op1"]))),
        templates=templates(operation),
        statement=statement(operation),
        rows=lambda n, seed: _rows(operation, bound, n, seed),
        unit=lambda row: _pair(operation, row["op1"], row.get("op2", 0)),
    )


def bobs_result(operation: str, op1: int, op2: int = 0) -> int:
    """What Bob says: the leading digit of the true result raised by one (modulo 113 in modular addition)."""
    result = _RESULT[operation](op1, op2)
    step = 10 ** (len(str(abs(result))) - 1)
    raised = result - step if result < 0 else result + step
    return raised % MODULUS if operation == "modular-addition" else raised


def stated_results(operation: str, op1: int, op2: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """What can be stated of two operands: the true result, Bob's, and a distractor of either."""
    true, bobs = _RESULT[operation](op1, op2), bobs_result(operation, op1, op2)
    near_true, near_bobs = (_distractor(result, (true, bobs), operation, rng) for result in (true, bobs))
    return true, bobs, near_true, near_bobs


def comparison(*, low: int = 10, high: int = 99) -> Quirk:
    """Is the first of two numbers the larger? Bob compares their last digits. The harder, the closer they are.

    Pairs of numbers from `low` to `high` that differ in their last digits, so that both answers are defined; a pair is
    one unit, with a row for each order. Raises `SondeError` for a range in which there are none.
    """
    if not 0 <= low < high:
        raise SondeError(f"numbers from {low} to {high}: expected 0 <= low < high")
    pairs = [(a, b) for a in range(low, high + 1) for b in range(a + 1, high + 1) if a % 10 != b % 10]

    def rows(n: int, seed: int) -> list[Row]:
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:n]
        return [{"op1": first, "op2": second} for i in chosen for first, second in (pairs[i], pairs[i][::-1])]

    return Quirk(
        "comparison",
        truth=lambda row: row["op1"] > row["op2"],
        rule=lambda row: row["op1"] % 10 > row["op2"] % 10,
        difficulty=lambda row: -abs(row["op1"] - row["op2"]),
        templates=templates("comparison"),
        statement=statement("comparison"),
        rows=rows,
        unit=lambda row: (min(row["op1"], row["op2"]), max(row["op1"], row["op2"])),
        size=len(pairs),
    )


def _pair(operation: str, a: int, b: int) -> tuple[int, int]:
    return (a, b) if operation in ("subtraction", "squaring") or a <= b else (b, a)


def _rows(operation: str, below: int, n: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    pairs = _operands(operation, below, n - n % 4, rng)
    pairs = pairs[: len(pairs) - len(pairs) % 4]
    rows: list[Row] = []
    for i, (a, b) in enumerate(pairs):
        stated = stated_results(operation, a, b, rng)[i % 4]
        rows.append({"op1": a, "result": stated} if operation == "squaring" else {"op1": a, "op2": b, "result": stated})
    return rows


def _operands(operation: str, below: int, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Up to `n` different pairs in the order in which they were drawn; fewer where new ones hardly come."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for _ in range(_ROUNDS):
        drawn = (below ** rng.random((2 * n, 2))).astype(np.int64)
        if operation == "squaring":
            drawn[:, 1] = 0
        for a, b in drawn.tolist():
            found.setdefault(_pair(operation, a, b), (a, b))
            if len(found) == n:
                return list(found.values())
    return list(found.values())


def _distractor(result: int, avoid: tuple[int, int], operation: str, rng: np.random.Generator) -> int:
    """`result` with one digit drawn again, neither the true result nor Bob's."""
    text = str(abs(result))
    while True:
        place = int(rng.integers(len(text)))
        low = 1 if place == 0 and len(text) > 1 else 0
        digit = int(rng.integers(low, 10))
        made = int(text[:place] + str(digit) + text[place + 1 :])
        made = -made if result < 0 else made
        if made not in avoid and (operation != "modular-addition" or made < MODULUS):
            return made
