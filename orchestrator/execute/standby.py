"""Standbys: processes that a node agent keeps with a launcher's imports done, so that an attempt starts in a second.

One serves any number of attempts, but only those for which nothing that is read at import would be another. They are
bounded in number; each holds some hundred megabytes, which its forks share, and does nothing in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from launch.attempt import ENV_HEARTBEAT, ENV_RESERVED, ENV_RUN_ID, RESERVED
from launch.engine_config import import_environment
from orchestrator.cluster.status import StandbyReport
from orchestrator.execute.gpus import local_gpus
from orchestrator.execute.processes import held_bytes, inherited, of_run

QUIET_S = 5.0
"""After a start the node's cores belong to the job that starts; importing takes some seconds of one."""
MOST_AHEAD = 4
"""Orders that wait for a standby's imports; more may not fit into the pipe."""
LATE = frozenset(
    {ENV_RUN_ID, ENV_HEARTBEAT, ENV_RESERVED, "OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"}
)
"""Variables that nothing reads at import, or that a rank sees to itself: a standby takes them from its order."""

Key = tuple[tuple[str, str], ...]


class Standby:
    """One process of `launch.standby`, for one environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        env = {name: value for name, value in environment.items() if name not in LATE}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.standby"],
            env={ENV_RESERVED: "-" * RESERVED, **env},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.ready = False
        self.ended: dict[int, int] = {}
        """Number of an order → its launcher's exit status."""
        self._orders = 0
        self._unread = b""
        self._closed = False
        self._hearing = threading.Lock()  # an agent's watch and whoever asks for a report both listen

    def order(self, argv: tuple[str, ...], environment: dict[str, str], cwd: str, log: Path) -> Ordered | None:
        """A launcher that does what `argv` would; None if the standby has died, or is not to be waited for.

        One that still imports is: each rank would import as much by itself, on the same cores.
        """
        if not self.ready and self._orders >= MOST_AHEAD:
            return None
        self._orders += 1
        order = {"number": self._orders, "argv": argv, "env": environment, "cwd": cwd, "log": str(log)}
        return Ordered(self, self._orders, environment[ENV_RUN_ID]) if self.tell(order) else None

    def tell(self, message: dict[str, Any]) -> bool:
        """Whether it could be told: it has died if not."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # a ValueError: it has been closed
            return False
        return True

    def alive(self) -> bool:
        """Whether it is there, after hearing what it has said."""
        assert self.process.stdout is not None
        with self._hearing:
            if self._closed:
                return False
            running = self.process.poll() is None  # before reading: its last words are heard, too
            while read := self.process.stdout.read(1 << 16):
                *lines, self._unread = (self._unread + read).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    if "ready" in said:
                        self.ready = True
                    else:
                        self.ended[said["number"]] = said["code"]
            return running

    def close(self) -> None:
        """End it; its launchers go on."""
        self.process.kill()
        self.process.wait()
        with self._hearing:
            self._closed = True
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Ordered:
    """A launcher that a standby forked: what a Popen is to one that was started."""

    def __init__(self, standby: Standby, number: int, run_id: str) -> None:
        self._standby, self._number, self._run_id = standby, number, run_id
        self._cancelled = False

    def cancel(self) -> None:
        """Have it not begin, if it has not; its status is that of SIGTERM then."""
        if not self._cancelled:
            self._cancelled = True
            self._standby.tell({"cancel": self._number})

    def poll(self) -> int | None:
        """The exit status; None while it runs. 1 if the standby died first: then nobody knows."""
        if not self._standby.alive() and self._number not in self._standby.ended and not of_run(self._run_id):
            return 1
        return self._standby.ended.get(self._number)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._run_id, timeout or 0)
            time.sleep(0.02)
        return code


class Standbys:
    """At most `limit` standbys, for the environments that were asked for last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._wanted: OrderedDict[Key, dict[str, str]] = OrderedDict()
        self._there: dict[Key, Standby] = {}
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
            if dropped in self._there:
                self._there.pop(dropped).close()

    def launch(self, argv: tuple[str, ...], environment: dict[str, str], cwd: str, log: Path) -> Ordered | None:
        """A launcher that does what `argv` would, forked from a standby; None if there is none for it."""
        self._quiet_until = time.monotonic() + QUIET_S
        standby = self._there.get(_key(environment))
        if standby is None or not standby.alive() or len(environment[ENV_RUN_ID]) > RESERVED:
            return None
        return standby.order(argv, environment, cwd, log)

    def tick(self) -> None:
        """Start one that is missing, if the node is quiet."""
        for key, standby in list(self._there.items()):
            if not standby.alive():
                self._there.pop(key).close()
                if not standby.ready:
                    del self._wanted[key]  # its imports failed, and would again; the attempt's own will say how
        if time.monotonic() < self._quiet_until:
            return
        for key, environment in self._wanted.items():
            if key not in self._there:
                self._there[key] = Standby(environment)
                return

    def report(self) -> StandbyReport:
        """How many are ready, and the memory of all."""
        there = list(self._there.values())
        return StandbyReport(
            count=sum(one.alive() and one.ready for one in there),
            bytes=sum(held_bytes(one.process.pid) for one in there),
        )

    def close(self) -> None:
        """End all of them."""
        self._wanted.clear()
        for key in list(self._there):
            self._there.pop(key).close()


def node_environment() -> dict[str, str]:
    """What this node's ranks are most likely to be started with: for the first standby, before any job has come."""
    return inherited() | import_environment("cuda" if local_gpus() else "cpu")


def _key(environment: dict[str, str]) -> Key:
    return tuple(sorted((name, value) for name, value in environment.items() if name not in LATE))
