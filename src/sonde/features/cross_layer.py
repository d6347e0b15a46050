"""Latents of every layer that write to all later ones: ŷ_m = Σ_{l <= m} f_l W_dec[l → m] + b_m.

A cross-layer transcoder (Ameisen et al. 2025, "Circuit tracing") has an encoder for each layer; a latent of layer l has
a decoder row for each layer from l on. Here layer l is a transcoder whose output is the targets of layers l … L-1 side
by side, and the outputs add up.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.features.design import Design, Kind
from sonde.features.dictionary import Dictionary, Sparse


class CrossLayerTranscoder(nn.Module):
    """Transcoders of the layers of a model, trained together by `Step`.

    Attributes:
        layers: a `Dictionary` for each layer l, of width d to (L - l) d.
        width: d.

    """

    def __init__(self, layers: Sequence[Dictionary]) -> None:
        super().__init__()
        self.width = layers[0].design.inputs
        for place, layer in enumerate(layers):
            wanted = (len(layers) - place) * self.width
            if (layer.design.inputs, layer.design.outputs) != (self.width, wanted):
                raise ValueError(f"outputs of layer {place} is {layer.design.outputs}: it must be {wanted}")
        self.layers: list[Dictionary] = nn.ModuleList(layers)  # type: ignore[assignment]

    @staticmethod
    def initialised(
        n_layers: int,
        width: int,
        latents: int,
        *,
        kind: Kind = "topk",
        k: int | None = None,
        mean: Float[Tensor, "layers d"] | None = None,
        target_mean: Float[Tensor, "layers d"] | None = None,
        seed: int = 0,
    ) -> "CrossLayerTranscoder":
        """A cross-layer transcoder before training, each layer initialised as a transcoder.

        Layer 0 alone starts with the mean of the targets as its bias, since biases add up. Raises `ValueError` for
        kinds other than "relu", "topk", "batchtopk" and "jumprelu", and for sizes that do not fit.
        """
        if kind not in ("relu", "topk", "batchtopk", "jumprelu"):
            raise ValueError(f"kind is {kind!r}: a cross-layer transcoder is relu, topk, batchtopk or jumprelu")
        if n_layers < 1:
            raise ValueError(f"n_layers is {n_layers}: it must be at least 1")
        layers = []
        for place in range(n_layers):
            design = Design(kind, width, latents, k, outputs=(n_layers - place) * width, transcodes=True)
            layers.append(
                Dictionary.initialised(
                    design,
                    mean=None if mean is None else mean[place],
                    target_mean=None if target_mean is None or place else target_mean.reshape(-1),
                    seed=seed + place,
                )
            )
        return CrossLayerTranscoder(layers)

    def save(self, folder: str | Path) -> None:
        """Write each layer as a dictionary into a folder of its own, `layer.0`, `layer.1`, …; the last one last."""
        for place, layer in enumerate(self.layers):
            layer.save(Path(folder) / f"layer.{place}")

    @staticmethod
    def load(folder: str | Path, *, device: torch.device | str = "cpu") -> "CrossLayerTranscoder":
        """Read what `save` wrote. Raises `SondeError` for a folder that lacks a layer or holds another thing."""
        folder = Path(folder)
        first = Dictionary.load(folder / "layer.0", device=device)
        count, rest = divmod(first.design.outputs or 0, first.design.inputs)
        if rest or not count:
            raise SondeError(f"{folder / 'layer.0'} is no first layer of a cross-layer transcoder")
        later = [Dictionary.load(folder / f"layer.{place}", device=device) for place in range(1, count)]
        try:
            return CrossLayerTranscoder([first, *later])
        except ValueError as error:
            raise SondeError(f"{folder} holds layers of different transcoders: {error}") from error

    def forward(self, x: Float[Tensor, "... layers d"]) -> Float[Tensor, "... layers d"]:
        """Predictions of all layers' targets."""
        rows, _ = self.checked(x, x)
        out = torch.zeros_like(rows)
        for layer, part, column in self.parts(rows):
            out = out + torch.nn.functional.pad(layer(part), (column, 0))
        return out.reshape(x.shape).to(x.dtype)

    def encode(self, x: Float[Tensor, "... layers d"]) -> list[Sparse]:
        """Active latents of each layer."""
        return [layer.encode(x[..., place, :]) for place, layer in enumerate(self.layers)]

    def decoder(self, layer: int, target: int) -> Float[Tensor, "latents d"]:
        """W_dec[layer → target]. Raises `ValueError` for a target before the layer."""
        if not 0 <= layer <= target < len(self.layers):
            raise ValueError(f"latents of layer {layer} do not write to layer {target}: there are {len(self.layers)}")
        start = (target - layer) * self.width
        return self.layers[layer].w_dec[:, start : start + self.width]

    def parts(self, rows: Float[Tensor, "n layers*d"]) -> list[tuple[Dictionary, Float[Tensor, "n d"], int]]:
        """Each layer, what it reads, and the first column of the targets that it writes."""
        return [
            (layer, rows[:, place * self.width : (place + 1) * self.width], place * self.width)
            for place, layer in enumerate(self.layers)
        ]

    def checked(
        self, x: Float[Tensor, "... layers d"], y: Float[Tensor, "... layers d"] | None
    ) -> tuple[Float[Tensor, "n layers*d"], Float[Tensor, "n layers*d"]]:
        """Inputs and targets of all layers side by side. Raises `SondeError` for other shapes."""
        if y is None:
            raise SondeError("a cross-layer transcoder needs the targets y: (..., layers, d)")
        wanted = (len(self.layers), self.width)
        for name, given in (("activations", x), ("targets", y)):
            if tuple(given.shape[-2:]) != wanted or given.shape != x.shape:
                raise SondeError(f"{name} have shape {tuple(given.shape)}: expected (..., {wanted[0]}, {wanted[1]})")
        dtype = self.layers[0].w_enc.dtype
        return x.reshape(-1, wanted[0] * wanted[1]).to(dtype), y.reshape(-1, wanted[0] * wanted[1]).to(dtype)
