"""Where text comes from: what a user can name, turned into an iterator of documents.

A source is nothing at all (the `help()` topics of Python), strings, a plain file (.txt, .jsonl, .json, .parquet), a
folder of these, a folder that `datasets.save_to_disk` wrote, a data set in memory, or one of the Hugging Face hub, read
as a stream. A name may carry a split and a column, `NAME[:SPLIT[:COLUMN]]`: `stas/openwebtext-10k:train`,
`reviews.jsonl::body`. Documents come lazily and in a fixed order (files by path); those of white space alone are left
out.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sonde.data.python_docs import topics
from sonde.errors import SondeError

PLAIN = (".txt", ".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class _Named:
    """A source that was given by name."""

    name: str
    path: Path | None  # None: on the hub
    split: str | None
    column: str


def documents(source: Any = None, *, column: str = "text", limit_chars: int | None = None) -> Iterator[str]:
    """Yield the documents of `source`, one string each.

    `column` is the field that holds the text where documents have fields; a column in the name goes before it.
    `limit_chars` ends the text after that many characters, within a document if need be.

    A missing or unreadable path raises `SondeError` at once; what is wrong inside a file, when it is reached (with its
    line or byte).
    """
    if limit_chars is not None and limit_chars < 1:
        raise SondeError(f"limit_chars is {limit_chars}; give 1 or more, or none for all of the text")
    if source is None:
        found: Iterable[str] = topics()
    elif isinstance(source, str | Path):
        found = _read_named(_resolve(str(source), column), limit_chars)
    else:
        found = _read_given(source, column)
    return _present(found, str(source) if isinstance(source, str | Path) else describe(source), limit_chars)


def describe(source: Any = None) -> str:
    """What to call `source` in a report: "pydoc topics", "emma.txt", "owner/name (train)", "12 given texts"."""
    if source is None:
        return "pydoc topics"
    if isinstance(source, str | Path):
        named = _split_name(str(source), "text")
        name = named.path.resolve().name if named.path else named.name
        return f"{name} ({named.split})" if named.split else name
    if isinstance(source, Sized) and not isinstance(source, Mapping):
        return f"{len(source)} given text{'' if len(source) == 1 else 's'}"
    return "given texts"


def text_hash(texts: Iterable[str]) -> str:
    """SHA-256 (hex) of the documents in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _present(found: Iterable[str], name: str, limit_chars: int | None) -> Iterator[str]:
    left, empty = limit_chars, True
    for text in found:
        if not text.strip():
            continue
        if left is not None:
            text = text[:left]
            left -= len(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SondeError(
                f"a document of {name} holds half a surrogate pair (character {error.start}), which is no text: "
                "repair or leave out the document"
            ) from error
        empty = False
        yield text
        if left == 0:
            return
    if empty:
        raise SondeError(f"{name}: no text, the source is empty or holds white space alone")


def _split_name(text: str, column: str) -> _Named:
    """Path, split and column of a name; a path that exists as it stands wins over any other reading."""
    name, split, named_column = text, None, None
    if not _exists(Path(text).expanduser()):
        name, *rest = text.split(":", 2)
        split = rest[0] if rest else None
        named_column = rest[1] if len(rest) > 1 else None
    path: Path | None = Path(name).expanduser()
    local = _exists(path) or path.suffix in PLAIN or _exists(Path(*path.parts[:1]))
    if not local and _HUB_NAME.fullmatch(name):
        path = None
    return _Named(name, path, split or None, named_column or column)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return True
    except OSError:  # too long a name, say
        return False


def _resolve(text: str, column: str) -> _Named:
    if not text.strip():
        raise SondeError("the text source is an empty name; give a file, a folder or a data set")
    if "\n" in text or len(text) > 1000:
        raise SondeError("a single string names a file or data set; to read the words of a string give them in a list")
    named = _split_name(text, column)
    path = named.path
    if path is None:
        return named
    try:
        if not path.exists():
            raise SondeError(
                f"{named.name} does not exist: give a file ({', '.join(PLAIN)}), a folder of these, a folder made by "
                "save_to_disk, or a data set as owner/name (literal text goes in a list)"
            )
        if path.is_dir():
            next(path.iterdir(), None)
        elif path.is_file():
            path.open("rb").close()
    except OSError as error:
        raise SondeError(f"{named.name} cannot be read: {error.strerror or error}") from error
    if named.split and not _is_saved_data_set(path):
        raise SondeError(f"{path} has no splits ({named.split!r} was asked for): name a column as {path}::COLUMN")
    return named


def _is_saved_data_set(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _read_named(named: _Named, limit_chars: int | None) -> Iterator[str]:
    path = named.path
    if path is None:
        return _read_hub(named)
    if _is_saved_data_set(path):
        return _read_saved(named, path)
    if not path.is_dir():
        return _read_file(path, named.column, limit_chars)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in PLAIN
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise SondeError(f"folder {path} holds no text: expected files that end in {', '.join(PLAIN)}")
    return (text for file in files for text in _read_file(file, named.column, limit_chars))


def _read_file(path: Path, column: str, limit_chars: int | None) -> Iterator[str]:
    try:
        match path.suffix.lower():
            case ".jsonl":
                yield from _read_json_lines(path, column)
            case ".json":
                yield from _read_json(path, column)
            case ".parquet":
                yield from _read_parquet(path, column)
            case _:
                # four bytes hold any character, three more a byte order mark
                yield _decoded(path, None if limit_chars is None else 4 * limit_chars + 3)
    except OSError as error:
        raise SondeError(f"{path} cannot be read: {error.strerror or error}") from error


def _decoded(path: Path, limit_bytes: int | None = None) -> str:
    with path.open("rb") as file:
        data = file.read(-1 if limit_bytes is None else limit_bytes)
    whole = limit_bytes is None or len(data) < limit_bytes
    skipped = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[skipped:], whole)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, skipped + error.start, error) from error
    if "\0" in text:
        raise SondeError(f"{path} holds zero bytes, which are no text: is it binary, or UTF-16? Convert it to UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> SondeError:
    byte = error.object[error.start]
    return SondeError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset:,}; convert the file to UTF-8")


