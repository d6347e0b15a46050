"""The self-check passes what is sound and names what is not, with its number."""

import dataclasses
import functools
import json

import pytest
import torch
from families import FAMILIES, tiny, tokens

from sonde.errors import SondeError
from sonde.lm.continuation import call
from sonde.lm.model import LanguageModel
from sonde.lm.selfcheck import self_check
from sonde.lm.state import LayeredCache

LEAKING = {"rwkv", "xlstm", "recurrent_gemma"}


def language_model(family, **changes):
    changes = {"rescale_every": 0, **changes} if family == "rwkv" else changes
    return LanguageModel(tiny(family, **changes), name=family)


@functools.cache
def check(family):
    return self_check(language_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sound_and_only_pads_are_refused(family):
    found = check(family)
    found.raise_if_unusable()
    assert found.unusable == ()
    assert max(found.unembedding, found.stream, found.early_stop) < 1e-5
    assert found.clone == 0.0
    assert min(found.states.values()) > 1e-2
    expected = ["rows of unequal length in a batch: pads change the logits by"] * (family in LEAKING)
    assert [refusal.rpartition(" ")[0] for refusal in found.refusals] == expected
    assert found.ignores_mask == (family in LEAKING)


@pytest.mark.parametrize(
    ("family", "parts"),
    [("gpt2", {"kv"}), ("mamba", {"recurrent", "conv"}), ("rwkv", {"recurrent", "shift"}), ("lfm2", {"conv", "kv"})],
)
def test_every_part_of_the_state_reaches_the_last_suffix_token(family, parts):
    assert check(family).states.keys() == parts


def test_stepping_is_noted_with_the_error_that_it_avoids():
    (note,) = check("falcon_mamba").notes
    assert note.startswith("tokens after a cache run one by one: in one call they differ by ")
    assert "a state edit loses" in note
    assert check("mamba2").notes == ()


def test_a_stream_that_is_rescaled_between_blocks_is_unusable():
    lm = language_model("rwkv")
    lm.model.config.rescale_every = 2
    with pytest.raises(
        SondeError, match=r"rwkv failed the self-check: blocks are not given what the block before returned"
    ):
        self_check(lm).raise_if_unusable()


def test_an_unembedding_without_its_norm_or_soft_cap_is_unusable():
    for name, value in (("norm", None), ("softcap", None), ("scale", 2.0)):
        lm = language_model("gemma2")
        setattr(lm.unembedding, name, value)
        with pytest.raises(SondeError, match="the unembedding of the last block differs from the logits by"):
            self_check(lm).raise_if_unusable()


def test_weights_that_are_not_numbers_are_unusable():
    lm = language_model("llama")
    lm.model.state_dict()["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    with pytest.raises(SondeError, match="failed the self-check"):
        self_check(lm).raise_if_unusable()


def test_a_clone_that_shares_memory_is_refused(monkeypatch):
    monkeypatch.setattr(LayeredCache, "clone", lambda self: self)
    refusals = self_check(language_model("mamba2")).refusals
    assert any("a clone shares memory with its original" in refusal for refusal in refusals)


def test_an_edit_without_effect_is_refused(monkeypatch):
    monkeypatch.setattr(LayeredCache, "_put", lambda self, layer, name, value: None)
    refusals = self_check(language_model("lfm2")).refusals
    assert [
        refusal
        for refusal in refusals
        if refusal.startswith("edits of state.*.conv: they change the logits by no more")
    ]


def test_a_wrong_continuation_is_refused_but_the_model_can_be_read():
    lm = language_model("qwen2")
    attention = lm.model.get_submodule("model.layers.0.self_attn")
    right = attention.forward
    attention.forward = lambda *args, **kwargs: right(
        *args, **{**kwargs, "past_key_values": None, "attention_mask": None}
    )  # type: ignore[method-assign]
    found = self_check(lm)
    found.raise_if_unusable()
    assert found.clone is None and not found.states
    assert any(refusal.startswith("generation and state edits: a split run differs by") for refusal in found.refusals)


def test_a_model_that_does_not_run_in_its_number_type_is_one_line():
    lm = LanguageModel(tiny("llama"), name="odd")
    lm.model.get_submodule("model.layers.1.mlp").double()
    with pytest.raises(SondeError, match=r"odd does not run in .*: RuntimeError: ") as raised:
        self_check(lm)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["gpt2", "jamba", "xlstm"])
def test_json_and_table_hold_every_number(family):
    found = check(family)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["continuation"]["mode"] == found.continuation.mode
    assert plain["refusals"] == list(found.refusals)
    assert {field.name for field in dataclasses.fields(found)} <= plain.keys()
    assert {len(row) for row in found.table()} == {4}
    assert [row[3] for row in found.table()].count("no") == (2 if family == "jamba" else int(family in LEAKING))


def test_the_check_leaves_model_and_generator_as_they_were():
    lm = language_model("recurrent_gemma")
    weights = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    kept, state = call(lm.model, tokens(2, 5))[1], torch.random.get_rng_state()
    before = kept.read(0)
    self_check(lm)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.read(0).items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        check("gpt2").name = "x"  # type: ignore[misc]
