"""The neurons of an MLP in the form of a dictionary, so that they can be cached, explained and scored like latents.

A neuron is a number between the two layers of an MLP, after its non-linearity: what the last projection is given. It is
computed again from what the MLP is given, by the MLP itself. A few neurons a token make a fair comparison with latents:
the k largest are kept (k = 32 in Paulo et al. 2410.13928), of the neurons themselves or of a random rotation of them;
with k None every positive one is.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.features.dictionary import Sparse
from sonde.lm.model import LanguageModel

_WITHIN = 1e-4


class _Caught(Exception):
    """Ends a pass through an MLP once its neurons are known."""


class MLPNeurons:
    """The neurons of one block's MLP, with `encode` as a `Dictionary` has it. Reads the site `mlp_in.i`.

    Args:
        lm: the model.
        layer: number of the block.
        k: neurons kept a token; None for all that are positive.
        rotation: seed of a random rotation of the neurons; None for the neurons themselves.
        only: with k None, the neurons that are given; every positive one of all neurons would fill a disk.

    Raises:
        SondeError: for a block without an MLP of one last projection, such as a mixture of experts, and for k out of
            range.

    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        *,
        k: int | None = 32,
        rotation: int | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        self.site = lm.match(f"mlp_in.{layer}")[0]
        place = lm.structure.mlp_inputs[layer]
        # what is called the MLP's output may be that of a norm behind it; what is given to the MLP is its own input
        mlp = place.module if place is not None and place.at_input else lm.structure.mlps[layer]
        found = None if mlp is None or isinstance(mlp, nn.Linear) else _last_projection(mlp, lm.d_model)
        if mlp is None or found is None:
            raise SondeError(f"{lm.name}: block {layer} has no MLP whose neurons one last projection reads")
        self._mlp, self._projection, self.latents = mlp, *found
        self._name, self.layer, self.k, self.rotation = lm.name, layer, k, rotation
        if k is not None and not 1 <= k <= self.latents:
            raise SondeError(f"k is {k}: block {layer} of {lm.name} has {self.latents} neurons")
        if only is not None and (k is not None or not set(only) <= set(range(self.latents))):
            raise SondeError(f"only takes neurons from 0 to {self.latents - 1}, and k None")
        self.only = None if only is None else tuple(sorted(set(only)))
        self._rotate: Tensor | None = None
        if rotation is not None:
            generator = torch.Generator().manual_seed(rotation)
            gaussian = torch.randn(self.latents, self.latents, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            # signs of R's diagonal make the rotation uniform (Mezzadri math-ph/0609050)
            self._rotate = (q * r.diagonal().sign()).float().to(lm.device)

    def __repr__(self) -> str:
        return f"MLPNeurons({self._name!r}, {self.layer}, k={self.k}, rotation={self.rotation}, only={self.only})"

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... d"]) -> Sparse:
        """The neurons of what an MLP is given: the k largest, none below 0."""
        rows = self.values(x)
        if self.k is None:
            chosen = torch.tensor(range(self.latents) if self.only is None else self.only, device=rows.device)
            values = rows[..., chosen].relu()
            return Sparse(values, chosen.expand(values.shape))
        values, indices = rows.topk(self.k, dim=-1)
        return Sparse(values.relu(), indices)

    @torch.no_grad()
    def values(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... neurons"]:
        """All neurons, of either sign, rotated where there is a rotation."""
        given = x.to(next(self._mlp.parameters()).dtype)
        neurons = _neurons(self._mlp, self._projection, given.reshape(1, -1, x.shape[-1])).float()
        neurons = neurons.reshape(*x.shape[:-1], self.latents)
        return neurons if self._rotate is None else neurons @ self._rotate

    def directions(self) -> Float[Tensor, "neurons d"]:
        """What each neuron writes into the stream: the rows of the last projection, rotated like the neurons."""
        weight = self._projection.get_parameter("weight").float()
        rows = weight.T if isinstance(self._projection, nn.Linear) else weight
        return rows if self._rotate is None else self._rotate.T @ rows


def _neurons(mlp: nn.Module, projection: nn.Module, x: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise _Caught

    hook = projection.register_forward_pre_hook(catch)
    try:
        mlp(x)
    except _Caught:
        pass
    finally:
        hook.remove()
    return caught[0]


@torch.no_grad()
def _last_projection(mlp: nn.Module, width: int) -> tuple[nn.Module, int] | None:
    """The linear map that runs last in an MLP and the number of neurons, where it gives the MLP's output."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    # transformers' Conv1D (GPT-2) is a linear map with its weight turned
    linear = [m for m in mlp.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]

    def note(module: nn.Module, args: tuple, out: Tensor) -> None:
        seen.append((module, args[0], out))

    hooks = [module.register_forward_hook(note) for module in linear]
    parameter = next(mlp.parameters())
    probe = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        out = mlp(probe)
    except Exception:  # parts that need more than the stream are no plain MLPs
        return None
    finally:
        for hook in hooks:
            hook.remove()
    out = out[0] if isinstance(out, tuple) else out
    if not seen:
        return None
    module, given, given_out = seen[-1]
    same = given_out.shape == out.shape and bool((given_out - out).abs().max() <= _WITHIN * out.abs().max())
    return (module, given.shape[-1]) if same and given.shape[:-1] == probe.shape[:-1] else None
