"""The study of quirky models: what it finds in the organism, that it resumes, and what it refuses."""

import polars as pl
import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.data.quirky import quirky_sets
from sonde.errors import SondeError
from sonde.studies import quirky_elk_measures
from sonde.studies.quirky_elk import QuirkyElkConfig, quirky_elk
from sonde.studies.quirky_elk_measures import split_bases, whole_bases

SMALL = ("--train", "320", "--test", "320", "--probes", "logr", "crc")


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["run", "quirky-elk", *options])
    return int(end.value.code or 0)


@pytest.fixture(scope="module", autouse=True)
def _few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quirky_elk_measures, "SHUFFLED", 2)
        patch.setattr(quirky_elk_measures, "REFLECTED", 100)
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elk") / "run"
    assert run(*SMALL, "--out", str(folder)) == 0
    return folder / "report.html"


def test_the_organism_knows_better_than_it_says_to_bob(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert found["says.alice"]["estimate"] >= 0.98 and found["says.bob"]["estimate"] <= 0.05
    assert found["transfer.ab"]["status"] == "found" and found["transfer.ab"]["estimate"] >= 0.8
    assert found["transfer.ab"]["control"]["name"] == "what it says to Bob"
    assert found["transfer.ab-last"]["estimate"] <= 0.65
    assert found["transfer.disagreements"]["status"] == "found"
    assert found["gap.logr"]["estimate"] >= 0.55
    assert found["alarm.auroc"]["estimate"] >= 0.7
    assert found["cause.alice"]["control"]["estimate"] < found["cause.alice"]["estimate"]


def test_every_transfer_is_in_the_tables(report):
    tables = report.parent / "tables"
    matrix = pl.read_csv(tables / "transfer.matrix.csv")
    assert set(matrix["trained on"]) <= {"A", "B", "AE", "AH", "BE", "BH", "all"} and "B low" in matrix.columns
    probes = pl.read_parquet(tables / "transfer.probes.parquet")
    assert probes["probe"].to_list() == ["logr", "crc", "random (95 % of directions)"] and set(probes["sign"]) == {
        "known"
    }
    assert (tables / "gap.table.tex").read_text().startswith(r"\begin{table}")


def test_a_finished_study_is_resumed_with_the_same_numbers(report):
    before = numbers(report.parent)
    assert run(*SMALL, "--out", str(report.parent), "--resume") == 0
    assert numbers(report.parent) == before
    assert {one["command"] for one in before} == {"sonde run quirky-elk --train 320 --test 320 --probes logr crc"}


def test_base_rows_stay_whole():
    records = quirky_sets("comparison", n=200, seed=0).train
    some = whole_bases(records, 100, 0)
    assert 100 <= len(some) < 110
    assert all((records.rows == row).sum() == (some.rows == row).sum() for row in set(some.rows))
    one, other = split_bases(some, 0.25, 0)
    assert len(one) + len(other) == len(some) and not set(one.rows) & set(other.rows)


def test_fewer_rows_than_asked_for_are_all_used_with_a_warning():
    records = quirky_sets("comparison", n=40, seed=0).test
    with pytest.warns(UserWarning, match=f"1000 records of comparison asked for: it has {len(records)}, all are used"):
        assert len(whole_bases(records, 1000, 0)) == len(records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 10}, "--train is 10: give 64 or more"),
        ({"test": 10}, "--test is 10: give 64 or more"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"seeds": 2, "model": "organism:pebble"}, "only organism:quirky-comparison is trained again"),
        ({"quirk": "addition"}, "organism:quirky-comparison knows its own set only"),
        ({"model": "organism:pebble"}, "--quirk names the set that organism:pebble was trained on"),
        ({"probes": ("nose",)}, "--probes takes some of .*, not nose"),
        ({"model": "organism:pebble", "quirk": "nonsense"}, "there is no quirky set 'nonsense'"),
        ({"model": "organism:pebble", "quirk": "sentiment"}, "give source, a .csv or .jsonl file"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_a_run_begins(options, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        quirky_elk(QuirkyElkConfig(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_one_line_and_exit_code_2(capsys):
    assert run("--train", "10") == 2
    assert capsys.readouterr().err.count("\n") == 1
