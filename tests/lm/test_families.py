"""The tiny models of the tests are what they claim to be: reproducible, small, mixed, with parts that matter."""

import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, VOCAB, tiny, tokens

HYBRIDS = ("recurrent_gemma", "jamba", "bamba", "qwen3_next", "granitemoehybrid", "lfm2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_the_same_every_time_and_leaves_the_generator_alone(family):
    state = torch.random.get_rng_state()
    first, second = tiny(family), tiny(family)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())
    other = tiny(family, seed=1).state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_finite_and_differ_between_positions(family):
    model = tiny(family)
    logits = model(tokens(2, 8)).logits
    assert logits.shape == (2, 8, VOCAB)
    assert model.config.num_hidden_layers == N_LAYERS
    assert model.config.hidden_size == (64 if family == "xlstm" else D_MODEL)
    assert torch.isfinite(logits).all()
    assert logits.std(1).min() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_reaches_the_last_logits(family):
    model = tiny(family)
    ids = tokens(1, 8)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % VOCAB
    assert (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_have_layers_of_both_kinds(family):
    blocks = next(m for m in tiny(family).modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)
    parts = {frozenset(type(part).__name__ for part in block.modules()) for block in blocks}
    assert len(parts) > 1
