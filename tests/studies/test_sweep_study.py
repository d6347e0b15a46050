"""A sweep makes every combination, checks all before it runs any, and leaves one tidy table and a report."""

import polars as pl
import pytest
from runs.trial_program import install

from sonde.cli import main
from sonde.errors import SondeError
from sonde.runs.folder import read_json
from sonde.studies.sweep import SweepConfig, settings, sweep


@pytest.fixture
def marks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", install(tmp_path)["PYTHONPATH"])
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def test_lists_and_ranges_make_every_combination_in_order():
    found = settings(["organism:a,organism:b", "--seed", "0..1", "--trainer=x,y", "--flag", "--layers", "1", "2"])
    assert len(found) == 8
    assert found[1].words == (*("organism:a", "--seed", "0", "--trainer=y", "--flag", "--layers", "1", "2"),)
    assert found[7].varied == {"argument 1": "organism:b", "seed": "1", "trainer": "y"}
    assert found[1].name == "argument-1=organism-a,seed=0,trainer=y"
    assert settings(["--seed", "-1..1"])[0].words == ("--seed", "-1")
    assert len(settings(["--seed=1,4..6"])) == 4
    assert settings(["a", "--text", "one,,two"])[0].varied == {}
    assert settings([])[0].name == "only"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", "5..1"], "the range 5..1 runs backwards: write 1..5"),
        (["--seed", "0..99999"], "these lists make 100000 trials, more than 10000"),
        (["--seed", "1,1"], "two trials of this sweep would have one name"),
    ],
)
def test_lists_that_cannot_be_swept_are_named(words, line):
    with pytest.raises(SondeError, match=line):
        settings(words)


def test_a_sweep_leaves_one_tidy_table_and_goes_on_where_it_stopped(marks, tmp_path):
    words = ["--seed=1,2", "--sleep=0,0.01", f"--marks={marks}"]
    out = tmp_path / "sweep"
    report = sweep("toy", words, SweepConfig(workers=2, out=out), check=lambda trial: None)
    assert "Over 2 trials at sleep 0" in report.read_text(encoding="utf-8")
    table = pl.read_parquet(out / "tables/results.parquet").sort("seed", "sleep")
    assert table["estimate"].to_list() == [1, 1, 2, 2]
    assert table["sleep"].to_list() == ["0", "0.01", "0", "0.01"]
    found = read_json(out / "findings.json")["findings"]
    assert [one["estimate"] for one in found] == [1.5, 1.5]
    started = [path.stat().st_size for path in sorted(marks.iterdir())]
    sweep("toy", words, SweepConfig(workers=2, out=out, resume=True), check=lambda trial: None)
    assert [path.stat().st_size for path in sorted(marks.iterdir())] == started
    with pytest.raises(SondeError, match="words"):
        sweep("toy", words[:1], SweepConfig(out=out, resume=True), check=lambda trial: None)


def test_failed_trials_are_listed_and_none_at_all_is_an_error(marks, tmp_path):
    config = SweepConfig(workers=2, retries=0, out=tmp_path / "sweep")
    sweep("toy", ["--seed=1,13", f"--marks={marks}"], config, check=lambda trial: None)
    ended = pl.read_parquet(tmp_path / "sweep/tables/trials.parquet")
    assert dict(zip(ended["trial"], ended["reason"], strict=True)) == {"seed=1": "", "seed=13": "it broke"}
    config = SweepConfig(workers=1, retries=0, out=tmp_path / "none")
    with pytest.raises(SondeError, match="no trial of this sweep has results: it broke"):
        sweep("toy", ["--seed=13", f"--marks={marks}"], config, check=lambda trial: None)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nosuch"], "there is no study 'nosuch'"),
        (["static-reading", "organism:pebble", "--seed", "0..2", "--toekns", "3,4"], "toekns"),
        (["static-reading", "organism:pebble", "--seed", "0..2", "--directions", "2,x"], "'x'"),
        (["static-reading", "organism:pebble", "--workers", "-1"], "--workers is -1"),
        (["--seed", "1"], "the study comes first"),
    ],
)
def test_a_wrong_command_line_is_one_line_before_any_trial(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
