"""Adapters of low rank: seen by every pass, gone when removed, part of the weights when merged."""

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lm.lora import attach, fast_training
from sonde.lm.model import LanguageModel

pytest.importorskip("peft")
FAMILIES = ["gpt_neox", "gpt2", "llama", "jamba", "qwen3_next", "mamba", "mamba2", "rwkv"]


def tokens_for(lm):
    return torch.randint(0, lm.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_through_the_adapters_and_merging_keeps_what_it_made(family):
    lm = LanguageModel(tiny(family))
    tokens = tokens_for(lm)
    with torch.no_grad():
        before = lm(tokens).logits
    adapters = attach(lm, rank=2)
    torch.testing.assert_close(lm(tokens).logits, before)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.05)
    with fast_training(lm):
        for _ in range(3):
            optimizer.zero_grad()
            loss = lm(tokens).logits.log_softmax(-1)[..., 0].neg().mean()
            loss.backward()
            optimizer.step()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    with torch.no_grad():
        trained = lm(tokens).logits
        assert not torch.allclose(trained, before, atol=1e-3)
        with adapters.disabled():
            torch.testing.assert_close(lm(tokens).logits, before)
        adapters.merge()
        torch.testing.assert_close(lm(tokens).logits, trained, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_removing_gives_the_model_back():
    lm = LanguageModel(tiny("gpt_neox"))
    tokens, before = tokens_for(lm), lm.hash
    adapters = attach(lm, rank=2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.3)
        changed = lm(tokens).logits
        adapters.remove()
        assert not torch.allclose(lm(tokens).logits, changed)
    assert lm.hash == before


def test_bad_settings_are_named():
    lm = LanguageModel(tiny("gpt_neox"))
    with pytest.raises(SondeError, match="rank of the adapters is 0"):
        attach(lm, rank=0)
    with pytest.raises(SondeError, match=r"no linear map of .* ends in nosuch: it has .*query_key_value"):
        attach(lm, rank=1, modules=("nosuch",))
