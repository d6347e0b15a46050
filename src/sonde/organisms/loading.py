"""`sonde.load`: one name for a folder, a model of the hub or an organism."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.errors import SondeError
from sonde.organisms.registry import DIFFERENCE, PREFIX, folder_of

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel


def load(name_or_path: str | Path, **options: Any) -> LanguageModel:
    """Load a language model, check it, and return it.

    `name_or_path` is a local folder, a hub name such as `gpt2`, or `organism:NAME` (see `sonde organism list`).
    `options` are those of `sonde.lm.load.load`: dtype, device, revision, trust_remote_code, allow_pickle, check.

    Raises `SondeError` when the organism does not exist or the model cannot be loaded.
    """
    from sonde.lm.load import load as load_model

    text = str(name_or_path)
    organism = text.startswith(PREFIX)
    folder = folder_of(text.removeprefix(PREFIX)) if organism else Path(name_or_path)
    files = ("model.safetensors", DIFFERENCE)
    if organism and not any((folder / name).is_file() for name in files):
        raise SondeError(f"{text} is no language model: `sonde organism info {folder.name}` says what it is")
    if (folder / DIFFERENCE).is_file() and not (folder / "config.json").is_file():
        from sonde.organisms.difference import load_difference

        return load_difference(folder, **{"name": text, **options})
    return load_model(folder, **{"name": text, **options}) if organism else load_model(name_or_path, **options)
