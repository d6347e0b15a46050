"""The recurrent twins of pebble: as large, on the same text, nearly as good, and made by a recipe that resumes."""

import json

import pytest

from sonde.lens.evaluation import LensEvaluation
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.chunked import faster_scans
from sonde.lm.stream import feed
from sonde.organisms.card import read_card, render, sha256
from sonde.organisms.loading import load
from sonde.organisms.pebble_recurrent import (
    PebbleMamba2Config,
    PebbleRwkvConfig,
    train_pebble_mamba2,
    train_pebble_rwkv,
)
from sonde.organisms.registry import folder_of

TWINS = ["pebble-mamba2", "pebble-rwkv"]
RECIPES = {
    "pebble-mamba2": (PebbleMamba2Config, train_pebble_mamba2),
    "pebble-rwkv": (PebbleRwkvConfig, train_pebble_rwkv),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_pebbles_size_text_and_tokenizer(name):
    pebble, twin = read_card("pebble"), read_card(name)
    assert twin["data"] == pebble["data"]
    assert twin["architecture"]["width"] == 192
    assert twin["architecture"]["parameters"] == pytest.approx(pebble["architecture"]["parameters"], rel=0.02)
    assert {key: twin["training"][key] for key in ("context", "tokens_per_step", "muon_lr", "adam_lr", "seed")} == {
        key: pebble["training"][key] for key in ("context", "tokens_per_step", "muon_lr", "adam_lr", "seed")
    }
    assert twin["sha256"]["tokenizer.json"] == pebble["sha256"]["tokenizer.json"]
    assert twin["sha256"] == {file: sha256(folder_of(name) / file) for file in twin["sha256"]}
    assert sum(path.stat().st_size for path in folder_of(name).iterdir()) < 10e6


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_better_than_a_5_gram_and_near_pebble_on_every_text_that_it_has_not_read(name):
    rows = read_card(name)["evaluation"]
    assert [row["text"] for row in rows] == [row["text"] for row in read_card("pebble")["evaluation"]]
    for row in rows:
        assert row["gain"]["low"] > 0, row["text"]
        assert row["model"]["estimate"] < 1.15 * row["pebble"]["estimate"], row["text"]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_loads_passes_its_self_check_and_has_a_state(name):
    lm = load(f"organism:{name}")
    check = lm.check()
    assert not check.unusable
    assert check.continuation.mode == "chunk"
    assert {"recurrent"} <= set(check.states)
    (text,) = lm.generate(["The old man looked at the"], max_new_tokens=8)
    assert len(text.split()) >= 3


@pytest.mark.parametrize("name", TWINS)
def test_the_tuned_lens_is_closer_than_the_logit_lens_at_every_site_of_a_twin(name):
    """In closed form on 3,000 tokens; the study trains longer."""
    lm = load(f"organism:{name}")
    fit, held = TokenBatches(None, lm.tokenizer, context=256, limit_tokens=4096).split(0.75)
    with faster_scans(lm.model):
        tuned = TunedLens.fit(lm, fit, trainer="ridge", held_out=512)
        evaluation = LensEvaluation(lm, {"tuned": tuned, "logit": TunedLens.logit(lm)}, draws=200)
        feed(lm, held, [evaluation])
    gaps = evaluation.difference("tuned", "logit")
    assert len(gaps) == lm.n_layers
    assert all(gap.high < 0 for gap in gaps)


@pytest.mark.parametrize("name", TWINS)
def test_the_card_of_a_twin_reads_as_text_with_pebble_beside(name):
    text = render(read_card(name))
    assert max(map(len, text.splitlines())) <= 100
    for part in (f"organism:{name}\n", "pebble ", "5-gram", f"sonde organism train {name}"):
        assert part in text


@pytest.mark.parametrize("name", TWINS)
def test_the_recipe_ends_in_a_model_with_a_card_and_goes_on_from_its_checkpoint(name, tmp_path, monkeypatch):
    for book in ("one", "two"):
        (tmp_path / f"{book}.txt").write_text(f"In book {book} the wolf looked at the fire. " * 300)
    monkeypatch.setattr("sonde.data.python_docs.comments", lambda: iter(["Return the number of wolves. " * 100]))
    monkeypatch.setattr("sonde.data.python_docs.topics", lambda: ["The wolf statement. " * 300])
    config, train = RECIPES[name]
    options = config(text=tmp_path, hold_out=("two",), out=tmp_path / "small", steps=1)
    folder = train(options)
    card = json.loads((folder / "card.json").read_text())
    assert card["name"] == name and card["data"]["books"] == ["one"]
    assert card["command"] == f"sonde organism train {name} --text {tmp_path.name} --hold-out two --steps=1"
    assert not any("pebble" in row for row in card["evaluation"])  # pebble's card has no scores of this text
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("sonde.organisms.small_lm.windows", None)  # no step is trained again
    assert (train(options) / "model.safetensors").read_bytes() == weights
