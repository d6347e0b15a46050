"""Files that appear whole or not at all, and state that is saved without pickle.

A file is written beside its place, flushed to the disk and renamed; a killed process leaves the old file or the new
one. A bundle is any tree of dicts, lists, numbers, strings and tensors (optimiser states, running moments) in one
safetensors file: the tensors as tensors, the tree as JSON in the header.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sonde.errors import SondeError

_TREE = "tree"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to, in the same folder; on success it replaces `path`, on any error it is removed.

    Raises `SondeError` when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise SondeError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinities are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def save_bundle(path: str | Path, tree: Any) -> None:
    """Save a tree of dicts, lists, tuples, numbers, strings, None and tensors. Tuples come back as lists.

    Raises `TypeError` for anything else in the tree.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(tree, tensors)
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={_TREE: json.dumps(packed)})


def load_bundle(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Load what `save_bundle` wrote. Raises `SondeError` when the file is missing, damaged or not a bundle."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tree = (file.metadata() or {}).get(_TREE)
            if tree is None:
                raise SondeError(f"{path} is a safetensors file but was not saved by Sonde")
            return _unpack(json.loads(tree), file)
    except FileNotFoundError as error:
        raise SondeError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SondeError(f"{path} is damaged or not a safetensors file: {error}") from error


def _pack(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = node.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(node, dict):
        return {"dict": [[key, _pack(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [_pack(value, tensors) for value in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a bundle holds dicts, lists, numbers, strings and tensors, not {type(node).__name__}")


def _unpack(node: Any, file: Any) -> Any:
    if isinstance(node, list):
        return [_unpack(value, file) for value in node]
    if isinstance(node, dict):
        if "tensor" in node:
            return file.get_tensor(node["tensor"])
        return {key: _unpack(value, file) for key, value in node["dict"]}
    return node
