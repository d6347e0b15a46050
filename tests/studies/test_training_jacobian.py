"""The study of the training Jacobian on a tiny perceptron, and what it refuses."""

import json

import pytest

from sonde.cli import main

_SMALL = ["--hidden", "1", "--epochs", "1", "--batch", "320", "--seeds", "2", "--looks", "2"]


def test_the_report_has_every_analysis_with_its_control_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["run", "training-jacobian", *_SMALL, "--out", str(out)])
    assert ended.value.code == 0
    found = json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]
    chapters = {finding["chapter"] for finding in found}
    assert chapters == {"spectrum", "response", "effect", "sharing", "blindness", "restriction"}
    assert all(finding["control"] and finding["n"] == 2 for finding in found)
    for name in ("spectrum.sigma", "spectrum.during", "response.ratio", "effect.curve", "sharing.curve"):
        assert (out / f"charts/{name}.svg").exists()
    assert not list((out / "checkpoints").glob("*"))
    before = (out / "steps/seed-0.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    with pytest.raises(SystemExit) as again:
        main(["run", "training-jacobian", *_SMALL, "--out", str(out), "--resume"])
    assert again.value.code == 0
    assert (out / "steps/seed-0.safetensors").stat().st_mtime_ns == before
    assert json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"] == found


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seeds", "1"], "--seeds is 1"),
        (["--hidden", "0"], "--hidden is 0"),
        (["--batch", "60"], "leave 40 of 1,600 rows over"),
        (["--lr", "0"], "lr is 0"),
        (["--momentum", "1"], "momentum is 1"),
        (["--epochs", "0"], "for 0 epochs"),
    ],
    ids=["seeds", "hidden", "batch", "lr", "momentum", "epochs"],
)
def test_bad_options_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "training-jacobian", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
