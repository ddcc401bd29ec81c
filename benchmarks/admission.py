"""From queue to agent on a real Ray yard: jobs admitted per second, beside the rate at which Ray alone makes groups.

    python -m benchmarks.admission [--jobs 200] [--nodes 4] [--rounds 5]

Each round takes the two ways in turn, so that a drift of the machine hits both alike; the first warms up. Ours is a
tick of the real controller, on a database of its own: from the look that finds the jobs queued until each has its
attempt stored, its slots reserved by Ray and its start taken on by its node's agent. The agents take contracts on and
run nothing: what is measured is everything but the jobs. Ray's is one driver that makes as many placement groups, of
the same bundles on the same nodes, and then waits for all of them. The limit is 0.8 of Ray's median rate.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from launch.contract import ExitCode, RankExit, RunContract
from orchestrator.cluster.status import NodeReport
from orchestrator.control.loop import Controller
from orchestrator.execute.ray import NAMESPACE, NODE_ID_LABEL, RayExecutor
from orchestrator.execute.ray_agent import NodeAgent
from orchestrator.settings import Settings
from orchestrator.store.jobs import NewJob
from orchestrator.store.store import Store
from tests.builders import a_command_job
from tests.yards import a_yard, until

LIMIT = 0.8
SETTLE_S = 1.0
"""Slots that Ray counts as free again it still cleans up after: neither way is to pay for what the other removed."""


class Idle(NodeAgent):
    """Takes attempts on and runs nothing of them: they have ended as soon as somebody asks."""

    def __init__(self, standbys: int = 0) -> None:
        super().__init__(standbys)
        self.taken: set[str] = set()

    def start(self, parts: Sequence[tuple[str, int]]) -> list[str | None]:
        self.taken.update(RunContract.model_validate_json(text).run_id for text, _ in parts)
        return [None] * len(parts)

    def report(self, parts: Sequence[tuple[str, int, int]]) -> list[NodeReport]:
        end = RankExit(rank=0, code=ExitCode.DONE, time=time.time())
        taken = [RunContract.model_validate_json(text).run_id in self.taken for text, _, _ in parts]
        return [NodeReport(node_index=0, reachable=True, claimed=one, ended=one, exits=(end,) * one) for one in taken]


class Admitted:
    """Jobs of one process each, through a controller that has nothing else to do."""

    def __init__(self, executor: RayExecutor, count: int, home: Path) -> None:
        self.executor, self.count = executor, count
        self.store = Store(f"sqlite:///{home}/yard.db")
        self.store.prepare()
        self.controller = Controller(self.store, executor, Settings(home=home))

    def round(self, name: str) -> float:
        """Seconds until all are admitted; afterwards nothing of them is left."""
        self.controller.tick()
        self.store.add_jobs([NewJob(f"{name}-{at}", a_command_job()) for at in range(self.count)], time.time())
        began = time.perf_counter()
        self.controller.tick()
        took = time.perf_counter() - began
        contracts = [attempt.run for attempt in self.store.live_attempts()]
        made = {entry["name"] for entry in placement_group_table().values() if entry["state"] == "CREATED"}
        statuses = self.executor.poll(contracts, {})
        assert len(contracts) == self.count
        assert all(run_id in made and status.claimed for run_id, status in statuses.items())
        while self.store.live_jobs():
            self.controller.tick()
        return took


class Groups:
    """Placement groups of one slot each, by Ray alone."""

    def __init__(self, executor: RayExecutor, count: int) -> None:
        nodes = executor.nodes()
        self.nodes = [nodes[at % len(nodes)].id for at in range(count)]

    def round(self, name: str) -> float:
        """Seconds until all are ready; afterwards none of them is left."""
        began = time.perf_counter()
        groups = [
            placement_group(
                [{"CPU": 1}],
                strategy="PACK",
                name=f"{name}-{at}",
                lifetime="detached",
                bundle_label_selector=[{NODE_ID_LABEL: node}],
            )
            for at, node in enumerate(self.nodes)
        ]
        ray.get([group.ready() for group in groups])
        took = time.perf_counter() - began
        for group in groups:
            remove_placement_group(group)
        return took


def idle_yard(address: str) -> RayExecutor:
    """An executor on the Ray nodes of a yard without a controller, whose agents run nothing; others are ended."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    for entry in ray.util.list_named_actors(all_namespaces=True):
        ray.kill(ray.get_actor(**entry))
    until(lambda: not ray.util.list_named_actors(all_namespaces=True))
    ray.shutdown()
    executor = RayExecutor(address, agent=Idle)
    nodes = [node.id for node in executor.nodes()]
    until(lambda: executor.free_ports(dict.fromkeys(nodes, 1)).keys() == set(nodes))
    return executor


def measure(address: str, home: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Rates of both ways, by round; `home` is for the database."""
    executor = idle_yard(address)
    slots = ray.cluster_resources()["CPU"]
    ways: dict[str, Callable[[str], float]] = {
        "groups": Groups(executor, count).round,
        "jobs": Admitted(executor, count, home).round,
    }
    gc.collect()
    gc.freeze()  # as a yard's controller does
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, way in ways.items():
            until(lambda: ray.available_resources().get("CPU") == slots)
            time.sleep(SETTLE_S)
            rate = count / way(f"{name}-{index}")
            if index:  # the first round warms the yard and this process
                rates[name].append(rate)
            print(f"{'warm-up' if not index else f'round {index}'}  {name:<6} {rate:6.1f}/s", file=sys.stderr)
    executor.close()
    return rates


def on_a_yard(count: int, nodes: int) -> int:
    """Start a yard, and this program again on it: Ray reads the yard's secret where it is imported. Its exit status."""
    with a_yard("--nodes", str(nodes), cpu_slots=str(math.ceil(count / nodes))) as yard:
        address, env = yard.without_controller()
        command = [sys.executable, "-m", "benchmarks.admission", *sys.argv[1:], "--address", address]
        return subprocess.run(command, env=env, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.address is None:
        return on_a_yard(options.jobs, options.nodes)
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        rates = measure(options.address, Path(home), options.jobs, options.rounds)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ratio = medians["jobs"] / medians["groups"]
    figures: dict[str, Any] = {f"{name}_per_s": round(rate, 1) for name, rate in medians.items()}
    figures |= {"ratio": round(ratio, 3), "limit": LIMIT, "within_limits": ratio >= LIMIT}
    figures |= {"jobs": options.jobs, "nodes": options.nodes}
    figures["rounds"] = {name: [round(rate, 1) for rate in found] for name, found in rates.items()}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
