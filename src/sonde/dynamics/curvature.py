"""Products of the Hessian of a step's loss with many directions at once, for any module.

A curve knows the layout in which it wants its columns: here the plain one, [columns, N]. `sonde.dynamics.fused_mlp` has
another for perceptrons, several times as fast.
"""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vjp, vmap

from sonde.dynamics.trajectory import Trajectory, gradient
from sonde.dynamics.update_rules import Parts


class Curve(Protocol):
    """Gradients and Hessian products along a recorded path."""

    path: Trajectory
    block: int
    """Columns that are walked at once."""

    def pack(self, columns: Float[Tensor, "k N"]) -> Parts:
        """Columns in the layout of the curve, as new memory."""
        ...

    def unpack(self, parts: Parts) -> Float[Tensor, "k N"]:
        """The reverse."""
        ...

    def expand(self, vector: Float[Tensor, " N"]) -> Parts:
        """One vector, so that it broadcasts against packed columns."""
        ...

    def inner(self, vector: Parts, parts: Parts) -> Parts:
        """Inner products of an expanded vector with every column, so that they broadcast against the pieces."""
        ...

    def gradient(self, step: int) -> Float[Tensor, " N"]:
        """The gradient of the step's loss, not clipped."""
        ...

    def product(self, step: int, x: Parts, out: Parts, beta: float) -> None:
        """Set out to beta · out + Hx, H the Hessian of the step's loss at the path."""
        ...


class AutogradCurve:
    """The curve of any module that `torch.func` can differentiate. A large `block` needs memory, a small one time."""

    def __init__(self, path: Trajectory, *, block: int = 256) -> None:
        self.path = path
        self.block = block

    def pack(self, columns: Float[Tensor, "k N"]) -> Parts:
        """A copy."""
        return [columns.clone()]

    def unpack(self, parts: Parts) -> Float[Tensor, "k N"]:
        """The only piece."""
        return parts[0]

    def expand(self, vector: Float[Tensor, " N"]) -> Parts:
        """The vector itself."""
        return [vector]

    def inner(self, vector: Parts, parts: Parts) -> Parts:
        """Inner products, [k, 1]."""
        return [parts[0] @ vector[0][:, None]]

    def gradient(self, step: int) -> Float[Tensor, " N"]:
        """By autograd."""
        return gradient(self.path.map, self.path[step].theta, step)

    def product(self, step: int, x: Parts, out: Parts, beta: float) -> None:
        """The pullback of the gradient, vectorised over columns: H is its own transpose, and its graph is made once."""
        map, theta = self.path.map, self.path[step].theta
        with map.draws(step):
            pull = vjp(grad(lambda weights: map.loss_at(weights, step)), theta)[1]
        (made,) = vmap(pull)(x[0])
        out[0].mul_(beta).add_(made) if beta else out[0].copy_(made)
