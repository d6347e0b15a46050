"""The multilayer perceptron: x ↦ W_L φ(… φ(W_1 x + b_1) …) + b_L, with one activation φ between layers.

Kernels are LeCun normal, truncated at two standard deviations and rescaled to variance 1 / fan-in (LeCun et al. 1998;
the initialiser of flax), biases normal with a chosen standard deviation.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError

Activation = Literal["gelu-tanh", "gelu", "relu", "tanh", "sigmoid"]
_TRUNCATED_SD = 0.87962566103423978  # of a standard normal cut at ±2


@dataclass(frozen=True)
class MLPShape:
    """Sizes from inputs to outputs, and the activation between layers."""

    sizes: tuple[int, ...] = (64, 64, 10)
    activation: Activation = "gelu-tanh"

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise SondeError(f"the sizes of an MLP are {self.sizes}; give inputs, hidden widths and outputs, all >= 1")
        if self.activation not in get_args(Activation):
            raise SondeError(f"activation {self.activation!r} is unknown: use {', '.join(get_args(Activation))}")


class MLP(nn.Module):
    """A perceptron of `shape`; the weights are drawn from `seed` alone. `bias_sd` is in units of the activations."""

    def __init__(self, shape: MLPShape, *, seed: int = 0, bias_sd: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for fan_in, fan_out in zip(shape.sizes, shape.sizes[1:], strict=False):
            layer = nn.Linear(fan_in, fan_out)
            with torch.no_grad():
                sd = fan_in**-0.5 / _TRUNCATED_SD
                nn.init.trunc_normal_(layer.weight, std=sd, a=-2 * sd, b=2 * sd, generator=generator)
                layer.bias.normal_(0, bias_sd, generator=generator) if bias_sd else layer.bias.zero_()
            self.layers.append(layer)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """The outputs of the last layer, without an activation."""
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else activate(x, self.shape.activation))
        return x


def activate(x: Tensor, activation: Activation) -> Tensor:
    """φ(x), elementwise."""
    if activation == "gelu-tanh":
        return nn.functional.gelu(x, approximate="tanh")
    return {"gelu": nn.functional.gelu, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation](x)
