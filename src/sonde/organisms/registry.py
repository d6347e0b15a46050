"""The catalogue of organisms and where their bundled weights lie.

An organism is a recipe, a function of one dataclass that writes a Hugging Face folder and its card, under `@organism`.
What is small enough has that folder in the package, under `weights/NAME`; what is fine-tuned from a bundled organism
has its difference from that there in place of weights (`sonde.organisms.difference`).
"""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from sonde.catalogue import Catalogue
from sonde.errors import SondeError

PREFIX = "organism:"
DIFFERENCE = "difference.safetensors"
_WEIGHTS = ("config.json", DIFFERENCE, "history.safetensors")

Recipe = TypeVar("Recipe", bound=Callable[[Any], Path])

ORGANISMS = Catalogue("sonde.organisms", decorator="organism", noun="organism")


def organism(name: str, *, summary: str, paper: str | None = None) -> Callable[[Recipe], Recipe]:
    """Enter a recipe `config -> folder` in the catalogue. All arguments are literals; `summary` is one sentence."""

    def enter(recipe: Recipe) -> Recipe:
        ORGANISMS.register(name, recipe)
        return recipe

    return enter


def has_weights(name: str) -> bool:
    """Whether the package brings the weights of the organism. Raises `SondeError` for an unknown name."""
    folder = _weights(ORGANISMS.entry(name).name)
    return any((folder / file).is_file() for file in _WEIGHTS)


def folder_of(name: str) -> Path:
    """The bundled folder of an organism, such as `pebble`: a Hugging Face folder, or one with a difference.

    Raises `SondeError` when there is no such organism, or when its weights are not bundled and it has to be trained.
    """
    if not has_weights(name):
        raise SondeError(f"organism {name!r} has no bundled weights: make them with `sonde organism train {name}`")
    return _weights(name)


def _weights(name: str) -> Path:
    return Path(str(resources.files("sonde.organisms"))) / "weights" / name
