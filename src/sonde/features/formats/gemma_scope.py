"""Gemma Scope: `params.npz` (and of Gemma Scope 2, `params.safetensors` with `config.json`), JumpReLU without centring.

`W_enc` d x M, `W_dec` M x d, `b_enc`, `b_dec`, `threshold` M; the second release writes small letters and may add
`affine_skip_connection` d x d_out. Dictionaries of the embedding were trained on x / √d times d: W_enc / √d and
W_dec √d read the embedding as it is. What a file is a dictionary of stands in the names of its folders alone, in the
first release: `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.
"""

import math
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary
from sonde.features.formats.assembly import Origin, assembled
from sonde.features.formats.foreign import Tensors, checked_design, read_json, unknown
from sonde.features.formats.hooks import site_of

PARAMS, PARAMS_2, CONFIG_2 = "params.npz", "params.safetensors", "config.json"
_RELEASE = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuned>pt|it)-(?P<place>res|mlp|att|transcoders)")
_PLACES = {"res": "resid_post", "mlp": "mlp_out"}  # of attention, heads before their output matrix: no site


def load(folder: Path, *, embedding: bool | None = None) -> Dictionary:
    """Read a dictionary of either release.

    `embedding` says whether it is one of the embedding; by default the names of the folders do. Raises `SondeError` for
    files that are missing, damaged or not what the format says.
    """
    if (folder / PARAMS_2).is_file():
        return _second(folder)
    path = folder / PARAMS
    tensors = Tensors(path, _arrays(path))
    names = {name: name if name in tensors else name.replace("W_", "w_") for name in ("W_enc", "W_dec")}
    d, latents = tensors.shape(names["W_enc"], 2)
    outputs = tensors.shape(names["W_dec"], 2)[1]
    path_name = folder.resolve().as_posix()
    release = _RELEASE.search(path_name)
    place = release["place"] if release else None
    if embedding is None:
        embedding = "embedding" in path_name
    transcodes = place == "transcoders"
    design = checked_design(
        path, kind="jumprelu", inputs=d, latents=latents, outputs=outputs, transcodes=transcodes, centred=False
    )
    weights = {
        "w_enc": tensors.take(names["W_enc"], (d, latents)).T,
        "w_dec": tensors.take(names["W_dec"], (latents, outputs)),
        "b_enc": tensors.take("b_enc", (latents,)),
        "b_dec": tensors.take("b_dec", (outputs,)),
        "threshold": tensors.take("threshold", (latents,)),
    }
    tensors.close()
    if embedding:
        weights["w_enc"], weights["w_dec"] = weights["w_enc"] / math.sqrt(d), weights["w_dec"] * math.sqrt(d)
    layer = re.search(r"layer_(\d+)", path_name)
    site, target = ("embed", None) if embedding else (None, None)
    if layer and place in _PLACES and not embedding:
        site = f"{_PLACES[place]}.{layer[1]}"
    if layer and transcodes:
        site, target = f"mlp_in.{layer[1]}", f"mlp_out.{layer[1]}"
    origin = Origin(
        "Gemma Scope",
        "/".join(folder.resolve().parts[-3:]),
        model=f"google/gemma-2-{release['size']}{'-it' * (release['tuned'] == 'it')}" if release else None,
        site=site,
        target=target,
    )
    return assembled(design, weights, origin)


def _second(folder: Path) -> Dictionary:
    """A dictionary of Gemma Scope 2."""
    path = folder / CONFIG_2
    config = read_json(path)
    if config.get("architecture") != "jump_relu":
        raise unknown(path, "architecture", config.get("architecture"), ("jump_relu",))
    tensors = Tensors.safetensors(folder / PARAMS_2)
    d, latents = tensors.shape("w_enc", 2)
    outputs = tensors.shape("w_dec", 2)[1]
    hook, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    transcodes, skip = out not in (None, hook), "affine_skip_connection" in tensors
    if bool(config.get("affine_connection")) != skip:
        raise SondeError(
            f"{path}: affine_connection is {config.get('affine_connection')}, but {PARAMS_2} "
            f"{'holds' if skip else 'lacks'} affine_skip_connection"
        )
    design = checked_design(
        path,
        kind="jumprelu",
        inputs=d,
        latents=latents,
        outputs=outputs,
        transcodes=transcodes,
        skip=skip,
        centred=False,
    )
    weights = {
        "w_enc": tensors.take("w_enc", (d, latents)).T,
        "w_dec": tensors.take("w_dec", (latents, outputs)),
        "b_enc": tensors.take("b_enc", (latents,)),
        "b_dec": tensors.take("b_dec", (outputs,)),
        "threshold": tensors.take("threshold", (latents,)),
        "w_skip": tensors.take("affine_skip_connection", (d, outputs)).T if skip else None,
    }
    tensors.close()
    origin = Origin(
        "Gemma Scope 2",
        "/".join(folder.resolve().parts[-2:]),
        hook=hook,
        model=config.get("model_name"),
        site=site_of(hook),
        target=site_of(out) if transcodes else None,
    )
    return assembled(design, weights, origin)


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}
    except FileNotFoundError as error:
        raise SondeError(f"{path} does not exist: the dictionary is incomplete") from error
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise SondeError(f"{path} is damaged or holds more than numbers: {error}") from error
