"""The studies of decay and persistence at a tiny size, and what they refuse."""

import json

import polars as pl
import pytest

from sonde.cli import main

TINY = [
    *("--mixtures", "A", "B", "--weight-decay", "0.01", "--seeds", "1", "--languages", "2", "--widths", "16"),
    *("--steps", "8", "--drop-steps", "8", "--drift-steps", "2", "--floor-steps", "2", "--revive-from", "2"),
]


def run(words):
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    return ended.value.code


def test_the_report_has_claims_that_are_refused_where_nothing_was_learned(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(["capability-decay", *TINY, "--out", str(out)]) == 0
    found = json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]
    assert [one["id"] for one in found] == [f"decay.h{i}" for i in range(1, 7)]
    assert {one["status"] for one in found} == {"refused"}
    units = pl.read_parquet(out / "tables/capability-decay.units.parquet")
    assert units["mixture"].to_list() == ["A", "B"] and not units["learned"].any()
    scores = pl.read_parquet(out / "tables/capability-decay.scores.parquet")
    assert {"joint", "dropped", "continued", "floor", "revived-2", "revived-8"} == set(scores["stage"])
    for name in ("decay.claims", "decay.laws", "revival.savings", "sharing.predictors"):
        assert (out / f"tables/{name}.parquet").exists()
    assert (out / "charts/decay.exact.svg").exists() and (out / "charts/decay.masked.svg").exists()
    capsys.readouterr()
    assert run(["capability-decay", *TINY, "--out", str(out), "--resume"]) == 0


def test_baselines_sequence_and_backdoor_are_chapters_of_their_own(tmp_path):
    out = tmp_path / "run"
    extras = ["--in-turn", "2", "--baselines", "--backdoor", "--no-gate"]
    one = ["--languages", "2", "--widths", "16", "--steps", "4", "--drop-steps", "3", "--revive-from", "1"]
    short = ["--mixtures", "A", "--weight-decay", "0.01", "--seeds", "1", "--drift-steps", "1", "--floor-steps", "1"]
    assert run(["capability-decay", *one, *short, *extras, "--out", str(out)]) == 0
    assert pl.read_parquet(out / "tables/baselines.kept.parquet")["baseline"].n_unique() == 8
    assert pl.read_parquet(out / "tables/backdoor.rates.parquet")["rate before"].to_list() == [0, 0]
    assert pl.read_parquet(out / "tables/sequence.turns.parquet")["language"].to_list() == ["digits", "digits-3x+5"]
    assert (out / "charts/sequence.matrix.svg").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--drop", "latin"], "there is no task 'latin' in the mixture: it has digits"),
        (["--languages", "2", "--mixtures", "B", "--drop", "digits", "digits-2"], "leaves an empty mixture"),
        (["--mixtures", "E"], "there is no mixture 'E'"),
        (["--seeds", "0"], "--seeds takes 1 or more"),
        (["--switch", "forget"], "switch 'forget' is unknown"),
        (["--revive-from", "5000"], "give a time inside it"),
        (["--lr", "0"], "a learning rate of 0"),
        (["--optimizer", "adam"], "optimizer 'adam' is unknown"),
        (["--replay", "1"], "a replay of 1"),
        (["--floor-steps", "0"], "take 1 or more"),
        (["--weight-decay", "-1"], "weight decay -1"),
    ],
)
def test_bad_options_of_decay_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["capability-decay", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_persistence_is_held_against_the_clean_twin(tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--steps", "4", "--revive-steps", "4", "--seeds", "1", "--rows", "48", "--asked", "12", "--batch", "4"]
    assert run(["persistence", *small, "--out", str(out)]) == 0
    (found,) = json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]
    assert found["id"] == "persistence.rate" and found["status"] == "found"
    assert found["estimate"] > 0.9 and found["control"]["estimate"] == 0
    runs = pl.read_parquet(out / "tables/persistence.runs.parquet")
    assert runs["half-life, steps"].to_list() == [">4"]
    capsys.readouterr()
    assert run(["persistence", *small, "--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "organism:pebble"], "is no organism whose trigger is known"),
        (["--steps", "0"], "take 1 or more"),
        (["--rows", "2"], "--rows takes 16 or more"),
    ],
)
def test_bad_options_of_persistence_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["persistence", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
