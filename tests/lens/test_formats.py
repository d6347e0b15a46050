import json
import pickle

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lens.formats import published_hashes
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"), name="tiny")


def random_lens(lm, kind="tuned"):
    lens = TunedLens.zeros(lm, kind)
    for parameter in lens.parameters():
        torch.nn.init.normal_(parameter)
    lens.facts = {"family": lm.family, "steps": 3}
    return lens


def published(folder, lm, **changes):
    """A lens as the `tuned-lens` package writes it."""
    folder.mkdir(exist_ok=True)
    state = {}
    for layer in range(3):
        state |= {f"{layer}.weight": torch.randn(32, 32), f"{layer}.bias": torch.randn(32)}
    config = {
        "base_model_name_or_path": "EleutherAI/tiny",
        "base_model_revision": None,
        "bias": True,
        "d_model": 32,
        "lens_type": "linear_tuned_lens",
        "num_hidden_layers": 3,
        "unembed_hash": sorted(published_hashes(lm.unembedding.weight))[0],
    }
    torch.save(state, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return state


@pytest.mark.parametrize("kind", ["logit", "bias", "tuned"])
def test_a_saved_lens_comes_back_the_same(lm, tmp_path, kind):
    lens = random_lens(lm, kind)
    lens.save(tmp_path / "lens")
    back = TunedLens.load(tmp_path / "lens", lm)
    assert (back.kind, back.sites, back.facts) == (lens.kind, lens.sites, lens.facts)
    assert all(torch.equal(a, b) for a, b in zip(lens.parameters(), back.parameters(), strict=True))


def test_another_unembedding_is_refused_unless_forced(lm, tmp_path):
    other = LanguageModel(tiny("gpt_neox", seed=1), name="other")
    random_lens(lm).save(tmp_path / "own")
    published(tmp_path / "published", lm)
    for folder in ("own", "published"):
        with pytest.raises(SondeError, match="unembedding"):
            TunedLens.load(tmp_path / folder, other)
        assert len(TunedLens.load(tmp_path / folder, other, force=True)) == 3


def test_published_lenses_are_read_and_mean_h_plus_linear_of_h(lm, tmp_path):
    state = published(tmp_path, lm)
    lens = TunedLens.load(tmp_path, lm)
    hidden = torch.randn(4, 32)
    linear = torch.nn.functional.linear(hidden, state["1.weight"], state["1.bias"])
    torch.testing.assert_close(lens(hidden, 1), lm.unembed(hidden + linear))


def test_a_published_lens_without_biases_has_none(lm, tmp_path):
    state = published(tmp_path, lm, bias=False)
    torch.save({name: t for name, t in state.items() if "weight" in name}, tmp_path / "params.pt")
    assert not TunedLens.load(tmp_path, lm).bias.any()


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_a_pickle_that_holds_code_runs_none(lm, tmp_path, capsys):
    published(tmp_path, lm)
    (tmp_path / "params.pt").write_bytes(pickle.dumps({"0.weight": Bomb()}, protocol=2))
    with pytest.raises(SondeError, match="more than weights"):
        TunedLens.load(tmp_path, lm)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 64}, "width 64"),
        ({"num_hidden_layers": 4}, "4 layers"),
        ({"lens_type": "mlp"}, "mlp"),
    ],
)
def test_published_lenses_of_another_shape_are_refused(lm, tmp_path, changes, message):
    published(tmp_path, lm, **changes)
    with pytest.raises(SondeError, match=message):
        TunedLens.load(tmp_path, lm)


def test_damaged_folders_are_refused_in_one_line(lm, tmp_path):
    folder = tmp_path / "lens"
    with pytest.raises(SondeError, match=r"no config\.json"):
        TunedLens.load(folder, lm)
    random_lens(lm).save(folder)
    (folder / "translators.safetensors").write_bytes(b"damaged")
    with pytest.raises(SondeError, match="damaged"):
        TunedLens.load(folder, lm)
    (folder / "translators.safetensors").unlink()
    with pytest.raises(SondeError, match="incomplete"):
        TunedLens.load(folder, lm)
    (folder / "config.json").write_text("{")
    with pytest.raises(SondeError, match="cannot be read"):
        TunedLens.load(folder, lm)
    (folder / "config.json").write_text("{}")
    with pytest.raises(SondeError, match="not the configuration of a lens"):
        TunedLens.load(folder, lm)
