"""The quirky sets by name: twelve of Mallen et al. (arXiv:2312.01037), and the comparison of two numbers.

Five are generated, and so is comparison; seven read a table of yours (see `sonde.data.quirky_text`).
"""

from sonde.data import quirky_text as text
from sonde.data.quirky import Quirk
from sonde.data.quirky_arithmetic import arithmetic, comparison

QUIRKS: dict[str, Quirk] = {
    quirk.name: quirk
    for quirk in (
        *(arithmetic(name) for name in ("addition", "subtraction", "multiplication", "modular-addition", "squaring")),
        comparison(),
        *(make() for make in (text.capitals, text.hemisphere, text.population, text.authors)),
        *(make() for make in (text.sciq, text.sentiment, text.nli)),
    )
}
