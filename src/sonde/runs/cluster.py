"""Trials on a Ray cluster: every node runs them with its own Sonde, and their folders come back to where it began.

A node needs Sonde and whatever files the trials name, but no shared file system: an attempt works in a temporary folder
of its node, and comes back packed, without its checkpoints. When a node is lost, what ran there counts as failed and is
tried again on another one, from the beginning.
"""

import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from sonde.errors import MissingExtra, SondeError
from sonde.runs.trials import Ended, Trial, last_line

_LOST = -1
_LEFT_BEHIND = "checkpoints"


class Cluster:
    """A pool on the Ray cluster at `address` (`auto`: the one that this machine belongs to).

    Raises `MissingExtra` without Ray, and `SondeError` where no cluster answers.
    """

    def __init__(self, folder: Path, *, address: str = "auto", cpus: int = 1) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("a sweep on a cluster", "cluster") from error
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())
            raise SondeError(f"no Ray cluster answers at {address} ({line}): start one with `ray start`") from error
        self._ray, self._folder = ray, folder
        # a lost node is our own retry, which is counted and listed
        self._attempt = ray.remote(_attempt)
        self._wanted = {"num_cpus": cpus, "max_retries": 0}
        self._running: dict[Any, Trial] = {}
        self.slots = sys.maxsize  # Ray queues what does not fit

    def start(self, trial: Trial) -> None:
        """Submit an attempt."""
        reference = self._attempt.options(name=trial.name, **self._wanted).remote(trial.words, str(Path.cwd()))
        self._running[reference] = trial

    def next_ended(self) -> tuple[Trial, Ended]:
        """Wait for an attempt, and unpack what it brought."""
        ready: list[Any] = []
        while not ready:  # in short waits, so that Ctrl-C is heard
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=0.5)
        trial = self._running.pop(ready[0])
        try:
            code, said, packed = self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            return trial, Ended(_LOST, f"lost with its node ({type(error).__name__})")
        if packed:
            _unpack(packed, self._folder / trial.name)
        return trial, Ended(code, said)

    def close(self) -> None:
        """Cancel what is under way and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _attempt(words: tuple[str, ...], home: str) -> tuple[int, str, bytes]:
    """On a node: run the command in a temporary folder. Returns exit code, last line, and the folder, packed.

    Relative paths are those of `home`, the folder where the sweep was started, where the node has one.
    """
    with tempfile.TemporaryDirectory(prefix="sonde-") as place:
        out = Path(place) / "run"
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "sonde", *words, "--out", str(out)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd=home if Path(home).is_dir() else place,
            check=False,
        )
        packed = _pack(out) if ended.returncode == 0 else b""
        return ended.returncode, last_line(ended.stdout + ended.stderr), packed


def _pack(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.name != _LEFT_BEHIND:
                archive.add(path, arcname=path.name)
    return packed.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    """Put the folder in its place, whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        beside = Path(place) / "run"
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
            archive.extractall(beside, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
