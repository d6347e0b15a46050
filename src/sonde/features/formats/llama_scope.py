"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, TopK turned to JumpReLU with one threshold.

The input was scaled by s = √d / `dataset_average_activation_norm` and the output likewise. The published code runs on
activations as they are with W_enc, b_enc / s, W_dec (s_in / s_out) and b_dec / s_out, makes decoder rows length 1
(where `sparsity_include_decoder_norm`) and only then compares with `jump_relu_threshold`. That is what is read here;
SAELens has the same latents times s.
"""

import math
from pathlib import Path

import torch

from sonde.features.dictionary import Dictionary
from sonde.features.formats.assembly import Origin, assembled, by_norm
from sonde.features.formats.foreign import Tensors, checked_design, read_json, setting, unknown
from sonde.features.formats.hooks import site_of

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_MODEL = "meta-llama/Llama-3.1-8B"


def load(folder: Path) -> Dictionary:
    """Read a dictionary.

    Raises `SondeError` for files that are missing, damaged or not what the format says.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise unknown(path, "act_fn", config["act_fn"], ("jumprelu",))
    d, latents = int(setting(config, path, "d_model")), int(setting(config, path, "d_sae"))
    threshold = float(setting(config, path, "jump_relu_threshold"))
    hook, out = setting(config, path, "hook_point_in"), config.get("hook_point_out")
    scale_in, scale_out = 1.0, 1.0
    norm = config.get("norm_activation", "dataset-wise")
    if norm == "dataset-wise":
        norms = setting(config, path, "dataset_average_activation_norm")
        scale_in, scale_out = (math.sqrt(d) / float(setting(norms, path, side)) for side in ("in", "out"))
    elif norm not in ("inference", "no-norm"):
        raise unknown(path, "norm_activation", norm, ("dataset-wise", "inference", "no-norm"))
    transcodes = out not in (None, hook)
    design = checked_design(
        path,
        kind="jumprelu",
        inputs=d,
        latents=latents,
        transcodes=transcodes,
        centred=bool(config.get("apply_decoder_bias_to_pre_encoder")) and not transcodes,
    )
    tensors = Tensors.safetensors(folder / WEIGHTS)
    weights = {
        "w_enc": tensors.take("encoder.weight", (latents, d)),
        "b_enc": tensors.take("encoder.bias", (latents,)) / scale_in,
        "w_dec": tensors.take("decoder.weight", (d, latents)).T * (scale_in / scale_out),
        "b_dec": tensors.take("decoder.bias", (d,)) / scale_out,
        "threshold": torch.tensor(threshold),
    }
    tensors.close()
    if config.get("sparsity_include_decoder_norm", True):
        weights = by_norm(weights)
    origin = Origin(
        "Llama Scope",
        folder.name,
        hook=hook,
        model=_MODEL,
        site=site_of(hook),
        target=site_of(out) if transcodes else None,
    )
    return assembled(design, weights, origin)
