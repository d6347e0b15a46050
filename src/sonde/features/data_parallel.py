"""Several processes, one dictionary: each learns from its own share of the text, and all take the same steps.

Under torchrun process r of w reads batches r, r + w, … Each takes the gradient of its rows, with sums of squares of all
processes' rows in the denominators; the gradients are added up, so that parameters stay equal to the bit and a step is
that of one process on all the rows. Only what is said of a batch as a whole is said of a process's own rows: which
latents BatchTopK and Matryoshka choose, and how far JumpReLU's L0 is from its aim. Backends are gloo on a CPU and
NCCL on CUDA.
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

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over processes into each tensor, in one message; all have the type of the first."""
        if self.world == 1 or not tensors:
            return
        joined = torch.cat([tensor.reshape(-1).to(tensors[0].dtype) for tensor in tensors])
        dist.all_reduce(joined)
        for tensor, part in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def least(self, number: float) -> float:
        """The smallest of the processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return float(found)
