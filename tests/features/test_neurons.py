"""Neurons are what the last projection of an MLP is given, in every family that has one."""

import pytest
import torch
from families import D_MODEL, tiny

from sonde.errors import SondeError
from sonde.features.neurons import MLPNeurons
from sonde.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("no_grad")
PLAIN = ["gpt2", "gpt_neox", "llama", "gemma2", "phi", "olmo2", "falcon"]


@pytest.mark.parametrize("family", PLAIN)
def test_all_neurons_times_their_directions_are_the_output_of_the_mlp(family):
    lm = LanguageModel(tiny(family))
    tokens = torch.randint(0, 97, (2, 9))
    with lm.reading("mlp_in.1", "mlp_out.1") as acts:
        lm(tokens)
    plain = MLPNeurons(lm, 1, k=None)
    turned = MLPNeurons(lm, 1, k=None, rotation=3)
    x = acts["mlp_in.1"]
    for neurons in (plain, turned):
        out = neurons.values(x) @ neurons.directions()
        assert out.shape[-1] == D_MODEL
        offset = acts["mlp_out.1"] - out
        if family in ("gemma2", "olmo2"):  # a norm stands between the projection and the stream
            continue
        assert (offset - offset[:1, :1]).abs().max() < 1e-4  # the bias, the same for every token
    assert torch.allclose(plain.values(x).norm(dim=-1), turned.values(x).norm(dim=-1), rtol=1e-4)


def test_the_k_largest_are_kept_and_none_below_0():
    lm = LanguageModel(tiny("gpt_neox"))
    x = torch.randn(3, 5, D_MODEL)
    neurons = MLPNeurons(lm, 0, k=6)
    values, indices = neurons.encode(x)
    every = neurons.values(x)
    assert values.shape == (3, 5, 6) and (values == every.gather(-1, indices).relu()).all()
    assert (values.sum(-1) - every.topk(6)[0].relu().sum(-1)).abs().max() < 1e-6
    some = MLPNeurons(lm, 0, k=None, only=[5, 2])
    assert (some.encode(x).indices[0, 0] == torch.tensor([2, 5])).all()
    assert (some.encode(x).values == every[..., [2, 5]].relu()).all()
    assert repr(neurons) == "MLPNeurons('model', 0, k=6, rotation=None, only=None)"


@pytest.mark.parametrize("family", ["opt", "mamba", "jamba"])
def test_a_block_without_a_plain_mlp_is_refused(family):
    lm = LanguageModel(tiny(family))
    layer = 1 if family == "jamba" else 0
    with pytest.raises(SondeError, match=r"does not exist|no MLP whose neurons"):
        MLPNeurons(lm, layer)


def test_k_out_of_range_is_named():
    lm = LanguageModel(tiny("llama"))
    with pytest.raises(SondeError, match=r"k is 65: block 0 of model has 64 neurons"):
        MLPNeurons(lm, 0, k=65)
    with pytest.raises(SondeError, match="only takes neurons from 0 to 63"):
        MLPNeurons(lm, 0, k=None, only=[64])
