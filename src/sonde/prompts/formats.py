"""Soft prompts on disk: Sonde's own folder, and PEFT's prompt tuning.

Own: `prompt.safetensors` (`vectors` (n, width)) and `prompt.json` (position, model and its hash, how it was trained).
PEFT: `adapter_config.json` with `peft_type` PROMPT_TUNING and `adapter_model.safetensors` with `prompt_embeddings`
(n, width); its prompts stand before the text, and it does not say which weights they belong to.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import replacing, write_json
from sonde.lm.model import LanguageModel
from sonde.prompts.soft_prompt import SoftPrompt, width

FORMAT = "sonde soft prompt 1"
GENERATOR = "sonde conditional prompt 1"
_CONFIG, _WEIGHTS = "prompt.json", "prompt.safetensors"
_PEFT_CONFIG, _PEFT_WEIGHTS, _PEFT_NAME = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def save(prompt: SoftPrompt, folder: str | Path, lm: LanguageModel) -> None:
    """Write a prompt for `lm`: the vectors first, then the configuration that makes them readable."""
    prompt.fits(lm)
    folder = Path(folder)
    _write(folder / _WEIGHTS, "vectors", prompt.vectors)
    config = {
        "format": FORMAT,
        "position": prompt.position,
        "n": len(prompt),
        "width": width(lm),
        "model": lm.name,
        "model_hash": lm.hash,
        "facts": prompt.facts,
    }
    write_json(folder / _CONFIG, config)


def load(folder: str | Path, lm: LanguageModel, *, force: bool = False) -> SoftPrompt:
    """Read a prompt of either format for `lm`; see `SoftPrompt.load`."""
    folder = Path(folder)
    if (folder / _PEFT_CONFIG).exists() and not (folder / _CONFIG).exists():
        return _load_peft(folder, lm)
    config = _json(folder / _CONFIG)
    if config.get("format") != FORMAT:
        raise SondeError(f"{folder / _CONFIG} is not the configuration of a soft prompt, neither Sonde's nor PEFT's")
    vectors = _tensor(folder / _WEIGHTS, "vectors")
    _belongs(folder, config, lm, vectors.shape[-1], force=force)
    if not {"position", "facts"} <= set(config):
        raise SondeError(f"{folder / _CONFIG} lacks position or facts: it was not written by Sonde, or was changed")
    return SoftPrompt(vectors.to(lm.device), config["position"], config["facts"])


def save_generator(tensors: dict[str, Tensor], layout: dict[str, Any], folder: str | Path, lm: LanguageModel) -> None:
    """Write the weights of a conditional prompt and what they are."""
    folder = Path(folder)
    with replacing(folder / _WEIGHTS) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
    config = {"format": GENERATOR, "layout": layout, "width": width(lm), "model": lm.name, "model_hash": lm.hash}
    write_json(folder / _CONFIG, config)


def load_generator(
    folder: str | Path, lm: LanguageModel, *, force: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layout and weights of a conditional prompt for `lm`."""
    folder = Path(folder)
    config = _json(folder / _CONFIG)
    if config.get("format") != GENERATOR:
        raise SondeError(f"{folder / _CONFIG} is not the configuration of a conditional prompt")
    _belongs(folder, config, lm, config.get("width"), force=force)
    return config["layout"], _tensors(folder / _WEIGHTS)


def save_peft(prompt: SoftPrompt, folder: str | Path, lm: LanguageModel) -> None:
    """Write a prompt as PEFT's prompt tuning, which `PeftModel.from_pretrained` reads.

    Raises `SondeError` for positions that PEFT does not have: all but "prefix".
    """
    prompt.fits(lm)
    if prompt.position not in ("prefix", 0):
        raise SondeError(f"PEFT puts prompts before the text; this one goes to {prompt.position!r}")
    config = lm.config
    layout = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "inference_mode": True,
        "num_virtual_tokens": len(prompt),
        "token_dim": width(lm),
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": lm.n_layers,
        "prompt_tuning_init": "RANDOM",
    }
    folder = Path(folder)
    _write(folder / _PEFT_WEIGHTS, _PEFT_NAME, prompt.vectors)
    write_json(folder / _PEFT_CONFIG, layout)


def _load_peft(folder: Path, lm: LanguageModel) -> SoftPrompt:
    config = _json(folder / _PEFT_CONFIG)
    if config.get("peft_type") != "PROMPT_TUNING":
        raise SondeError(f"{folder} holds PEFT's {config.get('peft_type')}; only PROMPT_TUNING is a soft prompt")
    vectors = _tensor(folder / _PEFT_WEIGHTS, _PEFT_NAME)
    config |= {"model": config.get("base_model_name_or_path"), "model_hash": None}
    _belongs(folder, config, lm, vectors.shape[-1])
    return SoftPrompt(vectors.to(lm.device), "prefix", {"format": "PEFT"})


def _belongs(folder: Path, config: dict[str, Any], lm: LanguageModel, found: Any, *, force: bool = False) -> None:
    """Refuse what was trained for another width, or for other weights; PEFT does not say for which."""
    name, stored = config.get("model"), config.get("model_hash")
    hashes = f"hash {stored[:12] if stored else 'unknown'}, that of {lm.name} is {lm.hash[:12]}"
    if found != width(lm):
        raise SondeError(
            f"{folder} has width {found}, {lm.name} wants {width(lm)}: it was trained for {name} ({hashes})"
        )
    if stored and stored != lm.hash and not force:
        raise SondeError(
            f"{folder} was trained for other weights: {name} ({hashes}); give force=True to try it on these"
        )


def _write(path: Path, name: str, vectors: Tensor) -> None:
    with replacing(path) as beside:
        save_file({name: vectors.detach().float().cpu().contiguous()}, beside)


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SondeError(f"{path.parent} has no {path.name}: there is no soft prompt in it") from error
    except (OSError, ValueError) as error:
        raise SondeError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise SondeError(f"{path} is not the configuration of a soft prompt")
    return config


def _tensor(path: Path, name: str) -> Tensor:
    tensors = _tensors(path)
    if name not in tensors:
        raise SondeError(f"{path} holds no {name}")
    return tensors[name].float()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise SondeError(f"{path.parent} has no {path.name}: the prompt is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise SondeError(f"{path} is damaged: {error}") from error
