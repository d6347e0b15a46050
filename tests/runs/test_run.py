import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import sonde
from sonde.errors import SondeError
from sonde.files import save_bundle
from sonde.runs import records
from sonde.runs.run import Run, new_folder, read_run

CONFIG = {"model": "organism:pebble", "tokens": 100}


def start(folder, **changes) -> Run:
    given = {"study": "audit", "config": CONFIG, "seed": 3, "command": "sonde audit organism:pebble"} | changes
    return Run.start(folder, **given)


def kill(run: Run) -> None:
    """What a killed process leaves behind: the status says running, the lock is free."""
    run._lock.release()


def metrics(run: Run) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "time"} for line in records.read(run.path("metrics.jsonl"))]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_says_what_was_done_where_and_how_it_ended(tmp_path):
    with start(tmp_path / "runs" / "a") as run:
        assert read_run(run.folder)["status"] == "running"
        run.finish("load")
    record = read_run(run.folder)
    assert record["status"] == run.status == "finished"
    assert (run.id, run.study, run.seed, run.command) == ("a", "audit", 3, "sonde audit organism:pebble")
    assert run.seconds >= record["timings"]["load"] >= 0
    assert run.timings == list(record["timings"].items())
    assert json.loads((run.folder / "config.json").read_text()) == CONFIG
    assert json.loads((run.folder / "environment.json").read_text())["seed"] == 3
    assert "started: sonde audit" in (run.folder / "log.txt").read_text()


def test_a_dataclass_with_paths_is_a_configuration(tmp_path):
    @dataclasses.dataclass
    class Config:
        text: Path
        names: tuple[str, ...] = ("a", "b")

    with start(tmp_path / "a", config=Config(Path("book.txt"))) as run:
        assert run.config == {"text": "book.txt", "names": ["a", "b"]}
    Run.resume(tmp_path / "a", config=Config(Path("book.txt"))).__exit__(None, None, None)
    with start(tmp_path / "b", config={"names": ["a", "b"], "text": "book.txt"}) as other:
        assert other.config_sha256 == run.config_sha256
    with pytest.raises(TypeError, match="plain values"):
        start(tmp_path / "c", config={"x": object()})
    assert not (tmp_path / "c").exists()


