"""Many runs of one command at once: each in a process and a folder of its own, tried again where it fails.

A trial is the words of a `sonde` command without `--out`. A pool runs trials somewhere: `Processes` on this machine,
`sonde.runs.cluster.Cluster` on Ray. Whatever happens to one trial, or to a machine, the others go on; a trial ends as
finished, or as failed with the reason of its last attempt. Bad input (exit code 2) is not tried again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sonde.errors import SondeError
from sonde.runs.folder import read_run

BAD_INPUT = 2
_POLL = 0.05
_PATIENCE = 10.0  # for processes that are asked to stop


@dataclass(frozen=True)
class Trial:
    """`words` are those of the command line after `sonde`, without --out and --resume; `name` is that of its folder."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: the exit code (negative for a signal or a lost machine) and its last line."""

    code: int
    said: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended after all its attempts (0: it was finished before). `reason` is empty for a finished one."""

    trial: Trial
    attempts: int
    reason: str = ""

    @property
    def finished(self) -> bool:
        """Whether there are results."""
        return not self.reason


class Pool(Protocol):
    """Where trials run."""

    slots: int
    """How many may be under way."""

    def start(self, trial: Trial) -> None:
        """Begin an attempt, from where an earlier one in the folder left off if it can."""
        ...

    def next_ended(self) -> tuple[Trial, Ended]:
        """Wait for one of those under way."""
        ...

    def close(self) -> None:
        """Stop all that are under way, leaving their folders resumable."""
        ...


def run_trials(trials: Sequence[Trial], pool: Pool, folder: Path, *, retries: int = 2) -> Iterator[Outcome]:
    """Run all trials whose folders, under `folder`, hold no finished run; yields each as it ends, finished ones first.

    Raises `SondeError` when a process of an earlier call is still at work in one of the folders. Leaving the iterator,
    also by Ctrl-C, stops what is under way.
    """
    waiting: list[Trial] = []
    for trial in trials:
        status = _status(folder / trial.name)
        if status == "finished":
            yield Outcome(trial, 0)
        elif status == "running":
            raise SondeError(f"{folder / trial.name} is still being written by another process: stop it, or wait")
        else:
            waiting.append(trial)
    attempts = {trial.name: 0 for trial in waiting}
    under_way = 0
    try:
        while waiting or under_way:
            while waiting and under_way < pool.slots:
                trial = waiting.pop(0)
                attempts[trial.name] += 1
                pool.start(trial)
                under_way += 1
            trial, ended = pool.next_ended()
            under_way -= 1
            done = attempts[trial.name]
            if ended.code == 0 and _status(folder / trial.name) == "finished":
                yield Outcome(trial, done)
            elif ended.code == BAD_INPUT or done > retries:
                yield Outcome(trial, done, ended.said or f"it ended with code {ended.code} and without a run")
            else:
                waiting.append(trial)
    finally:
        pool.close()


def _status(folder: Path) -> str | None:
    if not (folder / "run.json").exists():
        return None
    return read_run(folder)["status"]


def words_for(trial: Trial, folder: Path) -> list[str]:
    """The command line of the next attempt in the trial's folder."""
    out = folder / trial.name
    return [*trial.words, "--out", str(out), *(["--resume"] if _status(out) is not None else [])]


class Processes:
    """A pool on this machine: `workers` processes, which share the cores between them."""

    def __init__(self, folder: Path, *, workers: int) -> None:
        if workers < 1:
            raise SondeError(f"--workers is {workers}: give 1 or more")
        self.slots, self._folder = workers, folder
        self._running: dict[str, tuple[Trial, subprocess.Popen[bytes]]] = {}
        threads = max(1, (os.cpu_count() or 1) // workers)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def start(self, trial: Trial) -> None:
        """Start a process; what it says goes to NAME.log beside its folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log(trial).open("wb") as log, _interruptible():
            # a session of its own: Ctrl-C reaches it once, from `close`
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sonde", *words_for(trial, self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self._running[trial.name] = trial, process

    def next_ended(self) -> tuple[Trial, Ended]:
        """Wait for a process."""
        while True:
            for name, (trial, process) in self._running.items():
                if process.poll() is not None:
                    del self._running[name]
                    return trial, Ended(process.returncode, last_line(self._log(trial).read_bytes()))
            time.sleep(_POLL)

    def close(self) -> None:
        """Interrupt what runs; what does not stop within 10 seconds is killed."""
        for _, process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        until = time.monotonic() + _PATIENCE
        for _, process in self._running.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def _log(self, trial: Trial) -> Path:
        return self._folder / f"{trial.name}.log"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Processes that are started inside hear Ctrl-C, also those of a sweep that runs in a shell's background."""
    if (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def last_line(said: bytes) -> str:
    """The last line with letters in it of what a process said, after the progress bars in that line."""
    lines = said.decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if any(c.isalpha() for c in line)), "")
