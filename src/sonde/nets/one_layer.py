"""The one-layer transformer of modular addition (Nanda et al. 2023, arXiv:2301.05217), and its graph at the last token.

Tokens a b =; no layer norm, embedding and unembedding untied, no biases but those of the MLP, ReLU, learned positions:

    x_t = E[token_t] + p_t      attention of `=` over the three      r = x_2 + W_O z      y = r + W_out relu(W_in r + b)

Only `=` is read, so it is the only query: scores are a table of numbers by heads, values are projected once for each
number and gathered, and MLP and unembedding run on one column a pair. That is the whole of the speed.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.errors import SondeError


@dataclass(frozen=True)
class Shape:
    """Sizes: `modulus` numbers and the token `=`; `width` is divisible by `heads`."""

    modulus: int = 113
    width: int = 128
    heads: int = 4
    hidden: int = 512

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise SondeError(f"the modulus is {self.modulus}; give 2 or more")
        if self.width % self.heads:
            raise SondeError(f"a width of {self.width} is not divisible by {self.heads} heads")


class OneLayer(nn.Module):
    """Logits of `modulus + 1` classes for pairs of numbers.

    Weights are normal, with the standard deviations of the paper's code: width^-1/2 everywhere (also in `w_out`), and
    (modulus + 1)^-1/2 in the unembedding.
    """

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        tokens, d, heads, hidden = shape.modulus + 1, shape.width, shape.heads, shape.hidden
        small = d**-0.5

        def drawn(*size: int, scale: float = small) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * scale)

        self.w_e = drawn(tokens, d)
        self.w_pos = drawn(3, d)
        self.w_q = drawn(heads, d // heads, d)
        self.w_k = drawn(heads, d // heads, d)
        self.w_v = drawn(heads, d // heads, d)
        self.w_o = drawn(d, d)
        self.w_in = drawn(hidden, d)
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = drawn(d, hidden)
        self.b_out = nn.Parameter(torch.zeros(d))
        self.w_u = drawn(d, tokens, scale=tokens**-0.5)

    def forward(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n classes"]:
        """Logits at `=`, of which the last is the class `=`."""
        return self.logits(*self.parts(pairs))

    def parts(self, pairs: Int[Tensor, "n 2"]) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n hidden"]]:
        """At `=`: the stream before the MLP, and the activations of the MLP."""
        last = self.query_stream()
        values = [torch.einsum("hkd,nd->nhk", self.w_v, stream) for stream in self._number_streams()]
        own = torch.einsum("hkd,d->hk", self.w_v, last)
        here, there, at_end = self.attention(pairs)[..., None].unbind(1)
        z = here * values[0][pairs[:, 0]] + there * values[1][pairs[:, 1]] + at_end * own
        stream = last + z.flatten(1) @ self.w_o.T
        return stream, torch.relu(stream @ self.w_in.T + self.b_in)

    def logits(
        self, stream: Float[Tensor, "n width"], activations: Float[Tensor, "n hidden"]
    ) -> Float[Tensor, "n classes"]:
        """Unembedding of the stream and what MLP activations add to it."""
        return (stream + activations @ self.w_out.T + self.b_out) @ self.w_u

    def attention(self, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "n 3 heads"]:
        """Attention from `=` to a, b and itself."""
        last = self.query_stream()
        query = torch.einsum("hkd,d->hk", self.w_q, last)
        reader = torch.einsum("hk,hkd->hd", query, self.w_k) / math.sqrt(self.w_k.shape[1])
        first, second = (stream @ reader.T for stream in self._number_streams())
        own = (reader @ last).expand(len(pairs), -1)
        return torch.stack([first[pairs[:, 0]], second[pairs[:, 1]], own], 1).softmax(1)

    def query_stream(self) -> Float[Tensor, " width"]:
        """The stream of `=` before attention, the same for all pairs."""
        return self.w_e[-1] + self.w_pos[2]

    def _number_streams(self) -> list[Float[Tensor, "modulus width"]]:
        return [self.w_e[:-1] + self.w_pos[place] for place in (0, 1)]