def test_an_error_leaves_a_failed_run_with_its_reason_in_one_line(tmp_path):
    with pytest.raises(ZeroDivisionError), start(tmp_path / "a"):
        raise ZeroDivisionError("division\nby zero")
    assert read_run(tmp_path / "a")["status"] == "failed"
    assert read_run(tmp_path / "a")["reason"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in (tmp_path / "a" / "log.txt").read_text()
    with pytest.raises(SondeError), start(tmp_path / "b"):
        raise SondeError("no text")
    assert read_run(tmp_path / "b")["reason"] == "no text"


@pytest.fixture
def ctrl_c():
    """Send the signal of Ctrl-C, which a shell's background jobs ignore unless they ask for it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_an_interrupted_run_and_says_how_to_go_on(tmp_path, ctrl_c):
    with (
        pytest.raises(KeyboardInterrupt, match="go on with: sonde audit m --resume"),
        start(tmp_path / "a", resume_command="sonde audit m --resume"),
    ):
        ctrl_c()
    assert read_run(tmp_path / "a")["status"] == "interrupted"
    with Run.resume(tmp_path / "a") as run:
        assert run.resumed
    assert read_run(tmp_path / "a")["status"] == "finished"
    with pytest.raises(KeyboardInterrupt, match="can go on"), start(tmp_path / "b"):
        raise KeyboardInterrupt


def test_a_run_in_use_is_refused_and_stays_as_it_is(tmp_path):
    with start(tmp_path / "a") as run:
        before = everything(run.folder)
        for again in (lambda: start(run.folder), lambda: Run.resume(run.folder)):
            with pytest.raises(SondeError, match=f"in use by process {os.getpid()}"):
                again()
        assert everything(run.folder) == before


def test_an_ended_run_is_not_overwritten(tmp_path):
    with start(tmp_path / "a"):
        pass
    before = everything(tmp_path / "a")
    with pytest.raises(SondeError, match="already holds a run of 'audit' that is finished: choose another folder"):
        start(tmp_path / "a")
    assert everything(tmp_path / "a") == before
    kill(start(tmp_path / "b", resume_command="sonde audit m --resume"))
    with pytest.raises(SondeError, match="was killed: go on with `sonde audit m --resume` or choose"):
        start(tmp_path / "b")


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SondeError, match=r"not empty \(thesis\.tex\) and holds no run"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_which_a_start_was_killed_is_as_good_as_empty(tmp_path):
    for name in (".lock", "config.json", ".environment.json.7.part"):
        (tmp_path / name).write_text("")
    with start(tmp_path) as run:
        pass
    assert not list(run.folder.glob("*.part")) and not list(run.folder.glob(".*.part"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SondeError, match="cannot write to"):
            start(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(SondeError, match=r"cannot write to .*Permission denied"):
        start(tmp_path / "closed" / "run")


def test_a_killed_run_is_resumable_and_skips_finished_steps(tmp_path):
    run = start(tmp_path / "a")
    run.finish("lens", {"loss": [1.0, 2.0], "w": torch.ones(2)})
    save_bundle(run.checkpoint("probe"), 1)
    (run.folder / "tables").mkdir()
    (run.folder / "tables" / ".x.parquet.1.part").write_text("half")
    (run.folder / "log.txt").write_bytes((run.folder / "log.txt").read_bytes() + b"half a li")
    run.progress("probe", done=1, total=2)
    kill(run)
    assert read_run(run.folder)["status"] == "resumable"
    with Run.resume(run.folder, config=CONFIG) as again:
        assert again.resumed
        assert (again.seed, again.config, again.created) == (3, CONFIG, run.created)
        assert again.done("lens") and not again.done("probe")
        assert again.result("lens")["w"].tolist() == [1.0, 1.0]
        assert again.checkpoint("probe").exists()
        again.finish("probe")
        assert not again.checkpoint("probe").exists()
        assert [step for step, _ in again.timings] == ["lens", "probe"]
    assert not list(run.folder.rglob(".*.part"))
    assert "half a li" not in (run.folder / "log.txt").read_text()
    assert read_run(run.folder)["status"] == "finished"


def test_a_finished_run_can_be_gone_through_again(tmp_path):
    with start(tmp_path / "a") as run:
        run.finish("lens", 1)
    with Run.resume(run.folder) as again:
        assert again.result("lens") == 1


def test_another_configuration_is_refused_by_its_keys(tmp_path):
    kill(start(tmp_path / "a"))
    before = everything(tmp_path / "a")
    with pytest.raises(SondeError, match=r"tokens \(100, now 7\), dtype \(nothing, now f\)") as refusal:
        Run.resume(tmp_path / "a", config=CONFIG | {"tokens": 7, "dtype": "f"})
    assert "model" not in str(refusal.value)
    with pytest.raises(SondeError, match="a run of 'audit', not of 'tuned-lens'"):
        Run.resume(tmp_path / "a", study="tuned-lens")
    assert everything(tmp_path / "a") == before
    Run.resume(tmp_path / "a", config=CONFIG).__exit__(None, None, None)


def test_what_is_not_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(SondeError, match="holds no run"):
        Run.resume(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    kill(start(tmp_path / "a"))
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(SondeError, match=r"run\.json is missing or damaged"):
        Run.resume(tmp_path / "a")
    (tmp_path / "a" / "run.json").write_text('{"version": 99}')
    with pytest.raises(SondeError, match="version 99"):
        read_run(tmp_path / "a")


@pytest.mark.parametrize("name", ["run.json", "config.json", "environment.json"])
def test_a_damaged_folder_is_left_as_it_was(tmp_path, name):
    kill(start(tmp_path / "a"))
    (tmp_path / "a" / ".lock").unlink()
    (tmp_path / "a" / name).write_text("{")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    with pytest.raises(SondeError, match="missing or damaged"):
        Run.resume(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before


def test_another_environment_is_noted_on_resuming(tmp_path):
    run = start(tmp_path / "a")
    kill(run)
    at = json.loads((run.folder / "environment.json").read_text())
    (run.folder / "environment.json").write_text(json.dumps(at | {"threads": 99}))
    with Run.resume(run.folder):
        pass
    assert "numbers may differ, for this environment is another: threads 99" in (run.folder / "log.txt").read_text()


def test_metrics_after_the_checkpoint_are_replaced_and_not_repeated(tmp_path):
    run = start(tmp_path / "a")
    for step in range(3):
        run.metric(step=step, stage="a", loss=step)
    for step in range(6):
        run.metric(step=step, stage="b", loss=step)
        if step % 2 == 0:
            run.metric(step=step, stage="b", kl=step)
    uninterrupted = metrics(run)
    kill(run)
    with Run.resume(run.folder) as again:  # stage b goes on from a checkpoint after step 3
        again.metric(step=4, stage="b", loss=4)
        again.metric(step=4, stage="b", kl=4)
        again.metric(step=5, stage="b", loss=5)
    assert metrics(again) == uninterrupted


def test_steps_of_a_series_increase(tmp_path):
    with start(tmp_path / "a") as run:
        run.metric(step=1, loss=0.5)
        run.metric(step=1, accuracy=0.5)
        run.metric(step=1, stage="other", loss=0.5)
        with pytest.raises(ValueError, match="loss of step 1 after step 1"):
            run.metric(step=1, loss=0.5)
        with pytest.raises(ValueError, match="'reason'"):
            run.metric(step=2, reason="x")


def test_nan_is_never_written(tmp_path):
    with start(tmp_path / "a") as run:
        run.metric(step=0, loss=math.nan)
        table = run.table("t", [{"x": math.nan, "y": "a"}, {"x": 1.0, "y": None}])
    assert metrics(run) == [{"stage": "", "step": 0, "loss": None, "reason": "loss is nan"}]
    assert pl.read_parquet(table).rows() == [(None, "a"), (1.0, None)]


def test_progress_can_be_watched(tmp_path):
    with start(tmp_path / "a") as run:
        run.progress("lens", done=3, total=10, message="layer 2")
        (line,) = records.read(run.folder / "progress.jsonl")
        assert {k: line[k] for k in ("step", "done", "total", "message")} == {
            "step": "lens", "done": 3, "total": 10, "message": "layer 2",
        }  # fmt: skip


def test_weights_are_plain_safetensors(tmp_path):
    shared = torch.ones(4)
    with start(tmp_path / "a") as run:
        path = run.weights("lens", {"a": shared[:2], "b": shared[1:], "c": torch.eye(3).T})
    assert load_file(path)["b"].tolist() == [1.0] * 3


def test_a_chart_is_kept_as_spec_and_two_pictures(tmp_path):
    chart = {
        "title": {"text": "KL falls", "subtitle": "KL to the output, bits, lower is better"},
        "data": {"values": [{"x": 0, "y": 1.0}, {"x": 1, "y": 0.5}]},
        "mark": "line",
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": "layer"},
            "y": {"field": "y", "type": "quantitative", "title": "bits"},
        },
    }
    with start(tmp_path / "a") as run:
        path = run.chart("kl", chart)
        with pytest.raises(ValueError, match="'bare'"):
            run.chart("bare", {"mark": "line"})
    assert json.loads(path.read_text())["title"]["text"] == "KL falls"
    assert (run.folder / "charts" / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert "var(--" not in (run.folder / "charts" / "kl.svg").read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["kl.png", "kl.svg", "kl.vl.json"]


def test_the_manifest_lists_what_will_not_change(tmp_path):
    with start(tmp_path / "a") as run:
        run.table("t", [{"x": 1}])
        run.finish("lens", 1)
        save_bundle(run.checkpoint("probe"), 1)
        run.metric(step=0, loss=1)
        manifest = run.files()
    assert manifest == run.files()
    assert [name for name, _, _ in manifest] == [
        "config.json", "environment.json", "metrics.jsonl", "steps/lens.safetensors", "tables/t.parquet",
    ]  # fmt: skip
    name, size, digest = manifest[0]
    assert size == (run.folder / name).stat().st_size
    assert len(digest) == 64


def test_no_path_leads_out_of_the_folder(tmp_path):
    with start(tmp_path / "a") as run:
        assert run.path("report.html").parent == run.folder
        for bad in ("../x", "/etc/passwd"):
            with pytest.raises(ValueError, match="leads out"):
                run.path(bad)
        for write in (run.checkpoint, run.done, run.result):
            with pytest.raises(ValueError, match="lower-case"):
                write("../x")


def test_new_folders_count_on_and_have_harmless_names(tmp_path):
    assert new_folder(tmp_path / "runs", "audit-organism:pebble") == tmp_path / "runs" / "audit-organism-pebble-1"
    for name in ("audit-gpt2-2", "audit-gpt2-10", "audit-gpt2-x", "audit-gpt2-xl-50"):
        (tmp_path / name).mkdir()
    assert new_folder(tmp_path, "audit-gpt2").name == "audit-gpt2-11"
    assert new_folder(tmp_path, "../../x/..").name == "x-1"
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1024):
            pass


def test_a_run_does_not_start_on_a_full_disk(small_disk):
    fill(small_disk)
    with pytest.raises(SondeError, match="No space left on device"):
        start(small_disk / "runs" / "a")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_leaves_a_resumable_run_and_nothing_half_written(small_disk):
    with pytest.raises(SondeError, match="No space left on device"), start(small_disk / "a") as run:
        run.metric(step=0, loss=1.0)
        run.finish("lens", 1)
        fill(small_disk)
        with pytest.raises(SondeError, match="No space left on device"):
            for step in range(1, 10000):
                run.metric(step=step, loss=1.0)
        run.weights("big", {"w": torch.zeros(100_000)})
    assert (run.folder / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert not (run.folder / "weights" / "big.safetensors").exists()
    assert not list(run.folder.rglob(".*.part"))
    assert read_run(run.folder)["status"] in ("resumable", "failed")
    (small_disk / "filler").unlink()
    with Run.resume(run.folder) as again:
        assert again.done("lens")


def test_a_full_disk_in_the_middle_of_a_start_leaves_nothing(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SondeError, match="No space left on device"):
        start(tmp_path / "runs" / "a")
    assert len(calls) == 3
    assert not (tmp_path / "runs").exists()


def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(tmp_path):
    script = Path(__file__).with_name("killed_run.py")
    folders = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(sonde.__file__).parents[1])}
    command = [sys.executable, str(script), *map(str, folders), "8", "0"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) >= 5
    assert read_run(folders[1])["processes"] >= 5

    def numbers(folder: Path) -> tuple[list, list]:
        run = Run.resume(folder)
        kill(run)
        logged = sorted(metrics(run), key=lambda line: (line["stage"], line["step"], sorted(line)))
        return logged, [file for file in run.files() if file[0] != "metrics.jsonl"]

    whole, killed = map(numbers, folders)
    assert killed == whole
