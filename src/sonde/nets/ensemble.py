"""Many networks of one shape as one: seeds or settings as a batch axis, parameters stacked, one vectorised pass.

The sum of the members' losses has for each member the gradient of its own, and SGD and Adam act entry by entry, so
training the stack is training each alone; clipping by a common norm is the exception. Worth it where a network is too
small to fill the machine.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from sonde.errors import SondeError


class Ensemble(nn.Module):
    """A stack of modules of one architecture. Its parameters have a first axis of members."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        shapes = {tuple((name, tuple(p.shape)) for name, p in module.named_parameters()) for module in modules}
        if len(shapes) != 1:
            raise SondeError(
                f"an ensemble takes modules of one shape; {len(modules)} were given of {len(shapes)} shapes"
            )
        stacked, buffers = stack_module_state(list(modules))
        if buffers:
            raise SondeError(f"an ensemble takes modules without buffers; these have {', '.join(buffers)}")
        self.names = list(stacked)
        self.stacked = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in stacked.values())
        self._skeleton = [copy.deepcopy(modules[0]).to("meta")]  # in a list: no submodule, so not in the state

    def __len__(self) -> int:
        return len(self.stacked[0])

    def forward(self, x: Tensor, *, each: bool = False) -> Float[Tensor, "members ..."]:
        """What every member says of `x`; with `each`, the first axis of `x` deals one input to each member."""

        def one(values: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return functional_call(self._skeleton[0], dict(zip(self.names, values, strict=True)), (x,))

        return vmap(one, in_dims=(0, 0 if each else None))(tuple(self.stacked), x)

    @torch.no_grad()
    def member(self, index: int) -> nn.Module:
        """One member as a module of its own, with a copy of its parameters."""
        module = copy.deepcopy(self._skeleton[0]).to_empty(device=self.stacked[0].device)
        values = (value[index].clone() for value in self.stacked)
        module.load_state_dict(dict(zip(self.names, values, strict=True)))
        return module
