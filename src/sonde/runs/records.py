"""Logs that grow line by line and stay readable: JSON records or plain text, one line each, appended with one write.

A process that is killed leaves at most one truncated line, the last; `repair` cuts it off before a run goes on, and
`read` ignores it while the run is live. A full disk leaves the log as it was before the line.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sonde.errors import SondeError


def append_text(path: Path, line: str) -> None:
    """Append one line of text; line breaks in it are kept as indented lines. Raises `SondeError` on a full disk."""
    _append(path, line.rstrip().replace("\n", "\n    "))


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record. A number that is not finite becomes null and `reason` says what it was.

    Values are strings, numbers, booleans, None or scalars of torch and numpy. Raises `TypeError` for others and
    `SondeError` on a full disk.
    """
    plain = {name: _plain(name, value) for name, value in record.items()}
    gaps = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    if gaps:
        reason = ", ".join(f"{name} is {plain[name]}" for name in gaps)
        plain |= dict.fromkeys(gaps) | {"reason": reason}
    _append(path, json.dumps(plain, ensure_ascii=False, allow_nan=False))


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that is still being written; empty when there is no such file.

    Raises `SondeError` that names the line when one is damaged.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines[: _whole(lines)], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise SondeError(f"{path}: line {number} is damaged: remove it to go on") from error
    return found


def repair(path: Path) -> None:
    """Cut off what a killed process left unfinished at the end of a log of records or of text (`.txt`)."""
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().split(b"\n")
        whole = len(lines) - 1 if path.suffix == ".txt" else _whole(lines)
        size = sum(len(line) + 1 for line in lines[:whole])
        if size < path.stat().st_size:
            os.truncate(path, size)


def _whole(lines: list[bytes]) -> int:
    """How many of the lines are whole; what follows the last line break is not."""
    for count in range(len(lines) - 1, 0, -1):
        with contextlib.suppress(ValueError):
            json.loads(lines[count - 1])
            return count
    return 0


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, but a line of a log holds numbers, strings and None")


def _append(path: Path, line: str) -> None:
    data = line.encode("utf-8", errors="backslashreplace") + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SondeError(f"cannot write {path}: {error.strerror}") from error
    try:
        before = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    except OSError as error:
        raise SondeError(f"cannot write {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
