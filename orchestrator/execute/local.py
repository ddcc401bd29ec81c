"""Processes on this machine, no Ray: one detached agent process an attempt."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from launch.attempt import AttemptFiles, write_atomically
from launch.checkpoint.copies import SWEEP_S, sweep
from launch.contract import RunContract, StopRequest
from launch.instructions import multiplies_bf16
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus, NodeReport, ProbeCheck, ProbeReport, ProbeRequest, StandbyReport
from orchestrator.errors import ExecutorError
from orchestrator.execute.gpus import local_gpus
from orchestrator.execute.memory import host_memory
from orchestrator.execute.probes import Probes
from orchestrator.execute.processes import children_of, held_bytes, is_alive, of_run
from orchestrator.execute.protocol import read_bytes, read_report
from orchestrator.execute.request import build_request
from orchestrator.execute.standby import QUIET_S

MIN_SLOTS = 4  # so that small gangs can be tried on a small machine; their threads share the cores


def cpu_slots(cores: int, configured: int | None) -> int:
    """Ranks a node without GPUs takes at a time."""
    return configured or max(cores, MIN_SLOTS)


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nothing on this machine listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    return free_ports(1)[0]


def probed(probes: Probes, request: ProbeRequest) -> ProbeReport | None:
    """Begin a probe of this machine, unless it has begun; what it has found, once it has."""
    try:
        told = probes.ask(request.id, request.options)
    except OSError as problem:
        return ProbeReport(checks=(ProbeCheck(name="probe", ok=False, told=f"it cannot be started: {problem}"),))
    return None if told is None else ProbeReport.model_validate_json(told)


class LocalExecutor:
    """This machine as a cluster of one node.

    Args:
        slots: ranks it takes on CPU; None means its cores, and at least 4.
        owned: attempts end when this process does (an embedded `run`) instead of outliving it.
        standbys: agents that are kept with a standby for the next attempts.
        memory_gb: host memory that ranks may have together, in 10^9 bytes; None means what execute.memory finds.
    """

    def __init__(
        self, slots: int | None = None, *, owned: bool = False, standbys: int = 0, memory_gb: float | None = None
    ) -> None:
        self._slots = slots
        self._memory_gb = memory_gb
        self._owned = owned
        self._children: list[subprocess.Popen[bytes]] = []
        self._standbys = standbys
        self._spares: list[subprocess.Popen[bytes]] = []
        self._quiet_until = 0.0
        self._probes = Probes()
        self._sweep_at = 0.0
        self._lock = threading.Lock()  # the API asks for nodes, too

    def nodes(self) -> list[Node]:
        self._keep_spares()
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_S
            sweep(time.time())
        cores = os.cpu_count() or 1
        return [
            Node(
                id="local",
                name=platform.node() or "local",
                address="127.0.0.1",
                cores=cores,
                cpu_slots=cpu_slots(cores, self._slots),
                memory_bytes=host_memory(self._memory_gb),
                gpus=local_gpus(),
                bf16=multiplies_bf16(),
            )
        ]

    def standbys(self) -> dict[str, StandbyReport]:
        with self._lock:
            held = [child.pid for spare in self._spares for child in children_of(spare.pid)]
            ready = sum(map(_is_ready, self._spares))
        return {"local": StandbyReport(count=ready, bytes=sum(map(held_bytes, held)))}

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        return {node: free_ports(count) for node, count in wanted.items()}

    def probe(self, asked: Mapping[str, ProbeRequest]) -> dict[str, ProbeReport | None]:
        return {node: probed(self._probes, request) for node, request in asked.items()}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        failed = {}
        for contract in contracts:
            try:
                self._start(contract)
            except OSError as problem:
                failed[contract.run_id] = ExecutorError(
                    f"the attempt's directory or agent cannot be made: {problem}",
                    hint="is the disk full, or TUNEYARD_HOME not writable?",
                )
        return failed

    def _start(self, contract: RunContract) -> None:
        files = AttemptFiles(contract.run_dir)
        if files.agent(0).exists():
            return
        me = psutil.Process()
        owner = (me.pid, me.create_time()) if self._owned else None
        files.run_dir.mkdir(parents=True, exist_ok=True)
        request = files.run_dir / "request.json"
        write_atomically(request, build_request(contract, 0, owner=owner).dumps())
        self._quiet_until = time.monotonic() + QUIET_S
        if contract.spec is None or not self._hand_to_spare(request):
            self._children.append(_agent(str(request), stdin=subprocess.DEVNULL))

    def _hand_to_spare(self, request: Path) -> bool:
        """Whether an agent that waits has got the request."""
        with self._lock:
            for spare in [spare for spare in self._spares if _is_ready(spare)]:
                self._spares.remove(spare)
                assert spare.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has died; the next one, then
                    spare.stdin.write(f"{request}\n".encode())
                    spare.stdin.close()
                    self._children.append(spare)
                    return True
        return False

    def _keep_spares(self) -> None:
        with self._lock:
            self._spares = [spare for spare in self._spares if spare.poll() is None]
            if len(self._spares) < self._standbys and time.monotonic() >= self._quiet_until:
                self._spares.append(_agent("--spare", stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        self._children = [child for child in self._children if child.poll() is None]  # no zombies
        return {
            contract.run_id: AttemptStatus(reports=(self._report(contract, offsets.get(contract.run_id, 0)),))
            for contract in contracts
        }

    def _report(self, contract: RunContract, offset: int) -> NodeReport:
        report = read_report(contract, 0, offset, reachable=True)
        if report.ended or not report.claimed:
            return report
        claim = json.loads(AttemptFiles(contract.run_dir).agent(0).read_bytes() or b"{}")  # empty: being written
        if not claim or is_alive(claim["pid"], claim["start_time"]):
            return report
        # The agent died. Its ranks end by their leash; here they can be counted.
        gone = not of_run(contract.run_id)
        return read_report(contract, 0, offset, reachable=False).model_copy(update={"ended": gone})

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        files = AttemptFiles(contract.run_dir)
        if files.run_dir.exists():
            write_atomically(files.stop, request.model_dump_json())

    def release(self, contract: RunContract) -> None:
        """Nothing is reserved outside the database."""

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:
        return read_bytes(log_path(contract, rank), offset, limit)

    def close(self) -> None:
        """Agents of attempts are detached; those that wait for one end."""
        for spare in self._spares:
            assert spare.stdin is not None
            spare.stdin.close()
            spare.wait()
        self._spares.clear()


def _is_ready(spare: subprocess.Popen[bytes]) -> bool:
    """Whether it has said so; that a dead one seems to have is found out when it is written to."""
    assert spare.stdout is not None
    return bool(select.select([spare.stdout], [], [], 0)[0])


def _agent(argument: str, stdin: int, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.execute.agent", argument],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def log_path(contract: RunContract, rank: int | None) -> Path:
    """A rank's log, or the first node's launcher's."""
    files = AttemptFiles(contract.run_dir)
    return files.launcher_log(0) if rank is None else files.log(rank)
