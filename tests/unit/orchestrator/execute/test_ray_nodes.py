"""Ray's description of a node as ours. Nothing of a cluster is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launch.contract import NodeShare, RunContract
from launch.instructions import multiplies_bf16
from orchestrator.cluster.gpus import KNOWN
from orchestrator.cluster.model import BF16_LABEL, CORES_LABEL, MEMORY_LABEL, NAME_LABEL, START_LABEL, Gpu
from orchestrator.execute.ray import GPU_TYPE_LABEL, _node
from orchestrator.memory.plan import plan
from orchestrator.settings import Settings
from orchestrator.yard.nodes import ray_start
from tests.builders import a_command_job


def an_entry(resources: dict[str, float], labels: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "NodeID": "abc", "NodeManagerHostname": "host", "NodeManagerAddress": "10.0.0.1", "Alive": True,
        "Resources": resources, "Labels": labels,
    }  # fmt: skip


def test_a_node_without_labels_is_named_by_its_host() -> None:
    node = _node(an_entry({"CPU": 4.0, "memory": 1e9}))
    assert (node.id, node.name, node.address) == ("abc", "host", "10.0.0.1")
    assert (node.cpu_slots, node.cores, node.gpus) == (4, 4, ())
    assert node.memory_bytes == 1_000_000_000  # what Ray has


def test_the_labels_that_a_yard_gives_are_those_that_are_read(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, cpu_slots=3, memory_gb=10)
    command = ray_start(settings, tmp_path, {NAME_LABEL: "node-2", START_LABEL: "e0"}, share=2)
    (given,) = [word.removeprefix("--labels=") for word in command if word.startswith("--labels=")]
    assert "--num-cpus=3" in command
    node = _node(an_entry({"CPU": 3.0}, dict(pair.split("=") for pair in given.split(","))))
    assert (node.name, node.cores, node.cpu_slots) == ("node-2", os.cpu_count(), 3)
    assert (node.memory_bytes, node.bf16) == (5_000_000_000, multiplies_bf16())
    assert set(node.labels) == {NAME_LABEL, CORES_LABEL, MEMORY_LABEL, BF16_LABEL, START_LABEL}


def test_a_nodes_cpu_multiplies_bf16_where_somebody_says_so() -> None:
    told = {said: _node(an_entry({"CPU": 1.0}, {BF16_LABEL: said})).bf16 for said in ("true", "false")}
    assert told == {"true": True, "false": False}
    assert _node(an_entry({"CPU": 1.0})).bf16 is False


def test_a_gpus_type_is_a_label_or_a_resource() -> None:
    labelled = _node(an_entry({"CPU": 8.0, "GPU": 2.0}, {GPU_TYPE_LABEL: "H100"}))
    memory = KNOWN["h100"].memory_bytes
    assert labelled.gpus == tuple(Gpu(index=index, type="H100", memory_bytes=memory) for index in range(2))
    assert _node(an_entry({"GPU": 1.0, "accelerator_type:A100": 1.0})).gpus[0].type == "A100"
    assert _node(an_entry({"GPU": 1.0})).gpus[0].type == "GPU"
    assert _node(an_entry({"GPU": 1.0})).cores == 1


def test_ranks_are_numbered_through_the_nodes() -> None:
    shares = [NodeShare(node=name, address="x", processes=count) for name, count in (("a", 2), ("b", 1), ("c", 3))]
    contract = RunContract(
        run_id="j.1", job_id="j", attempt=1, plan=plan(a_command_job(6), 6, "cpu"), nodes=tuple(shares), main_port=1,
        run_dir="/r", output_dir="/o", checkpoint_dir="/c", tracker_dir="/trackers", command=("true",),
    )  # fmt: skip
    assert [contract.ranks_of(index) for index in range(3)] == [(0, 1), (2,), (3, 4, 5)]
