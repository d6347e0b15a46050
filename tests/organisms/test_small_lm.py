import numpy as np
import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sonde.errors import SondeError
from sonde.organisms.small_lm import (
    Training,
    joined_ids,
    optimizers_for,
    train_language_model,
    train_tokenizer,
    windows,
)

TOKENIZER = train_tokenizer(["the wolf and the fire, and the wolf again; naïve café"] * 3, vocab_size=300)


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: "<|endoftext|>" not in text))
def test_any_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_documents_are_joined_with_the_end_of_text_token_before_each():
    ids = joined_ids(["the wolf", "fire"], TOKENIZER)
    starts = np.flatnonzero(ids == TOKENIZER.eos_token_id)
    assert [TOKENIZER.decode(part[1:]) for part in np.split(ids, starts[1:])] == ["the wolf", "fire"]


@given(st.integers(9, 60), st.integers(2, 4), st.integers(0, 3))
def test_an_epoch_visits_each_of_its_windows_once(n, length, seed):
    ids = np.arange(n, dtype=np.uint16)
    per_epoch = n // length - 1
    first = windows(ids, length, per_epoch, 0, seed=seed)
    assert first.shape == (per_epoch, length)
    assert len(set(first.flatten().tolist())) == per_epoch * length
    again = torch.cat([windows(ids, length, 1, index, seed=seed) for index in range(per_epoch)])
    assert torch.equal(first, again)


def test_too_short_a_text_is_refused_with_its_length():
    with pytest.raises(SondeError, match="has 5 tokens; training on windows of 4 needs at least 8"):
        windows(np.arange(5, dtype=np.uint16), 4, 1, 0, seed=0)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mamba", "mamba2", "rwkv"])
def test_muon_gets_the_linear_maps_of_the_blocks_and_nothing_else(family):
    model = tiny(family)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adam = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in optimizers_for(model, Training()))
    assert muon | adam == set(names.values()) and not muon & adam
    maps = {
        "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        "mamba": "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj",
        "mamba2": "mixer.in_proj mixer.out_proj",
        "rwkv": "attention.key attention.value attention.receptance attention.output"
        " feed_forward.key feed_forward.receptance feed_forward.value",
    }
    suffixes = {name.split(".", 3)[-1].removesuffix(".weight") for name in muon}
    assert suffixes == set(maps[family].split())


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)
    settings = Training(steps=6, tokens_per_step=64, context=16, final_context=32, bfloat16=False)

    def trained(checkpoint, stop=None):
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        model = GPTNeoXForCausalLM(config)

        def report(step, loss):
            if step == stop:
                raise KeyboardInterrupt

        train_language_model(
            model, ids, settings, checkpoint=checkpoint, data_hash="x", report=report, progress=None, every=2
        )
        return model.state_dict()

    whole = trained(tmp_path / "a.safetensors")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b.safetensors", stop=4)
    resumed = trained(tmp_path / "b.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
