"""States after every token, and states as features."""

import pytest
import torch
from families import tiny, tokens

from sonde.errors import SondeError
from sonde.lm.continuation import call
from sonde.lm.model import LanguageModel
from sonde.lm.state_algebra import states
from sonde.lm.state_positions import Projection, pooled, states_by_position


def model(family):
    return LanguageModel(tiny(family), name=family)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv", "xlstm", "jamba", "recurrent_gemma", "qwen3_next"])
def test_the_state_at_a_position_is_that_of_a_run_that_ends_there(family):
    lm, ids = model(family), tokens(2, 6)
    found = states_by_position(lm, ids)
    assert found and all(state.shape[:2] == (2, 6) for state in found.values())
    for length in (1, 4, 6):
        with torch.no_grad():
            cache = call(lm.model, ids[:, :length])[1]
        for layer, state in found.items():
            true = states(cache, layer)["recurrent"]
            assert (state[:, length - 1] - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1), (layer, length)


def test_layers_parts_and_features_are_chosen():
    lm, ids = model("rwkv"), tokens(2, 3)
    assert list(states_by_position(lm, ids, [2])) == [2]
    assert states_by_position(lm, ids, [0], part="shift")[0].shape == (2, 3, 64)
    lm = model("mamba2")
    assert states_by_position(lm, ids, [1], features=pooled)[1].shape == (2, 3, 64)
    assert states_by_position(lm, ids, [1], features=Projection(7))[1].shape == (2, 3, 7)
    assert states_by_position(lm, ids, [1], part="conv")[1].shape == (2, 3, 96, 4)


def test_pooling_is_the_mean_over_the_state_dimension():
    state = torch.randn(3, 4, 16, 8)
    assert torch.equal(pooled(state), state.mean(-1).reshape(3, 64))
    assert torch.equal(pooled(state[:, 0, :, 0]), state[:, 0, :, 0])


def test_a_projection_is_the_same_every_time_and_keeps_inner_products_on_average():
    state = torch.randn(3, 70, 90)
    found = Projection(4000)(state)
    assert torch.equal(found, Projection(4000)(state))
    assert not torch.equal(found, Projection(4000, seed=1)(state))
    gram, true = found @ found.T, state.flatten(1) @ state.flatten(1).T
    assert (gram - true).abs().max() < 0.1 * true.max()
    assert torch.allclose(Projection(5)(state[:2]), Projection(5)(state)[:2], atol=1e-4)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: states_by_position(model("llama"), tokens(1, 3)), "llama has no recurrent memory .* it keeps kv"),
        (lambda: states_by_position(model("jamba"), tokens(1, 3), [1]), r"state\.1 of jamba .* layers 0, 2 do"),
        (lambda: states_by_position(model("mamba2"), tokens(1, 3), [3]), r"state\.3 of mamba2 .* layers 0, 1, 2 do"),
        (lambda: states_by_position(model("mamba2"), tokens(1, 3)[0]), r"ids of shape \(batch, pos\)"),
        (lambda: Projection(0), "a projection to 0 numbers"),
    ],
)
def test_what_has_no_state_is_refused_with_what_there_is(act, message):
    with pytest.raises(SondeError, match=message):
        act()
