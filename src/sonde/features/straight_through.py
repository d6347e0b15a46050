"""Gradients of a threshold: how should θ move, when f = pre·1[pre > θ] and 1[pre > θ] have none in it?

Straight through a window of width ε around θ (Rajamanoharan et al. 2407.14435): with K(u) = 1[|u| < 1/2],
∂f/∂θ = -(θ/ε) K((pre - θ)/ε) and ∂1[pre > θ]/∂θ = -(1/ε) K((pre - θ)/ε). Both take pre, not f: with f, which is 0 below
θ, the lower half of the window would never be seen.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where((pre > threshold) & (pre > 0), pre, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (gradient,) = grad_outputs
        pre, threshold = ctx.saved_tensors
        window = _window(pre, threshold, ctx.bandwidth)
        to_threshold = -(threshold / ctx.bandwidth) * (gradient * window).sum(0)
        return gradient * ((pre > threshold) & (pre > 0)), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return ((pre > threshold) & (pre > 0)).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[override]
        (gradient,) = grad_outputs
        pre, threshold = ctx.saved_tensors
        slope = gradient * _window(pre, threshold, ctx.bandwidth) / ctx.bandwidth
        return slope if ctx.to_input else None, -slope.sum(0), None, None


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


def jump_relu(
    pre: Float[Tensor, "n latents"], threshold: Float[Tensor, " latents"], bandwidth: float
) -> Float[Tensor, "n latents"]:
    """The preactivation where it is above `threshold` and 0, else 0."""
    return _JumpReLU.apply(pre, threshold, bandwidth)  # type: ignore[no-any-return]


def step_above(
    pre: Float[Tensor, "n latents"], threshold: Float[Tensor, " latents"], bandwidth: float, *, to_input: bool = False
) -> Float[Tensor, "n latents"]:
    """1[pre > threshold]: its sum over latents is the L0 of a row. `to_input` sends the negated gradient to pre too."""
    return _Step.apply(pre, threshold, bandwidth, to_input)  # type: ignore[no-any-return]
