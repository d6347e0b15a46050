"""May this process write to the run folder? One process at a time: an exclusive `flock` on the file `.lock` in it.

The operating system releases the lock when the process ends, however it ends, so there is nothing stale to clean up.
The file stays and holds the process id for the message to others; it is the lock and not the file that counts.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from sonde.errors import SondeError

NAME = ".lock"
# `holder` takes the lock for a moment to look; whoever meets it there tries again.
_TRIES, _PAUSE = 4, 0.05


class Lock:
    """The exclusive right to write to `folder`, held until `release` or the end of the process.

    Raises `SondeError` that names the holding process, or when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise SondeError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            self._take(folder)
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            self._file.close()
            raise SondeError(f"cannot lock {folder}: {error.strerror}") from error
        except SondeError:
            self._file.close()
            raise

    def _take(self, folder: Path) -> None:
        for attempt in range(_TRIES):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if attempt + 1 < _TRIES:
                    time.sleep(_PAUSE)
        raise SondeError(
            f"{folder} is in use by process {_pid(folder / NAME) or 'unknown'}: wait until it ends, "
            "or choose another folder"
        )

    def release(self) -> None:
        """Let others write."""
        self._file.close()


def holder(folder: str | Path) -> int | None:
    """The id of the process that is writing to `folder`, or None; 0 when it is not known."""
    path = Path(folder) / NAME
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _pid(path)
    except OSError:
        return None
    return None


def _pid(path: Path) -> int:
    text = path.read_text(encoding="ascii", errors="replace")
    return int(text) if text.isdigit() else 0
