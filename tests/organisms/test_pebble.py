import json
import re

import pytest

from sonde.data.python_docs import comments, topics
from sonde.errors import SondeError
from sonde.organisms.card import read_card, render, sha256
from sonde.organisms.pebble import PebbleConfig, train_pebble
from sonde.organisms.registry import folder_of


@pytest.fixture(scope="module")
def card():
    return read_card("pebble")


def test_the_card_belongs_to_the_bundled_files(card):
    folder = folder_of("pebble")
    assert card["sha256"] == {name: sha256(folder / name) for name in card["sha256"]}


def test_pebble_is_clearly_better_than_a_5_gram_on_every_text_that_it_has_not_read(card):
    assert len(card["evaluation"]) == 4
    for row in card["evaluation"]:
        assert row["model"]["low"] <= row["model"]["estimate"] <= row["model"]["high"]
        assert row["gain"]["low"] > 0.05, row["text"]


@pytest.mark.data
def test_pebble_writes_words_of_english(card, shared_data):
    books = " ".join(path.read_text(encoding="utf-8") for path in (shared_data / "text/books").glob("*.txt"))
    known = set(re.findall(r"[a-z]+", " ".join([books, *topics(), *comments()]).lower()))
    words = re.findall(r"[a-z]{2,}", " ".join(sample["text"] for sample in card["samples"]).lower())
    assert len(words) > 100
    assert sum(word in known for word in words) / len(words) > 0.95


def test_the_held_out_books_were_not_read(card):
    assert len(card["data"]["held_out"]) == 3
    assert not set(card["data"]["held_out"]) & set(card["data"]["books"])


def test_the_card_reads_as_text(card):
    text = render(card)
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("organism:pebble\n")
    for part in ("What is true of it", "Bits per byte", "heidi", "Make it again", "sonde organism train pebble"):
        assert part in text


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for name in ("one", "two", "three"):
        (folder / f"{name}.txt").write_text(f"In book {name} the wolf looked at the fire. " * 150)
    return folder


def test_the_recipe_ends_in_a_model_with_a_card_and_goes_on_from_its_checkpoint(books, tmp_path, monkeypatch):
    monkeypatch.setattr("sonde.data.python_docs.comments", lambda: iter(["Return the number of wolves. " * 100]))
    monkeypatch.setattr("sonde.data.python_docs.topics", lambda: ["The wolf statement. " * 30])
    config = PebbleConfig(text=books, hold_out=("two",), out=tmp_path / "small", steps=2)
    folder = train_pebble(config)
    card = json.loads((folder / "card.json").read_text())
    assert card["data"]["books"] == ["one", "three"] and card["data"]["held_out"] == ["two"]
    assert card["command"] == f"sonde organism train pebble --text {books.name} --hold-out two --steps=2"
    assert [row["text"].split()[0] for row in card["evaluation"]] == ["two", "help()"]
    assert "Make it again" in render(read_card(folder))

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("sonde.organisms.small_lm.windows", None)  # no step is trained again
    assert (train_pebble(config) / "model.safetensors").read_bytes() == weights

    with pytest.raises(SondeError, match="belongs to another configuration"):
        train_pebble(PebbleConfig(text=books, out=tmp_path / "small", steps=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "nowhere"}, "--text .*nowhere is not a folder"),
        ({"text": "."}, "holds no .txt file"),
        ({"hold_out": ("four",)}, "--hold-out four is not among the files of --text: one, three, two"),
        ({"steps": 0}, "--steps is 0"),
        ({"device": "abacus"}, "--device abacus is not a device"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_the_users_words(change, message, books, tmp_path, monkeypatch):
    monkeypatch.setattr("sonde.data.python_docs.comments", lambda: iter(["Return the number of wolves. " * 100]))
    if "text" in change:
        change = {**change, "text": tmp_path / change["text"]}
    with pytest.raises(SondeError, match=message):
        train_pebble(PebbleConfig(**{"text": books, "out": tmp_path / "out", **change}))
    assert not (tmp_path / "out").exists()
