"""Trials on a real Ray cluster of two nodes on this machine, one of which is killed while it works."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs.test_trials import trials
from runs.trial_program import install

from sonde.errors import MissingExtra, SondeError
from sonde.runs.cluster import Cluster
from sonde.runs.folder import read_run
from sonde.runs.trials import run_trials

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.xdist_group("ray"),
]
_MEMORY = str(100 << 20)


class Nodes:
    """Raylets on the loopback device, each a process group that can be killed."""

    def __init__(self, environment: dict[str, str], place: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._environment = {**environment, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self._place = place
        self.processes: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--node-ip-address", "127.0.0.1", "--port", self.address.split(":")[1]]
        self.add(*head, "--include-dashboard", "false", "--temp-dir", str(place))
        self.add("--address", self.address)

    def add(self, *options: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", *options, "--num-cpus", "1", "--object-store-memory", _MEMORY, "--block"]
        with (self._place.parent / f"node-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        if len(self.processes) == 1:
            self._until_answering(int(self.address.split(":")[1]))

    def _until_answering(self, port: int) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        raise TimeoutError("the head node did not start")

    def kill(self, number: int) -> None:
        os.killpg(self.processes[number].pid, signal.SIGKILL)
        self.processes[number].wait()


@pytest.fixture
def nodes(tmp_path_factory, monkeypatch):
    pytest.importorskip("ray")
    place = tmp_path_factory.mktemp("r")  # Ray's sockets lie under it, and their paths must be short
    environment = install(place)
    started = Nodes(environment, Path("/tmp") / f"sonde-ray-{os.getpid()}")
    yield started
    for number, process in enumerate(started.processes):
        if process.poll() is None:
            started.kill(number)


def test_a_node_that_is_killed_loses_nothing(nodes, tmp_path):
    import ray

    (tmp_path / "marks").mkdir()
    folder = tmp_path / "sweep"
    given = trials(tmp_path / "marks", 1, 2, 7, 66, sleep=3)
    pool = Cluster(folder, address=nodes.address)
    until = time.monotonic() + 120
    while len([node for node in ray.nodes() if node["Alive"]]) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    assert ray.cluster_resources()["CPU"] == 2
    killed = False
    found = {}
    next_ended = pool.next_ended

    def killing_once():
        nonlocal killed
        if not killed:
            while len(list((tmp_path / "marks").glob("at-work-*"))) < 2:  # both nodes are at work
                time.sleep(0.1)
            nodes.kill(1)
            killed = True
        return next_ended()

    pool.next_ended = killing_once  # type: ignore[method-assign]
    for outcome in run_trials(given, pool, folder, retries=3):
        found[outcome.trial.name] = outcome
    assert [found[f"seed={seed}"].finished for seed in (1, 2, 7)] == [True] * 3
    assert found["seed=66"].reason == "sonde: 66 is no seed"
    assert max(outcome.attempts for outcome in found.values()) > 1
    for seed in (1, 2, 7):
        assert read_run(folder / f"seed={seed}")["status"] == "finished"
        assert (folder / f"seed={seed}" / "findings.json").exists()
    assert not list(folder.glob(".*"))


def test_a_cluster_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(SondeError, match=r"no Ray cluster answers at auto .*: start one with `ray start`"):
        Cluster(tmp_path)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"a sweep on a cluster needs an extra: pip install 'sonde\[cluster\]'"):
        Cluster(tmp_path)
