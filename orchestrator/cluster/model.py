"""Nodes, GPUs and placements: the cluster as values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.contract import Device, ExecutionPlan, NodeShare
from orchestrator.cluster.gpus import gpu_type

# Labels that Tuneyard itself puts on nodes or reads from them.
NAME_LABEL = "tuneyard.io/name"
CORES_LABEL = "tuneyard.io/cores"  # a node's CPU slots need not be its cores
MEMORY_LABEL = "tuneyard.io/memory-bytes"  # what ranks may have of it
BF16_LABEL = "tuneyard.io/bf16"  # `true`: its CPU multiplies bf16
START_LABEL = "tuneyard.io/start"  # another one each time: for seconds, Ray takes a node that has died for alive


HOST_SHARE = 0.9
"""Of a host's memory, what ranks may have: the rest is the system's."""


class Gpu(BaseModel):
    model_config = ConfigDict(frozen=True)

    index: int
    type: str = "GPU"
    memory_bytes: int | None = None


class Node(BaseModel):
    """One machine as the executor sees it. A node with GPUs takes one rank a GPU, one without takes `cpu_slots`."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    address: str
    cores: int
    cpu_slots: int
    memory_bytes: int | None = None
    """What ranks may have of the host's; null where nobody has said."""
    gpus: tuple[Gpu, ...] = ()
    bf16: bool = False
    """Whether its CPU is known to multiply bf16."""
    labels: Mapping[str, str] = {}

    def takes(self, accelerator: str) -> bool:
        """Whether ranks that ask for `accelerator` may run here."""
        if accelerator == "any":
            return True
        if accelerator == "cpu":
            return not self.gpus
        if accelerator == "gpu":
            return bool(self.gpus)
        return any(gpu.type.lower() == accelerator.lower() for gpu in self.gpus)


def multiply_bf16(nodes: Iterable[Node], device: Device) -> bool:
    """Whether all of `nodes` do, on their GPUs or CPUs. A GPU of a type that is not known is taken for a newer one."""
    if device == "cpu":
        return all(node.bf16 for node in nodes)
    types = {gpu.type for node in nodes for gpu in node.gpus}
    return all(known.bf16 for name in types if (known := gpu_type(name)) is not None)


class Placement(BaseModel):
    """Which slots of which nodes a gang holds."""

    model_config = ConfigDict(frozen=True)

    device: str
    """cpu or cuda"""
    shares: tuple[NodeShare, ...]
    host_bytes: int = 0
    """Of host memory, what each rank is expected to need; 0 where nobody knows."""

    @property
    def world_size(self) -> int:
        return sum(share.processes for share in self.shares)

    def multiplies_bf16(self, nodes: Iterable[Node]) -> bool:
        """Whether all of it does, found among `nodes`."""
        mine = {share.node for share in self.shares}
        return multiply_bf16([node for node in nodes if node.id in mine], "cuda" if self.device == "cuda" else "cpu")


@dataclass(frozen=True)
class Need:
    """What a rank needs of memory, in bytes; 0 where nobody knows."""

    device_bytes: int = 0
    """Of its GPU."""
    host_bytes: int = 0


UNKNOWN_NEED = Need()


@dataclass(frozen=True)
class Option:
    """A way to run a gang: what each rank needs of its place, and the plan that goes with it."""

    processes: int
    device: Device
    need: Need
    plan: ExecutionPlan
    predicted: Mapping[str, Any] | None = None
    """What the plan's memory was predicted to be: memory.options.Forecast as JSON."""
