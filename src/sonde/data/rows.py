"""Rows with named fields from a .csv, .json or .jsonl file, each with what to call it when something is wrong with it.

A CSV has a header and its values are strings; .json holds a list, .jsonl a value on every line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sonde.errors import SondeError

SUFFIXES = (".json", ".jsonl", ".csv")


def read_rows(path: str | Path, *, of: str = "rows") -> Iterator[tuple[str, Any]]:
    """The rows of a file in order, as (where, row); `of` says in errors what they are rows of, such as "questions".

    Raises `SondeError` for another suffix, a file that is missing, not UTF-8 or not what its suffix says; naming the
    line where there is one.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise SondeError(f"{path} is not a file of {of}: expected one that ends in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SondeError(f"{path} does not exist: give a file of {of} ({', '.join(SUFFIXES)})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SondeError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        return
    match path.suffix.lower():
        case ".csv":
            import io

            import polars as pl

            try:
                frame = pl.read_csv(io.StringIO(text), infer_schema=False)
            except pl.exceptions.PolarsError as error:
                raise SondeError(f"{path} is not a CSV with a header: {str(error).splitlines()[0]}") from error
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(frame.iter_rows(named=True), 1))
        case ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield f"{path}, line {number}", parsed(line, f"{path}, line {number}")
        case _:
            value = parsed(text, str(path))
            if not isinstance(value, list):
                raise SondeError(f"{path} holds {type(value).__name__}: expected a list of {of}")
            yield from ((f"{path}, entry {number}", row) for number, row in enumerate(value, 1))


def parsed(text: str, where: str) -> Any:
    """A JSON value. Raises `SondeError` that begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SondeError(f"{where} is not JSON: {error}") from error
