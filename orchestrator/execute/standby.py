"""Standbys: launchers that a node agent keeps with their imports done, so that an attempt starts in a second.

One serves one attempt, and only where nothing that is read at import would be another. They are bounded in number;
each is a process of some hundred megabytes that waits and does nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

from launch.attempt import ENV_HEARTBEAT, ENV_RESERVED, ENV_RUN_ID, RESERVED
from launch.engine_config import import_environment
from orchestrator.cluster.status import StandbyReport
from orchestrator.execute.gpus import local_gpus
from orchestrator.execute.processes import held_bytes, inherited

QUIET_S = 5.0
"""After a start the node's cores belong to the job that starts; importing takes some seconds of one."""
LATE = frozenset(
    {ENV_RUN_ID, ENV_HEARTBEAT, ENV_RESERVED, "OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"}
)
"""Variables that nothing reads at import, or that a rank sees to itself: a standby takes them from its order."""

Key = tuple[tuple[str, str], ...]


class Standbys:
    """At most `limit` idle standbys, for the environments that were asked for last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: OrderedDict[Key, subprocess.Popen[bytes]] = OrderedDict()
        self._wanted: OrderedDict[Key, dict[str, str]] = OrderedDict()
        self._quiet_until = 0.0

    def want(self, environment: dict[str, str]) -> None:
        """Have one for the launcher environment `environment` from now on; of too many, the oldest wish is dropped."""
        if self._limit == 0:
            return
        key = _key(environment)
        self._wanted[key] = environment
        self._wanted.move_to_end(key)
        while len(self._wanted) > self._limit:
            dropped, _ = self._wanted.popitem(last=False)
            self._end(dropped)

    def take(
        self, argv: tuple[str, ...], environment: dict[str, str], cwd: str, log: Path
    ) -> subprocess.Popen[bytes] | None:
        """A launcher that does what `argv` would, started from a standby; None if none is there for it."""
        self._quiet_until = time.monotonic() + QUIET_S
        standby = self._idle.pop(_key(environment), None)
        if standby is None or len(environment[ENV_RUN_ID]) > RESERVED:
            return None
        order = {"argv": argv, "env": environment, "cwd": cwd, "log": str(log)}
        assert standby.stdin is not None
        try:
            standby.stdin.write(json.dumps(order).encode() + b"\n")
            standby.stdin.close()
        except BrokenPipeError:
            standby.wait()
            return None
        return standby

    def tick(self) -> None:
        """Start one that is missing, if the node is quiet."""
        for key, standby in list(self._idle.items()):
            if standby.poll() is not None:
                del self._idle[key]
                del self._wanted[key]  # its imports failed, and would again; the attempt's own will say how
        if time.monotonic() < self._quiet_until:
            return
        for key, environment in self._wanted.items():
            if key not in self._idle:
                self._idle[key] = _start(environment)
                return

    def report(self) -> StandbyReport:
        """How many wait, and the memory they hold."""
        return StandbyReport(count=len(self._idle), bytes=sum(held_bytes(one.pid) for one in self._idle.values()))

    def close(self) -> None:
        """End all that wait."""
        for key in list(self._idle):
            self._end(key)

    def _end(self, key: Key) -> None:
        standby = self._idle.pop(key, None)
        if standby is not None:
            standby.kill()
            standby.wait()


def node_environment() -> dict[str, str]:
    """What this node's ranks are most likely to be started with: for the first standby, before any job has come."""
    return inherited() | import_environment("cuda" if local_gpus() else "cpu")


def _key(environment: dict[str, str]) -> Key:
    return tuple(sorted((name, value) for name, value in environment.items() if name not in LATE))


def _start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in environment.items() if name not in LATE}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.standby"],
        env={ENV_RESERVED: "-" * RESERVED, **env},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
