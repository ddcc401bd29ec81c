"""Processes on this machine, no Ray: one detached agent process an attempt."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from launch.attempt import AttemptFiles, write_atomically
from launch.contract import RunContract, StopRequest
from orchestrator.cluster.model import Node, Placement
from orchestrator.cluster.status import AttemptStatus, NodeReport
from orchestrator.errors import ExecutorError
from orchestrator.execute.gpus import local_gpus
from orchestrator.execute.processes import is_alive, of_run
from orchestrator.execute.protocol import read_bytes, read_report
from orchestrator.execute.request import build_request

MIN_SLOTS = 4  # so that small gangs can be tried on a small machine; their threads share the cores


def cpu_slots(cores: int, configured: int | None) -> int:
    """Ranks a node without GPUs takes at a time."""
    return configured or max(cores, MIN_SLOTS)


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class LocalExecutor:
    """This machine as a cluster of one node.

    Args:
        slots: ranks it takes on CPU; None means its cores, and at least 4.
        owned: attempts end when this process does (an embedded `run`) instead of outliving it.
    """

    def __init__(self, slots: int | None = None, *, owned: bool = False) -> None:
        self._slots = slots
        self._owned = owned
        self._children: list[subprocess.Popen[bytes]] = []

    def nodes(self) -> list[Node]:
        cores = os.cpu_count() or 1
        return [
            Node(
                id="local",
                name=platform.node() or "local",
                address="127.0.0.1",
                cores=cores,
                cpu_slots=cpu_slots(cores, self._slots),
                gpus=local_gpus(),
            )
        ]

    def free_port(self, placement: Placement) -> int:  # noqa: ARG002 - there is one node
        return free_port()

    def start(self, contract: RunContract) -> None:
        files = AttemptFiles(contract.run_dir)
        if files.agent(0).exists():
            return
        me = psutil.Process()
        owner = (me.pid, me.create_time()) if self._owned else None
        try:
            files.run_dir.mkdir(parents=True, exist_ok=True)
            request = files.run_dir / "request.json"
            write_atomically(request, build_request(contract, 0, owner=owner).dumps())
            agent = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.execute.agent", str(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as problem:
            raise ExecutorError(
                f"the attempt's directory or agent cannot be made: {problem}",
                hint="is the disk full, or TUNEYARD_HOME not writable?",
            ) from problem
        self._children.append(agent)

    def poll(self, contracts: Sequence[RunContract]) -> dict[str, AttemptStatus]:
        self._children = [child for child in self._children if child.poll() is None]  # no zombies
        return {contract.run_id: AttemptStatus(reports=(self._report(contract),)) for contract in contracts}

    def _report(self, contract: RunContract) -> NodeReport:
        report = read_report(contract, 0, reachable=True)
        if report.ended or not report.claimed:
            return report
        claim = json.loads(AttemptFiles(contract.run_dir).agent(0).read_bytes() or b"{}")  # empty: being written
        if not claim or is_alive(claim["pid"], claim["start_time"]):
            return report
        # The agent died. Its ranks end by their leash; here they can be counted.
        gone = not of_run(contract.run_id)
        return read_report(contract, 0, reachable=False).model_copy(update={"ended": gone})

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        files = AttemptFiles(contract.run_dir)
        if files.run_dir.exists():
            write_atomically(files.stop, request.model_dump_json())

    def release(self, contract: RunContract) -> None:
        """Nothing is reserved outside the database."""

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:
        return read_bytes(log_path(contract, rank), offset, limit)

    def close(self) -> None:
        """Agents are detached; there is nothing to let go of."""


def log_path(contract: RunContract, rank: int | None) -> Path:
    """A rank's log, or the first node's launcher's."""
    files = AttemptFiles(contract.run_dir)
    return files.launcher_log(0) if rank is None else files.log(rank)
