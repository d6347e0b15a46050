"""The small transformer: causal, edited where it is said, drawn from its seed."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.nets.transformer import Transformer, TransformerShape

SHAPE = TransformerShape(vocab=11, width=16, layers=3, heads=2, context=9)
TOKENS = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hidden", [None, 0, 24])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_no_position_sees_a_later_token(hidden, layer_norm):
    shape = TransformerShape(vocab=11, width=16, layers=2, heads=2, context=9, hidden=hidden, layer_norm=layer_norm)
    net = Transformer(shape)
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = net(TOKENS), net(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_streams_are_what_the_blocks_see_and_edits_replace_them():
    net = Transformer(SHAPE)
    streams = net.streams(TOKENS)
    assert streams.shape == (4, 4, 9, 16)
    torch.testing.assert_close(net.unembedding(net.norm(streams[-1])), net(TOKENS))
    torch.testing.assert_close(net.blocks[1](streams[1]), streams[2])
    for place in range(4):
        torch.testing.assert_close(net(TOKENS, {place: lambda x, place=place: streams[place]}), net(TOKENS))
    zeroed = net(TOKENS, {3: torch.zeros_like})
    torch.testing.assert_close(zeroed, net.unembedding(net.norm(torch.zeros(4, 9, 16))))


def test_a_seed_is_a_network_whatever_the_global_one():
    torch.manual_seed(5)
    one = Transformer(SHAPE, seed=2)
    torch.manual_seed(6)
    same, other = Transformer(SHAPE, seed=2), Transformer(SHAPE, seed=3)
    assert torch.equal(one(TOKENS), same(TOKENS))
    assert not torch.equal(one(TOKENS), other(TOKENS))


def test_it_starts_near_the_uniform_distribution():
    loss = torch.nn.functional.cross_entropy(Transformer(SHAPE)(TOKENS).flatten(0, 1), TOKENS.flatten())
    assert loss.item() == pytest.approx(torch.tensor(11.0).log().item(), abs=0.05)


def test_outputs_may_be_classes():
    shape = TransformerShape(vocab=11, width=16, layers=1, heads=2, context=9, outputs=3)
    assert Transformer(shape)(TOKENS).shape == (4, 9, 3)


@pytest.mark.parametrize("wrong", [{"width": 10, "heads": 4}, {"layers": 0}, {"dropout": 1.0}])
def test_shapes_that_are_none_are_refused(wrong):
    with pytest.raises(SondeError):
        TransformerShape(vocab=5, **wrong)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(SondeError, match="10 tokens are more than the context of 9"):
        Transformer(SHAPE)(torch.zeros(1, 10, dtype=torch.long))
