"""Tables keep every number, interval and reason in all three formats."""

import csv
import io

import pytest

from sonde.errors import SondeError
from sonde.knowledge.tables import IntervalTable, Undefined
from sonde.stats.intervals import Interval

TABLE = IntervalTable(
    "AUROC of probes_1 & others",
    ("probe", "layer", "A->B", "disagreements"),
    (
        ("logr|pair", 2, Interval(0.885, 0.86, 0.91, 500), 0.5),
        ("50% {x}", 3, Undefined("single class: all 40 rows are true"), None),
    ),
)


def test_markdown_has_intervals_in_brackets_and_reasons_below():
    text = TABLE.markdown()
    assert "| logr\\|pair | 2 | 0.885 (0.860 to 0.910) | 0.500 |" in text
    assert text.endswith("\u2013 single class: all 40 rows are true\n")


def test_csv_has_every_digit_and_reads_back():
    first, second = csv.DictReader(io.StringIO(TABLE.csv()))
    assert (first["A->B"], first["A->B low"], first["A->B high"], first["A->B n"]) == ("0.885", "0.86", "0.91", "500")
    assert second["A->B"] == "" and second["A->B reason"] == "single class: all 40 rows are true"


def test_latex_escapes_what_latex_reads():
    text = TABLE.latex()
    assert r"AUROC of probes\_1 \& others" in text
    assert r"50\% \{x\} & 3 & -- & -- \\" in text
    assert r"\begin{tabular}{lrrr}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_the_suffix_is_the_format(tmp_path):
    for suffix, form in ((".md", TABLE.markdown), (".csv", TABLE.csv), (".tex", TABLE.latex)):
        assert TABLE.write(tmp_path / f"table{suffix}").read_text() == form()
    with pytest.raises(SondeError, match=r"table\.xls: a table is written as \.md, \.csv, \.tex"):
        TABLE.write(tmp_path / "table.xls")


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="row 0 has 1 cells, but there are 2 columns"):
        IntervalTable("x", ("a", "b"), (("a",),))
