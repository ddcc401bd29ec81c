"""Whether a rank still moves, by its pulse, and where its threads are if not. Standard library and psutil alone.

A rank that is alive may hang all the same: in a collective whose peers have gone elsewhere, in a driver, in a lock.
What tells is that it does not move on, for longer than it ever took for the like, and for longer than sound trainings
take. One rank that hangs makes all others wait, so all look alike soon; who is behind the others is the cause.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.pulse import Beat, read_beat

PATIENCE_S = {
    "start": 600.0,
    "load": 1800.0,
    "first-step": 1800.0,
    "step": 120.0,
    "evaluate": 300.0,
    "save": 1800.0,
    "export": 1800.0,
}
"""How long a rank may stay where it is in a phase, at least."""
STEADY = ("step", "evaluate")
"""Phases of which a user knows how long they take."""
FACTOR = 10.0
"""And so many times the longest that it has stayed in that phase in this attempt."""
STOPPED_S = 20.0
"""How long its process may be stopped by a signal, whatever it does."""
AWAY_S = 1.0
"""While nobody looked for so long, the machine itself may have stood still: that time does not count."""
DUMP_S = 8.0
STACK_CHARS = 6000


@dataclass
class Watch:
    """Looks at one rank every now and then."""

    pulse: Path
    pid: int
    limit_s: float | None = None
    """For the steady phases, in place of patience that adapts; 0 is for ever, in all phases."""
    _beat: Beat | None = None
    _age_s: float = 0.0
    _away_s: float = 0.0
    _looked_at: float | None = None
    _stopped_since: float | None = None
    _longest_s: dict[str, float] = field(default_factory=dict)

    def look(self, now: float) -> dict[str, Any] | None:
        """Fields of a Stall, once the rank does not move for too long; None while all is well. `now` is monotonic."""
        away_s = now - self._looked_at if self._looked_at is not None else 0.0
        self._looked_at = now
        beat = read_beat(self.pulse)
        if beat is None or beat.phase == "done":
            return None
        if self._beat is None or beat.count != self._beat.count:
            if self._beat is not None:
                phase = self._beat.phase
                self._longest_s[phase] = max(self._age_s, self._longest_s.get(phase, 0.0))
            self._beat, self._away_s, self._stopped_since = beat, 0.0, None
        elif away_s > AWAY_S:
            self._away_s += away_s
        self._age_s = max(0.0, now - beat.since - self._away_s)
        if self._age_s > AWAY_S:
            stopped = is_stopped(self.pid)
            self._stopped_since = (self._stopped_since or now) if stopped else None
        found = self.place(now)
        assert found is not None
        return found if found["overdue"] else None

    def place(self, now: float) -> dict[str, Any] | None:
        """Where it is, overdue or not; None if it has not said yet."""
        beat = self._beat
        if beat is None:
            return None
        limit_s = self._limit_s(beat.phase)
        stopped_s = now - self._stopped_since if self._stopped_since is not None else 0.0
        too_long = self._age_s > limit_s or stopped_s > min(STOPPED_S, self.limit_s or STOPPED_S)
        return {
            "phase": beat.phase,
            "part": beat.part,
            "step": beat.step,
            "count": beat.count,
            "seconds": round(self._age_s, 3),
            "limit_s": limit_s,
            "stopped": self._stopped_since is not None,
            "overdue": too_long and self.limit_s != 0,
        }

    def _limit_s(self, phase: str) -> float:
        if self.limit_s and phase in STEADY:
            return self.limit_s
        return max(PATIENCE_S.get(phase, max(PATIENCE_S.values())), FACTOR * self._longest_s.get(phase, 0.0))


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; a debugger that holds it does not count."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def dump_collectives(pipes: Iterable[Path]) -> None:
    """Ask NCCL's flight recorders to write what they have, by torch's pipes; where there are none, nothing is asked."""
    for pipe in pipes:
        with contextlib.suppress(OSError):  # none, or nobody who reads it
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, b"1")
            finally:
                os.close(descriptor)


class Stacks:
    """Python stacks of processes, written into files by py-spy, which reads also one that is stopped.

    Where it may not look into other processes (a container without CAP_SYS_PTRACE), a rank is asked by SIGUSR2 to tell
    of itself, which it can unless it is stopped.
    """

    def __init__(self, files: dict[int, Path]) -> None:
        """`files` by pid."""
        self._until = time.monotonic() + DUMP_S
        self.written = False
        """Whether more is not to come."""
        self._files = files
        self._asked: set[int] = set()
        self._readers: dict[int, subprocess.Popen[bytes]] = {}
        reader = py_spy()
        for pid, path in files.items():
            if reader is None:
                self._ask(pid)
                continue
            with contextlib.suppress(OSError), path.open("wb") as stream:
                command = [reader, "dump", "--nonblocking", "--pid", str(pid)]
                self._readers[pid] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.DEVNULL
                )

    def look(self) -> None:
        """See what has been read meanwhile; what takes too long is given up."""
        late = time.monotonic() > self._until
        for pid, reader in list(self._readers.items()):
            if late:
                reader.kill()
                reader.wait()
            code = reader.poll()
            if code is not None:
                del self._readers[pid]
            if code is not None and code != 0:
                self._ask(pid)
        self.written = late or (not self._readers and not self._asked)

    def _ask(self, pid: int) -> None:
        if pid not in self._asked and not is_stopped(pid) and listens(pid):
            self._asked.add(pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGUSR2)


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR2: without one the signal would end it. Linux's /proc tells."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)


def py_spy() -> str | None:
    """The reader that is installed beside this interpreter."""
    path = Path(sys.executable).with_name("py-spy")
    return str(path) if path.is_file() else None


def stack_in(path: Path) -> str | None:
    """What a file of `Stacks` says, the main thread's part first and not more than a screen or two."""
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return None
    main = text.find('"MainThread"')
    start = text.rfind("\n", 0, main) + 1 if main >= 0 else 0
    return text[start : start + STACK_CHARS] or None
