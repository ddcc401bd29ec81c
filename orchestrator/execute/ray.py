"""A Ray cluster: gangs reserved by placement groups pinned to the nodes that `decide` chose, started by node agents."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayError, RaySystemError
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.contract import RunContract, StopRequest
from orchestrator.cluster.gpus import gpu_type
from orchestrator.cluster.model import BF16_LABEL, CORES_LABEL, MEMORY_LABEL, NAME_LABEL, Gpu, Node
from orchestrator.cluster.status import AttemptStatus, NodeReport, ProbeReport, ProbeRequest, StandbyReport
from orchestrator.errors import ExecutorError
from orchestrator.execute.local import log_path
from orchestrator.execute.protocol import read_bytes, read_report
from orchestrator.execute.ray_agent import NodeAgent

NAMESPACE = "tuneyard"
CALL_S = 5.0
START_S = 4 * CALL_S
RESERVE_S = 30.0
SOON_S = 1.0
NODE_ID_LABEL = "ray.io/node-id"
GPU_TYPE_LABEL = "ray.io/accelerator-type"


class RayExecutor:
    """Node id is Ray's node id; a node takes as many CPU ranks as it has Ray CPUs, and keeps so many `standbys`.

    `agent` is the class of the nodes' agents.

    Raises:
        ExecutorError: no Ray cluster answers at `address`.
    """

    def __init__(self, address: str, standbys: int = 0, agent: type[NodeAgent] = NodeAgent) -> None:
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RayError, RuntimeError) as problem:
            raise ExecutorError(
                f"no Ray cluster answers at {address}: {problem}", hint="start one with `tuneyard up`"
            ) from problem
        self._agents: dict[str, Any] = {}
        self._pings: dict[str, Any] = {}
        """By node: the answer of an agent that has not given one yet."""
        self._up: set[str] = set()
        """Nodes whose agent has answered."""
        self._dead_found: dict[str, int] = {}
        self._met = False
        self._standbys = standbys
        self._agent_class = agent
        self._asked: Future[list[dict[str, Any]]] | None = None
        self._lock = threading.Lock()

    @property
    def head(self) -> str:
        """host:port of Ray's."""
        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Node]:
        seen = self._seen()
        nodes = [_node(entry) for entry in seen if entry["Alive"]]
        alive = {node.id for node in nodes}
        for gone in set(self._agents) - alive:
            self._lose(gone)
        for node in nodes:
            if node.cpu_slots or node.gpus:
                self._agent(node.id)
        # For seconds Ray takes a node that has died for alive. A gang that is sent there waits in vain.
        self._hear(0.0 if self._met else CALL_S)
        self._met = True
        return [node for node in nodes if node.id in self._up or not (node.cpu_slots or node.gpus)]

    def _seen(self) -> list[dict[str, Any]]:
        """What Ray's head tells of nodes. While it is away Ray waits for it, for minutes: we do not.

        Raises:
            ExecutorError: it does not answer.
        """
        with self._lock:
            if self._asked is None:
                self._asked = Future()
                threading.Thread(target=_ask, args=[self._asked], name="nodes", daemon=True).start()
            asked = self._asked
        try:
            return asked.result(CALL_S)
        except TimeoutError:
            raise ExecutorError(
                f"Ray's head has not answered for {CALL_S:.0f} s", hint="`tuneyard up` starts it again if it has died"
            ) from None
        except RayError as problem:
            raise ExecutorError(f"the Ray cluster does not answer: {problem}") from problem
        finally:
            with self._lock:
                if asked.done() and self._asked is asked:
                    self._asked = None

    def standbys(self) -> dict[str, StandbyReport]:
        asked = {agent.standbys.remote(): node for node, agent in list(self._agents.items())}
        return {asked[reference]: report for reference, report in self._answers(asked, CALL_S).items()}

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        asked = {self._agent(node).free_ports.remote(count): node for node, count in wanted.items()}
        return {asked[reference]: ports for reference, ports in self._answers(asked, CALL_S).items()}

    def probe(self, asked: Mapping[str, ProbeRequest]) -> dict[str, ProbeReport | None]:
        sent = {self._agent(node).probe.remote(request): node for node, request in asked.items()}
        return {sent[reference]: report for reference, report in self._answers(sent, CALL_S).items()}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        failed: dict[str, ExecutorError] = {}
        told: dict[Any, tuple[str, list[RunContract]]] = {}
        for reserved in self._reserved(contracts, failed):
            for node, parts in _by_node(reserved).items():
                reference = self._agent(node).start.remote([(one.model_dump_json(), index) for one, index in parts])
                told[reference] = node, [contract for contract, _ in parts]
        answers = self._answers({reference: node for reference, (node, _) in told.items()}, START_S)
        for reference, (node, some) in told.items():
            silent = [f"the agent of node {node} does not answer"] * len(some)
            for contract, problem in zip(some, answers.get(reference, silent), strict=True):
                if problem is not None:
                    what = f"the gang of {contract.run_id} could not be started: {problem}"
                    failed[contract.run_id] = ExecutorError(what)
        return failed

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        parts = {node: some for node, some in _by_node(contracts).items() if node in self._agents}
        asked = {
            self._agents[node].report.remote(
                [(contract.model_dump_json(), index, offsets.get(contract.run_id, 0)) for contract, index in some]
            ): node
            for node, some in parts.items()
        }
        known: dict[tuple[str, int], NodeReport] = {
            (contract.run_id, index): report
            for reference, reports in self._answers(asked, CALL_S).items()
            for (contract, index), report in zip(parts[asked[reference]], reports, strict=True)
        }
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

    def _reserved(
        self, contracts: Sequence[RunContract], failed: dict[str, ExecutorError]
    ) -> Iterator[list[RunContract]]:
        """Reserve the slots of gangs, and yield those that have got theirs, once all have or SOON_S have passed: none
        waits long for another, or for a node that is lost meanwhile. Why one has none goes into `failed`, by run."""
        groups = []
        for contract in contracts:
            try:
                groups.append((contract, _reserve(contract)))
            except (RayError, ValueError) as problem:
                failed[contract.run_id] = ExecutorError(f"Ray reserves nothing for {contract.run_id}: {problem}")
        # Not before all are asked for: Ray makes groups more slowly while it is asked whether they are ready.
        asked = {group.ready(): (contract, group) for contract, group in groups}
        deadline = time.monotonic() + RESERVE_S
        while asked and (left := deadline - time.monotonic()) > 0:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=min(left, SOON_S))
            reserved = []
            for reference in answered:
                contract, _ = asked.pop(reference)
                try:
                    ray.get(reference)
                    reserved.append(contract)
                except RayError as problem:
                    failed[contract.run_id] = ExecutorError(
                        f"the slots of {contract.run_id} were given away: {problem}"
                    )
            yield reserved
            for reference, (contract, group) in list(asked.items()):
                lost = [share.node for share in contract.nodes if share.node not in self._up]
                if lost:
                    del asked[reference]
                    remove_placement_group(group)
                    failed[contract.run_id] = ExecutorError(
                        f"{contract.run_id} was to start on a node that is lost by now ({', '.join(lost)})",
                        hint="nothing to do: its job goes back to the queue, and starts elsewhere",
                    )
        for contract, group in asked.values():
            remove_placement_group(group)
            failed[contract.run_id] = ExecutorError(
                f"Ray did not reserve the slots of {contract.run_id} within {RESERVE_S:.0f} s",
                hint="does something else use this Ray cluster?",
            )

    def _hear(self, patience: float) -> None:
        """Learn which new agents have answered by now, or do within `patience` seconds."""
        asked = {reference: node for node, reference in list(self._pings.items())}
        for reference in self._answers(asked, patience):
            if self._pings.pop(asked[reference], None) is not None:
                self._up.add(asked[reference])

    def _lose(self, node_id: str) -> None:
        """The node's agent has died; another is made when it is needed."""
        self._agents.pop(node_id, None)
        self._up.discard(node_id)
        if self._pings.pop(node_id, None) is not None:
            # Since its head was started again, Ray may give one by name that has died long ago: by another name, then.
            self._dead_found[node_id] = self._dead_found.get(node_id, 0) + 1

    def _agent(self, node_id: str) -> Any:
        """The node's agent, made if there is none; made again if it died."""
        if node_id not in self._agents:
            actor, dead = ray.remote(self._agent_class), self._dead_found.get(node_id)
            name = f"node-agent-{node_id}" if dead is None else f"node-agent-{node_id}-{dead}"
            agent: Any = actor.options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=8,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(self._standbys)
            try:
                self._pings[node_id] = agent.ping.remote()
            except ActorAlreadyExistsError:  # who connects from outside (ray://) is not heard on get_if_exists
                agent = ray.get_actor(name, namespace=NAMESPACE)
                self._pings[node_id] = agent.ping.remote()
            self._agents[node_id] = agent
        return self._agents[node_id]

    def _call(self, node_id: str, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._agent(node_id), method).remote(*arguments), timeout=CALL_S)
        except (RayError, GetTimeoutError) as problem:
            self._lose(node_id)
            raise ExecutorError(f"the agent of node {node_id} does not answer: {problem}") from problem

    def _answers(self, asked: Mapping[Any, str], patience: float) -> dict[Any, Any]:
        """What agents answer within `patience` seconds. `asked` says which node's each answer is; an agent that died
        is made again when it is needed."""
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=patience) if asked else ([], [])
        found = {}
        for reference in answered:
            try:
                found[reference] = ray.get(reference)
            except RayError:
                self._lose(asked[reference])
        return found


