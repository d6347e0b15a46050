import json
import shutil
import subprocess

import pytest
import torch

import sonde
from sonde.runs.environment import differences, environment, git_state

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_the_environment_names_versions_machine_threads_and_seed():
    at = environment(seed=7)
    assert at["sonde"] == sonde.__version__
    assert at["packages"]["torch"] == torch.__version__.split("+")[0] or at["packages"]["torch"] == torch.__version__
    assert at["seed"] == 7
    assert at["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(at, allow_nan=False)) == at


@needs_git
def test_the_git_state_tells_commit_and_changes(repository):
    clean = git_state(repository)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (repository / "runs").mkdir()
    assert git_state(repository) == clean
    (repository / "code.py").write_text("2")
    assert git_state(repository) == clean | {"dirty": True}


@needs_git
def test_outside_a_repository_with_a_commit_there_is_no_git_state(tmp_path):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None


def test_only_what_can_change_numbers_counts_as_a_difference():
    at = environment(seed=0)
    assert differences(at, at | {"git": None, "platform": "other"}) == []
    other = at | {"threads": 64, "packages": at["packages"] | {"torch": "1.0"}}
    assert differences(other, at) == [
        f"threads 64, now {at['threads']}",
        f"torch 1.0, now {at['packages']['torch']}",
    ]
