"""Organisms that are kept as a difference from another: what is loaded is what was saved, and nothing else."""

import json

import pytest
import torch

import sonde
from sonde.errors import SondeError
from sonde.organisms.difference import load_difference, save_difference


@pytest.fixture
def tuned():
    """Pebble with a change of rank 2, changed rows of the embedding, a changed bias and one dense change."""
    lm = sonde.load("organism:pebble", check=False)
    state = lm.model.state_dict()
    generator = torch.Generator().manual_seed(0)
    state["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"] += (
        0.02 * torch.randn(768, 2, generator=generator) @ torch.randn(2, 192, generator=generator)
    )
    state["gpt_neox.embed_in.weight"][[5, 77]] += 0.1
    state["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"] += 0.01 * torch.randn(192, generator=generator)
    state["gpt_neox.layers.0.attention.dense.weight"] += 0.01 * torch.randn(192, 192, generator=generator)
    return lm


def test_the_model_comes_back_from_its_difference(tuned, tmp_path):
    lost = save_difference(tuned.model, "pebble", tmp_path)
    assert lost < 1e-6
    assert (tmp_path / "difference.safetensors").stat().st_size < 200_000
    again = sonde.load(tmp_path)
    tokens = torch.arange(10, 42)[None]
    torch.testing.assert_close(again(tokens).logits, tuned(tokens).logits, atol=2e-2, rtol=0)
    for name, weight in tuned.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, atol=2e-4, rtol=1e-3)


def test_the_base_is_left_as_it_was(tuned, tmp_path):
    before = sonde.load("organism:pebble", check=False).hash
    save_difference(tuned.model, "pebble", tmp_path)
    assert load_difference(tmp_path, name="tuned", check=False).hash != before
    assert sonde.load("organism:pebble", check=False).hash == before


def test_a_bounded_rank_says_what_it_loses(tuned, tmp_path):
    assert 0.1 < save_difference(tuned.model, "pebble", tmp_path, rank=1) < 0.9


def test_a_difference_of_nothing_is_refused(tmp_path):
    lm = sonde.load("organism:pebble", check=False)
    with pytest.raises(SondeError, match="no difference to keep"):
        save_difference(lm.model, "pebble", tmp_path)


def test_other_weights_of_the_base_are_refused(tuned, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_difference(tuned.model, "pebble", tmp_path)
    path = tmp_path / "difference.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["sonde"])
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, metadata={"sonde": json.dumps({**about, "base_sha256": "0"})})
    with pytest.raises(SondeError, match="other weights of organism:pebble"):
        load_difference(tmp_path, name="tuned")
    save_file(tensors, path)
    with pytest.raises(SondeError, match="not a difference"):
        load_difference(tmp_path, name="tuned")
    path.write_bytes(b"nothing")
    with pytest.raises(SondeError, match="damaged"):
        load_difference(tmp_path, name="tuned")


def test_a_model_of_another_shape_is_refused(tmp_path):
    from families import tiny

    with pytest.raises(SondeError, match="does not have the parameters of organism:pebble"):
        save_difference(tiny("gpt_neox"), "pebble", tmp_path)
