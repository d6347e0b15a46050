"""The study of state steering on a toy: what its report says, what it refuses, and that it goes on where it stopped."""

import pytest
from kill_and_resume import numbers

from sonde.errors import SondeError
from sonde.studies.state_steering import StateSteeringConfig, state_steering

TOY = ("organism:mode-recall-rwkv",)
SMALL = {"models": TOY, "pairs": 8, "items": 6, "multipliers": (-3.0, 3.0)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return state_steering(StateSteeringConfig(**SMALL, out=tmp_path_factory.mktemp("study") / "run"))


def test_the_toy_is_steered_by_residual_stream_state_and_both(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    for name in ("summary.both-0", "model-0.residual", "model-0.state"):
        assert found[name]["status"] == "found", name
        assert found[name]["estimate"] > 0.9
    assert found["summary.both-0"]["command"].startswith("sonde run state-steering --models organism:mode-recall-rwkv")


def test_figures_and_typed_tables_are_in_the_run(report):
    import polars as pl

    for name in ("summary.spread", "model-0.layers", "model-0.strength", "model-0.kinds", "decay-0.tokens"):
        assert (report.parent / "charts" / f"{name}.svg").stat().st_size > 1000
    table = pl.read_parquet(report.parent / "tables/model-0.effects.parquet")
    assert table.height == 9 * 4  # residual, state, both of three layers, at -3, -1, 1, 3
    assert table["match"].dtype == pl.Float64


def test_a_finished_run_is_resumed_with_the_same_numbers(report, monkeypatch):
    monkeypatch.setattr("sonde.concepts.sweep.sweep", None)  # nothing is swept again
    before = numbers(report.parent)
    again = state_steering(StateSteeringConfig(**SMALL, out=report.parent, resume=True))
    assert numbers(again.parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ()}, "--models takes one or more different models, not none"),
        ({"models": TOY * 2}, "--models takes one or more different"),
        ({"models": ("organism:pebble",)}, "organism:pebble needs --contrast FILE"),
        ({"models": ("organism:pebble",), "contrast": "x.json"}, r"\(gpt_neox\) has no recurrent state to steer"),
        ({"contrast": "x.json"}, r"x\.json does not exist"),
        ({"items": 1}, "--pairs and --items are at least 2"),
        ({"multipliers": ()}, "--multipliers at least one"),
        ({"resume": True, "out": None}, "--resume needs --out"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        state_steering(StateSteeringConfig(**{**SMALL, "out": tmp_path / "run", **change}))
    assert not (tmp_path / "run").exists()
