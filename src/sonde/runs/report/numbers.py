"""Numbers, times and sizes as people write them: few significant digits, thousands apart, a true minus sign."""

import math
import re
from datetime import datetime

_PER_CENT = re.compile(r"(?<=\d) %")


def number(value: float | int | None, digits: int = 3) -> str:
    """A number as people write it: `digits` significant digits, thousands apart, a true minus sign; "–" for a gap."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if float(value).is_integer() and (isinstance(value, int) or abs(value) >= 10**digits):
        text = f"{int(value):,}"
    elif abs(value) >= 10**digits:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{decimals}f}"
    return text.replace("-", "−")


def trimmed(value: float | int | None, digits: int = 3) -> str:
    """`number` without zeros at its end, for a number that stands alone: 0.5, 12."""
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "×" not in text else text


def tied(text: str) -> str:
    """`text` whose numbers stay on one line with their per cent sign."""
    return _PER_CENT.sub("\u00a0%", text)


def count(value: int) -> str:
    """A large count in words: "812", "65,536", "2.61 M", "1.2 B"."""
    for unit, step in (("B", 1e9), ("M", 1e6)):
        if value >= step:
            return f"{trimmed(value / step)} {unit}"
    return f"{value:,}"


def decimals(estimate: float, low: float, high: float) -> int:
    """Digits after the point that show one to two significant digits of the interval's width."""
    scale = (high - low) / 3 or abs(estimate) / 300 or 1.0
    return max(0, min(8, -math.floor(math.log10(scale))))


def rounded(value: float, places: int) -> str:
    """A number with `places` decimals, thousands apart and a true minus sign."""
    text = f"{value:,.{places}f}"
    return (text if float(text.replace(",", "")) else text.lstrip("-")).replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as people say them: "0.4 s", "41 s", "2 min 41 s", "3 h 5 min"."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: int) -> str:
    """Bytes in decimal units: "512 B", "48.2 kB", "1.22 MB"."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= step:
            return f"{number(n_bytes / step)} {unit}"
    return f"{n_bytes} B"


def date(created: str) -> str:
    """An ISO date or time as "21 Nov 2026" or "21 Nov 2026, 09:35"; anything else as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    day = f"{moment.day} {moment:%b %Y}"
    return f"{day}, {moment:%H:%M}" if len(created) > 10 else day
