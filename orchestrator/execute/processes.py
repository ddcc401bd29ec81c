"""Processes of an attempt, found by what they carry in their environment and told apart from reused pids."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from launch.attempt import ENV_RUN_ID


def inherited() -> dict[str, str]:
    """This process's environment as ranks get it: without what Ray put there for its workers."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "OMP_NUM_THREADS"}
    # `python` in a user's command is the one that runs the yard, whether or not its environment was activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def carrying(name: str, value: str) -> list[psutil.Process]:
    """Living processes of this host whose environment holds `name=value`, whoever started them and wherever they moved.

    Ranks have sessions of their own (torchelastic), so neither a process group nor a parent finds them all.
    """
    wanted = f"{name}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                process = psutil.Process(int(entry.name))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (OSError, psutil.Error):
            continue  # ended meanwhile, or another user's
    return found


def of_run(run_id: str) -> list[psutil.Process]:
    """Living processes of one attempt on this host."""
    return carrying(ENV_RUN_ID, run_id)


def of_any_run() -> list[int]:
    """Pids of this host's processes of all attempts, whosever they are."""
    wanted, found = f"{ENV_RUN_ID}=".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if entry.name.isdigit() and any(
                one.startswith(wanted) for one in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each; psutil refuses a pid that has been reused."""
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def end_all(name: str, value: str, timeout: float = 10.0) -> list[int]:
    """SIGKILL every process that carries `name=value`, and those that they start meanwhile.

    Returns:
        Pids that still live after `timeout` seconds (in an uninterruptible wait, for one); normally empty.
    """
    deadline = time.monotonic() + timeout
    while True:
        alive = carrying(name, value)
        if not alive or time.monotonic() > deadline:
            return [process.pid for process in alive]
        kill(alive)
        time.sleep(0.02)


def is_alive(pid: int, start_time: float) -> bool:
    """Whether the process that had `pid` and started at `start_time` (psutil's create_time) still runs."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - start_time) < 0.05
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def children_of(pid: int) -> list[psutil.Process]:
    """Living children of `pid`; none if it is gone."""
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def held_bytes(pid: int) -> int:
    """Memory that a process holds, its share of what others map, too; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
