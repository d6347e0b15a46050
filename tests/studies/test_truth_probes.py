"""The study of truth probes: made-up statements, files that share bases, and what it refuses."""

import json

import polars as pl
import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies import truth_measures
from sonde.studies.truth_probes import TruthProbesConfig, truth_probes

MODEL = "organism:pebble"
SMALL = ("--rows", "160", "--probes", "logr", "diff-in-means")


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["run", "truth-probes", MODEL, *options])
    return int(end.value.code or 0)


@pytest.fixture(scope="module", autouse=True)
def _few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth_measures, "SHUFFLED", 2)
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth") / "run"
    assert run(*SMALL, "--out", str(folder)) == 0
    return folder / "report.html"


def test_pebble_reads_the_comparison_and_not_its_truth(report):
    """Its states hold which number is the larger: what is true of one relation is false of the other."""
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert found["within.set-0"]["status"] == "found" and found["within.set-0"]["estimate"] > 0.9
    assert found["within.set-0"]["control"]["name"] == "shuffled labels"
    assert found["across.pair-0"]["status"] == "not found" and found["across.pair-0"]["estimate"] < 0.3
    assert "calls the false ones true" in found["across.pair-0"]["sentence"]


def test_tables_are_written_in_three_formats_with_intervals(report):
    for suffix in (".md", ".csv", ".tex"):
        assert (report.parent / "tables" / f"across.probes{suffix}").read_text().count("logr")
    table = pl.read_csv(report.parent / "tables" / "across.probes.csv")
    assert {"larger than to smaller than", "larger than to smaller than low"} <= set(table.columns)


def test_a_finished_study_is_resumed_with_the_same_numbers(report):
    before = numbers(report.parent)
    assert run(*SMALL, "--out", str(report.parent), "--resume") == 0
    assert numbers(report.parent) == before
    assert {one["command"] for one in before} == {
        "sonde run truth-probes organism:pebble --rows 160 --probes logr diff-in-means"
    }


def test_files_that_share_a_base_are_split_together(tmp_path):
    rows = [{"statement": f"The town of X{i} is in {place}.", "label": label, "town": i}
            for i in range(60) for place, label in (("Spain", 1), ("Peru", 0))]  # fmt: skip
    paths = []
    for name, no in (("towns", ""), ("neg_towns", "not ")):
        path = tmp_path / f"{name}.jsonl"
        made = [{**row, "statement": row["statement"].replace(" in ", f" {no}in "), "label": row["label"] ^ bool(no)}
                for row in rows]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, made)))
        paths.append(str(path))
    config = TruthProbesConfig(
        MODEL, statements=tuple(paths), base="town", rows=100, probes=("logr",), out=tmp_path / "run"
    )
    found = {one["id"]: one for one in numbers(truth_probes(config).parent)}
    assert found["within.set-0"]["n"] < 30  # towns, of which three in ten are held
    assert found["within.set-0"]["estimate"] > 0.95  # Spain against Peru
    assert found["across.pair-0"]["estimate"] < 0.5  # which is no truth


@pytest.mark.data
def test_the_files_of_the_literature_run(shared_data, tmp_path):
    files = tuple(str(shared_data / f"truth/{name}.csv") for name in ("sp_en_trans", "neg_sp_en_trans"))
    config = TruthProbesConfig(MODEL, statements=files, probes=("logr",), rows=120, out=tmp_path / "run")
    assert "sp_en_trans" in truth_probes(config).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 10}, "--rows is 10: give 40 or more"),
        ({"probes": ("logr", "nose")}, "--probes takes some of .*, not nose"),
        ({"probes": ()}, "--probes takes some of .*, not none"),
        ({"base": "city"}, "--base names a column of --statements"),
        ({"statements": ("nowhere.csv",)}, "nowhere.csv does not exist"),
        ({"answers": (" True",)}, "--answers takes two"),
        ({"answers": (" unbelievable things", " True")}, "are not one token each"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_a_run_begins(options, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        truth_probes(TruthProbesConfig(MODEL, out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_one_line_and_exit_code_2(capsys):
    assert run("--rows", "10") == 2
    assert capsys.readouterr().err.count("\n") == 1
