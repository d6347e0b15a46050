"""EleutherAI's sparsify: a folder for each hookpoint, with `cfg.json` and `sae.safetensors`.

f = topk or groupmax of relu(W_enc (x - b_dec) + b_enc), without the subtraction for transcoders; `encoder.weight` and
`W_dec` are M x d, `W_skip` d x d. Folders are named after modules of the base model, and `config.json` beside them
names the model. Old files have no `activation` and may carry `signed`, which kept the largest of either sign: no kind
here does that, so it is refused where it is true.
"""

from pathlib import Path

from safetensors.torch import save_file

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary
from sonde.features.formats.assembly import Origin, assembled, portable
from sonde.features.formats.foreign import Tensors, checked_design, read_json, setting, unknown
from sonde.features.formats.hooks import site_of
from sonde.files import replacing, write_json

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATIONS = ("topk", "groupmax")


def load(folder: Path) -> Dictionary:
    """Read the dictionary of the hookpoint that `folder` is named after.

    Raises `SondeError` for files that are missing, damaged or not what the format says.
    """
    path = folder / CONFIG
    config = read_json(path)
    activation = config.get("activation", "topk")
    if activation not in _ACTIVATIONS:
        raise unknown(path, "activation", activation, _ACTIVATIONS)
    if config.get("signed"):
        raise SondeError(f"{path}: signed is true, expected false: latents of either sign are not read")
    d = int(setting(config, path, "d_in"))
    latents = config.get("num_latents") or d * int(setting(config, path, "expansion_factor"))
    transcodes, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    design = checked_design(
        path,
        kind=activation,
        inputs=d,
        latents=latents,
        k=int(setting(config, path, "k")),
        transcodes=transcodes,
        skip=skip,
        multi_topk=bool(config.get("multi_topk")) and activation == "topk",
    )
    tensors = Tensors.safetensors(folder / WEIGHTS)
    weights = {
        "w_enc": tensors.take("encoder.weight", (latents, d)),
        "b_enc": tensors.take("encoder.bias", (latents,)),
        "w_dec": tensors.take("W_dec", (latents, d)),
        "b_dec": tensors.take("b_dec", (d,)),
        "w_skip": tensors.take("W_skip", (d, d)) if skip else None,
    }
    tensors.close()
    run = folder.parent / "config.json"
    origin = Origin(
        "sparsify",
        folder.name,
        hook=folder.name,
        model=read_json(run).get("model") if run.is_file() else None,
        site=site_of(folder.name, side="in" if transcodes else "out"),
        target=site_of(folder.name) if transcodes else None,
    )
    return assembled(design, weights, origin)


def save(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a dictionary so that sparsify 1.3 loads it; norms are folded where it ranks by them.

    Raises `SondeError` for what sparsify does not have: other kinds than topk and groupmax, standardised rows, and a
    skip or a width of the output that its transcoders do not take.
    """
    folder = Path(folder)
    design = dictionary.design
    if design.kind not in _ACTIVATIONS:
        raise SondeError(f"sparsify has no kind {design.kind!r}: it holds {' and '.join(_ACTIVATIONS)}")
    if design.layer_norm:
        raise SondeError("sparsify does not standardise rows: a dictionary with layer_norm cannot be written for it")
    if design.outputs != design.inputs:
        raise SondeError(
            f"sparsify's transcoders keep the width: this one reads {design.inputs} and writes {design.outputs}"
        )
    _, weights = portable(dictionary, "sparsify", centred=not design.transcodes)
    tensors = {
        "encoder.weight": weights["w_enc"],
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["w_dec"],
        "b_dec": weights["b_dec"],
    }
    if design.skip:
        tensors["W_skip"] = weights["w_skip"]
    with replacing(folder / WEIGHTS) as beside:
        save_file(tensors, beside)
    config = {
        "activation": design.kind,
        "expansion_factor": design.latents // design.inputs,
        "normalize_decoder": True,
        "num_latents": design.latents,
        "k": design.k,
        "multi_topk": design.multi_topk,
        "skip_connection": design.skip,
        "transcode": design.transcodes,
        "d_in": design.inputs,
    }
    write_json(folder / CONFIG, config)
