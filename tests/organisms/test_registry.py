import pytest

from sonde.errors import SondeError
from sonde.organisms.loading import load
from sonde.organisms.registry import ORGANISMS, folder_of, has_weights


def test_pebble_is_bundled_in_half_precision_under_10_mb():
    folder = folder_of("pebble")
    assert has_weights("pebble")
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "card.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    assert "float16" in (folder / "config.json").read_text()


def test_an_unknown_organism_is_answered_with_those_that_exist():
    with pytest.raises(SondeError, match=r"no organism 'peble', did you mean 'pebble'\? \(there are: .*pebble"):
        load("organism:peble")


def test_every_recipe_has_a_summary_and_options_with_defaults():
    for name, entry in ORGANISMS.entries.items():
        assert entry.summary
        ORGANISMS.get(name).config()


def test_pebble_loads_by_name_and_writes_text():
    lm = load("organism:pebble")
    assert lm.name == "organism:pebble"
    assert (lm.n_layers, lm.d_model, lm.vocab_size, lm.context) == (6, 192, 4096, 512)
    (text,) = lm.generate(["The old man looked at the"], max_new_tokens=8)
    assert len(text.split()) >= 3
