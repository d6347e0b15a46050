"""The study of contrastive activation addition on pebble, which has no such behaviour to show: it says so."""

import json

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies.caa import CaaConfig, caa

MODEL = "organism:pebble"
SMALL = {"pairs": 12, "items": 4, "multipliers": (1.0,)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    record = {
        "question": "Is snow white?\n\nChoices:\n(A) Yes\n(B) No",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    }
    (folder / "other.json").write_text(json.dumps([record] * 3))
    return caa(CaaConfig(MODEL, **SMALL, capability=str(folder / "other.json"), out=folder / "run"))


def test_little_is_moved_on_pebble_and_the_report_says_so(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {"steering.residual", "meaning.behaviour", "robustness.swapped"}
    assert abs(found["steering.residual"]["estimate"]) < 0.1
    page = report.read_text(encoding="utf-8")
    assert "of the probability to neither answer" in page
    assert "no recurrent state to steer" in page


def test_every_form_and_the_other_questions_are_in_the_table(report):
    import polars as pl

    forms = pl.read_parquet(report.parent / "tables/robustness.table.parquet")["form"].to_list()
    for form in ("add", "projection, then add", "discriminant", "unit length", "letters swapped", "labels 1 and 2"):
        assert form in forms
    assert forms[-1] == "other questions"


def test_the_vectors_are_kept_and_load_for_this_model(report):
    import sonde
    from sonde.concepts.contrast import Contrast

    lm = sonde.load(MODEL, check=False)
    assert Contrast.load(report.parent / "vectors" / "caa", lm).n_positive == 12


def test_a_finished_run_is_resumed_with_the_same_numbers(report, monkeypatch):
    monkeypatch.setattr("sonde.concepts.sweep.sweep", None)  # nothing is swept again
    before = numbers(report.parent)
    other = str(report.parent.parent / "other.json")
    assert numbers(caa(CaaConfig(MODEL, **SMALL, capability=other, out=report.parent, resume=True)).parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrast": "none.json"}, r"none\.json does not exist"),
        ({"held_out": "none.json"}, r"none\.json does not exist"),
        ({"capability": "none.json"}, r"none\.json does not exist"),
        ({"pairs": 4}, "--pairs is at least 8"),
        ({"chat": True}, "has no chat template"),
        ({"chat": True, "plain": True}, "--chat and --plain exclude each other"),
        ({"resume": True, "out": None}, "--resume needs --out"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        caa(CaaConfig(MODEL, **{**SMALL, "out": tmp_path / "run", **change}))
    assert not (tmp_path / "run").exists()


def test_one_letter_for_all_and_too_few_items_are_refused(tmp_path, capsys):
    record = {
        "question": "Will you?\n\nChoices:\n(A) Yes\n(B) No",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    }
    (tmp_path / "a.json").write_text(json.dumps([record] * 40))
    with pytest.raises(SystemExit) as end:
        main(["run", "caa", MODEL, "--contrast", str(tmp_path / "a.json"), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert "all 40 answers that show the behaviour have the earlier letter" in said and "\n" not in said
    swapped = {**record, "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"}
    (tmp_path / "b.json").write_text(json.dumps([record, swapped] * 5))
    with pytest.raises(SondeError, match="has 10 items: 4 to score leave fewer than 8; give fewer --items"):
        caa(CaaConfig(MODEL, contrast=str(tmp_path / "b.json"), **SMALL, out=tmp_path / "run"))
