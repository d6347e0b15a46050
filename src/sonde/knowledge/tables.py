"""Tables of intervals for other places than a report: Markdown, CSV and LaTeX.

A cell is a text, a number, an `Interval`, or a reason why there is no number (`Undefined`), which every format shows
as a dash with a note below the table and CSV in a column of its own.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sonde.errors import SondeError
from sonde.files import write_text
from sonde.stats.intervals import Interval

DASH = "\N{EN DASH}"
_LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: rf"\{character}" for character in "&%$#_"}


@dataclass(frozen=True)
class Undefined:
    """A number that does not exist, and why."""

    reason: str


Cell = str | float | int | Interval | Undefined | None


@dataclass(frozen=True)
class IntervalTable:
    """Rows under named columns, with a `caption`. Raises `ValueError` for rows of another length than the columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    digits: int = 3
    """Digits after the point."""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells, but there are {len(self.columns)} columns")

    def markdown(self) -> str:
        """A table of pipes; intervals in brackets; reasons as notes below."""
        lines = [self.columns, tuple("---" for _ in self.columns), *(self._texts(row) for row in self.rows)]
        table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        return "\n\n".join([self.caption, table, *(f"{DASH} {note}" for note in self._notes())]) + "\n"

    def csv(self) -> str:
        """One line a row; a column with an interval has `low`, `high` and `n` beside it, one with gaps `reason`."""
        kinds = [{type(row[i]) for row in self.rows} for i in range(len(self.columns))]
        header, written = [], io.StringIO()
        for name, kind in zip(self.columns, kinds, strict=True):
            header.append(name)
            header += [f"{name} {part}" for part in ("low", "high", "n")] if Interval in kind else []
            header += [f"{name} reason"] if Undefined in kind else []
        lines = csv.writer(written, lineterminator="\n")
        lines.writerow(header)
        for row in self.rows:
            cells: list[object] = []
            for cell, kind in zip(row, kinds, strict=True):
                inner = isinstance(cell, Interval)
                cells.append(cell.estimate if inner else "" if isinstance(cell, Undefined) or cell is None else cell)
                if Interval in kind:
                    cells += [cell.low, cell.high, cell.n] if isinstance(cell, Interval) else ["", "", ""]
                if Undefined in kind:
                    cells.append(cell.reason if isinstance(cell, Undefined) else "")
            lines.writerow(cells)
        return written.getvalue()

    def latex(self) -> str:
        """A `table` with a `tabular` of booktabs rules; what LaTeX would read as its own is escaped."""
        numeric = ["r" if any(not isinstance(row[i], str) for row in self.rows) else "l" for i in range(self._width)]
        body = [" & ".join(map(_escaped, self._texts(row))) + r" \\" for row in self.rows]
        notes = [rf"\\ \footnotesize -- {_escaped(note)}" for note in self._notes()]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(self.caption)}}}",
            rf"\begin{{tabular}}{{{''.join(numeric)}}}",
            r"\toprule",
            " & ".join(map(_escaped, self.columns)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> Path:
        """Write what the suffix says: .md, .csv or .tex. Raises `SondeError` for another one."""
        formats = {".md": self.markdown, ".csv": self.csv, ".tex": self.latex}
        path = Path(path)
        if path.suffix not in formats:
            raise SondeError(f"{path}: a table is written as {', '.join(formats)}")
        write_text(path, formats[path.suffix]())
        return path

    @property
    def _width(self) -> int:
        return len(self.columns)

    def _texts(self, row: Sequence[Cell]) -> tuple[str, ...]:
        return tuple(self._text(cell) for cell in row)

    def _text(self, cell: Cell) -> str:
        if isinstance(cell, Interval):
            return f"{self._text(cell.estimate)} ({self._text(cell.low)} to {self._text(cell.high)})"
        if cell is None or isinstance(cell, Undefined):
            return DASH
        return f"{cell:.{self.digits}f}" if isinstance(cell, float) else str(cell)

    def _notes(self) -> list[str]:
        return list(dict.fromkeys(cell.reason for row in self.rows for cell in row if isinstance(cell, Undefined)))


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text).replace(DASH, "--")
