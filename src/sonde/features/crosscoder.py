"""One set of latents for several streams: f = act(Σ_p E_p x_p + b), x̂_p = Σ_i f_i D_{p,i} + b_p.

A crosscoder (Lindsey et al. 2024, "Sparse crosscoders") of layers, or of two models, is a dictionary of the streams
laid side by side, in which the size of a latent is Σ_p ‖D_{p,i}‖: the penalty λ Σ_i f_i Σ_p ‖D_{p,i}‖ weighs by it, and
BatchTopK ranks by f_i Σ_p ‖D_{p,i}‖. How the sum divides among the streams says whose a latent is.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.design import Design, Kind
from sonde.features.dictionary import Dictionary


def crosscoder(widths: Sequence[int], latents: int, *, kind: Kind = "batchtopk", k: int | None = None) -> Design:
    """The design of a crosscoder of streams of these widths. `Step` trains it on what `joined` gives.

    Raises `ValueError` for kinds other than "relu" and "batchtopk", for fewer than two streams, and as `Design` does.
    """
    if kind not in ("relu", "batchtopk"):
        raise ValueError(f"kind is {kind!r}: a crosscoder is relu or batchtopk")
    if len(widths) < 2:
        raise ValueError(f"widths are {tuple(widths)}: a crosscoder has at least two streams")
    return Design(
        kind, sum(widths), latents, k, centred=False, ranked_by_norm=kind == "batchtopk", streams=tuple(widths)
    )


def joined(streams: Sequence[Float[Tensor, "... d_p"]]) -> Float[Tensor, "... d"]:
    """The streams of the same rows, side by side. Raises `SondeError` for streams of different rows."""
    shapes = [tuple(stream.shape[:-1]) for stream in streams]
    if len(set(shapes)) != 1:
        raise SondeError(f"streams of a crosscoder have the same rows, not {shapes}")
    return torch.cat(list(streams), -1)


def parted(dictionary: Dictionary, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d_p"], ...]:
    """What belongs to each stream of activations or reconstructions."""
    return x.split(_streams(dictionary), -1)


def decoders(dictionary: Dictionary) -> tuple[Float[Tensor, "latents d_p"], ...]:
    """D_p of each stream."""
    return dictionary.w_dec.split(_streams(dictionary), 1)


@torch.no_grad()
def stream_norms(dictionary: Dictionary) -> Float[Tensor, "latents streams"]:
    """‖D_{p,i}‖ of each latent in each stream: 0 in one of two streams means that the latent is the other's alone."""
    return torch.stack([part.norm(dim=1) for part in decoders(dictionary)], 1)


def _streams(dictionary: Dictionary) -> tuple[int, ...]:
    if not dictionary.design.streams:
        raise SondeError(f"{dictionary!r} is no crosscoder: its design has no streams")
    return dictionary.design.streams
