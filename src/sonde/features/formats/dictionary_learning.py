"""dictionary_learning: `ae.pt` (a pickled state dict, opened without running code) and `config.json`.

`encoder.weight` is M x d and `decoder.weight` d x M, or `W_enc` d x M and `W_dec` M x d; the output's bias is called
`bias`, `decoder_bias`, `b_dec` or `decoder.bias`; `k` and `threshold` are buffers, and a threshold of -1 was never set.
JumpReluAutoEncoder and AutoEncoderNew do not centre.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sonde.errors import SondeError
from sonde.features.design import Kind
from sonde.features.dictionary import Dictionary
from sonde.features.formats.assembly import Origin, assembled
from sonde.features.formats.foreign import Tensors, checked_design, read_json, read_pickled, setting, unknown

CONFIG, WEIGHTS = "config.json", "ae.pt"


class _Class(NamedTuple):
    kind: Kind
    centred: bool
    turned: bool  # the encoder is W_enc d x M
    bias: str  # of the output


_CLASSES = {
    "AutoEncoder": _Class("relu", True, False, "bias"),
    "AutoEncoderNew": _Class("relu", False, False, "decoder.bias"),
    "GatedAutoEncoder": _Class("gated", True, False, "decoder_bias"),
    "JumpReluAutoEncoder": _Class("jumprelu", False, True, "b_dec"),
    "AutoEncoderTopK": _Class("topk", True, False, "b_dec"),
    "BatchTopKSAE": _Class("batchtopk", True, False, "b_dec"),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", True, True, "b_dec"),
}


def load(folder: Path) -> Dictionary:
    """Read a dictionary.

    Raises `SondeError` for files that are missing, damaged or not what the format says.
    """
    path = folder / CONFIG
    config = read_json(path)
    trainer = setting(config, path, "trainer")
    name = setting(trainer, path, "dict_class")
    if name not in _CLASSES:
        raise unknown(path, "dict_class", name, tuple(_CLASSES))
    how = _CLASSES[name]
    d, latents = int(setting(trainer, path, "activation_dim")), int(setting(trainer, path, "dict_size"))
    state = read_pickled(folder / WEIGHTS)
    tensors = Tensors(folder / WEIGHTS, {key: value for key, value in state.items() if isinstance(value, Tensor)})
    fields: dict[str, Any] = {"kind": how.kind, "inputs": d, "latents": latents, "centred": how.centred}
    if how.kind in ("topk", "batchtopk", "matryoshka"):
        fields["k"] = _k(tensors, trainer, path)
    if how.kind == "matryoshka":
        sizes = tensors.take("group_sizes", tensors.shape("group_sizes", 1))
        fields["prefixes"] = tuple(int(end) for end in sizes.cumsum(0))
    weights = _weights(tensors, how, d, latents)
    tensors.close(ignored=("threshold",) if how.kind == "topk" else ())
    origin = Origin(
        "dictionary_learning",
        folder.name,
        hook=trainer.get("submodule_name"),
        model=trainer.get("lm_name"),
        site=_site(trainer),
    )
    return assembled(checked_design(path, **fields), weights, origin)


def _weights(tensors: Tensors, how: _Class, d: int, latents: int) -> dict[str, Tensor]:
    if how.turned:
        weights = {"w_enc": tensors.take("W_enc", (d, latents)).T, "w_dec": tensors.take("W_dec", (latents, d))}
    else:
        encoder, decoder = tensors.take("encoder.weight", (latents, d)), tensors.take("decoder.weight", (d, latents))
        weights = {"w_enc": encoder, "w_dec": decoder.T}
    weights["b_dec"] = tensors.take(how.bias, (d,))
    if how.kind == "gated":
        names = {"b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
        return weights | {ours: tensors.take(theirs, (latents,)) for ours, theirs in names.items()}
    weights["b_enc"] = tensors.take("b_enc" if how.turned else "encoder.bias", (latents,))
    if how.kind == "jumprelu":
        weights["threshold"] = tensors.take("threshold", (latents,))
    if how.kind in ("batchtopk", "matryoshka"):
        threshold = tensors.take("threshold", ())
        # -1 until training sets it; a dictionary without one chooses among the rows of a batch, as it did in training
        weights["threshold"] = threshold.clamp(min=0)
    return weights


def _k(tensors: Tensors, trainer: Mapping[str, Any], path: Path) -> int:
    k, stored = int(setting(trainer, path, "k")), int(tensors.take("k", ()))
    if k != stored:
        raise SondeError(f"{path}: k is {k}, but {tensors.path.name} holds {stored}")
    return k


def _site(trainer: Mapping[str, Any]) -> str | None:
    """The site of a trainer's `layer` and `submodule_name`, such as `resid_post_layer_3`."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    stems = {"resid_post": "resid_post", "resid": "resid_post", "mlp": "mlp_out", "attn": "mixer_out"}
    found = next((site for stem, site in stems.items() if name.startswith(stem)), None)
    return None if layer is None or found is None else f"{found}.{layer}"
