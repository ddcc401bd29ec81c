"""What the end of a log says. Standard library alone: the node agent pays for what it imports."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

SEARCHED_BYTES = 1 << 16


def tail(path: Path, size: int = SEARCHED_BYTES) -> str:
    """The end of a log; nothing if there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def found_in(text: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Those of `patterns` that a line of `text` contains, in which * stands for anything. Takes linear time."""
    lines = text.splitlines()
    return tuple(pattern for pattern in patterns if any(_contains(line, pattern) for line in lines))


def _contains(line: str, pattern: str) -> bool:
    at = 0
    for piece in pattern.split("*"):
        at = line.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def told_to_end(code: int | None, log: str) -> bool:
    """Whether SIGTERM ended the launcher, or a rank that did not listen yet: somebody wants the processes gone."""
    return code == -signal.SIGTERM or re.search(r"exitcode\s*:\s*-15\b|got signal: 15\b", log) is not None


def signal_in(log: str, pid: int) -> int | None:
    """The signal that ended `pid`, as the launcher reports it."""
    elastic = re.search(rf"exitcode\s*:\s*-(\d+)\s*\(pid:\s*{pid}\)", log)
    if elastic:
        return int(elastic[1])
    simple = re.search(r"died with <Signals\.(\w+)", log)
    return int(signal.Signals[simple[1]]) if simple else None
