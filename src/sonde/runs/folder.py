"""Which state is a run folder in, seen from outside: may a run begin in it, may one go on, is one at work in it?"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sonde.errors import SondeError
from sonde.runs import records
from sonde.runs.lock import NAME as LOCK_FILE
from sonde.runs.lock import holder

VERSION = 1
# What a process that is killed while it starts may leave in a folder: still no run.
BEGINNINGS = (LOCK_FILE, "config.json", "environment.json")

_ENDED = {
    "finished": "is finished",
    "failed": "failed",
    "interrupted": "was interrupted",
    "running": "was killed",
}


def read_run(folder: str | Path) -> dict[str, Any]:
    """What run.json says, with the status `resumable` instead of `running` when no process holds the folder.

    Raises `SondeError` when there is no run or it is damaged.
    """
    record = read_record(Path(folder))
    if record["status"] == "running" and holder(folder) is None:
        record["status"] = "resumable"
    return record


def new_folder(root: str | Path, stem: str) -> Path:
    """The next free `root/stem-n`, not made yet. Characters of `stem` that do not belong in a file name become '-'."""
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", stem).strip("-.")[:80] or "run"
    taken = [path.name.removeprefix(f"{stem}-") for path in Path(root).glob(f"{stem}-*")]
    return Path(root) / f"{stem}-{1 + max((int(n) for n in taken if re.fullmatch(r'[0-9]+', n)), default=0)}"


def refuse_foreign(folder: Path) -> None:
    """Raise `SondeError` when the folder holds files but no run."""
    names = [path.name for path in folder.iterdir()]
    foreign = sorted(name for name in names if name not in BEGINNINGS and not re.fullmatch(r"\..*\.part", name))
    if foreign and "run.json" not in names:
        raise SondeError(f"{folder} is not empty ({foreign[0]}) and holds no run: choose another folder")


def refuse_occupied(folder: Path) -> None:
    """Raise `SondeError` when the folder holds a run, saying how it ended and how to go on with it."""
    if not (folder / "run.json").exists():
        return
    record = read_record(folder)
    resumes = record["resume_command"] and record["status"] != "finished"
    raise SondeError(
        f"{folder} already holds a run of {record['study']!r} that {_ENDED[record['status']]}: "
        + (f"go on with `{record['resume_command']}` or " if resumes else "")
        + "choose another folder"
    )


def refuse_other_config(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise `SondeError` that names the keys in which two configurations differ."""
    absent = "nothing"
    other = [
        f"{key} ({stored.get(key, absent)}, now {given.get(key, absent)})"
        for key in [*stored, *(key for key in given if key not in stored)]
        if stored.get(key, absent) != given.get(key, absent)
    ]
    if other:
        raise SondeError(
            f"{folder} was started with other options: {', '.join(other)}; give the same ones or choose another folder"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises `SondeError` when there is none or it is damaged."""
    if not (folder / "run.json").exists():
        raise SondeError(f"{folder} holds no run: there is no run.json in it")
    record = read_json(folder / "run.json")
    version = record.get("version")
    if version != VERSION:
        raise SondeError(f"{folder}/run.json has version {version}, this sonde reads {VERSION}: use the newer sonde")
    return record


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises `SondeError` when it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SondeError(f"{path} is missing or damaged ({error}): start the run again in another folder") from error
    if not isinstance(found, dict):
        raise SondeError(f"{path} is damaged: start the run again in another folder")
    return found


def working_time(folder: Path, record: Mapping[str, Any]) -> float:
    """Seconds that a killed process had worked when it last reported progress, on top of those before it."""
    lines = records.read(folder / "progress.jsonl")
    if not lines:
        return 0.0
    updated = datetime.fromisoformat(record["updated"]).timestamp()
    return record["seconds"] + max(0.0, lines[-1]["time"] - updated)
