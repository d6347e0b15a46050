"""The same function by other weights: a scale of the input, or the norms of decoder rows, taken into the weights.

A dictionary of s x is one of x with W_enc s, W_dec / s and b_dec / s; b_enc and thresholds stay. With n_i the norm of
decoder row i, (W_enc, b_enc, θ) n_i and W_dec / n_i give the same output wherever what is kept does not depend on how
large latents are beside each other: not for plain TopK, whose choice would change.
"""

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary


@torch.no_grad()
def folded_scale(dictionary: Dictionary, scale: float, *, target: float | None = None) -> Dictionary:
    """The dictionary of x, of one that was trained on `scale` x (and of y, on `target` y; by default also `scale`).

    Raises `ValueError` for scales that are not above 0, and for a target scale of its own with a centred dictionary.
    """
    to = scale if target is None else target
    if not (scale > 0 and to > 0):
        raise ValueError(f"scale is {scale} and target {to}: both must be above 0")
    if to != scale and dictionary.design.centred:
        raise ValueError("a centred dictionary reads and writes on one scale: target must be left out")
    if dictionary.design.layer_norm:
        raise ValueError("layer_norm takes every scale from the input already: there is none to fold")
    folded = copy.deepcopy(dictionary)
    folded.w_enc.mul_(scale)
    folded.w_dec.div_(to)
    folded.b_dec.div_(to)
    if folded.w_skip is not None:
        folded.w_skip.mul_(scale / to)
    if folded.threshold is not None and folded.design.ranked_by_norm:
        folded.threshold.div_(to)  # it is compared with pre times the norm of a row that has become shorter
    return folded


@torch.no_grad()
def folded_norms(dictionary: Dictionary) -> Dictionary:
    """The same dictionary with decoder rows of length 1 (rows of zeros stay).

    Kinds that keep what is above one threshold become JumpReLU, with a threshold for each latent. Raises `SondeError`
    where the choice is by size among latents, which other norms would change: TopK and GroupMax that do not rank by
    norm, and BatchTopK before it has a threshold.
    """
    design = dictionary.design
    if design.chooses_across_rows and not design.ranked_by_norm:
        return folded_norms(as_jumprelu(dictionary))
    if design.kind in ("topk", "groupmax") and not design.ranked_by_norm:
        raise SondeError(f"norms cannot be folded into {dictionary!r}: other sizes of latents change which are kept")
    norms = _norms(dictionary)
    folded = copy.deepcopy(dictionary)
    folded.design = replace(design, ranked_by_norm=False)
    folded.w_enc.mul_(norms[:, None])
    folded.w_dec.div_(norms[:, None])
    folded.b_enc.mul_(norms)
    if folded.b_mag is not None:
        folded.b_mag.mul_(norms)
    if design.kind == "jumprelu" and folded.threshold is not None:
        folded.threshold.mul_(norms)
    return folded


@torch.no_grad()
def as_jumprelu(dictionary: Dictionary) -> Dictionary:
    """A dictionary with one threshold for all rows as JumpReLU: the same latents are active, with the same values.

    Raises `SondeError` for other kinds and before training has set the threshold.
    """
    design = dictionary.design
    if design.kind == "jumprelu":
        return copy.deepcopy(dictionary)
    if not design.chooses_across_rows or dictionary.threshold is None:
        raise SondeError(f"{dictionary!r} has no threshold: only batchtopk and matryoshka become jumprelu")
    if float(dictionary.threshold) <= 0:
        raise SondeError(f"{dictionary!r} has no threshold yet: train it first")
    jumping = replace(design, kind="jumprelu", k=None, prefixes=(), prefix_weights=(), ranked_by_norm=False)
    made = Dictionary(jumping, device=dictionary.device).to(dictionary.w_enc.dtype)
    for name, parameter in dictionary.named_parameters():
        made.get_parameter(name).copy_(parameter)
    made.get_parameter("threshold").copy_(
        dictionary.threshold / _norms(dictionary) if design.ranked_by_norm else dictionary.threshold
    )
    for name in ("site", "target", "model", "model_hash", "tokenizer_hash"):
        setattr(made, name, getattr(dictionary, name))
    made.facts = copy.deepcopy(dictionary.facts) | {"was": {"kind": design.kind, "k": design.k}}
    return made


def _norms(dictionary: Dictionary) -> Float[Tensor, " latents"]:
    """Norms of decoder rows; 1 for rows of zeros."""
    norms = dictionary.decoder_norms().detach()
    return torch.where(norms > 0, norms, 1)
