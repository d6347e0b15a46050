"""Other networks that answer a pair of elements: a perceptron, and a transformer of any depth.

Both are called as `sonde.nets.one_layer.OneLayer` is, with pairs [n, 2]. What the embedding of the elements is, and
which logits the last hidden units add to, is asked of all three alike.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.nets.mlp import MLP, MLPShape
from sonde.nets.one_layer import OneLayer, Shape
from sonde.nets.transformer import Transformer, TransformerShape


class PairMLP(nn.Module):
    """Embeddings of both elements side by side, one hidden layer of ReLU; logits of the elements."""

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        size = (shape.modulus, shape.width)
        self.embedding = nn.Parameter(torch.randn(*size, generator=generator) * shape.width**-0.5)
        self.mlp = MLP(MLPShape((2 * shape.width, shape.hidden, shape.modulus), "relu"), seed=seed)

    def forward(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n modulus"]:
        """Logits of the answer."""
        return self.mlp(self.embedding[pairs].flatten(1))


class PairTransformer(nn.Module):
    """`layers` blocks over a b =, without layer norm, read at `=`; logits of the elements."""

    def __init__(self, shape: Shape, *, layers: int = 2, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        p, width = shape.modulus, shape.width
        sizes = TransformerShape(p + 1, width, layers, shape.heads, 3, shape.hidden, p, False, dropout)
        self.transformer = Transformer(sizes, seed=seed)

    def forward(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n modulus"]:
        """Logits of the answer."""
        ends = torch.full((len(pairs), 1), self.shape.modulus)
        return self.transformer(torch.cat([pairs, ends], 1))[:, -1]


PairNetwork = OneLayer | PairMLP | PairTransformer


def element_embedding(net: PairNetwork) -> Float[Tensor, "modulus width"]:
    """W_E without `=`."""
    if isinstance(net, OneLayer):
        return net.w_e[:-1]
    return net.embedding if isinstance(net, PairMLP) else net.transformer.embedding.weight[:-1]


def logit_map(net: PairNetwork) -> Float[Tensor, "modulus hidden"]:
    """W_L, in float64: what each hidden unit of the last layer adds to the logit of each element."""
    if isinstance(net, OneLayer):
        return (net.w_out.T.double() @ net.w_u[:, :-1].double()).T
    if isinstance(net, PairMLP):
        return net.mlp.layers[-1].weight.double()  # type: ignore[operator]
    last = net.transformer.blocks[-1].mlp_out
    return net.transformer.unembedding.weight.double() @ last.weight.double()  # type: ignore[union-attr, operator]
