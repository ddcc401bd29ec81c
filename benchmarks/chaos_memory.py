"""A cgroup around one process of which another one takes all the memory; for benchmarks.chaos_faults."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLLOW_S = 3.0
"""The node's agent follows a rank into another cgroup at its next heartbeat, which is late on a loaded machine."""
SPARE = 24 << 20
"""What a rank whose memory runs out may still take."""
FILL_S = 60.0

EATER = """
import os, pathlib, sys, time
group, victim = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(group / "cgroup.procs").write_text(str(os.getpid()))
held = []
while pathlib.Path(f"/proc/{victim}/stat").exists() and ") Z" not in pathlib.Path(f"/proc/{victim}/stat").read_text():
    held.append(b"x" * (1 << 20))
    time.sleep(0.01)
"""


class Cannot(Exception):
    """This kind of fault cannot be done on this machine."""


@dataclass(frozen=True)
class Container:
    group: Path
    pid: int

    def fill(self) -> None:
        """Returns once the kernel has killed the process, or FILL_S have passed."""
        Path(f"/proc/{self.pid}/oom_score_adj").write_text("1000")  # it, and not who eats
        eater = subprocess.Popen([sys.executable, "-c", EATER, str(self.group), str(self.pid)])
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                eater.wait(FILL_S)
        finally:
            eater.kill()
            eater.wait()


@contextmanager
def a_container(pid: int) -> Iterator[Container]:
    """Moves process `pid` into a cgroup of memory, version 1, in which it may take SPARE more than it has.

    Raises:
        Cannot: there is no such thing here.
    """
    with a_cgroup() as group:
        (group / "cgroup.procs").write_text(str(pid))
        time.sleep(FOLLOW_S)
        held = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(held + SPARE))
        yield Container(group, pid)


@contextmanager
def a_cgroup() -> Iterator[Path]:
    """A cgroup of memory, version 1, below this process's own."""
    listed = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, kind, path in listed if "memory" in kind.split(",")), None)
    if own is None:
        raise Cannot("there is no memory controller of cgroup version 1")
    group = Path("/sys/fs/cgroup/memory") / own.strip("/") / f"tuneyard-chaos-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as problem:
        raise Cannot(f"a cgroup cannot be made here: {problem.strerror}") from problem
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            group.rmdir()
