"""A Ray cluster: gangs reserved by placement groups pinned to the nodes that `decide` chose, started by node agents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.contract import RunContract, StopRequest
from orchestrator.cluster.gpus import gpu_type
from orchestrator.cluster.model import CORES_LABEL, MEMORY_LABEL, NAME_LABEL, Gpu, Node, Placement
from orchestrator.cluster.status import AttemptStatus, NodeReport, StandbyReport
from orchestrator.errors import ExecutorError
from orchestrator.execute.local import log_path
from orchestrator.execute.protocol import read_bytes, read_report
from orchestrator.execute.ray_agent import NodeAgent

NAMESPACE = "tuneyard"
CALL_S = 5.0
RESERVE_S = 30.0
NODE_ID_LABEL = "ray.io/node-id"
GPU_TYPE_LABEL = "ray.io/accelerator-type"


class RayExecutor:
    """Node id is Ray's node id; a node takes as many CPU ranks as it has Ray CPUs, and keeps so many `standbys`.

    Raises:
        ExecutorError: no Ray cluster answers at `address`.
    """

    def __init__(self, address: str, standbys: int = 0) -> None:
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RayError, RuntimeError) as problem:
            raise ExecutorError(
                f"no Ray cluster answers at {address}: {problem}", hint="start one with `tuneyard up`"
            ) from problem
        self._agents: dict[str, Any] = {}
        self._standbys = standbys

    def nodes(self) -> list[Node]:
        try:
            seen = ray.nodes()
        except RayError as problem:
            raise ExecutorError(f"the Ray cluster does not answer: {problem}") from problem
        nodes = [_node(entry) for entry in seen if entry["Alive"]]
        alive = {node.id for node in nodes}
        for gone in set(self._agents) - alive:
            del self._agents[gone]
        for node in nodes:
            if node.cpu_slots or node.gpus:
                self._agent(node.id)  # so that it is up before the first gang comes
        return nodes

    def standbys(self) -> dict[str, StandbyReport]:
        asked = {agent.standbys.remote(): node for node, agent in self._agents.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CALL_S) if asked else ([], [])
        found = {}
        for reference in answered:
            with contextlib.suppress(RayError):  # its next call tells who died
                found[asked[reference]] = ray.get(reference)
        return found

    def free_port(self, placement: Placement) -> int:
        return int(self._call(placement.shares[0].node, "free_port"))

    def start(self, contract: RunContract) -> None:
        self._reserve(contract)
        text = contract.model_dump_json()
        try:
            calls = [self._agent(share.node).start.remote(text, index) for index, share in enumerate(contract.nodes)]
            ray.get(calls, timeout=CALL_S * 4)
        except (RayError, OSError) as problem:
            raise ExecutorError(f"the gang of {contract.run_id} could not be started: {problem}") from problem

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        asked: dict[Any, tuple[RunContract, int]] = {}
        for contract in contracts:
            text, offset = contract.model_dump_json(), offsets.get(contract.run_id, 0)
            for index, share in enumerate(contract.nodes):
                if share.node in self._agents:
                    asked[self._agents[share.node].report.remote(text, index, offset)] = (contract, index)
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CALL_S) if asked else ([], [])
        known: dict[tuple[str, int], NodeReport] = {}
        for reference in answered:
            contract, index = asked[reference]
            try:
                known[contract.run_id, index] = ray.get(reference)
            except RayError:
                self._agents.pop(contract.nodes[index].node, None)
        return {
            contract.run_id: AttemptStatus(
                reports=tuple(
                    known.get((contract.run_id, index))
                    or _unreachable(contract, index, offsets.get(contract.run_id, 0))
                    for index in range(len(contract.nodes))
                )
            )
            for contract in contracts
        }

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        for share in contract.nodes:
            if share.node in self._agents:
                self._agents[share.node].stop.remote(contract.model_dump_json(), request.model_dump_json())

    def release(self, contract: RunContract) -> None:
        try:
            remove_placement_group(get_placement_group(contract.run_id))
        except (ValueError, RayError):
            return  # there is none any more

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:
        index, seen = 0, contract.nodes[0].processes
        while rank is not None and rank >= seen and index + 1 < len(contract.nodes):
            index += 1
            seen += contract.nodes[index].processes
        node = contract.nodes[index].node
        if node in self._agents:
            try:
                return bytes(self._call(node, "read_log", contract.model_dump_json(), rank, offset, limit))
            except ExecutorError:
                pass  # the node is gone; its directory may still be in sight
        return read_bytes(log_path(contract, rank), offset, limit)

    def close(self) -> None:
        ray.shutdown()

    def _agent(self, node_id: str) -> Any:
        """The node's agent, made if there is none; made again if it died."""
        if node_id not in self._agents:
            actor = ray.remote(NodeAgent)
            self._agents[node_id] = actor.options(
                name=f"node-agent-{node_id}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=8,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(self._standbys)
        return self._agents[node_id]

    def _call(self, node_id: str, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._agent(node_id), method).remote(*arguments), timeout=CALL_S)
        except (RayError, GetTimeoutError) as problem:
            self._agents.pop(node_id, None)
            raise ExecutorError(f"the agent of node {node_id} does not answer: {problem}") from problem

    def _reserve(self, contract: RunContract) -> None:
        """A placement group that holds the gang's slots, so that nobody else on the Ray cluster gets them."""
        kind = "GPU" if contract.plan.device == "cuda" else "CPU"
        try:
            get_placement_group(contract.run_id)
            return
        except ValueError:
            pass
        group = placement_group(
            [{kind: share.processes} for share in contract.nodes],
            strategy="PACK",
            name=contract.run_id,
            lifetime="detached",
            bundle_label_selector=[{NODE_ID_LABEL: share.node} for share in contract.nodes],
        )
        if not group.wait(RESERVE_S):
            remove_placement_group(group)
            raise ExecutorError(
                f"Ray did not reserve the slots of {contract.run_id} within {RESERVE_S:.0f} s",
                hint="does something else use this Ray cluster?",
            )


def _unreachable(contract: RunContract, index: int, offset: int) -> NodeReport:
    """What the attempt's directory shows, where it is shared, of a node that does not answer.

    The node's part counts as ended once each of its ranks has said how it ended.
    """
    report = read_report(contract, index, offset, reachable=False)
    told = len(report.exits) == contract.nodes[index].processes
    return report.model_copy(update={"ended": report.ended or told})


def _memory(resources: dict[str, Any], labels: dict[str, str]) -> int | None:
    """What the yard has written down, else what Ray was told or has found to be left for tasks."""
    known = labels.get(MEMORY_LABEL) or resources.get("memory")
    return int(known) if known is not None else None


def _node(entry: dict[str, Any]) -> Node:
    resources, labels = entry["Resources"], dict(entry.get("Labels") or {})
    kind = labels.get(GPU_TYPE_LABEL) or next(
        (name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")), "GPU"
    )
    known = gpu_type(kind)
    cpus = int(resources.get("CPU", 0))
    return Node(
        id=entry["NodeID"],
        name=labels.get(NAME_LABEL) or entry["NodeManagerHostname"],
        address=entry["NodeManagerAddress"],
        cores=int(labels.get(CORES_LABEL, max(1, cpus))),
        cpu_slots=cpus,
        memory_bytes=_memory(resources, labels),
        gpus=tuple(
            Gpu(index=index, type=kind, memory_bytes=known.memory_bytes if known is not None else None)
            for index in range(int(resources.get("GPU", 0)))
        ),
        labels=labels,
    )
