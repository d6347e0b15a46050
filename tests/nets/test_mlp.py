"""The perceptron: its formula, its initialisation."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.nets.mlp import MLP, MLPShape


def test_it_is_the_formula():
    net = MLP(MLPShape((3, 5, 2), activation="tanh"), bias_sd=0.5)
    x = torch.randn(7, 3)
    first, second = net.layers
    by_hand = torch.tanh(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(net(x), by_hand)


def test_kernels_have_variance_one_over_fan_in_and_no_tails():
    weight = MLP(MLPShape((400, 500, 1))).layers[0].weight.detach()
    assert weight.var().item() == pytest.approx(1 / 400, rel=0.02)
    assert weight.abs().max() <= 2 / 0.8796 * 400**-0.5


def test_biases_have_the_chosen_spread_on_every_layer():
    biases = [layer.bias for layer in MLP(MLPShape((64, 3000, 3000)), bias_sd=0.125).layers]
    assert all(bias.std().item() == pytest.approx(0.125, rel=0.1) for bias in biases)
    assert all((layer.bias == 0).all() for layer in MLP(MLPShape((4, 4, 4))).layers)


def test_a_seed_is_a_network():
    one, same, other = (MLP(MLPShape(), seed=seed, bias_sd=0.1).layers[1].weight for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [{"sizes": (4,)}, {"sizes": (4, 0)}, {"activation": "swish"}])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(SondeError, match=r"give|use"):
        MLPShape(**shape)
