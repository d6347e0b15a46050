"""The study of phase changes at a tiny size, and what it refuses."""

import json

import pytest

from sonde.cli import main


@pytest.mark.parametrize("task", ["skip-trigram", "phrase", "addition"])
def test_the_report_holds_endless_data_against_few(task, tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--task", task, "--size", "3" if task != "addition" else "1", "--steps", "12", "--seeds", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "phase-changes", *small, "--examples", "16", "--out", str(out)])
    assert ended.value.code == 0
    found = json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"][0]
    assert found["control"]["name"] == "the fixed set without weight decay"
    assert (out / "charts/phases.losses.svg").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as again:
        main(["run", "phase-changes", *small, "--examples", "16", "--out", str(out), "--resume"])
    assert again.value.code == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seeds", "1"], "--seeds takes 2 or more"),
        (["--task", "addition", "--size", "18"], "summands have 1 to 17 digits"),
        (["--steps", "1"], "too small"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "phase-changes", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
