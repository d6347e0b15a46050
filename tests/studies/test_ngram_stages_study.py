"""The study of stages by n-grams, trained small and on checkpoints, and what it refuses."""

import json

import pytest

import sonde
from sonde.cli import main
from sonde.files import load_bundle

SMALL = ["--width", "32", "--layers", "1", "--sequences", "16", "--context", "24", "--seed", "3"]


def run(words: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "ngram-stages", *words])
    assert (ended.value.code or 0) == code


def test_training_is_watched_and_told_with_its_control(tmp_path):
    out = tmp_path / "run"
    words = ["--characters", "60000", "--steps", "16", "--seeds", "2", "--lr", "0.01", *SMALL, "--out", str(out)]
    run(words)
    findings = {f["id"]: f for f in json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]}
    assert set(findings) == {"stages.order", "stages.rise"}
    assert findings["stages.order"]["control"]["name"] == "n-grams of the shuffled text"
    assert findings["stages.order"]["control"]["estimate"] <= 1
    trace = load_bundle(out / "steps" / "seed-4.safetensors")
    assert list(trace) == [0, 1, 2, 4, 8, 16]

    assert trace[16]["kl"]["2"].shape == (16,)
    assert (out / "charts" / "samples.position.svg").exists()
    before = (out / "findings.json").read_text(encoding="utf-8")
    run([*words, "--resume"])
    assert json.loads(before)["findings"] == json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]


def test_checkpoints_of_a_language_model_are_read_by_name_or_found_in_its_folder(tmp_path):
    lm = sonde.load("organism:pebble", check=False)
    assert lm.tokenizer is not None
    for step in (10, 200):
        lm.model.save_pretrained(tmp_path / "model" / f"step{step}")
        lm.tokenizer.save_pretrained(tmp_path / "model" / f"step{step}")
    words = ["--model", str(tmp_path / "model"), "--tokens", "4096", "--sequences", "4", "--context", "32"]
    run([*words, "--revisions", "step200,step10", "--out", str(tmp_path / "named")])
    run([*words, "--out", str(tmp_path / "found")])
    named, found = (
        json.loads((tmp_path / name / "findings.json").read_text(encoding="utf-8"))["findings"]
        for name in ("named", "found")
    )
    assert [f["estimate"] for f in named] == [f["estimate"] for f in found]
    assert named[1]["estimate"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--orders", "0"], "--orders is 0"),
        (["--orders", "64"], "below the context of 64"),
        (["--smoothing", "magic"], "'magic': give kneser-ney or absolute"),
        (["--steps", "0"], "take 1 or more"),
        (["--width", "30"], "--width a multiple of 4"),
        (["--revisions", "step1"], "--revisions needs --model"),
        (["--model", "."], "holds no folders such as step1000"),
        (["--model", ".", "--revisions", "step1"], "step1 does not exist"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(words, code=2)
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
