"""The node agent of a Ray yard: one detached actor a node, which holds that node's part of every attempt.

It lives as long as its raylet. When the raylet is gone the node counts as lost, so the agent ends what it holds and
leaves; ranks that outlive it are ended by their leash, and so are those of a node that is cut off (contact.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import ray

from launch.attempt import AttemptFiles, write_atomically
from launch.checkpoint.copies import SWEEP_S, sweep
from launch.contract import RunContract
from orchestrator.cluster.status import NodeReport, ProbeReport, ProbeRequest, StandbyReport
from orchestrator.execute.contact import Contact
from orchestrator.execute.local import free_ports, log_path, probed
from orchestrator.execute.member import Member
from orchestrator.execute.probes import Probes
from orchestrator.execute.protocol import read_bytes, read_report
from orchestrator.execute.request import build_request
from orchestrator.execute.standby import Standbys, node_environment

TICK_S = 0.1


class NodeAgent:
    """The actor's class; `RayExecutor` turns it into one."""

    def __init__(self, standbys: int = 0) -> None:
        self._raylet = os.getppid()
        self._contact = Contact(ray.get_runtime_context().gcs_address)
        self._members: dict[str, Member] = {}
        self._seen: set[str] = set()
        """Runs that it has started, or has seen not to be left behind by another agent."""
        self._lock = threading.Lock()
        self._probes = Probes()
        self._standbys = Standbys(standbys)
        self._standbys.want(node_environment())
        self._sweep_at = 0.0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def ping(self) -> int:
        """The agent's pid."""
        return os.getpid()

    def free_ports(self, count: int) -> list[int]:
        return free_ports(count)

    def probe(self, request: ProbeRequest) -> ProbeReport | None:
        """What a probe of this node has found; it is begun if it was not."""
        return probed(self._probes, request)

    def start(self, parts: Sequence[tuple[str, int]]) -> list[str | None]:
        """Start this node's parts of attempts, each a contract as JSON and the node's index in it; nothing is done for
        one that was started before. Returns of each what went wrong, if anything did."""
        return [self._start(RunContract.model_validate_json(text), index) for text, index in parts]

    def _start(self, contract: RunContract, node_index: int) -> str | None:
        member = Member(build_request(contract, node_index))
        with self._lock:
            if contract.run_id not in self._members:
                try:
                    if member.start(self._standbys):
                        self._members[contract.run_id] = member
                except OSError as problem:
                    return str(problem)
        return None

    def report(self, parts: Sequence[tuple[str, int, int]]) -> list[NodeReport]:
        """What is known of this node's parts, each a contract as JSON, the node's index in it, and from which byte of
        rank 0's progress on there may be news. What an agent before this one has left behind is ended."""
        self._contact.heard()
        contracts = [(RunContract.model_validate_json(text), index, offset) for text, index, offset in parts]
        for contract, index, _ in contracts:
            self._inherit(contract, index)
        return [read_report(contract, index, offset, reachable=True) for contract, index, offset in contracts]

    def _inherit(self, contract: RunContract, node_index: int) -> None:
        with self._lock:
            if contract.run_id in self._seen:
                return
            self._seen.add(contract.run_id)
            member = Member.left_behind(build_request(contract, node_index))
            if member is not None:
                self._members[contract.run_id] = member

    def standbys(self) -> StandbyReport:
        with self._lock:
            return self._standbys.report()

    def stop(self, contract_json: str, request_json: str) -> None:
        """Pass the stop message to the ranks here."""
        files = AttemptFiles(RunContract.model_validate_json(contract_json).run_dir)
        if files.run_dir.exists():
            write_atomically(files.stop, request_json)

    def read_log(self, contract_json: str, rank: int | None, offset: int, limit: int) -> bytes:
        return read_bytes(log_path(RunContract.model_validate_json(contract_json), rank), offset, limit)

    def _watch(self) -> None:
        while os.getppid() == self._raylet:
            self._tick()
            with self._lock:
                self._standbys.tick()
            if time.monotonic() >= self._sweep_at:
                sweep(time.time())
                self._sweep_at = time.monotonic() + SWEEP_S
            time.sleep(TICK_S)
        self._standbys.close()
        self._probes.close()
        self._contact.close()
        # The node is lost: another attempt may start as soon as these ranks are gone, so they go now.
        for member in list(self._members.values()):
            member.lose_node()
        while self._members:
            self._tick()
            time.sleep(TICK_S)
        os._exit(0)

    def _tick(self) -> None:
        with self._lock:
            members = list(self._members.items())
        for run_id, member in members:
            if member.tick(self._contact.last):
                with self._lock:
                    self._members.pop(run_id, None)
