"""A dictionary from a folder or file of any format that is known, by what lies in it.

`load_dictionary(path)` reads one, `load_dictionaries(path)` all that lie in the folders of a run, by their hookpoints.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sonde.errors import SondeError
from sonde.features import dictionary_files
from sonde.features.dictionary import Dictionary
from sonde.features.formats import dictionary_learning, gemma_scope, llama_scope, openai, saelens, sparsify

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel

_MARKS = {
    "sonde": (dictionary_files.WEIGHTS,),
    "sparsify": (sparsify.WEIGHTS,),
    "saelens": (saelens.WEIGHTS,),
    "gemma_scope": (gemma_scope.PARAMS, gemma_scope.PARAMS_2),
    "llama_scope": (llama_scope.CONFIG,),
    "dictionary_learning": (dictionary_learning.WEIGHTS,),
}
FORMATS = (*_MARKS, "openai")
_PICKLES = (".pt", ".pth")


def load_dictionary(
    path: str | Path,
    format: str | None = None,
    *,
    input_scale: float | None = None,
    lm: "LanguageModel | None" = None,
) -> Dictionary:
    """Read the dictionary in a folder (or of OpenAI's, a file).

    Args:
        path: where it lies.
        format: one of `FORMATS`; by default what the files say.
        input_scale: for a SAELens file whose input was scaled by a factor that the file does not have.
        lm: the model that it will be used on: a warning says so where it was made for another one.

    Raises:
        SondeError: for a path without a dictionary, and for files that are missing, damaged or not what their format
            says: missing and unexplained tensors, other shapes, unknown activations.

    """
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path], Dictionary]] = {
        "sonde": Dictionary.load,
        "sparsify": sparsify.load,
        "saelens": lambda folder: saelens.load(folder, input_scale=input_scale),
        "gemma_scope": gemma_scope.load,
        "llama_scope": llama_scope.load,
        "dictionary_learning": dictionary_learning.load,
        "openai": openai.load,
    }
    found = format or detected(path)
    if found not in readers:
        raise SondeError(f"format {found!r} is not known: use one of {', '.join(FORMATS)}")
    dictionary = readers[found](path)
    if lm is not None:
        from sonde.features.recorded import warn_of_another_model

        warn_of_another_model(dictionary, lm)
    return dictionary


def load_dictionaries(path: str | Path) -> dict[str, Dictionary]:
    """All dictionaries in the folders below `path`, by the folder's path from there (a hookpoint, in sparsify's runs).

    Raises `SondeError` where there are none, and for one that cannot be read.
    """
    root = Path(path).expanduser()
    marks = {mark.split("/")[0] for names in _MARKS.values() for mark in names}
    folders = sorted({file.parent for mark in marks for file in root.rglob(mark)}, key=_natural)
    if not folders:
        raise SondeError(f"{root} holds no dictionary in any folder: expected one of {', '.join(sorted(marks))}")
    return {folder.relative_to(root).as_posix(): load_dictionary(folder) for folder in folders}


def detected(path: Path) -> str:
    """The format of a folder or file. Raises `SondeError` where it is none, saying what is there."""
    if path.is_file():
        if path.suffix in _PICKLES and path.name != dictionary_learning.WEIGHTS:
            return "openai"
        raise SondeError(f"{path} is a file: give the folder that it lies in, or a {' or '.join(_PICKLES)} of OpenAI's")
    if not path.is_dir():
        raise SondeError(f"{path} does not exist: give the folder of a dictionary")
    for name, marks in _MARKS.items():
        if any((path / mark).is_file() for mark in marks):
            return name
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
    wanted = ", ".join(mark for marks in _MARKS.values() for mark in marks)
    raise SondeError(f"{path} holds no dictionary: found {there}; expected one of {wanted}")


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Order in which layer 10 comes after layer 9."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
