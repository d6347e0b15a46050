"""Lenses on disk: Sonde's own folder, and the one in which tuned lenses are published.

Own: `config.json` (kind, sites, width, model, hash of its unembedding, how it was trained) and
`translators.safetensors` (`weight` (layers, d, d), `bias` (layers, d)). Published (the `tuned-lens` package):
`config.json` and `params.pt`, a pickled state dict with `i.weight` and `i.bias`, which is opened with `weights_only`
and so runs no code.
"""

import hashlib
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import replacing, write_json
from sonde.lens.tuned import TunedLens

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel

FORMAT = "sonde lens 1"
_CONFIG, _OWN, _PUBLISHED = "config.json", "translators.safetensors", "params.pt"


def save(lens: TunedLens, folder: str | Path) -> None:
    """Write a lens to `folder`: the weights first, then the configuration that makes it readable."""
    folder = Path(folder)
    with replacing(folder / _OWN) as beside:
        save_file({name: p.detach().cpu().contiguous() for name, p in lens.named_parameters()}, beside)
    config = {
        "format": FORMAT,
        "kind": lens.kind,
        "sites": list(lens.sites),
        "d_model": lens.d_model,
        "model": lens.model_name,
        "unembedding_hash": lens.unembedding.hash,
        "facts": lens.facts,
    }
    write_json(folder / _CONFIG, config)


def load(folder: str | Path, lm: "LanguageModel", *, force: bool = False) -> TunedLens:
    """Read a lens of either format for `lm`; see `TunedLens.load`."""
    folder = Path(folder)
    config = _config(folder)
    if config.get("format") == FORMAT:
        return _load_own(folder, config, lm, force)
    if "num_hidden_layers" in config and "d_model" in config:
        return _load_published(folder, config, lm, force)
    raise SondeError(f"{folder / _CONFIG} is not the configuration of a lens, neither Sonde's nor the published one")


def _load_own(folder: Path, config: dict[str, Any], lm: "LanguageModel", force: bool) -> TunedLens:
    try:
        kind, sites, d_model = config["kind"], config["sites"], config["d_model"]
        lens = TunedLens(lm.unembedding, sites, d_model, kind=kind, model_name=config["model"], device=lm.device)
        facts, stored = config["facts"], config["unembedding_hash"]
    except KeyError as error:
        raise SondeError(f"{folder / _CONFIG} lacks {error}: it was not written by Sonde, or was changed") from error
    lens.check_fits(lm, f"the lens in {folder}")
    if stored != lm.unembedding.hash:
        _refuse_hash(folder, config["model"], lm, force)
    try:
        tensors = load_file(folder / _OWN)
    except FileNotFoundError as error:
        raise SondeError(f"{folder} has no {_OWN}: the lens is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise SondeError(f"{folder / _OWN} is damaged: {error}") from error
    _fill(lens, tensors, folder / _OWN)
    lens.facts = facts
    return lens


def _load_published(folder: Path, config: dict[str, Any], lm: "LanguageModel", force: bool) -> TunedLens:
    layers, d_model = config["num_hidden_layers"], config["d_model"]
    name = config.get("base_model_name_or_path", "an unnamed model")
    if config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        raise SondeError(f"{folder} holds a lens of type {config['lens_type']!r}; Sonde reads linear_tuned_lens")
    if layers != lm.n_layers:
        raise SondeError(f"the lens in {folder} has {layers} layers, {lm.name} has {lm.n_layers}")
    lens = TunedLens.zeros(lm)
    if d_model != lm.d_model:
        raise SondeError(f"the lens in {folder} has width {d_model}, {lm.name} has {lm.d_model}")
    stored = config.get("unembed_hash")
    if stored is not None and stored not in published_hashes(lm.unembedding.weight):
        _refuse_hash(folder, name, lm, force)
    try:
        state = torch.load(folder / _PUBLISHED, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SondeError(f"{folder} has no {_PUBLISHED}: the lens is incomplete") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise SondeError(
            f"{folder / _PUBLISHED} is damaged or holds more than weights: {str(error).splitlines()[0][:200]}"
        ) from error
    if not isinstance(state, dict) or any(f"{i}.weight" not in state for i in range(layers)):
        raise SondeError(f"{folder / _PUBLISHED} does not hold 0.weight to {layers - 1}.weight")
    weight = torch.stack([state[f"{i}.weight"].float() for i in range(layers)])
    zero = torch.zeros(d_model)
    bias = torch.stack([state.get(f"{i}.bias", zero).float() for i in range(layers)])
    _fill(lens, {"weight": weight, "bias": bias}, folder / _PUBLISHED)
    lens.model_name = name
    lens.facts = {"family": lm.family, "published": {key: config[key] for key in sorted(config)}}
    return lens


def published_hashes(weight: Tensor) -> set[str]:
    """SHA-256 of the head's matrix in the types in which the published lenses' models may have been loaded."""
    kinds = {weight.dtype, torch.float32, torch.float16}
    parts = (weight.detach().cpu().to(kind).contiguous().flatten().view(torch.uint8).numpy() for kind in kinds)
    return {hashlib.sha256(part.tobytes()).hexdigest() for part in parts}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SondeError(f"{folder} is not the folder of a lens: it has no {_CONFIG}") from error
    except (OSError, ValueError) as error:
        raise SondeError(f"{folder / _CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SondeError(f"{folder / _CONFIG} is not the configuration of a lens")
    return config


def _refuse_hash(folder: Path, name: str, lm: "LanguageModel", force: bool) -> None:
    if not force:
        raise SondeError(
            f"the lens in {folder} was made for the unembedding of {name}, and that of {lm.name} differs: "
            "force=True loads it all the same"
        )


def _fill(lens: TunedLens, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = {name: tuple(p.shape) for name, p in lens.named_parameters()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != given:
        raise SondeError(f"{path} holds {given}, expected {wanted}")
    lens.load_state_dict(tensors)
