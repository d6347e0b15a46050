"""The study of grokking on a small network, and what it refuses."""

import json

import pytest

from sonde.cli import main


def test_the_report_has_phases_circuit_and_control(tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--modulus", "31", "--share", "0.6", "--hidden", "128", "--steps", "400", "--lr", "0.006", "--every", "50"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "grokking", *small, "--out", str(out)])
    assert ended.value.code == 0
    found = json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]
    assert found[0]["id"] == "grokking.accuracy"
    assert found[0]["control"]["name"] == "the same training without weight decay"
    assert (out / "history.safetensors").exists()
    assert (out / "charts/progress.losses.svg").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as again:
        main(["run", "grokking", *small, "--out", str(out), "--resume"])
    assert again.value.code == 0


def test_a_group_has_components_in_the_place_of_frequencies(tmp_path):
    out = tmp_path / "run"
    small = ["--group", "s3", "--share", "0.7", "--hidden", "16", "--steps", "100", "--every", "50", "--no-control"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "grokking", *small, "--out", str(out)])
    assert ended.value.code == 0
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "multiplication in S3" in report and "Components of the group" in report


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--modulus", "1"], "the modulus is 1"),
        (["--share", "1.5"], "a share of 1.5"),
        (["--group", "e8"], "'e8' names no group: give c2"),
        (["--lr", "0"], "--lr a number above 0"),
        (["--steps", "0"], "steps is 0"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "grokking", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
