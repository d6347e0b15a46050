"""A small causal transformer over toy languages: pre-layer-norm blocks, GELU, learned positions, untied unembedding.

    x_0 = E[token] + p    x_{i+½} = x_i + Attention(LN x_i)    x_{i+1} = x_{i+½} + MLP(LN x_{i+½})    y = W_U LN x_L

Language models that are to be read and audited are Hugging Face models (`sonde.organisms.small_lm`); this one is for
training by the hundred: plain functional parameters, so `torch.func` and `sonde.nets.ensemble` take it as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.errors import SondeError

Edit = Callable[[Tensor], Tensor]
_SD = 0.02  # of every weight, as in GPT-2 (Radford et al. 2019)


@dataclass(frozen=True)
class TransformerShape:
    """Sizes. `hidden` is 4 x `width` where not given, and 0 for attention only; `outputs` is the vocabulary."""

    vocab: int
    width: int = 96
    layers: int = 2
    heads: int = 4
    context: int = 64
    hidden: int | None = None
    outputs: int | None = None
    layer_norm: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.vocab, self.width, self.layers, self.heads, self.context) < 1:
            raise SondeError(f"{self}: vocab, width, layers, heads and context take 1 or more")
        if self.width % self.heads:
            raise SondeError(f"a width of {self.width} is not divisible by {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise SondeError(f"dropout is {self.dropout}; give a share from 0 to below 1")


class Transformer(nn.Module):
    """Logits of the next token at every position. Weights are drawn from `seed` alone."""

    def __init__(self, shape: TransformerShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        d = shape.width
        self.embedding = nn.Embedding(shape.vocab, d)
        self.positions = nn.Parameter(torch.empty(shape.context, d))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.unembedding = nn.Linear(d, shape.outputs or shape.vocab, bias=False)
        generator = torch.Generator().manual_seed(seed)
        into_stream = _SD / (2 * shape.layers) ** 0.5  # 2 writers a block: the stream keeps its scale
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" not in name:
                    scale = into_stream if name.endswith(("attention_out.weight", "mlp_out.weight")) else _SD
                    parameter.normal_(0, scale, generator=generator)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[int, Edit] | None = None
    ) -> Float[Tensor, "batch pos outputs"]:
        """Logits. `edits[i]` replaces the stream that enters block `i`; `edits[layers]` the one that enters the end."""
        return self.unembedding(self.norm(self._run(tokens, edits or {})[-1]))

    def streams(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "points batch pos width"]:
        """The residual stream before each block and after the last: `layers + 1` points."""
        return torch.stack(self._run(tokens, {}))

    def _run(self, tokens: Tensor, edits: Mapping[int, Edit]) -> list[Tensor]:
        if tokens.shape[-1] > self.shape.context:
            raise SondeError(f"{tokens.shape[-1]} tokens are more than the context of {self.shape.context}")
        x = self.embedding(tokens) + self.positions[: tokens.shape[-1]]
        points = []
        for i in range(len(self.blocks) + 1):
            if i:
                x = self.blocks[i - 1](x)
            if i in edits:
                x = edits[i](x)
            points.append(x)
        return points


class Block(nn.Module):
    """One block: attention, and an MLP where `hidden` is not 0."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        d, hidden = shape.width, 4 * shape.width if shape.hidden is None else shape.hidden
        self.heads, self.dropout = shape.heads, shape.dropout
        self.attention_norm = _norm(shape)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.mlp_norm = _norm(shape) if hidden else None
        self.mlp_in = nn.Linear(d, hidden) if hidden else None
        self.mlp_out = nn.Linear(hidden, d) if hidden else None

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """The stream after the block."""
        batch, pos, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, pos, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        # written out: torch's fused attention has neither second derivatives nor a batching rule on the CPU
        scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5
        future = torch.ones(pos, pos, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + self._drop(self.attention_out(mixed.transpose(1, 2).flatten(2)))
        if self.mlp_in is None or self.mlp_out is None or self.mlp_norm is None:
            return x
        return x + self._drop(self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x


def _norm(shape: TransformerShape) -> nn.Module:
    return nn.LayerNorm(shape.width) if shape.layer_norm else nn.Identity()
