import os
import signal
import subprocess
import sys

import pytest

from sonde.errors import SondeError
from sonde.runs.lock import Lock, holder

HOLD = """
import sys, time
from pathlib import Path
from sonde.runs.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_another_process_holds_is_refused_by_its_id(tmp_path, other):
    assert holder(tmp_path) == other.pid
    with pytest.raises(SondeError, match=f"in use by process {other.pid}: wait"):
        Lock(tmp_path)


def test_a_killed_process_leaves_the_folder_free(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    lock = Lock(tmp_path)
    assert holder(tmp_path) == os.getpid()
    with pytest.raises(SondeError, match=str(os.getpid())):
        Lock(tmp_path)
    lock.release()
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


def test_nobody_holds_a_folder_that_does_not_exist(tmp_path):
    assert holder(tmp_path / "no") is None
    with pytest.raises(SondeError, match="cannot write"):
        Lock(tmp_path / "no")
