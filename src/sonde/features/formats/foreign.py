"""What all readers of other projects' files share: configurations and tensors that are checked as they are taken.

A reader names every tensor that it wants and the shape; what is missing, transposed, of another shape or left over is
refused with what was found and what was expected. Nothing is guessed and no pickle is executed.
"""

import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.design import Design


def read_json(path: Path) -> dict[str, Any]:
    """A configuration. Raises `SondeError` where it is missing, damaged or no mapping."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SondeError(f"{path} does not exist: a dictionary in this format needs it") from error
    except (OSError, ValueError) as error:
        raise SondeError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SondeError(f"{path} holds a {type(config).__name__}: expected a mapping of settings")
    return config


def setting(config: Mapping[str, Any], path: Path, *names: str) -> Any:
    """The first of `names` that a configuration has. Raises `SondeError` where it has none."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise SondeError(f"{path} has no {' or '.join(names)}: it has {', '.join(sorted(config)) or 'nothing'}")


class Tensors:
    """The tensors of a file, taken one by one in float32."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._all = dict(tensors)
        self._taken: set[str] = set()

    @classmethod
    def safetensors(cls, path: Path) -> "Tensors":
        """Tensors of a safetensors file. Raises `SondeError` where it is missing or damaged."""
        try:
            return cls(path, load_file(path))
        except FileNotFoundError as error:
            raise SondeError(f"{path} does not exist: the dictionary is incomplete") from error
        except (OSError, SafetensorError) as error:
            raise SondeError(f"{path} is damaged: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises `SondeError` where it is missing or has another number of axes."""
        shape = tuple(self._tensor(name, None).shape)
        if len(shape) != axes:
            raise SondeError(f"{self.path}: {name} has the shape {shape}, expected {axes} axes")
        return shape

    def take(self, name: str, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """A tensor of a known shape. Raises `SondeError` where it is missing, transposed or of another shape."""
        tensor = self._tensor(name, shape)
        found = tuple(tensor.shape)
        if found != shape:
            turned = ", which is its transpose" if len(shape) == 2 and found == shape[::-1] else ""
            raise SondeError(f"{self.path}: {name} has the shape {found}, expected {shape}{turned}")
        self._taken.add(name)
        tensor = tensor.detach().float().contiguous()
        if not bool(tensor.isfinite().all()):
            raise SondeError(f"{self.path}: {name} holds nan or infinity")
        return tensor

    def close(self, ignored: Collection[str] = ()) -> None:
        """Refuse tensors that nobody took, apart from `ignored`: without them the dictionary would be another one."""
        left = sorted(set(self._all) - self._taken - set(ignored))
        if left:
            raise SondeError(
                f"{self.path} also holds {self._listed(left)}, which this format does not explain: expected only "
                f"{', '.join(sorted(self._taken))}"
            )

    def _tensor(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        if name not in self._all:
            wanted = f"{name} {shape}" if shape else name
            raise SondeError(f"{self.path} lacks {wanted}: it holds {self._listed(sorted(self._all)) or 'nothing'}")
        return self._all[name]

    def _listed(self, names: Collection[str]) -> str:
        return ", ".join(f"{name} {tuple(self._all[name].shape)}" for name in names)


def read_pickled(path: Path) -> dict[str, Any]:
    """A state dict that torch pickled, opened with `weights_only`, which runs no code.

    Raises `SondeError` where it is missing, damaged or holds more than weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SondeError(f"{path} does not exist: the dictionary is incomplete") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise SondeError(f"{path} is damaged or holds more than weights: {lines[0][:200]}") from error
    if not isinstance(state, dict):
        raise SondeError(f"{path} holds a {type(state).__name__}: expected a state dict")
    return state


def unknown(path: Path, what: str, found: Any, expected: Collection[str]) -> SondeError:
    """The error for an activation or architecture that no reader knows: nothing is read as a ReLU instead."""
    return SondeError(f"{path}: {what} is {found!r}, expected one of {', '.join(expected)}")


def checked_design(path: Path, **fields: Any) -> Design:
    """A design from a configuration. Raises `SondeError` that begins with `path` for a field that does not fit."""
    try:
        return Design(**fields)
    except ValueError as error:
        raise SondeError(f"{path}: {error}") from error
