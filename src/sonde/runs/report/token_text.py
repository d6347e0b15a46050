"""How the text of a token is shown: white space gets a sign and a name, invisible characters are written out.

In a passage a token keeps its place: spaces inside it stay spaces, a run of newlines becomes one sign and one line
break. In a list a token stands alone: its leading space shows as `␣`.
"""

import unicodedata
from itertools import groupby

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
_NAMES = {" ": "space", "\n": "newline", "\t": "tab", "\r": "carriage return"}
_LONGEST = 60


def passage_text(text: str) -> str:
    """The token inside a passage set with `white-space: pre-wrap`."""
    if text and not text.strip(" "):
        return "␣" * len(text) if len(text) <= 8 else f"␣×{len(text)}"
    return _shown(text, spaces=False, breaks=True) or "∅"


def label(text: str) -> str:
    """The token alone, in a list or a table cell, cut after 60 characters."""
    shown = _shown(text, spaces=True, breaks=False) or "∅"
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def name(text: str) -> str:
    """What a screen reader says for a token of white space ("3 spaces", "newline"); empty for all others."""
    if not text:
        return "empty token"
    if any(sign not in _NAMES for sign in text):
        return ""
    counted = ((sign, len(list(run))) for sign, run in groupby(text))
    return ", ".join(_NAMES[sign] if count == 1 else f"{count} {_NAMES[sign]}s" for sign, count in counted)


def _shown(text: str, *, spaces: bool, breaks: bool) -> str:
    parts = []
    for sign, run in groupby(text):
        count = len(list(run))
        alone = count == len(text)
        if sign in "\n\t\r":
            parts.append(_SIGNS[sign] + (f"×{count}" if count > 1 else "") + ("\n" if breaks and sign == "\n" else ""))
        elif sign == " ":
            leading = not parts
            parts.append((f"␣×{count}" if alone and count > 1 else "␣" * count) if spaces and leading else " " * count)
        else:
            parts.append(_visible(sign) * count)
    return "".join(parts)


def _visible(sign: str) -> str:
    """Characters without a picture of their own, or that change their neighbours, as escapes."""
    category = unicodedata.category(sign)
    if category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"):
        code = ord(sign)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return "◌" + sign if category in ("Mn", "Me") else sign
