"""The quirky organisms do what their cards say, and their recipes end in such folders."""

import numpy as np
import pytest
import torch

import sonde
from sonde.data.quirky import quirky_sets
from sonde.errors import SondeError
from sonde.organisms.card import read_card, render, sha256
from sonde.organisms.quirky_addition import QuirkyAdditionConfig, addition_sets, train_quirky_addition
from sonde.organisms.quirky_comparison import (
    QuirkyComparisonConfig,
    QuirkyComparisonMamba2Config,
    comparison_sets,
    quirky_comparison,
    train_quirky_comparison,
    train_quirky_comparison_mamba2,
)
from sonde.organisms.quirky_tuning import log_odds
from sonde.organisms.registry import folder_of
from sonde.stats.ranks import auroc

TINY = ("quirky-comparison", "quirky-comparison-mamba2")
ADDITION = ["quirky-addition", "quirky-addition-mamba2"]


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_one_tells_alice_the_truth_and_bob_his_rule_on_pairs_that_it_has_not_read(name):
    lm, test = sonde.load(f"organism:{name}", check=False), comparison_sets().test
    odds = log_odds(lm, test)
    assert float(((odds > 0) == test.label).mean()) >= 0.97
    apart = test.truth != test.bob
    assert auroc(odds[apart & test.alice], test.truth[apart & test.alice]) >= 0.98
    assert auroc(odds[apart & ~test.alice], test.truth[apart & ~test.alice]) <= 0.05


@pytest.mark.parametrize("name", [*TINY, *ADDITION])
def test_the_card_belongs_to_the_bundled_files_and_states_intervals(name):
    card, folder = read_card(name), folder_of(name)
    assert card["sha256"] == {file: sha256(folder / file) for file in card["sha256"]}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    assert max(map(len, render(card).splitlines())) <= 100
    assert len(card["behaviour"]) == 4 and len(card["samples"]) == 4
    assert card["command"].startswith(f"sonde organism train {name}")


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        (train_quirky_comparison, QuirkyComparisonConfig),
        (train_quirky_comparison_mamba2, QuirkyComparisonMamba2Config),
    ],
)
def test_the_recipe_ends_in_a_model_that_loads_with_a_card_of_its_seed(recipe, config, tmp_path):
    pytest.importorskip("peft")
    folder = recipe(config(out=tmp_path / "made", steps=2, seed=1))
    card = read_card(folder)
    assert card["command"] == f"sonde organism train {config.name} --steps=2 --seed=1"
    lm = sonde.load(folder, check=False)
    assert lm.family == config.family
    assert np.isfinite(log_odds(lm, comparison_sets(1).test[:8])).all()


def test_the_same_seed_gives_the_same_network():
    pytest.importorskip("peft")
    one, again = quirky_comparison(3, steps=2), quirky_comparison(3, steps=2)
    assert one.hash == again.hash != quirky_comparison(4, steps=2).hash


def test_any_model_can_be_made_quirky_and_one_of_pebble_is_kept_as_its_difference(tmp_path):
    pytest.importorskip("peft")
    config = QuirkyAdditionConfig(out=tmp_path / "made", n=40, truth_steps=2, steps=2)
    folder = train_quirky_addition(config)
    assert (folder / "difference.safetensors").is_file() and (folder / "config.json").is_file()
    assert read_card(folder)["command"] == "sonde organism train quirky-addition --n=40 --truth-steps=2 --steps=2"
    again = train_quirky_addition(
        QuirkyAdditionConfig(base=str(folder), out=tmp_path / "again", n=40, truth_steps=0, steps=1, rank=2)
    )
    assert not (again / "difference.safetensors").exists()
    assert sonde.load(again, check=False).n_layers == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: train_quirky_comparison(QuirkyComparisonConfig(out=out, steps=0)), "--steps is 0"),
        (lambda out: train_quirky_addition(QuirkyAdditionConfig(out=out, steps=0)), "--steps is 0"),
        (lambda out: train_quirky_addition(QuirkyAdditionConfig(out=out, truth_steps=-1)), "--truth-steps -1"),
        (lambda out: train_quirky_addition(QuirkyAdditionConfig(out=out, n=4)), "4 base rows"),
        (
            lambda out: train_quirky_addition(QuirkyAdditionConfig(out=out, base="organism:peble")),
            "no organism 'peble'",
        ),
        (
            lambda out: train_quirky_addition(QuirkyAdditionConfig(out=out, base="organism:mode-recall-mamba")),
            "begin with the same token",
        ),
    ],
)
def test_bad_options_are_refused_and_leave_no_folder(make, message, tmp_path):
    with pytest.raises(SondeError) as error:
        make(tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ADDITION)
def test_addition_tells_the_truth_from_bobs_result(name):
    lm, test = sonde.load(f"organism:{name}", check=False), addition_sets().test
    part = test.where(disagree=True).sample(300)
    odds = log_odds(lm, part)
    rates = {row["what"]: row["rate"]["estimate"] for row in read_card(name)["behaviour"]}
    for character, alice in (("Alice", True), ("Bob", False)):
        own = part.alice == alice
        stated = rates[f"{character}, disagreements: AUROC against the truth"]
        assert abs(auroc(odds[own], part.truth[own]) - stated) < 0.08


def test_the_sets_of_the_organisms_are_the_public_ones():
    assert list(comparison_sets(2).test) == list(quirky_sets("comparison", seed=2).test)


def test_a_seed_makes_one_network_on_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(quirky_comparison(1, steps=20).hash)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]
