"""Git repositories to read job files from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def a_repository(folder: Path) -> None:
    """Make `folder` a git repository with all that lies in it, and a file `tracked`, in one commit."""
    (folder / "tracked").touch()
    for arguments in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", "all"],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
