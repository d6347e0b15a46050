"""A run is a folder that says what was done, how far it got and what came out; a killed one goes on where it stopped.

    config.json environment.json    what decides the numbers; where it happened
    run.json                        study, command, times, status: running, finished, failed, interrupted
    progress.jsonl log.txt          how far it is, live
    metrics.jsonl tables/ charts/ weights/      what came out; findings.json and report.html are written by the report
    steps/ checkpoints/             results of finished steps, state of the one in progress

Files appear whole; logs grow by whole lines. One process at a time holds the folder. A run whose status is `running`
but whose folder nobody holds was killed: it is resumable. A resumed run skips finished steps and repeats the rest of
the unfinished one from its checkpoint; what it logs again replaces what the killed process logged after the checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor

from sonde.errors import SondeError
from sonde.files import load_bundle, replacing, save_bundle, write_json, write_text
from sonde.runs import records
from sonde.runs.environment import differences, environment
from sonde.runs.folder import (
    VERSION,
    new_folder,
    read_json,
    read_record,
    read_run,
    refuse_foreign,
    refuse_occupied,
    refuse_other_config,
    working_time,
)
from sonde.runs.lock import NAME as LOCK_FILE
from sonde.runs.lock import Lock

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Run", "new_folder", "read_run"]

Status = Literal["running", "finished", "failed", "interrupted"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# These change after the report is written, so that it cannot state their size and hash; checkpoints are no result.
_LIVE = (LOCK_FILE, "run.json", "progress.jsonl", "log.txt", "findings.json", "report.html")
_RESERVED = {"time", "reason"}


class Run:
    """A run in progress, made by `Run.start` or `Run.resume` and used in a `with` block.

    At the end of the block the status becomes finished, failed (with the reason in one line) or, on Ctrl-C,
    interrupted; the `KeyboardInterrupt` that leaves the block says how to go on. Writes raise `SondeError` on a full
    disk.

    folder, id: the folder and its name. study, command, seed, created: as given at the start; `created` is ISO, UTC.
    config, config_sha256: the configuration as plain JSON, and the hash of its canonical form.
    environment: versions, machine, seed. resumed: whether an earlier process has worked on the run.
    """

    def __init__(self, folder: Path, lock: Lock, record: dict[str, Any], config: dict[str, Any], at: dict[str, Any]):
        self.folder = folder
        self.config = config
        self.environment = at
        self.resumed = record["processes"] > 1
        self._lock = lock
        self._record = record
        self._began = self._step_began = time.monotonic()
        self._ended: float | None = None
        self._earlier: float = record["seconds"]
        self._last_step: dict[tuple[str, tuple[str, ...]], int] = {}

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        study: str,
        config: "Mapping[str, Any] | DataclassInstance",
        seed: int,
        command: str,
        device: str = "cpu",
        resume_command: str | None = None,
    ) -> Self:
        """Make a run in `folder`, which is created where it does not exist.

        `config` is a mapping or dataclass of what decides the numbers, of plain values and paths. `command` makes the
        run again; `resume_command` is what a user types to go on with it after Ctrl-C.

        Raises `SondeError` when the folder cannot be written, is in use, holds a run already, or holds other files.
        Nothing is left behind then.
        """
        folder = Path(folder)
        plain = _plain(config)
        new: list[Path] = []
        mine: list[Path] = []
        lock = None
        try:
            try:
                new = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                refuse_foreign(folder)
            except OSError as error:
                raise SondeError(f"cannot write to {folder}: {error.strerror}") from error
            lock = Lock(folder)
            refuse_occupied(folder)
            _remove_parts(folder)
            mine = [folder / name for name in ("config.json", "environment.json", "run.json", "log.txt", LOCK_FILE)]
            record = {
                "version": VERSION,
                "study": study,
                "command": command,
                "resume_command": resume_command,
                "seed": seed,
                "device": device,
                "config_sha256": _sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()),
                "created": _now(),
                "status": "running",
                "reason": None,
                "processes": 1,
                "seconds": 0.0,
                "timings": {},
            }
            run = cls(folder, lock, record, plain, environment(seed=seed, device=device))
            write_json(folder / "config.json", plain)
            write_json(folder / "environment.json", run.environment)
            run._write_record()
            run.log(f"started: {command}")
        except BaseException:
            with contextlib.suppress(OSError):
                for path in mine:
                    path.unlink(missing_ok=True)
                for path in new:
                    path.rmdir()
            if lock is not None:
                lock.release()
            raise
        return run

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        *,
        study: str | None = None,
        config: "Mapping[str, Any] | DataclassInstance | None" = None,
        resume_command: str | None = None,
    ) -> Self:
        """Go on with the run in `folder`, whatever its status; a finished one then only skips its steps.

        Raises `SondeError` when there is no run, when it is damaged or in use, and when `study` or `config` (where
        given) differ from what it was started with, naming the keys.
        """
        folder = Path(folder)
        # What never changes is read before the folder is locked: a damaged one is left as it is.
        record = read_record(folder)
        stored, before = read_json(folder / "config.json"), read_json(folder / "environment.json")
        if study is not None and study != record["study"]:
            raise SondeError(f"{folder} holds a run of {record['study']!r}, not of {study!r}: choose its folder")
        if config is not None:
            refuse_other_config(folder, stored, _plain(config))
        lock = Lock(folder)
        try:
            record = read_record(folder)
            _remove_parts(folder)
            for name in ("metrics.jsonl", "progress.jsonl", "log.txt"):
                records.repair(folder / name)
            killed = record["status"] == "running"
            if killed:
                record["seconds"] = max(record["seconds"], working_time(folder, record))
            record |= {"status": "running", "reason": None, "processes": record["processes"] + 1}
            record["resume_command"] = resume_command or record["resume_command"]
            run = cls(folder, lock, record, stored, before)
            run._write_record()
            changed = differences(before, environment(seed=run.seed, device=record["device"]))
            run.log(f"resumed after it {'was killed' if killed else 'ended'}")
            if changed:
                run.log(f"numbers may differ, for this environment is another: {'; '.join(changed)}")
        except OSError as error:
            lock.release()
            raise SondeError(f"cannot write to {folder}: {error.strerror}") from error
        except BaseException:
            lock.release()
            raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        try:
            if error is None:
                self._end("finished")
            elif stopped:
                self._end("interrupted")
            else:
                self._end("failed", _one_line(error), "".join(traceback.format_exception(error)))
        except SondeError:
            # On a full disk the status stays `running`, which without its process reads as resumable.
            if error is None:
                raise
        finally:
            self._lock.release()
        if isinstance(error, KeyboardInterrupt):
            again = self._record["resume_command"]
            raise KeyboardInterrupt(
                f"interrupted; go on with: {again}" if again else f"interrupted; the run in {self.folder} can go on"
            ) from error

    @property
    def id(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def study(self) -> str:
        """The name of the study."""
        return self._record["study"]

    @property
    def command(self) -> str:
        """What makes this run again."""
        return self._record["command"]

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self._record["seed"]

    @property
    def created(self) -> str:
        """When the run was started, as ISO time in UTC."""
        return self._record["created"]

    @property
    def config_sha256(self) -> str:
        """The hash of the configuration's canonical JSON."""
        return self._record["config_sha256"]

    @property
    def status(self) -> Status:
        """`running` inside the `with` block, then how it ended."""
        return self._record["status"]

    @property
    def seconds(self) -> float:
        """Working time so far, of all processes."""
        now = time.monotonic() if self._ended is None else self._ended
        return self._earlier + now - self._began

    @property
    def timings(self) -> list[tuple[str, float]]:
        """(step, seconds) of the finished steps, in order; of a resumed step the time of its last process."""
        return list(self._record["timings"].items())

    def path(self, *parts: str) -> Path:
        """A path in the run folder. Raises `ValueError` for one that leads out of it."""
        path = self.folder.joinpath(*parts)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{'/'.join(parts)} leads out of the run folder {self.folder}")
        return path

    def log(self, message: str) -> None:
        """Append a line with the time to log.txt."""
        records.append_text(self.folder / "log.txt", f"{_now()} {message}")

    def progress(self, step: str, *, done: int, total: int | None = None, message: str = "") -> None:
        """Append to progress.jsonl how far a step is, for whoever watches."""
        line = {"time": _clock(), "step": step, "done": done, "total": total, "message": message}
        records.append(self.folder / "progress.jsonl", line)

    def metric(self, *, step: int, stage: str = "", **values: Any) -> None:
        """Append values (scalars) at `step` of `stage` to metrics.jsonl. NaN becomes null with a reason.

        Values of the same names form a series, whose steps must increase within a stage: that is how a resumed run
        knows which lines it repeats. Its first line of a series replaces that and all later ones of earlier processes.

        Raises `ValueError` for a step that does not come after the last one.
        """
        if taken := _RESERVED & set(values):
            raise ValueError(f"a metric cannot be named {min(taken)!r}")
        series = (stage, tuple(sorted(values)))
        last = self._last_step.get(series)
        if last is not None and step <= last:
            raise ValueError(f"{', '.join(values)} of step {step} after step {last}: give each loop its own `stage`")
        if last is None and self.resumed:
            self._forget(series, step)
        self._last_step[series] = step
        records.append(self.folder / "metrics.jsonl", {"time": _clock(), "stage": stage, "step": step, **values})

    def table(self, name: str, rows: Any) -> Path:
        """Write rows (a sequence of mappings, a mapping of columns, or a polars frame) to tables/`name`.parquet.

        NaN becomes null.
        """
        import polars as pl

        frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
        path = self._place("tables", name, ".parquet")
        with replacing(path) as beside:
            frame.fill_nan(None).write_parquet(beside)
        return path

    def chart(self, name: str, chart: Any) -> Path:
        """Write a chart as charts/`name`.vl.json, .svg and .png; returns the path of the spec.

        The pictures have the light theme's colours. Raises `ValueError` where the chart breaks a house rule.
        """
        from sonde.runs.charts import png, spec, svg
        from sonde.runs.palette import fixed

        path = self._place("charts", name, ".vl.json")
        made = spec(chart, name)
        pictures = fixed(svg(made)), png(made)
        write_json(path, made)
        write_text(path.with_name(f"{name}.svg"), pictures[0])
        with replacing(path.with_name(f"{name}.png")) as beside:
            beside.write_bytes(pictures[1])
        return path

    def weights(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write tensors to weights/`name`.safetensors, in plain safetensors that any reader opens."""
        from safetensors.torch import save_file

        path = self._place("weights", name, ".safetensors")
        with replacing(path) as beside:
            save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, beside)
        return path

    def checkpoint(self, name: str) -> Path:
        """Where the state of a step in progress is kept, written by `save_bundle`; `finish` of that name removes it."""
        return self._place("checkpoints", name, ".safetensors")

    def done(self, step: str) -> bool:
        """Whether the step is finished, so that a resumed run can take its `result` instead of repeating it."""
        return self._place("steps", step, ".safetensors").exists()

    def result(self, step: str) -> Any:
        """The tree that the finished step left. Raises `SondeError` when it is not there."""
        return load_bundle(self._place("steps", step, ".safetensors"))

    def finish(self, step: str, result: Any = None) -> None:
        """Keep the step's result: a tree of dicts, lists, numbers, strings and tensors (tuples come back as lists)."""
        save_bundle(self._place("steps", step, ".safetensors"), result)
        self._place("checkpoints", step, ".safetensors").unlink(missing_ok=True)
        now = time.monotonic()
        self._record["timings"][step] = round(now - self._step_began, 3)
        self._step_began = now
        self._write_record()
        self.log(f"finished {step} in {self._record['timings'][step]:.1f} s")

    def files(self) -> list[tuple[str, int, str]]:
        """(path in the folder, bytes, SHA-256 in hex) of what the run has written and will not change, by path.

        Runs in folders of this one, as a sweep has them, keep lists of their own.
        """
        found = []
        inner = {record.parent for record in self.folder.glob("*/**/run.json")}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if (
                path.is_file()
                and inner.isdisjoint(path.parents)
                and name not in _LIVE
                and not name.startswith("checkpoints/")
            ):
                with path.open("rb") as file:
                    found.append((name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
        return found

    def _place(self, kind: str, name: str, suffix: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{kind}: the name {name!r} should be lower-case letters, digits, '.', '-' and '_'")
        return self.folder / kind / (name + suffix)

    def _forget(self, series: tuple[str, tuple[str, ...]], step: int) -> None:
        """Drop the lines of a series from `step` on."""
        path = self.folder / "metrics.jsonl"
        lines = records.read(path)
        kept = [line for line in lines if _series(line) != series or line["step"] < step]
        if len(kept) < len(lines):
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def _end(self, status: Status, reason: str | None = None, trace: str = "") -> None:
        self._ended = time.monotonic()
        self._record |= {"status": status, "reason": reason}
        self._write_record()
        self.log(f"{status}{f': {reason}' if reason else ''}{chr(10) if trace else ''}{trace}")

    def _write_record(self) -> None:
        self._record |= {"seconds": round(self.seconds, 3), "updated": _now()}
        write_json(self.folder / "run.json", self._record)


def _remove_parts(folder: Path) -> None:
    """Remove what a killed process was writing. Only the holder of the folder may."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def _series(line: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return line["stage"], tuple(sorted(set(line) - {"stage", "step"} - _RESERVED))


def _plain(config: "Mapping[str, Any] | DataclassInstance") -> dict[str, Any]:
    """The configuration as JSON holds it: dataclasses as objects, tuples as lists, paths as strings."""
    given = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    return json.loads(json.dumps(given, default=_path_text, allow_nan=False))


def _path_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a configuration holds plain values and paths, not {type(value).__name__}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, SondeError) else f"{type(error).__name__}: {text}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _clock() -> float:
    return round(time.time(), 3)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
