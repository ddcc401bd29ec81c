"""Which commit a file was read at. Torch-free.

Told on a best-effort basis: no job fails, or waits for long, because git is absent, slow or refuses.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from launch.contract import GitState

PATIENCE_S = 2.0
# Set inside git's own hooks, where they would make every answer about another repository.
MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
INITIAL = "(initial)"


def git_state(file: Path) -> GitState | None:
    """The commit checked out around `file`; None without git, a repository or a commit."""
    there = file.resolve()
    status = _git(there.parent, "status", "--porcelain=v2", "--branch", "--untracked-files=no")
    if status is None:
        return None
    lines = status.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), INITIAL)
    if commit == INITIAL:
        return None
    tracked = _git(there.parent, "ls-files", "-z", "--full-name", "--error-unmatch", "--", there.name)
    changed = any(not line.startswith("#") for line in lines)
    path = tracked.split("\0")[0] if tracked else None
    return GitState(commit=commit, dirty=changed or path is None, path=path)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails."""
    # A repository's own configuration may name a program to run as file-system monitor; looking must not start it.
    command = [
        "git",
        "-C",
        str(folder),
        "--no-optional-locks",
        "--literal-pathspecs",
        "-c",
        "core.fsmonitor=false",
        *arguments,
    ]
    try:
        done = subprocess.run(
            command,
            env={name: value for name, value in os.environ.items() if name not in MISLEADING},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
