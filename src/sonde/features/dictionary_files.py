"""Dictionaries on disk: `config.json` (design, sites, model, facts) and `dictionary.safetensors` (weights by name)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.files import replacing, write_json

FORMAT = "sonde dictionary 1"
CONFIG, WEIGHTS = "config.json", "dictionary.safetensors"
_RECORDED = ("site", "target", "model", "model_hash", "tokenizer_hash", "facts")


def save(dictionary: Dictionary, folder: str | Path) -> None:
    """Write a dictionary to `folder`: the weights first, then the configuration that makes it readable."""
    folder = Path(folder)
    with replacing(folder / WEIGHTS) as beside:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in dictionary.state_dict().items()}
        save_file(state, beside)
    recorded = {name: getattr(dictionary, name) for name in _RECORDED}
    write_json(folder / CONFIG, {"format": FORMAT, "design": dictionary.design.to_json(), **recorded})


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> Dictionary:
    """Read what `save` wrote. Raises `SondeError` for a folder that is incomplete, damaged or of another format."""
    folder = Path(folder)
    config = _config(folder / CONFIG)
    try:
        dictionary = Dictionary(Design.from_json(config["design"]), device=device)
        for name in _RECORDED:
            setattr(dictionary, name, config[name])
    except (KeyError, TypeError, ValueError) as error:
        raise SondeError(f"{folder / CONFIG} does not describe a dictionary: {error}") from error
    try:
        state = load_file(folder / WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise SondeError(f"{folder} has no {WEIGHTS}: the dictionary is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise SondeError(f"{folder / WEIGHTS} is damaged: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in dictionary.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        wrong = {name: found.get(name, "nothing") for name in wanted if found.get(name) != wanted[name]}
        wrong |= {name: shape for name, shape in found.items() if name not in wanted}
        raise SondeError(f"{folder / WEIGHTS} holds {wrong}, where the design has {wanted}")
    dictionary.to(state["w_enc"].dtype)
    dictionary.load_state_dict(state)
    return dictionary


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SondeError(f"{path} does not exist: this is no dictionary") from error
    except (OSError, ValueError) as error:
        raise SondeError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SondeError(f"{path} is not the configuration of a dictionary that Sonde saved")
    return config
