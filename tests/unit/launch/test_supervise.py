"""What is told of a user's own command that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.supervise import last_traceback

CHAINED = """
try:
    1 / 0
except ZeroDivisionError as problem:
    raise ValueError("second\\nline") from problem
"""


@pytest.mark.parametrize(
    ("script", "last"),
    [
        ("print('before'); raise RuntimeError('boom')", "RuntimeError: boom"),
        (CHAINED, "ValueError: second"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_the_last_traceback_of_a_log(tmp_path: Path, script: str, last: str) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        subprocess.run([sys.executable, "-c", script], stdout=stream, stderr=stream, check=False)
        stream.write("and the launcher went on talking\n")
    trace = last_traceback(log)
    assert trace is not None
    assert trace.startswith("Traceback (most recent call last)")
    assert trace.splitlines()[-1] == last


def test_a_log_without_one(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("it just ended\n")
    assert last_traceback(tmp_path / "log") is None
    assert last_traceback(tmp_path / "nowhere") is None
