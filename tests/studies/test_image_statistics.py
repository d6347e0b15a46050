"""The study of image statistics at a tiny size, and what it refuses."""

import json

import pytest

from sonde.cli import main


def test_the_report_has_digits_and_planted_classes(tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--steps", "16", "--seeds", "2", "--per-class", "6", "--no-third"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "image-statistics", *small, "--out", str(out)])
    assert ended.value.code == 0
    found = {f["id"]: f for f in json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]}
    assert found["image_statistics.rise"]["control"]["name"] == "real test digits"
    assert found["image_statistics.order"]["n"] == 2
    for chart in ("digits.edited", "digits.made", "planted.accuracy"):
        assert (out / f"charts/{chart}.svg").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as again:
        main(["run", "image-statistics", *small, "--out", str(out), "--resume"])
    assert again.value.code == 0


@pytest.mark.parametrize("words", [["--seeds", "1"], ["--steps", "4"], ["--per-class", "1"]])
def test_bad_options_are_one_line_and_leave_nothing(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "image-statistics", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--seeds takes 2 or more" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
