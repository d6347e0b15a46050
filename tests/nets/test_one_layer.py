"""The graph at the last token is the whole graph, and the sizes are the paper's."""

import math

import pytest
import torch

from sonde.data.modular import ModularTask
from sonde.errors import SondeError
from sonde.nets.one_layer import OneLayer, Shape


def whole_graph(net: OneLayer, pairs: torch.Tensor) -> torch.Tensor:
    """All three tokens through causal attention and MLP, as a transformer is usually written; logits at the last."""
    p = net.shape.modulus
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), p)], 1)
    x = net.w_e[tokens] + net.w_pos
    q, k, v = (torch.einsum("hkd,npd->nhpk", w, x) for w in (net.w_q, net.w_k, net.w_v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + z @ net.w_o.T
    x = x + torch.relu(x @ net.w_in.T + net.b_in) @ net.w_out.T + net.b_out
    return (x @ net.w_u)[:, -1]


def test_the_graph_at_the_last_token_is_the_whole_graph_with_its_gradients():
    net = OneLayer(Shape(11, 16, 4, 24), seed=3).double()
    torch.nn.init.normal_(net.b_in)
    pairs = ModularTask(11, share=0.5).pairs
    found, expected = net(pairs), whole_graph(net, pairs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), list(net.parameters())),
        torch.autograd.grad((expected * direction).sum(), list(net.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_it_has_the_size_of_the_paper():
    net = OneLayer(Shape())
    assert sum(p.numel() for p in net.parameters()) == 226_816 + 512 + 128 - 640
    assert net.w_out.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert net.w_u.std().item() == pytest.approx(114**-0.5, rel=0.02)


def test_bad_sizes_are_named():
    with pytest.raises(SondeError, match="a width of 10 is not divisible by 4 heads"):
        Shape(11, 10)
    with pytest.raises(SondeError, match="the modulus is 1; give 2 or more"):
        Shape(1)
