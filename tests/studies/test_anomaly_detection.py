"""The study of anomaly detection: what it finds in the organism, resumes and reports, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.knowledge.anomaly_features import Feature
from sonde.knowledge.anomaly_table import compare
from sonde.organisms.quirky_comparison import comparison_sets
from sonde.runs.run import Run
from sonde.studies.anomaly_chapters import chapters
from sonde.studies.anomaly_detection import ALICES, BOBS, AnomalyDetectionConfig, anomaly_detection
from sonde.studies.anomaly_measures import ALL, HARD, LOG_ODDS, RANDOM, STREAM, TASKS, Measured, task

MODEL = "organism:quirky-comparison"
SMALL = ("--tasks", "all", "--detectors", "mahalanobis", "lof", "spectral", "--trusted", "200", "--test", "200",
         "--steps", "2")  # fmt: skip


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["run", "anomaly-detection", *options])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anomaly-detection") / "run"
    assert run(*SMALL, "--out", str(folder)) == 0
    return folder / "report.html"


def test_bobs_records_set_off_the_alarm_and_records_dealt_again_do_not(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    alarm = found["alarm.all"]
    assert alarm["status"] == "found" and alarm["estimate"] >= 0.8
    assert alarm["control"]["interval"][0] < 0.56 and alarm["control"]["interval"][1] > 0.44
    assert set(found) == {"alarm.all", "alarm.random", "alarm.twin", "features.best", "features.stream-twin"}


def test_every_feature_and_detector_is_in_a_table_of_three_formats(report):
    import polars as pl

    table = pl.read_parquet(report.parent / "tables" / "features.all.parquet")
    assert {"mahalanobis", "lof", "spectral"} == set(table["detector"])
    assert {
        "probe's log-odds",
        "residual stream",
        "effects: components",
        "effects on the probe",
        "random directions",
    } <= (set(table["feature"]))
    assert set(table["form"]) == {"offline", "online"}
    for suffix in ("md", "csv", "tex"):
        assert (report.parent / "tables" / f"features.all.{suffix}").stat().st_size > 500


def test_a_finished_study_is_resumed_with_the_same_numbers(report):
    before = numbers(report.parent)
    assert run(*SMALL, "--out", str(report.parent), "--resume") == 0
    assert numbers(report.parent) == before
    assert before[0]["command"].startswith(
        "sonde run anomaly-detection --tasks all --detectors mahalanobis lof spectral"
    )


def test_tasks_share_no_base_row_and_trusted_names_are_not_tested():
    splits = comparison_sets(0, (ALICES, BOBS))
    trusted, other = ALICES[:4], ALICES[4:]
    for name in (HARD, ALL):
        made = task(name, splits, trusted=300, test=400, seed=0)
        assert not set(made.trusted.rows) & set(made.test.rows) and len(made.test) <= 400
        assert bool(made.trusted.alice.all()) and made.anomalous.sum() == (~made.test.alice).sum()
    assert (task(HARD, splits, trusted=300, test=400, seed=0).test.quantile >= 0.75).all()
    named = task("names", splits, trusted=300, test=400, seed=0, names=(trusted, other))
    assert {record.asked for record in named.trusted} == set(trusted) == {record.asked for record in named.probed}
    assert {record.asked for record in named.test} == set(other) | set(BOBS)
    assert np.isin([record.asked for record in named.test], BOBS).tolist() == named.anomalous.tolist()
    assert set(TASKS) == {"hard", "all", "names"}


def planted(shift: float, seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(rng.normal(size=(200, 3))) for _ in range(2)]
    rows[1][100:] += shift
    features = [Feature(name, *rows) for name in (LOG_ODDS, RANDOM, STREAM)]
    labels, bases = np.repeat([False, True], 100), np.arange(200)
    told = compare(features, labels, groups=bases, detectors=["mahalanobis", "lof"], seed=seed)
    control = {one.feature: one.auroc for one in compare([one.dealt_again() for one in features], labels,
                                                         detectors=["mahalanobis"])}  # fmt: skip
    return Measured(tuple(told), control, labels, bases)  # type: ignore[arg-type]


def test_networks_of_other_seeds_are_averaged_and_a_state_keeps_everything(tmp_path):
    models = [planted(3.0, seed) for seed in range(3)]
    again = Measured.from_state(models[0].state())
    assert [one.auroc for one in again.told] == [one.auroc for one in models[0].told]
    with Run.start(tmp_path / "run", study="anomaly-detection", config={}, seed=0, command="x") as run:
        written = chapters({HARD: models[0]}, {}, [{HARD: one} for one in models[1:]], run, command="sonde run x")
    found = {finding.id: finding for chapter in written for finding in chapter.findings}
    assert found["seeds.hard"].status == "found"
    mean = np.mean([one.of(LOG_ODDS).auroc.estimate for one in models])  # type: ignore[union-attr]
    assert found["seeds.hard"].estimate == pytest.approx(mean)
    paper = found["alarm.hard"].paper
    assert paper is not None and paper.value == 0.95
    assert "alarm.twin" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "--tasks takes some of hard, all, names, not none"),
        ({"tasks": ("easy",)}, "--tasks takes some of hard, all, names, not easy"),
        ({"detectors": ("nose",)}, "--detectors takes some of mahalanobis, .* not nose"),
        ({"trusted": 9}, "--trusted is 9: give 100 or more"),
        ({"test": 9}, "--test is 9: give 100 or more"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"quirk": "addition"}, "knows the first template of comparison only"),
        ({"model": "organism:pebble", "seeds": 2}, "only organism:quirky-comparison is trained again"),
        ({"model": "organism:pebble", "tasks": ("names",)}, "the task names trains organism:quirky-comparison"),
        ({"model": "organism:pebble", "quirk": "sum"}, "there is no quirky set 'sum'"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_a_run_begins(options, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        anomaly_detection(AnomalyDetectionConfig(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_one_line_and_exit_code_2(capsys):
    assert run("--tasks", "easy") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_says_what_was_looked_at(report):
    page = report.read_text()
    for part in ("random directions", "honest twin", "records dealt out again", "LOF online"):
        assert part in page
    assert json.loads((report.parent / "charts" / "features.all-map.vl.json").read_text())["title"]
