"""`python -m tests.ray_starts ADDRESS FOLDER`: gangs on three Ray nodes, one of which is taken, one silent, and one
lost in the end. A program of its own, because Ray reads a yard's secret where it is imported. What it saw it prints as
JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util import placement_group

from launch.contract import NodeShare, RunContract
from orchestrator.errors import ExecutorError
from orchestrator.execute import ray as executor_module
from orchestrator.execute.ray import NAMESPACE, NODE_ID_LABEL, RayExecutor, _reserve
from orchestrator.memory.plan import plan
from tests.builders import a_command_job
from tests.yards import until

PATIENCE_S = 3.0


def a_contract(folder: Path, name: str, *nodes: str, processes: int = 1) -> RunContract:
    world = len(nodes) * processes
    return RunContract(
        run_id=f"{name}.1", job_id=name, attempt=1, plan=plan(a_command_job(world), world, "cpu"),
        nodes=tuple(NodeShare(node=node, address="127.0.0.1", processes=processes) for node in nodes), main_port=1,
        run_dir=str(folder / name), output_dir="/o", checkpoint_dir="/c", tracker_dir="/t", command=("true",),
    )  # fmt: skip


def main(address: str, folder: Path) -> dict[str, Any]:
    executor_module.RESERVE_S = executor_module.START_S = executor_module.CALL_S = PATIENCE_S
    executor = RayExecutor(address)
    good, taken, silent = sorted(node.id for node in until(lambda: len(executor.nodes()) == 3 and executor.nodes()))
    until(lambda: len(executor.free_ports({good: 1, taken: 1, silent: 1})) == 3)
    slots = ray.cluster_resources()["CPU"] / 3
    somebody = placement_group([{"CPU": slots}], bundle_label_selector=[{NODE_ID_LABEL: taken}])
    assert somebody.wait(30)
    agent = ray.get(ray.get_actor(f"node-agent-{silent}", namespace=NAMESPACE).ping.remote())
    os.kill(agent, signal.SIGSTOP)
    try:
        names = {"fine": [good], "taken": [taken], "silent": [silent], "half": [good, silent], "reserved": [good]}
        contracts = [a_contract(folder, name, *nodes) for name, nodes in names.items()]
        _reserve(contracts[-1])  # by a controller that got no further
        ports = executor.free_ports({good: 50, silent: 1})
        failed = executor.start(contracts)
        again = executor.start([contracts[0], contracts[-1]])
    finally:
        os.kill(agent, signal.SIGCONT)
    claimed = until(lambda: [one.run_id for one, status in _statuses(executor, contracts) if status.claimed_everywhere])
    groups = ray.util.placement_group_table().values()
    kept = sorted(group["name"] for group in groups if group["name"] and group["state"] == "CREATED")
    lost = _start_on_a_lost_node(executor, folder, taken, silent)
    executor.close()
    return {
        "lost": lost,
        "ports": {"good": sorted(set(ports.pop(good))), "others": ports},
        "failed": {run_id: problem.message for run_id, problem in failed.items()},
        "again": list(again),
        "claimed": claimed,
        "kept": kept,
    }


def _start_on_a_lost_node(executor: RayExecutor, folder: Path, *nodes: str) -> str:
    """What is said of a gang whose node is lost while its slots are being reserved, some of which somebody has."""
    entries = {entry["NodeID"]: entry["Resources"] for entry in ray.nodes()}
    node = next(node for node in nodes if "node:__internal_head__" not in entries[node])
    contract = a_contract(folder, "lost", node, processes=int(entries[node]["CPU"]))
    failed: dict[str, ExecutorError] = {}
    executor_module.RESERVE_S = 10 * PATIENCE_S
    starts = threading.Thread(target=lambda: failed.update(executor.start([contract])))
    starts.start()
    agent = ray.get(ray.get_actor(f"node-agent-{node}", namespace=NAMESPACE).ping.remote())
    raylet = psutil.Process(agent).parent()
    assert raylet is not None
    raylet.kill()
    until(lambda: node not in [one.id for one in executor.nodes()])
    starts.join()
    return failed[contract.run_id].message


def _statuses(executor: RayExecutor, contracts: list[RunContract]) -> list[tuple[RunContract, Any]]:
    found = executor.poll(contracts, {})
    return [(one, found[one.run_id]) for one in contracts]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
