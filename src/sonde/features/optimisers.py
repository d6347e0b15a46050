"""Optimisers of dictionaries: Adam in one pass, the averaged sign of the gradient, or Muon for the matrices.

Schedule-free averaging (Defazio et al. 2405.15682): with z moved by -lr sign(g), x the mean of all z, and gradients
taken at y = momentum x + (1 - momentum) z, which is what the parameters hold in training; what is kept is x.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sonde.features.step_config import StepConfig
from sonde.nets.muon import Muon


class AveragedSignSGD(torch.optim.Optimizer):
    """Steps of length `lr` in every coordinate, against the gradient's sign, averaged as above."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, fast=p.clone(), mean=p.clone())
                state["step"] += 1
                state["fast"].add_(p.grad.sign(), alpha=-group["lr"])
                state["mean"].lerp_(state["fast"], 1 / state["step"])
                torch.lerp(state["fast"], state["mean"], group["momentum"], out=p)

    def copies(self, parameter: Tensor) -> list[Tensor]:
        """The parameter, and the fast and the mean one where there has been a step: what a projection acts on."""
        state = self.state.get(parameter, {})
        return [parameter, *(state[name] for name in ("fast", "mean") if name in state)]


def optimisers(parameters: Sequence[nn.Parameter], config: StepConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a filled `StepConfig`, each with some of the parameters."""
    lr = config.lr or 0.0
    betas = config.betas or (0.9, 0.999)
    if config.optimizer == "signsgd":
        return [AveragedSignSGD(parameters, lr, config.momentum)]
    if config.optimizer == "adam":
        return [torch.optim.Adam(parameters, lr, betas, fused=True)]
    matrices = [p for p in parameters if p.ndim == 2]
    vectors = [p for p in parameters if p.ndim != 2]
    return [Muon(matrices, lr, config.momentum), torch.optim.Adam(vectors, lr, betas, fused=True)]
