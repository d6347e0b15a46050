"""The bundled dictionary: its size, its numbers on a text of the tests, how it is found, and how it is made again."""

import json

import pytest
import torch

import sonde
from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary
from sonde.features.metrics import Metrics, evaluate
from sonde.organisms import pebble_features
from sonde.organisms.card import read_card
from sonde.organisms.pebble_features import (
    PebbleFeaturesConfig,
    bundled_folder,
    has_dictionary,
    load_dictionary,
    read_records,
    train_pebble_features,
)
from sonde.organisms.registry import folder_of

FOLDER = folder_of("pebble-features")


def test_it_is_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.5e6
    assert Dictionary.load(FOLDER).w_enc.dtype == torch.float16
    assert load_dictionary("organism:pebble").w_enc.dtype == torch.float32


@pytest.mark.parametrize("name", ["organism:pebble", "organism:pebble-features", str(FOLDER)])
def test_it_is_found_by_its_name_by_its_models_and_by_its_folder(name):
    found = load_dictionary(name)
    assert (found.site, found.model, found.design.latents, found.design.k) == (
        "resid_post.3", "organism:pebble", 1024, 16,
    )  # fmt: skip
    assert has_dictionary("organism:pebble")


def test_the_bundled_numbers_come_out_again_on_part_of_the_text():
    lm = sonde.load("organism:pebble")
    bundled = Metrics.load(FOLDER / "metrics.json")
    again = evaluate(lm, load_dictionary("organism:pebble", lm=lm), tokens=4096, loss_tokens=2048, draws=100)
    assert again.reconstruction.fvu.estimate == pytest.approx(bundled.reconstruction.fvu.estimate, abs=0.02)
    assert again.reconstruction.l0.estimate == 16
    assert bundled.losses is not None and again.losses is not None
    assert again.losses.ce_recovered["mean"].value == pytest.approx(bundled.losses.ce_recovered["mean"].value, abs=0.03)
    card = {row["what"]: row["rate"]["estimate"] for row in read_card("pebble-features")["behaviour"]}
    assert card["variance that it misses (FVU)"] == bundled.reconstruction.fvu.estimate


def test_every_latent_has_a_record_with_scores_or_a_reason():
    records = read_records(FOLDER)["resid_post.3"]
    assert sorted(records) == list(range(1024))
    for record in records.values():
        if record["status"] == "scored":
            assert record["explanation"].startswith("fires on ")
            for one in record["measures"].values():
                value = one["values"][one["main"]]
                assert value["low"] <= value["estimate"] <= value["high"] and "chance" in value
        else:
            assert record["reason"] and record["explanation"] is None
    scores = [
        r["measures"]["detection"]["values"]["balanced_accuracy"]["estimate"] for r in records.values() if r["measures"]
    ]
    card = {row["what"]: row["rate"]["estimate"] for row in read_card("pebble-features")["behaviour"]}
    assert sum(scores) / len(scores) == pytest.approx(card["detection of the explanations, mean (balanced accuracy)"])


def test_it_is_no_language_model():
    with pytest.raises(SondeError, match="organism:pebble-features is no language model: `sonde organism info pebble"):
        sonde.load("organism:pebble-features")


def test_a_model_without_a_bundled_dictionary_is_told_how_to_train_one():
    assert not has_dictionary("organism:quiz") and not has_dictionary("gpt2")
    with pytest.raises(SondeError, match=r"no dictionary of organism:quiz is bundled.*sonde run sae organism:quiz"):
        bundled_folder("organism:quiz")


def test_records_that_are_something_else_are_refused_by_line(tmp_path):
    assert read_records(tmp_path) == {}
    (tmp_path / "latents.jsonl").write_text('{"hookpoint": "a", "latent": 1}\n{"latent": 2}\n')
    with pytest.raises(SondeError, match="line 2: expected an object with hookpoint and latent"):
        read_records(tmp_path)


def test_the_recipe_makes_the_same_folder_at_a_small_size(tmp_path, monkeypatch):
    monkeypatch.setattr(pebble_features, "_MEASURED", 2048)
    monkeypatch.setattr(pebble_features, "_PREDICTED", 1024)
    config = PebbleFeaturesConfig(latents=24, k=4, tokens=4096, read=8192, out=tmp_path)
    assert config.command == "sonde organism train pebble-features --latents=24 --k=4 --tokens=4096 --read=8192"
    train_pebble_features(config)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in FOLDER.iterdir()), "training"}
    assert sorted(read_records(tmp_path)["resid_post.3"]) == list(range(24))
    assert read_card(tmp_path)["architecture"]["latents"] == 24
    assert json.loads((tmp_path / "config.json").read_text())["facts"]["steps"] == 4
