"""Studies of shaken prompts and of token sizes, at a size that tests what they say."""

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies.prompt_fragility import PromptFragilityConfig, prompt_fragility
from sonde.studies.token_granularity import TokenGranularityConfig, token_granularity

SMALL = [
    "--targets",
    "1",
    "2",
    "--rows",
    "12",
    "--lengths",
    "1",
    "2",
    "--shaken",
    "1",
    "--rhos",
    "0.1",
    "3",
    "--rho",
    "3",
]
TOY = ["--model", "organism:markov-backdoor", "--steps", "8", "--batch", "4", "--draws", "4", "--tested", "2"]


def ran(words, out):
    with pytest.raises(SystemExit) as end:
        main(["run", *words, "--out", str(out)])
    assert not end.value.code
    return {finding["id"]: finding for finding in numbers(out)}


def test_tasks_have_a_price_and_prompts_a_fragility_and_a_run_goes_on(tmp_path):
    found = ran(["prompt-fragility", *TOY, *SMALL, "--robust", "noise"], tmp_path / "run")
    assert set(found) == {
        f"fragility.{name}" for name in ("distance-f", "distance-g", "bits-f", "f-g", "trace", "robust-noise")
    }
    correlated = [one for name, one in found.items() if name[-2:] in ("-f", "-g") and one["status"] != "refused"]
    assert correlated and all(one["control"]["name"] == "shuffled pairing" for one in correlated)
    assert all(abs(one["estimate"]) <= 1 for one in correlated)
    assert found["fragility.trace"]["control"]["name"] == "ρ = 3"
    import polars as pl

    table = pl.read_parquet(tmp_path / "run/tables/fragility.tasks.parquet")
    assert table["tokens"].to_list() == [1, 1, 2, 2]
    assert all(table["worst(3)"] >= 0)
    (tmp_path / "run/steps/random-2.safetensors").unlink()
    before = list(found.values())
    config = PromptFragilityConfig(
        model="organism:markov-backdoor", steps=8, batch=4, draws=4, tested=2, targets=(1, 2), rows=12, lengths=(1, 2),
        shaken=1, rhos=(0.1, 3.0), rho=3.0, robust=("noise",), out=tmp_path / "run", resume=True,
    )  # fmt: skip
    assert numbers(prompt_fragility(config).parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": (3, 3)}, "--targets takes two or more different"),
        ({"rho": 0.5}, "--rho is 0.5, --rhos 0.03 0.1 0.3 1 3"),
        ({"draws": 5}, "--draws is 5"),
        ({"rows": 9}, "--rows is 9"),
        ({"robust": ("luck",)}, "--robust takes some of noise, sam, norm, hull"),
        ({"lengths": (0,)}, "nothing to train"),
        ({"model": "organism:markov-backdoor", "shaken": 300}, "more than the 256 positions"),
    ],
    ids=str,
)
def test_bad_options_of_the_study_of_fragility_are_refused(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        prompt_fragility(PromptFragilityConfig(**change, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_models_of_two_spellings_are_compared_by_the_character(tmp_path):
    words = ["token-granularity", "--training", "6", "--lengths", "1", "4", "--rows", "8", "--restarts", "1"]
    found = ran([*words, "--contexts", "0", "8", "--steps", "2"], tmp_path / "run")
    assert set(found) == {"granularity.delivered-1", "granularity.delivered-4", "granularity.same-4"}
    before = list(found.values())
    config = TokenGranularityConfig(
        training=6, lengths=(1, 4), rows=8, restarts=1, contexts=(0, 8), steps=2, out=tmp_path / "run", resume=True
    )
    assert numbers(token_granularity(config).parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (4,)}, "--sizes takes two or more"),
        ({"sizes": (1, 3)}, "tokens of 3 characters"),
        ({"contexts": (0, 6)}, "--contexts are multiples of 4 up to 64"),
        ({"lengths": (0,)}, "numbers above 0"),
        ({"rows": 3}, "--rows is 3"),
    ],
    ids=str,
)
def test_bad_options_of_the_study_of_token_sizes_are_refused(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        token_granularity(TokenGranularityConfig(**change, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
