"""Where did this run happen? Versions, machine, threads, seed, and the state of the user's own code, as plain JSON.

The same seed gives the same result on the same machine and thread count, so these are what a rerun must match.
"""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sonde

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


def environment(*, seed: int, device: str = "cpu", folder: str | Path = ".") -> dict[str, Any]:
    """Versions, platform, device, threads, seed, and commit and dirty flag of the git repository around `folder`.

    `git` is None outside a repository or without git.
    """
    return {
        "sonde": sonde.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device)
        if device.startswith("cuda") and torch.cuda.is_available()
        else None,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "git": git_state(folder),
    }


def git_state(folder: str | Path = ".") -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None where there is no repository with a commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two environments that can change numbers, as `torch 2.11.0, now 2.13.0`."""
    keys = ("sonde", "python", "processor", "device", "device_name", "threads")
    pairs = [(key, before.get(key), now.get(key)) for key in keys]
    packages = before.get("packages", {})
    pairs += [(name, packages.get(name), version) for name, version in now["packages"].items()]
    return [f"{key} {old}, now {new}" for key, old, new in pairs if old != new]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: str | Path, *arguments: str) -> str | None:
    # No lock is taken in the user's repository, and nothing that its configuration names is executed.
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout
