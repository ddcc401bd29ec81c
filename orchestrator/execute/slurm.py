"""The nodes of one Slurm allocation: each attempt is a step of it, `srun`, with an agent on each of its nodes.

A step ends with the process that started it. So that process alone executes here, and what an earlier run of the same
job left behind is found by its files, or ended by its ranks' leash.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.attempt import AttemptFiles, write_atomically
from launch.contract import RunContract, StopRequest
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus, NodeReport, ProbeReport, ProbeRequest, StandbyReport
from orchestrator.errors import ExecutorError
from orchestrator.execute.local import free_ports, log_path
from orchestrator.execute.protocol import read_bytes, read_report

SILENT_S = 60.0
"""A node whose heartbeat stands still for so long is lost; a shared file system may show an old one for a while."""
PORTS_S = 30.0
PORTS = "import sys; from orchestrator.execute.local import free_ports; print(*free_ports(int(sys.argv[1])))"


@dataclass
class _Step:
    """An attempt that was started here."""

    srun: subprocess.Popen[bytes]
    beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    """By node of the gang: its last heartbeat, and when that was seen first."""


class SlurmExecutor:
    """The allocation of this process, which runs on the first of its nodes.

    Args:
        nodes: what there is; ids are Slurm's names of nodes.
        cpus: the allocation's, on each node.
        grace_s: how long Slurm waits between its SIGTERM and its SIGKILL.
    """

    def __init__(self, nodes: Sequence[Node], *, cpus: int, grace_s: float) -> None:
        self._nodes, self._cpus, self._grace_s = tuple(nodes), cpus, grace_s
        self._steps: dict[str, _Step] = {}
        self._lock = threading.Lock()
        self._end_by = float("inf")
        self.lost: set[str] = set()
        """Nodes that do not answer any more, by id."""

    def hurry(self, until: float) -> None:
        """From now on what is to stop is given no longer than to this Unix time."""
        self._end_by = until

    def nodes(self) -> list[Node]:
        return [node for node in self._nodes if node.id not in self.lost]

    def standbys(self) -> dict[str, StandbyReport]:
        return {}

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        here = self._nodes[0].id
        return {
            node: ports
            for node, count in wanted.items()
            if (ports := free_ports(count) if node == here else self._ports_of(node, count))
        }

    def _ports_of(self, node: str, count: int) -> list[int]:
        argv = [*self._srun([node]), sys.executable, "-c", PORTS, str(count)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PORTS_S)
        except (OSError, subprocess.SubprocessError):
            return []
        return [int(port) for port in done.stdout.split()]

    def probe(self, asked: Mapping[str, ProbeRequest]) -> dict[str, ProbeReport | None]:  # noqa: ARG002
        """None is begun: an allocation has no nodes to choose from."""
        return {}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        failed = {}
        for contract in contracts:
            try:
                with self._lock:
                    self._start(contract)
            except OSError as problem:
                failed[contract.run_id] = ExecutorError(
                    f"the step cannot be started: {problem}",
                    hint="is srun installed on this node, and the run's directory writable?",
                )
        return failed

    def _start(self, contract: RunContract) -> None:
        step = self._steps.get(contract.run_id)
        files = AttemptFiles(contract.run_dir)
        if (step is not None and step.srun.poll() is None) or files.agent(0).exists():
            return
        files.run_dir.mkdir(parents=True, exist_ok=True)
        contract.write(files.contract)
        nodes = [share.node for share in contract.nodes]
        agent = ["-m", "orchestrator.execute.slurm_agent", contract.run_dir, f"--grace={self._grace_s:g}"]
        with (files.run_dir / "srun.log").open("ab") as log:
            srun = subprocess.Popen(
                [*self._srun(nodes), "--kill-on-bad-exit=1", sys.executable, *agent],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._steps[contract.run_id] = _Step(srun)

    def _srun(self, nodes: Sequence[str]) -> list[str]:
        """A step with one task on each of `nodes` that has all that the allocation has there."""
        return [
            "srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}", f"--cpus-per-task={self._cpus}", "--overlap", "--export=ALL",
        ]  # fmt: skip

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        return {
            contract.run_id: AttemptStatus(
                reports=tuple(
                    self._report(contract, index, offsets.get(contract.run_id, 0))
                    for index in range(len(contract.nodes))
                )
            )
            for contract in contracts
        }

    def _report(self, contract: RunContract, index: int, offset: int) -> NodeReport:
        report = read_report(contract, index, offset, reachable=True)
        if report.ended or self._answers(contract, index, claimed=report.claimed):
            return report
        return read_report(contract, index, offset, reachable=False)

    def _answers(self, contract: RunContract, index: int, *, claimed: bool) -> bool:
        """Whether the agent of a part that has not ended may be alive."""
        step, node = self._steps.get(contract.run_id), contract.nodes[index].node
        if node not in {one.id for one in self._nodes}:
            return False  # of an earlier run, in another allocation
        if step is None or step.srun.poll() is not None:
            return not claimed  # what no agent has taken on is started again
        beat, now = read_bytes(AttemptFiles(contract.run_dir).heartbeat(index), 0, 64), time.monotonic()
        if index not in step.beats or step.beats[index][0] != beat:
            step.beats[index] = beat, now
        if claimed and now - step.beats[index][1] > SILENT_S:
            self.lost.add(node)
        return node not in self.lost

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        files = AttemptFiles(contract.run_dir)
        if files.run_dir.exists():
            bounded = request.model_copy(update={"deadline": min(request.deadline, self._end_by)})
            write_atomically(files.stop, bounded.model_dump_json())

    def release(self, contract: RunContract) -> None:
        """The step has ended by itself."""
        step = self._steps.pop(contract.run_id, None)
        if step is not None and step.srun.poll() is None:
            step.srun.kill()  # only where a node was lost, and with it one of its tasks
            step.srun.wait()

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:
        return read_bytes(log_path(contract, rank), offset, limit)

    def close(self) -> None:
        """Steps end with this process."""
