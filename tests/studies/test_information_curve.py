"""The studies of prompts at a size that tests what they say and keep, on pebble."""

import json

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.prompts import elicitation
from sonde.studies.information_curve import InformationCurveConfig, information_curve

SMALL = {"behaviours": ("rule",), "rows": 10, "lengths": (1, 2), "restarts": 1, "steps": 2, "batch": 4}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "run"
    words = ["run", "information-curve", "--behaviours", "rule", "--rows", "10", "--lengths", "1", "2"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--restarts", "1", "--steps", "2", "--batch", "4", "--out", str(out)])
    assert not end.value.code
    return out / "report.html"


def test_a_behaviour_comes_with_its_controls_and_a_claim(report):
    (finding,) = numbers(report.parent)
    assert finding["status"] == "not found" and finding["control"]["estimate"] == 0.5
    assert "longer, placed elsewhere" in finding["sentence"]
    assert "the control model needs" in finding["sentence"] and "random targets" in finding["sentence"]
    assert len(list((report.parent / "curves").glob("*.safetensors"))) == 3
    import polars as pl

    table = pl.read_parquet(report.parent / "tables/rule.lengths.parquet")
    assert table["curve"].unique().sort().to_list() == ["behaviour", "control model", "random targets"]
    assert table.filter(pl.col("curve") == "behaviour")["n"].to_list() == [0, 1, 2]


def test_a_finished_run_is_resumed_with_the_same_numbers(report, monkeypatch):
    monkeypatch.setattr(elicitation, "train_prompts", None)
    before = numbers(report.parent)
    assert numbers(information_curve(InformationCurveConfig(**SMALL, out=report.parent, resume=True)).parent) == before


def test_without_a_control_model_the_report_refuses_the_word_and_says_why(tmp_path):
    config = InformationCurveConfig(
        **{**SMALL, "lengths": (1,)}, skip_control_model=True, skip_random_targets=True, out=tmp_path / "run"
    )
    page = information_curve(config)
    (finding,) = numbers(page.parent)
    assert finding["status"] == "unclear" and "no control model" in finding["control_reason"]
    assert "The word “capability” is refused: there is no control model." in finding["sentence"]
    assert "So this is a capability" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behaviours": ("harm",)}, "there is no behaviour 'harm'"),
        ({"behaviours": ()}, "--behaviours names none"),
        ({"examples": "none.jsonl"}, r"none\.jsonl does not exist"),
        ({"positions": ("middle",)}, "'middle' is no position"),
        ({"lengths": (0,)}, "nothing to train"),
        ({"lengths": (600,)}, "more than the 512 positions"),
        ({"controls": ("a", "b")}, "1 models, but 2 --controls"),
        ({"success": 0.0}, "--success is 0"),
        ({"models": ()}, "--models takes one or more"),
        ({"resume": True, "out": None}, "--resume needs --out"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        information_curve(InformationCurveConfig(**{**SMALL, "out": tmp_path / "run", **change}))
    assert not (tmp_path / "run").exists()


def test_a_file_of_prompts_and_targets_is_a_behaviour(tmp_path):
    rows = [{"prompt": f"{i} is", "target": " odd" if i % 2 else " even", "behaviour": "Parity!"} for i in range(8)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    config = InformationCurveConfig(
        **{**SMALL, "lengths": (1,)},
        examples=str(tmp_path / "own.json"),
        skip_random_targets=True,
        out=tmp_path / "run",
    )
    (finding,) = numbers(information_curve(config).parent)
    assert finding["id"] == "parity.push" and "do “Parity!”" in finding["sentence"]
