"""Studies of repetition, of defences and of walks, at a size that tests what they say."""

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies.defence_strength import DefenceStrengthConfig, defence_strength
from sonde.studies.pathfinding import PathfindingConfig, pathfinding
from sonde.studies.repetition import RepetitionConfig, repetition

STRINGS = (" river", " river stone")


def ran(words, out):
    with pytest.raises(SystemExit) as end:
        main(["run", *words, "--out", str(out)])
    assert not end.value.code
    return {finding["id"]: finding for finding in numbers(out)}


def test_strings_of_one_and_two_tokens_have_curves_that_fall_and_an_order(tmp_path):
    words = ["repetition", "--strings", *STRINGS, "--rows", "12", "--scored", "4", "--lengths", "1", "2"]
    found = ran([*words, "--restarts", "1", "--steps", "6", "--batch", "6"], tmp_path / "run")
    assert set(found) == {"repetition.order", "repetition.falls-1", "repetition.falls-2"}
    import polars as pl

    table = pl.read_parquet(tmp_path / "run/tables/repetition.lengths.parquet")
    first = table.filter((pl.col("curve") == "behaviour") & (pl.col("n") < 2))
    for string in first["string"].unique():
        bare, one = first.filter(pl.col("string") == string)["loss"].to_list()
        assert one < bare - 2  # nats a token: a single vector helps a lot
    assert table["curve"].unique().len() == 3


def test_a_filter_is_not_broken_and_a_neutral_text_is_the_control_of_a_system_prompt(tmp_path):
    words = ["defence-strength", "--rows", "10", "--lengths", "1", "--restarts", "1", "--steps", "2", "--batch", "4"]
    found = ran([*words, "--skip-bits", "--kinds", "system", "filter", "edit"], tmp_path / "run")
    assert set(found) == {
        f"defence.{name}" for name in ("system-prompt", "neutral-text", "edit", "random-edit", "filter")
    }
    assert found["defence.filter"]["metric"].startswith("successes lost")
    assert found["defence.edit"]["unit"] == "nats"


def test_prompts_are_written_from_conditions_and_walks_are_followed(tmp_path):
    words = ["pathfinding", "--size", "3", "--boards", "10", "--lengths", "1", "--steps", "2", "--batch", "3"]
    found = ran(words, tmp_path / "run")
    assert set(found) == {"pathfinding.loss", "pathfinding.condition"}
    assert found["pathfinding.loss"]["control"]["name"] == "control model"
    before = list(found.values())
    config = PathfindingConfig(
        size=3, boards=10, lengths=(1,), steps=2, batch=3, out=tmp_path / "run", resume=True
    )  # fmt: skip
    assert numbers(pathfinding(config).parent) == before


@pytest.mark.parametrize(
    ("run", "config", "change", "message"),
    [
        (repetition, RepetitionConfig, {"strings": (" a", " a")}, "--strings takes one or more different"),
        (repetition, RepetitionConfig, {"scored": 1}, "--scored is 1"),
        (repetition, RepetitionConfig, {"rows": 10**6}, "--rows is 1000000: give more text"),
        (defence_strength, DefenceStrengthConfig, {"kinds": ("wall",)}, "--kinds takes some of system, edit"),
        (defence_strength, DefenceStrengthConfig, {"kinds": ("fine-tune",)}, "belong together"),
        (defence_strength, DefenceStrengthConfig, {"behaviours": ("phrase", "rule")}, "one behaviour at a time"),
        (defence_strength, DefenceStrengthConfig, {"site": "resid_post.99"}, "resid_post.99"),
        (pathfinding, PathfindingConfig, {"boards": 3}, "--boards is 3"),
        (pathfinding, PathfindingConfig, {"lengths": (0,)}, "numbers above 0"),
        (pathfinding, PathfindingConfig, {"longest": 1, "size": 2}, "raise --longest"),
    ],
    ids=lambda given: given.__name__ if callable(given) else str(given),
)
def test_bad_options_are_refused_before_a_folder_is_made(run, config, change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        run(config(**change, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
