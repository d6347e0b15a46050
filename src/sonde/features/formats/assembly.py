"""From checked tensors to a `Dictionary` that knows where it came from, and back to weights that others can use."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary


@dataclass(frozen=True)
class Origin:
    """Where a dictionary came from: the format, the name of its folder or file, what it was trained on.

    hook: the place by the other project's name. model: what it calls the language model. site, target: Sonde's names of
    the places, None where there are none.
    """

    format: str
    name: str
    hook: str | None = None
    model: str | None = None
    site: str | None = None
    target: str | None = None


@torch.no_grad()
def assembled(design: Design, weights: Mapping[str, Tensor | None], origin: Origin) -> Dictionary:
    """A dictionary with these weights, by the names of its parameters; a scalar threshold counts for all latents."""
    dictionary = Dictionary(design)
    for name, parameter in dictionary.state_dict(keep_vars=True).items():
        value = weights[name]
        assert value is not None, f"the reader left out {name}"
        parameter.copy_(value)
    dictionary.site, dictionary.target, dictionary.model = origin.site, origin.target, origin.model
    dictionary.facts = {"format": origin.format, "name": origin.name, "hook": origin.hook}
    return dictionary


def by_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose pre is the given one's times the norm of the latent's decoder row, for the same output.

    What is compared with a threshold or ranked by pre times the norm is then compared by pre alone.
    """
    norms = weights["w_dec"].norm(dim=1)
    norms = torch.where(norms > 0, norms, 1)
    scaled = {"w_enc": weights["w_enc"] * norms[:, None], "b_enc": weights["b_enc"] * norms}
    return dict(weights) | scaled | {"w_dec": weights["w_dec"] / norms[:, None]}


@torch.no_grad()
def recentred(dictionary: Dictionary, *, centred: bool) -> Dictionary:
    """The same function with or without the subtraction of b_dec from the input: b_enc takes W_enc b_dec in or out."""
    if dictionary.design.centred == centred:
        return dictionary
    moved = copy.deepcopy(dictionary)
    moved.design = replace(dictionary.design, centred=centred)
    shift = dictionary.w_enc @ dictionary.b_dec * (1 if centred else -1)
    moved.b_enc.add_(shift)
    if moved.b_mag is not None and moved.r_mag is not None:
        moved.b_mag.add_(moved.r_mag.exp() * shift)
    return moved


def portable(dictionary: Dictionary, to: str, *, centred: bool) -> tuple[Dictionary, dict[str, Tensor]]:
    """The dictionary as another project computes, and its weights in float32 by Sonde's names.

    Norms are folded where it ranks by them; one threshold for all rows becomes JumpReLU's. Raises `SondeError` where
    there is no threshold yet, and for a crosscoder, which reads several sites.
    """
    design = dictionary.design
    if design.streams:
        raise SondeError(f"{dictionary!r} is a crosscoder: {to} holds dictionaries of one site")
    if design.chooses_across_rows:
        dictionary = dictionary.as_jumprelu()
    elif design.ranked_by_norm:
        dictionary = dictionary.folded_norms()
    dictionary = recentred(dictionary, centred=centred)
    weights = {name: tensor.detach().cpu().float().contiguous() for name, tensor in dictionary.state_dict().items()}
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise SondeError(f"{dictionary!r} cannot be written for {to}: {broken[0]} holds nan or infinity")
    return dictionary, weights
