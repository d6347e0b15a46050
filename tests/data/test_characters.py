import numpy as np
import pytest

from sonde.data import characters
from sonde.data.characters import read_characters
from sonde.errors import SondeError


def test_characters_come_back_and_every_tenth_document_is_held_out():
    texts = ["abc xyz\n" * (20 + i) for i in range(30)]
    text = read_characters(texts)
    spell = ["".join(text.alphabet[i] for i in ids) for ids in [*text.train, *text.held]]
    assert sorted(spell) == sorted(texts)
    assert len(text.held) == 3 and spell[-1] == texts[29]
    assert text.bytes_per_token == 1


def test_rare_characters_are_one_symbol():
    text = read_characters(["é" * 20 + "abcde" * 100 + "ü日本" for _ in range(3)] * 2 + ["ß"])
    assert text.alphabet == ("a", "b", "c", "d", "e", "é", "\N{REPLACEMENT CHARACTER}")
    assert text.bytes_per_token > 1


def test_windows_stay_in_one_document_and_come_again_with_the_seed():
    text = read_characters([chr(97 + i) * 60 for i in range(20)])
    drawn = text.windows(50, 40, seed=1)
    assert (drawn == drawn[:, :1]).all() and len(np.unique(drawn[:, 0])) > 8
    np.testing.assert_array_equal(drawn, text.windows(50, 40, seed=1))
    assert set(text.windows(50, 40, seed=1, held=True)[:, 0]) <= {ids[0] for ids in text.held}
    with pytest.raises(SondeError, match="no document of 20 given texts has 70 characters"):
        text.windows(70, 4, seed=0)


def test_by_default_it_is_the_standard_library_or_where_that_has_no_source_the_help_texts(monkeypatch):
    assert read_characters(limit=50_000).source == "source code of Python's standard library"
    monkeypatch.setattr(characters, "sources", lambda: iter(()))
    assert "this Python has no source code of its library" in read_characters(limit=50_000).source


def test_too_little_text_is_named():
    with pytest.raises(SondeError, match="5 characters are too few"):
        read_characters(["short"])
