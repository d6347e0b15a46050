"""Kill an audit at random moments, resume it, and compare its numbers with those of an audit that was left alone.

    python tests/studies/kill_and_resume.py --kills 20

Each round starts `sonde audit` in a new folder, sends SIGKILL after a random share of the undisturbed time, goes on
with --resume (and is killed again, half of the time), and then runs to its end. The findings must be equal to the last
digit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AUDIT = ("organism:pebble", "--tokens", "8192")


def start(folder: Path, audit: tuple[str, ...], *, resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-m", "sonde", "audit", *audit, "--out", str(folder), *(["--resume"] if resume else [])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, audit: tuple[str, ...], *, resume: bool) -> float:
    """Run to the end; returns the seconds that it took."""
    began = time.monotonic()
    process = start(folder, audit, resume=resume)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the audit in {folder} ended with {process.returncode}: {error[-2000:]}")
    return time.monotonic() - began


def numbers(folder: Path) -> list[dict]:
    """The findings, without what names the folder."""
    return json.loads((folder / "findings.json").read_text())["findings"]


def begun(folder: Path) -> bool:
    return (folder / "run.json").exists()


def disturb(root: Path, kills: int, audit: tuple[str, ...], seed: int = 0) -> list[str]:
    """Kill at `kills` moments; returns a line for every round, and raises `AssertionError` where a number differs."""
    rng = random.Random(seed)
    whole = finish(root / "undisturbed", audit, resume=False)
    expected = numbers(root / "undisturbed")
    lines, done, turn = [], 0, 0
    while done < kills:
        folder, turn, hits = root / f"disturbed-{turn}", turn + 1, []
        while done < kills and (not hits or rng.random() < 0.5):
            seconds = kill(folder, audit, rng.uniform(0.1, 0.9) * whole)
            if seconds is None:  # it was done before: the machine is faster than it was, or little was left to do
                whole *= 0.9
                break
            hits.append(f"killed after {seconds:.1f} s")
            done += 1
        finish(folder, audit, resume=begun(folder))
        assert numbers(folder) == expected, f"{folder}: the numbers differ after: {', '.join(hits)}"
        leftover = [path.name for path in folder.rglob("*") if path.name.endswith(".part")]
        assert not leftover, f"{folder}: half-written files {leftover}"
        if hits:
            lines.append(f"{folder.name}: {', '.join(hits)}; same numbers")
            print(lines[-1], flush=True)
    return lines


def kill(folder: Path, audit: tuple[str, ...], wait: float) -> float | None:
    """Start or resume an audit and kill it after `wait` seconds; None when it was done before."""
    process = start(folder, audit, resume=begun(folder))
    try:
        _, error = process.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        return wait
    if process.returncode:
        raise RuntimeError(f"the audit in {folder} ended with {process.returncode}: {error[-2000:]}")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        disturb(Path(root), options.kills, AUDIT, options.seed)


if __name__ == "__main__":
    main()
