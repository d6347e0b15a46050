"""Training a stack is training each member alone."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.nets.ensemble import Ensemble
from sonde.nets.loop import train
from sonde.nets.mlp import MLP, MLPShape
from sonde.nets.transformer import Transformer, TransformerShape

SHAPE = MLPShape((5, 7, 3))
X = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (20,), generator=torch.Generator().manual_seed(1))


def test_it_says_what_each_member_says():
    nets = [MLP(SHAPE, seed=seed) for seed in range(4)]
    many = Ensemble(nets)
    torch.testing.assert_close(many(X), torch.stack([net(X) for net in nets]))
    dealt = torch.randn(4, 6, 5)
    torch.testing.assert_close(
        many(dealt, each=True), torch.stack([net(x) for net, x in zip(nets, dealt, strict=True)])
    )
    assert len(many) == 4
    torch.testing.assert_close(many.member(2)(X), nets[2](X))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_the_stack_is_training_each_alone(kind):
    def optimizer(module):
        parameters = module.parameters()
        return torch.optim.AdamW(parameters, lr=0.01) if kind == "adam" else torch.optim.SGD(parameters, 0.1, 0.9)

    many = Ensemble([MLP(SHAPE, seed=seed) for seed in range(3)])

    def summed(step):
        return sum(torch.nn.functional.cross_entropy(logits, Y) for logits in many(X))

    train(many, summed, [optimizer(many)], steps=25)
    for seed in range(3):
        alone = MLP(SHAPE, seed=seed)
        train(alone, lambda step, net=alone: torch.nn.functional.cross_entropy(net(X), Y), [optimizer(alone)], steps=25)
        torch.testing.assert_close(many.member(seed)(X), alone(X), rtol=1e-3, atol=1e-4)


def test_transformers_stack_too():
    nets = [Transformer(TransformerShape(vocab=7, width=8, layers=2, heads=2, context=6), seed=s) for s in range(2)]
    tokens = torch.randint(7, (3, 6))
    torch.testing.assert_close(Ensemble(nets)(tokens), torch.stack([net(tokens) for net in nets]))


def test_modules_of_different_shapes_are_refused():
    with pytest.raises(SondeError, match="one shape"):
        Ensemble([MLP(SHAPE), MLP(MLPShape((5, 8, 3)))])
