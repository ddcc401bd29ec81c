"""A cluster whose processes exist in an object of the test alone: the test says what becomes of them, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.contract import ProgressLine, RankExit, RunContract, StopRequest
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus, NodeReport, Spent
from orchestrator.errors import ExecutorError


@dataclass
class Gang:
    """What really became of an attempt."""

    contract: RunContract
    begun: bool = False
    stop: StopRequest | None = None
    exits: dict[int, RankExit] = field(default_factory=dict)
    told: list[ProgressLine] = field(default_factory=list)
    spent: Spent | None = None

    @property
    def ended(self) -> bool:
        return len(self.exits) == self.contract.plan.world_size


class World:
    """An executor whose processes exist in this object alone, and whose nodes come and go."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.all = tuple(nodes)
        self.up = {node.id for node in nodes}
        self.gangs: dict[str, Gang] = {}
        self.starts_fail = False
        self.now = 1000.0

    def nodes(self) -> list[Node]:
        return [node for node in self.all if node.id in self.up]

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        return {node: list(range(count)) for node, count in wanted.items() if node in self.up}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        if self.starts_fail:
            return {contract.run_id: ExecutorError("it did not start") for contract in contracts}
        for contract in contracts:
            self.gangs.setdefault(contract.run_id, Gang(contract))
        return {}

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        return {contract.run_id: self._status(contract, offsets[contract.run_id]) for contract in contracts}

    def _status(self, contract: RunContract, offset: int) -> AttemptStatus:
        gang = self.gangs.get(contract.run_id)
        reports = []
        for index, share in enumerate(contract.nodes):
            reachable = share.node in self.up
            exits = tuple(gang.exits[rank] for rank in contract.ranks_of(index) if rank in gang.exits) if gang else ()
            reports.append(
                NodeReport(
                    node_index=index,
                    reachable=reachable,
                    claimed=gang is not None,
                    begun=gang is not None and gang.begun,
                    ended=gang is not None and reachable and len(exits) == share.processes,
                    exits=exits if reachable else (),
                    progress=ProgressLine(time=self.now, phase="train", step=1) if gang and gang.begun else None,
                    # One a look, and a line is a byte: how often one tells what, rank 0's node decides.
                    news=tuple(gang.told[offset : offset + 1]) if gang and index == 0 and reachable else (),
                    offset=min(offset + 1, len(gang.told)) if gang and index == 0 and reachable else offset,
                    spent=gang.spent if gang and reachable else None,
                )
            )
        return AttemptStatus(reports=tuple(reports))

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        if contract.run_id in self.gangs:
            self.gangs[contract.run_id].stop = request

    def release(self, contract: RunContract) -> None:
        """Nothing is held."""

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:  # noqa: ARG002
        return b""

    def close(self) -> None:
        """Nothing is open."""
