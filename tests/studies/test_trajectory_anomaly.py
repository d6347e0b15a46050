"""The study of misled prompts: what it finds in the organism, on a user's file, and what it refuses."""

import json

import pytest
from families import tiny
from kill_and_resume import numbers

from sonde.cli import main
from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.organisms.small_lm import train_tokenizer
from sonde.studies.trajectory_anomaly import TrajectoryAnomalyConfig, trajectory_anomaly

MODEL = "organism:quiz"
SMALL = ("--items", "400", "--tokens", "8000", "--detectors", "lof")


def run(*options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["run", "trajectory-anomaly", MODEL, *options])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anomaly") / "run"
    assert run(*SMALL, "--out", str(folder)) == 0
    return folder / "report.html"


def test_both_ways_to_mislead_are_found_against_plain_prompts(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    for attack in ("wrong", "order"):
        finding = found[f"detect.{attack}"]
        assert finding["status"] == "found" and finding["estimate"] >= 0.9
        assert abs(finding["control"]["estimate"] - 0.5) <= 0.1
    assert found["accuracy.overthinking"]["estimate"] >= 90
    assert found["depth.spearman"]["paper"]["value"] == 0.585


def test_all_layers_are_reported_for_the_baseline_and_one_is_chosen(report):
    import polars as pl

    table = pl.read_parquet(report.parent / "tables" / "srm.table.parquet")
    assert table["row"].to_list() == [*(f"resid_pre.{layer}" for layer in range(4)), "output"]
    assert table["chosen on plain prompts"].to_list().count("yes") == 1


def test_a_finished_study_is_resumed_with_the_same_numbers(report):
    before = numbers(report.parent)
    assert run(*SMALL, "--out", str(report.parent), "--resume") == 0
    assert numbers(report.parent) == before
    command = "sonde run trajectory-anomaly organism:quiz --items 400 --detectors lof --tokens 8000"
    assert {finding["command"] for finding in before} == {command}


@pytest.fixture
def file(tmp_path):
    rows = [
        {"question": f"Which comes after {n}?", "choices": [str(n), str(n + 1), str(n + 2)], "answer": 1}
        for n in range(60)
    ]
    rows.append({"question": "Which?", "choices": ["a", "b"], "answer": 0})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path):
    """A random model that knows nothing, with its tokenizer."""
    train_tokenizer(topics()[:20], 400).save_pretrained(tmp_path / "model")
    tiny("gpt_neox", vocab_size=400, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_any_file_runs_on_any_model(file, folder, tmp_path):
    options = TrajectoryAnomalyConfig(
        folder,
        questions=str(file),
        shots=1,
        style="letters",
        detectors=("lof",),
        neighbors=5,
        tokens=3000,
        out=tmp_path / "run",
    )
    trajectory_anomaly(options)
    found = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert {finding["chapter"] for finding in found["findings"]} == {"detect", "srm", "accuracy"}
    assert "1 with another number of choices" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 30}, "30 questions are too few: give at least 40"),
        ({"items": 60, "neighbors": 20}, "30 plain questions are too few: half of them are fitted on"),
        ({"neighbors": 0}, "--neighbors is 0"),
        ({"detectors": ()}, "--detectors takes some of lof, isolation-forest, one-class-svm, not none"),
        ({"detectors": ("lof", "nose")}, "--detectors takes some of .*, not lof nose"),
        ({"shots": 0}, "--shots is 0"),
        ({"shots": 60, "items": 300}, "prompt 0 takes .* tokens, more than the 256 positions of organism:quiz"),
        ({"questions": "nowhere.json"}, "nowhere.json does not exist"),
        ({"tokens": 1}, "--tokens is 1"),
        ({"checkpoints": ("nowhere/1",)}, "nowhere/1"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_a_run_begins(options, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        trajectory_anomaly(TrajectoryAnomalyConfig(MODEL, out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_one_line_and_exit_code_2(capsys):
    assert run("--items", "30") == 2
    assert capsys.readouterr().err.count("\n") == 1
