"""Trials end as finished or failed, whatever happens to one of them, and what is finished is not run again."""

import subprocess
import time
from pathlib import Path

import pytest
from runs.trial_program import install

from sonde.errors import SondeError
from sonde.runs.folder import read_run
from sonde.runs.trials import Processes, Trial, last_line, run_trials


def trials(marks: Path, *seeds: int, sleep: float = 0.0) -> list[Trial]:
    return [Trial(f"seed={s}", ("run", "toy", f"--seed={s}", f"--marks={marks}", f"--sleep={sleep}")) for s in seeds]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", install(tmp_path)["PYTHONPATH"])
    (tmp_path / "marks").mkdir()
    return tmp_path


def starts(place: Path, seed: int) -> int:
    return (place / "marks" / f"started-{seed}").stat().st_size


def test_what_fails_is_tried_again_and_what_keeps_failing_is_listed_with_its_reason(place):
    folder = place / "sweep"
    given = trials(place / "marks", 1, 7, 13, 66)
    found = {o.trial.name: o for o in run_trials(given, Processes(folder, workers=2), folder, retries=1)}
    assert (found["seed=1"].finished, found["seed=1"].attempts) == (True, 1)
    assert (found["seed=7"].finished, found["seed=7"].attempts) == (True, 2)
    assert (found["seed=13"].reason, found["seed=13"].attempts) == ("it broke", 2)
    assert (found["seed=66"].reason, found["seed=66"].attempts) == ("sonde: 66 is no seed", 1)
    assert [starts(place, seed) for seed in (1, 7, 13, 66)] == [1, 2, 2, 1]
    again = {o.trial.name: o for o in run_trials(given[:2], Processes(folder, workers=2), folder)}
    assert all(outcome.finished and outcome.attempts == 0 for outcome in again.values())
    assert starts(place, 1) == 1


def test_stopping_interrupts_what_runs_and_another_call_goes_on(place):
    folder = place / "sweep"
    given = trials(place / "marks", 1, 2, sleep=30)
    pool = Processes(folder, workers=2)
    pool.start(given[0])
    until = time.monotonic() + 60
    while not (place / "marks" / "at-work-1").exists() and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(SondeError, match=r"seed=1 is still being written by another process"):
        list(run_trials(given, Processes(folder, workers=1), folder))
    pool.close()
    assert read_run(folder / "seed=1")["status"] == "interrupted"
    quick = trials(place / "marks", 1, 2)
    found = list(run_trials(quick, Processes(folder, workers=2), folder))
    assert all(outcome.finished for outcome in found)
    assert read_run(folder / "seed=1")["processes"] == 2


def test_leaving_early_stops_the_processes(place):
    folder = place / "sweep"
    pool = Processes(folder, workers=2)
    outcomes = run_trials(trials(place / "marks", 1) + trials(place / "marks", 2, sleep=60), pool, folder)
    assert next(outcomes).trial.name == "seed=1"
    outcomes.close()
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in listed


def test_workers_are_at_least_one(tmp_path):
    with pytest.raises(SondeError, match="--workers is 0: give 1 or more"):
        Processes(tmp_path, workers=0)


def test_the_last_line_is_read_behind_progress_bars():
    assert last_line(b"one\nbar 1%\rbar 100%\rsonde: it broke\n\n...\n") == "sonde: it broke"
    assert last_line(b"") == ""
