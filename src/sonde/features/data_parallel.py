"""Several processes, one dictionary: each learns from its own share of the text, and all take the same steps.

Under torchrun process r of w reads batches r, r + w, … With g_r the gradient of process r on its n rows, all step along
the mean of the g_r, so that their parameters stay equal to the bit; what a step counts (which latents fired, sums of
squares) is added up over processes. Backends are gloo on a CPU and NCCL on CUDA.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from sonde.lm.batches import rank_and_world


class Processes:
    """The processes that torchrun started, or this one alone. Starts the process group where none exists."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world = rank_and_world()
        self.device = device
        if self.world > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over processes into each tensor, in one message."""
        if self.world == 1 or not tensors:
            return
        joined = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in tensors])
        dist.all_reduce(joined)
        joined /= self.world
        for tensor, part in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        if self.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor([number], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    def wait(self) -> None:
        """Go on when all have come so far."""
        if self.world > 1:
            dist.barrier()