def _read_json_lines(path: Path, column: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            try:
                text = line[skipped:].decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + skipped + error.start, error) from error
            offset += len(line)
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise SondeError(f"{where} is not JSON: {error.msg} (column {error.colno})") from error
            except (ValueError, RecursionError) as error:
                raise SondeError(f"{where} is not JSON that can be read: {error}") from error
            yield _text_of(row, column, where)


def _read_json(path: Path, column: str) -> Iterator[str]:
    text = _decoded(path)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value a line, whatever the file is called
            yield from _read_json_lines(path, column)
            return
        raise SondeError(f"{path}, line {error.lineno} is not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise SondeError(f"{path} is not JSON that can be read: {error}") from error
    if isinstance(value, Mapping) and isinstance(value.get(column), list):
        value = value[column]
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield _text_of(row, column, f"{path}, entry {number}")


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _no_column(str(path), column, names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _text_of({column: value}, column, str(path))
    except pa.ArrowInvalid as error:
        raise SondeError(f"{path} is damaged or not a parquet file: {str(error).splitlines()[0]}") from error


def _read_saved(named: _Named, path: Path) -> Iterator[str]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise SondeError(f"{path} is a damaged data set: {_first_line(error)}") from error
    if isinstance(found, Mapping):
        found = _one_split(found, named)
    elif named.split:
        raise SondeError(f"{path} has no splits ({named.split!r} was asked for): name a column as {path}::COLUMN")
    return _read_given(found, named.column, named.name)


def _read_hub(named: _Named) -> Iterator[str]:
    import datasets

    owner, name, *config = named.name.split("/")
    try:
        found = datasets.load_dataset(
            f"{owner}/{name}", config[0] if config else None, split=named.split or "train", streaming=True
        )
    except Exception as error:  # whatever the hub, the network or the data set's builder has to say
        raise SondeError(
            f"{named.name} is no file or folder here, and as a Hugging Face data set it cannot be read: "
            f"{_first_line(error)}"
        ) from error
    return _read_given(found, named.column, named.name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _one_split(splits: Mapping[Any, Any], named: _Named) -> Any:
    wanted = named.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if wanted not in splits:
        raise SondeError(
            f"{named.name} has no split {wanted!r}; it has {', '.join(splits)}: name one as {named.name}:SPLIT"
        )
    return splits[wanted]


def _read_given(source: Any, column: str, name: str = "the data set") -> Iterator[str]:
    """Strings or rows from memory. A data set that knows its columns is read in that column alone."""
    if isinstance(source, Mapping) and source and hasattr(next(iter(source.values())), "column_names"):
        source = _one_split(source, _Named(name, None, None, column))
    if isinstance(source, bytes | Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"text is an iterable of strings, a path or the name of a data set, not {type(source).__name__}"
        )
    rows: Any = source
    columns = getattr(rows, "column_names", None)
    if columns is not None:
        if column not in columns:
            raise _no_column(name, column, columns)
        rows = rows.select_columns([column])
    where = name if columns is not None else "the given texts"
    return (_text_of(row, column, f"{where}, entry {number}") for number, row in enumerate(rows, 1))


def _text_of(row: Any, column: str, where: str) -> str:
    if isinstance(row, Mapping):
        if column not in row:
            raise _no_column(where, column, list(row))
        row, where = row[column], f"{where}, column {column!r}"
        if row is None:  # a missing value is an empty document
            return ""
    if not isinstance(row, str):
        raise SondeError(f"{where}: expected a string, found {type(row).__name__}")
    return row


def _no_column(where: str, column: str, columns: list[str]) -> SondeError:
    has = ", ".join(map(str, columns)) or "none"
    return SondeError(f"{where} has no column {column!r}; its columns are {has}: name one as SOURCE:SPLIT:COLUMN")
