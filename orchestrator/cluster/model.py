"""Nodes, GPUs and placements: the cluster as values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from launch.contract import Device, ExecutionPlan, NodeShare

# Labels that Tuneyard itself puts on nodes or reads from them.
NAME_LABEL = "tuneyard.io/name"
CORES_LABEL = "tuneyard.io/cores"  # a node's CPU slots need not be its cores
MEMORY_LABEL = "tuneyard.io/memory-bytes"  # what ranks may have of it


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


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment: nodes, and what each placement on them holds."""

    nodes: tuple[Node, ...]
    used_slots: Mapping[str, int] = field(default_factory=dict)
    """Ranks per node id."""
    used_gpus: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """GPU indices per node id."""
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    """Host memory per node id."""

    @classmethod
    def of(cls, nodes: Iterable[Node], placements: Iterable[Placement]) -> Snapshot:
        """The snapshot in which `placements` hold their slots."""
        snapshot = cls(nodes=tuple(nodes))
        for placement in placements:
            snapshot = snapshot.with_placement(placement)
        return snapshot

    def with_placement(self, placement: Placement) -> Snapshot:
        """This snapshot after `placement` has taken its slots."""
        slots, gpus, held = dict(self.used_slots), dict(self.used_gpus), dict(self.used_bytes)
        for share in placement.shares:
            if placement.device == "cuda":
                gpus[share.node] = gpus.get(share.node, frozenset()) | frozenset(share.gpus)
            else:
                slots[share.node] = slots.get(share.node, 0) + share.processes
            held[share.node] = held.get(share.node, 0) + share.processes * placement.host_bytes
        return Snapshot(nodes=self.nodes, used_slots=slots, used_gpus=gpus, used_bytes=held)

    def free_gpus(self, node: Node, accelerator: str, need: Need = UNKNOWN_NEED) -> tuple[int, ...]:
        """Indices of the free GPUs of `node` that `accelerator` accepts and that are large enough."""
        used = self.used_gpus.get(node.id, frozenset())
        anything = accelerator in ("any", "gpu")
        return tuple(
            gpu.index
            for gpu in node.gpus
            if gpu.index not in used
            and (anything or gpu.type.lower() == accelerator.lower())
            and (gpu.memory_bytes is None or gpu.memory_bytes >= need.device_bytes)
        )

    def free(self, node: Node, accelerator: str, need: Need = UNKNOWN_NEED) -> int:
        """Ranks that `node` can still take for `accelerator`."""
        if not node.takes(accelerator):
            return 0
        if node.gpus:
            places = len(self.free_gpus(node, accelerator, need))
        else:
            places = max(0, node.cpu_slots - self.used_slots.get(node.id, 0))
        if need.host_bytes and node.memory_bytes is not None:
            left = node.memory_bytes - self.used_bytes.get(node.id, 0)
            places = min(places, max(0, left // need.host_bytes))
        return places

    def idle(self) -> Snapshot:
        """The same nodes with nothing on them."""
        return Snapshot(nodes=self.nodes)
