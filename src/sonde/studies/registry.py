"""The catalogue of studies: `sonde studies` lists it, `sonde run NAME` runs from it.

A study is one function of one dataclass. The dataclass is the command line (required fields are positional, every field
has a docstring, which is its help); the function makes a run folder and returns the path of its report.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sonde.catalogue import Catalogue

Run = TypeVar("Run", bound=Callable[[Any], Path])

STUDIES = Catalogue("sonde.studies", decorator="study", noun="study")


def study(name: str, *, summary: str, paper: str | None = None) -> Callable[[Run], Run]:
    """Enter a function `config -> path of the report` in the catalogue. All arguments are literals.

    `summary` is one sentence for `sonde studies`; `paper` is the source, as a reader would look it up. Imports of torch
    and of the methods belong inside the function: its module is imported for `--help`.
    """

    def enter(run: Run) -> Run:
        STUDIES.register(name, run)
        return run

    return enter
