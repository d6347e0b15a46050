"""A run of three steps, left alone in WHOLE, killed at random moments and resumed in KILLED.

`python killed_run.py WHOLE KILLED KILLS SEED` prints how many processes were killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sonde.files import load_bundle, save_bundle
from sonde.runs.run import Run

STEPS, UPDATES, EVERY = 3, 60, 8


def work(folder: Path) -> None:
    config = {"updates": UPDATES}
    if (folder / "run.json").exists():
        run = Run.resume(folder, config=config)
    else:
        run = Run.start(folder, study="walk", config=config, seed=0, command="walk")
    with run:
        ends = {}
        for number in range(STEPS):
            stage = f"walk-{number}"
            if not run.done(stage):
                run.finish(stage, {"position": walk(run, stage, number)})
            ends[stage] = run.result(stage)["position"]
        run.weights("ends", ends)


def walk(run: Run, stage: str, number: int) -> torch.Tensor:
    """A random walk whose state is kept every few updates."""
    generator = torch.Generator().manual_seed(number)
    position, first = torch.zeros(3), 0
    kept = run.checkpoint(stage)
    if kept.exists():
        state = load_bundle(kept)
        position, first = state["position"], state["done"]
        generator.set_state(state["generator"])
    for update in range(first, UPDATES):
        position = position + torch.randn(3, generator=generator)
        run.metric(step=update, stage=stage, norm=position.norm())
        if update % 5 == 0:
            run.metric(step=update, stage=stage, highest=position.max())
        run.progress(stage, done=update + 1, total=UPDATES)
        if (update + 1) % EVERY == 0:
            save_bundle(kept, {"position": position, "done": update + 1, "generator": generator.get_state()})
        time.sleep(0.001)
    return position


def updates(folder: Path) -> int:
    """How many updates all processes have reported."""
    log = folder / "progress.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def attempts(folder: Path, kills: int, seed: int) -> int:
    """Work on the run until it is finished, killing up to `kills` processes; returns how many were."""
    moments = random.Random(seed)
    killed = 0
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            try:
                work(folder)
                os._exit(0)
            finally:
                os._exit(1)
        if attempt < kills:
            goal = updates(folder) + moments.randint(0, 32)
            while updates(folder) < goal and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(moments.uniform(0.0005, 0.003))
            os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(ended)
        if ended == 0:
            break
        if not os.WIFSIGNALED(ended):
            sys.exit(1)
    return killed


if __name__ == "__main__":
    attempts(Path(sys.argv[1]), 0, 0)
    print(attempts(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