def _ask(answer: Future[list[dict[str, Any]]]) -> None:
    try:
        answer.set_result(ray.nodes())
    except Exception as problem:  # whoever waits raises it
        answer.set_exception(problem)


def _reserve(contract: RunContract) -> Any:
    """The placement group that holds the gang's slots, or will, so that nobody else on the Ray cluster gets them.

    Raises:
        RayError, ValueError: Ray makes none.
    """
    kind = "GPU" if contract.plan.device == "cuda" else "CPU"
    try:
        return placement_group(
            [{kind: share.processes} for share in contract.nodes],
            strategy="PACK",
            name=contract.run_id,
            lifetime="detached",
            bundle_label_selector=[{NODE_ID_LABEL: share.node} for share in contract.nodes],
        )
    except RaySystemError:
        # Its name is taken by the group of a start before: asking first would cost every start a call.
        return get_placement_group(contract.run_id)


def _by_node(contracts: Sequence[RunContract]) -> dict[str, list[tuple[RunContract, int]]]:
    """The parts of gangs on each node, with the node's index in the contract."""
    parts: dict[str, list[tuple[RunContract, int]]] = {}
    for contract in contracts:
        for index, share in enumerate(contract.nodes):
            parts.setdefault(share.node, []).append((contract, index))
    return parts


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
        bf16=labels.get(BF16_LABEL) == "true",
        labels=labels,
    )
