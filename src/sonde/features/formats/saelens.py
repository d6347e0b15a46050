"""SAELens: `cfg.json` and `sae_weights.safetensors`, from version 6 on and before it.

`W_enc` is d x M, `W_dec` M x d. `apply_b_dec_to_input` centres; `rescale_acts_by_decoder_norm` ranks by pre times the
decoder's norms, which are folded in as they are read, so that the numbers of the latents are SAELens' own. A scale of
the input ("expected_average_only_in") is not in the file before it is folded: it must be given. Before version 6 the
keys are `hook_point`, `activation_fn_str` and `activation_fn_kwargs`, and a TopK dictionary calls itself "standard".
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.formats.assembly import Origin, assembled, by_norm, portable
from sonde.features.formats.foreign import Tensors, checked_design, read_json, setting, unknown
from sonde.features.formats.hooks import lens_hook, site_of
from sonde.files import replacing, write_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.0.0"  # of the format that is written
_KINDS = {
    "standard": "relu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_SCALED = "expected_average_only_in"
_NORMALISATIONS = ("none", _SCALED, "layer_norm")
_PROCESSING = ("center_writing_weights", "fold_ln", "refactor_factored_attn_matrices")
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def load(folder: Path, *, input_scale: float | None = None) -> Dictionary:
    """Read a dictionary; `input_scale` is the factor on the input where the file says that there was one.

    Raises `SondeError` for files that are missing, damaged or not what the format says. Warns where the model's weights
    were processed before the activations were taken: those of the model as it is are others.
    """
    path = folder / CONFIG
    config = read_json(path)
    config |= dict(config.get("metadata") or {})
    processed = {name: on for name, on in (config.get("model_from_pretrained_kwargs") or {}).items() if on}
    if changes := sorted(set(processed) & set(_PROCESSING)):
        warnings.warn(
            f"{path}: the dictionary was trained on {config.get('model_name')} with {' and '.join(changes)}: the model "
            "as it is has other activations",
            stacklevel=2,
        )
    architecture, k = _architecture(config, path)
    transcodes = architecture.endswith("transcoder")
    d = int(setting(config, path, "d_in"))
    normalisation = _normalisation(config, path)
    design = checked_design(
        path,
        kind=_KINDS[architecture],
        inputs=d,
        latents=int(setting(config, path, "d_sae")),
        k=k,
        outputs=int(setting(config, path, "d_out")) if transcodes else d,
        transcodes=transcodes,
        skip="skip" in architecture,
        centred=bool(config.get("apply_b_dec_to_input", True)) and not transcodes,
        layer_norm=normalisation == "layer_norm",
    )
    hook, out = config.get("hook_name", config.get("hook_point")), config.get("hook_name_out")
    origin = Origin(
        "SAELens",
        folder.name,
        hook=hook,
        model=config.get("model_name"),
        site=site_of(config.get("hf_hook_name")) or site_of(hook),
        target=(site_of(config.get("hf_hook_name_out")) or site_of(out)) if transcodes else None,
    )
    weights = _weights(Tensors.safetensors(folder / WEIGHTS), design, architecture, config)
    if config.get("rescale_acts_by_decoder_norm"):
        weights = by_norm(weights)
    dictionary = assembled(design, weights, origin)
    if normalisation != _SCALED:
        return dictionary
    if input_scale is None:
        raise SondeError(
            f"{path}: normalize_activations is {_SCALED!r} and its factor is not in the file: give input_scale, "
            "sqrt(d) over the mean norm of the training activations, or 1 where it is folded in already"
        )
    return dictionary.folded_scale(input_scale)


def save(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a dictionary so that SAELens 6 loads it; norms are folded where it ranks by them.

    Raises `SondeError` for kinds that SAELens does not have, and for one without its threshold.
    """
    folder = Path(folder)
    design = dictionary.design
    architecture = _architecture_of(design)
    centred = bool(design.centred) and not design.transcodes
    dictionary, weights = portable(dictionary, "SAELens", centred=centred)
    tensors = {"W_enc": weights["w_enc"].T, "W_dec": weights["w_dec"], "b_dec": weights["b_dec"]}
    if architecture == "gated":
        tensors |= {"b_gate": weights["b_enc"], "b_mag": weights["b_mag"], "r_mag": weights["r_mag"]}
    else:
        tensors["b_enc"] = weights["b_enc"]
    if dictionary.design.kind == "jumprelu":
        tensors["threshold"] = weights["threshold"]
    if design.skip:
        tensors["W_skip"] = weights["w_skip"]
    with replacing(folder / WEIGHTS) as beside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    metadata: dict[str, Any] = {
        "sae_lens_version": _VERSION,
        "model_name": dictionary.model,
        "hook_name": lens_hook(dictionary.site),
    }
    config = {
        "architecture": architecture,
        "d_in": design.inputs,
        "d_sae": design.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "normalize_activations": "layer_norm" if design.layer_norm else "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if design.kind == "topk":
        config |= {"k": design.k, "rescale_acts_by_decoder_norm": False}
    if design.transcodes:
        config["d_out"] = design.outputs
        metadata["hook_name_out"] = lens_hook(dictionary.target)
    write_json(folder / CONFIG, config)


def _architecture(config: Mapping[str, Any], path: Path) -> tuple[str, int | None]:
    """The architecture by its name from version 6 on, and k."""
    architecture = config.get("architecture", "standard")
    given = config.get("activation_fn_kwargs") or {}
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if architecture not in _KINDS:
        raise unknown(path, "architecture", architecture, tuple(_KINDS))
    if activation not in ("relu", "topk"):
        raise unknown(path, "activation_fn", activation, ("relu", "topk"))
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture != "topk":
        return architecture, None
    k = config.get("k", given.get("k"))
    if k is None:
        raise SondeError(f"{path}: topk without k: expected k, or activation_fn_kwargs with k")
    return architecture, int(k)


def _normalisation(config: Mapping[str, Any], path: Path) -> str:
    """How the input is normalised; old files say so with a truth value."""
    given = config.get("normalize_activations")
    given = {None: "none", False: "none", True: _SCALED}.get(given, given)
    if given not in _NORMALISATIONS:
        raise unknown(path, "normalize_activations", given, _NORMALISATIONS)
    return given


def _weights(tensors: Tensors, design: Design, architecture: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    d, m, out = design.inputs, design.latents, design.outputs
    weights = {
        "w_enc": tensors.take("W_enc", (d, m)).T,
        "w_dec": tensors.take("W_dec", (m, out)),
        "b_dec": tensors.take("b_dec", (out,)),
    }
    if design.kind == "gated":
        names = {"b_enc": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"}
        weights |= {ours: tensors.take(theirs, (m,)) for ours, theirs in names.items()}
    else:
        weights["b_enc"] = tensors.take("b_enc", (m,))
    if design.kind == "jumprelu":
        weights["threshold"] = _threshold(tensors, architecture, m)
    if design.skip:
        weights["w_skip"] = tensors.take("W_skip", (out, d))
    for name in _FACTORS:
        if name in tensors:
            weights["w_dec"] = weights["w_dec"] * _factor(tensors, name, m, config)[:, None]
    tensors.close()
    return weights


def _factor(tensors: Tensors, name: str, latents: int, config: Mapping[str, Any]) -> Float[Tensor, " latents"]:
    """What each latent is multiplied by before it is decoded. Raises `SondeError` where the file contradicts itself."""
    factor = tensors.take(name, (latents,))
    if not bool((factor == 1).all()) and not config.get("finetuning_scaling_factor"):
        raise SondeError(
            f"{tensors.path} holds a {name} other than 1, but finetuning_scaling_factor is "
            f"{config.get('finetuning_scaling_factor')}: expected true"
        )
    return factor


def _threshold(tensors: Tensors, architecture: str, latents: int) -> Float[Tensor, " latents"]:
    if architecture.endswith("batchtopk"):
        value = tensors.take("topk_threshold", ())
        if not value > 0:
            raise SondeError(f"{tensors.path}: topk_threshold is {float(value)}, expected above 0: it was never set")
        return value.expand(latents)
    if "log_threshold" in tensors:
        return tensors.take("log_threshold", (latents,)).exp()
    return tensors.take("threshold", (latents,))


def _architecture_of(design: Design) -> str:
    jumping = ("jumprelu", "batchtopk", "matryoshka")
    if design.transcodes:
        if design.kind != "relu" and design.kind not in jumping:
            raise SondeError(f"SAELens has no transcoder of kind {design.kind!r}: it has relu and jumprelu")
        return f"{'' if design.kind == 'relu' else 'jumprelu_'}{'skip_' if design.skip else ''}transcoder"
    names = {"relu": "standard", "topk": "topk", "gated": "gated"} | dict.fromkeys(jumping, "jumprelu")
    if design.kind not in names:
        raise SondeError(f"SAELens has no kind {design.kind!r}: it has {', '.join(names)}")
    return names[design.kind]
