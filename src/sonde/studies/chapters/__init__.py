"""Chapters of the audit: one module each, in the order in which the report shows them.

A chapter fits what it needs on the first half of the text, watches the shared pass over the second, and writes itself.
To add one, write a subclass of `sonde.studies.chapters.part.Part` and name it here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sonde.errors import SondeError

if TYPE_CHECKING:
    from sonde.studies.chapters.part import Part

CHAPTERS = {
    "card": "Card",
    "loss": "Loss",
    "statistics": "Statistics",
    "depth": "Depth",
    "passage": "Passage",
    "concepts": "Concepts",
    "control": "Control",
    "features": "Features",
    "knowledge": "Knowledge",
    "elicitation": "Elicitation",
    "cost": "Cost",
}


def chosen(names: tuple[str, ...] | None) -> list["type[Part]"]:
    """The classes of the named chapters in the report's order; all of them for None.

    Raises `SondeError` for a name that does not exist, and for no name at all.
    """
    if names == ():
        raise SondeError(f"--chapters names none: the audit has {', '.join(CHAPTERS)}")
    for name in names or ():
        if name not in CHAPTERS:
            raise SondeError(f"there is no chapter {name!r}: the audit has {', '.join(CHAPTERS)}")
    wanted = [name for name in CHAPTERS if names is None or name in names]
    return [getattr(import_module(f"{__name__}.{name}"), CHAPTERS[name]) for name in wanted]
