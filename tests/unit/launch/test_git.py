"""Which commit a file is told to be at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch import git as module
from launch.alone import contract_alone
from launch.git import git_state
from tests.repositories import a_repository

JOB = """
name: small
model: {name_or_path: org/model, task: sequence-classification}
data: {train: org/data}
train: {max_steps: 1}
strategy: single
"""


def head(folder: Path) -> str:
    return subprocess.check_output(["git", "-C", str(folder), "rev-parse", "HEAD"], text=True).strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "job.yaml"
    path.write_text(JOB)
    a_repository(tmp_path)
    return path


def test_a_committed_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").touch()  # what runs leave behind does not make a work tree another one
    state = git_state(file)
    assert state is not None
    assert (state.commit, state.dirty, state.path) == (head(tmp_path), False, "jobs/job.yaml")


def test_a_changed_file_and_a_changed_neighbour(file: Path, tmp_path: Path) -> None:
    (tmp_path / "tracked").write_text("changed")
    state = git_state(file)
    assert state is not None
    assert (state.dirty, state.path) == (True, "jobs/job.yaml")


def test_a_file_that_was_never_added(file: Path) -> None:
    state = git_state(file.with_name("new:job.yaml"))
    assert state is not None
    assert (state.dirty, state.path) == (True, None)


def test_a_name_that_git_would_take_for_a_pattern(file: Path, tmp_path: Path) -> None:
    assert git_state(file.with_name("*.yaml")) == git_state(file.with_name("absent"))
    assert (tmp_path / "jobs" / "job.yaml").exists()


def test_where_there_is_no_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path / "job.yaml") is None
    assert git_state(tmp_path / "absent" / "job.yaml") is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_state(tmp_path / "job.yaml") is None  # no commit yet


def test_where_there_is_no_git(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_state(file) is None


def test_a_git_that_takes_too_long_is_not_waited_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    assert git_state(file) is None


def test_inside_a_hook_the_file_s_own_repository_answers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git_state(file)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_state(file) == expected is not None


def test_looking_runs_nothing_that_the_repository_names(file: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    hook.chmod(0o755)
    subprocess.run(["git", "-C", str(tmp_path), "config", "core.fsmonitor", str(hook)], check=True)
    assert git_state(file) is not None
    assert not (tmp_path / "ran").exists()


def test_launch_alone_takes_it_into_the_contract(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert contract_alone(file, (), None, 1).origin.git == git_state(file)
