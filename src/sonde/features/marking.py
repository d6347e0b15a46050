"""How a window of text is shown to a reader: on one line, the tokens that matter between << and >>.

Adjacent marked tokens share one pair. Text that holds << or >> itself, or a mark's half where it would touch one, is
written with a backslash before every angle bracket and backslash of the window, so that a mark is never ambiguous.
"""

import math
import re
from collections.abc import Sequence

OPEN, CLOSE = "<<", ">>"
SHARE = 0.3  # a token is marked where its activation is above this share of the window's largest
_SPECIAL = re.compile(r"([<>\\])")
_ESCAPED = re.compile(r"\\[<>\\]")
_SIGNS = re.compile(r"\\[<>\\]|<<|>>|.", re.DOTALL)
LINE_BREAK = "↵"


def strengths(activations: Sequence[float], largest: float) -> list[int]:
    """Activations as whole numbers from 0 to 10: clamp(ceil(10 a / a_max), 0, 10), a_max over all windows."""
    if not largest > 0:
        return [0] * len(activations)
    # Rounded before the ceiling: 10 * 0.3 / 1.0 in half precision is a little above 3.
    return [min(10, max(0, math.ceil(round(10 * a / largest, 3)))) for a in activations]


def one_line(text: str) -> str:
    """A text with its line breaks written as ↵."""
    return text.replace("\r", "").replace("\n", LINE_BREAK)


def plain(tokens: Sequence[str]) -> str:
    """The text of a window on one line."""
    return one_line("".join(tokens))


def marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """The text of a window on one line, with its marked tokens between << and >>."""
    shown = [one_line(token) if "\n" in token or "\r" in token else token for token in tokens]
    if _ambiguous(shown, marks):
        shown = [_SPECIAL.sub(r"\\\1", token) for token in shown]
    pieces, inside = [], False
    for token, mark in zip(shown, marks, strict=True):
        if mark != inside:
            pieces.append(OPEN if mark else CLOSE)
            inside = mark
        pieces.append(token)
    return "".join(pieces) + CLOSE * inside


def spans(text: str) -> list[str]:
    """What stands between marks in a text that `marked` made, with its escapes undone."""
    found: list[str] = []
    inside = False
    for sign in _SIGNS.findall(text):
        if sign == OPEN:
            found.append("")
            inside = True
        elif sign == CLOSE:
            inside = False
        elif inside:
            found[-1] += sign[-1]
    return found


def _ambiguous(tokens: Sequence[str], marks: Sequence[bool]) -> bool:
    text = "".join(tokens)
    if OPEN in text or CLOSE in text or _ESCAPED.search(text):
        return True
    for before, after, a, b in zip(["", *tokens], [*tokens, ""], [False, *marks], [*marks, False], strict=True):
        if a != b and ((before and before[-1] in "<>\\") or (after and after[0] in "<>")):
            return True
    return False
