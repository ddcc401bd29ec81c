"""A cluster file: which kinds of nodes there are, to plan for without being on them. Pure.

A NodeKind is what planning knows of a node, be it from such a file, from a yard, or from this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from launch.config import validate
from launch.contract import Device
from launch.document import Document
from launch.section import Section
from orchestrator.cluster.gpus import PCIE_GB_S, SLOWEST, GpuType, gpu_type
from orchestrator.cluster.model import HOST_SHARE, Node
from orchestrator.errors import SpecError

GB = 10**9
GIGABIT = 10**9 / 8
Link = Literal["nvlink", "pcie"]


class GpuSpec(Section):
    """The GPUs of a node, all of one type."""

    type: str = Field(min_length=1)
    """Such as H100, A100-40GB or L4: what `resources.accelerator` of a job may ask for."""
    count: int = Field(ge=1, le=64)
    memory_gb: float | None = Field(None, gt=0)
    """Of each, in 10^9 bytes; null for the type's, where that is known."""
    link: Link | None = None
    """What joins them; null for what the type has."""


class NodeSpec(Section):
    """Nodes that are alike."""

    name: str = Field(min_length=1)
    count: int = Field(1, ge=1, le=100_000)
    cores: int = Field(ge=1)
    memory_gb: float = Field(gt=0)
    """Host memory, in 10^9 bytes."""
    slots: int | None = Field(None, ge=1)
    """Processes that a node without GPUs takes at once; null for one a core."""
    bf16: bool = False
    """Whether its CPU multiplies bf16 (AMX, AVX512_BF16, Arm's BF16): for jobs with `train.precision: auto`."""
    gpus: GpuSpec | None = None
    network_gbit: float = Field(25.0, gt=0)
    """Between nodes, in 10^9 bits a second."""


class ClusterSpec(Section):
    """All of a cluster file."""

    name: str = "cluster"
    nodes: tuple[NodeSpec, ...] = Field(min_length=1)


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike, as planning sees them. Bytes, and bytes or operations a second."""

    name: str
    count: int
    cores: int
    slots: int
    """Processes that one of them takes: one a GPU, or the CPU slots."""
    memory_bytes: int
    """Of the host, what ranks may have."""
    gpu: GpuType | None = None
    gpu_memory_bytes: int = 0
    link: Link = "pcie"
    network_bytes_s: float = 25 * GIGABIT
    cpu_bf16: bool = False

    @property
    def bf16(self) -> bool:
        """Whether what ranks compute on multiplies bf16."""
        return self.gpu.bf16 if self.gpu is not None else self.cpu_bf16

    @property
    def device(self) -> Device:
        return "cuda" if self.gpu is not None else "cpu"

    @property
    def most(self) -> int:
        """Processes that all of them take together."""
        return self.count * self.slots

    def takes(self, accelerator: str) -> bool:
        """Whether a job that asks for `accelerator` may run here."""
        wanted = accelerator.lower()
        named = self.gpu is not None and wanted in (self.gpu.name.lower(), self.gpu.name.split("-")[0].lower())
        return wanted == "any" or wanted == ("cpu" if self.gpu is None else "gpu") or named

    def local(self, world_size: int) -> int:
        """The most processes on one node, with as few nodes as possible."""
        return min(world_size, self.slots)

    @property
    def gpu_link_bytes_s(self) -> float:
        """What a GPU can send to the others of its node."""
        assert self.gpu is not None
        return (self.gpu.nvlink_gb_s / 2 if self.link == "nvlink" else PCIE_GB_S[self.gpu.pcie]) * GB

    @property
    def host_link_bytes_s(self) -> float:
        """What a GPU can send to its host, in one direction."""
        return PCIE_GB_S[self.gpu.pcie if self.gpu is not None else 4] * GB


def load_cluster(document: Document) -> tuple[NodeKind, ...]:
    """The kinds of nodes that a cluster file lists.

    Raises:
        SpecErrors: every fault at once, each with its line and a remedy.
        SpecError: a GPU type that is not known, without its memory.
    """
    kinds = []
    for index, node in enumerate(validate(ClusterSpec, document).nodes):
        kind = gpu_type(node.gpus.type) if node.gpus is not None else None
        if node.gpus is not None and kind is None and node.gpus.memory_gb is None:
            raise document.error(
                ("nodes", index, "gpus", "type"),
                f"the memory of a {node.gpus.type} is not known",
                code="unknown-gpu",
                hint="add `memory_gb:`, or name a type such as H100, H200, A100-80GB, A100-40GB, L40S or L4",
            )
        kinds.append(_kind(node, kind))
    return tuple(kinds)


def _kind(node: NodeSpec, known: GpuType | None) -> NodeKind:
    common = NodeKind(
        name=node.name,
        count=node.count,
        cores=node.cores,
        slots=node.slots or node.cores,
        memory_bytes=int(node.memory_gb * GB * HOST_SHARE),
        network_bytes_s=node.network_gbit * GIGABIT,
        cpu_bf16=node.bf16,
    )
    if node.gpus is None:
        return common
    memory = int(node.gpus.memory_gb * GB) if node.gpus.memory_gb is not None else None
    return with_gpus(common, node.gpus.type, known, node.gpus.count, memory, node.gpus.link)


def with_gpus(
    node: NodeKind, name: str, known: GpuType | None, count: int, memory: int | None = None, link: Link | None = None
) -> NodeKind:
    """`node` with `count` GPUs. A type that is not known has the speed of a slow one; its memory has to be given."""
    kind = known or GpuType(
        name, 0, SLOWEST.tflops, SLOWEST.tflops_fp32, SLOWEST.memory_gb_s, SLOWEST.nvlink_gb_s, SLOWEST.pcie
    )
    return replace(
        node,
        slots=count,
        gpu=kind,
        gpu_memory_bytes=memory or kind.memory_bytes,
        link=link or ("nvlink" if kind.nvlink_gb_s else "pcie"),
    )


def kind_of(node: Node) -> NodeKind:
    """A node of a yard, or this machine, as planning sees it.

    Raises:
        SpecError: how much memory it has is not known.
    """
    if node.memory_bytes is None:
        raise SpecError(
            f"how much memory the node {node.name} has is not known",
            code="unknown-memory",
            hint="describe it in a file, and plan with --cluster FILE",
        )
    plain = NodeKind(node.name, 1, node.cores, max(1, node.cpu_slots), node.memory_bytes, cpu_bf16=node.bf16)
    if not node.gpus:
        return plain
    memory = min((gpu.memory_bytes for gpu in node.gpus if gpu.memory_bytes), default=None)
    name = node.gpus[0].type
    return with_gpus(plain, name, gpu_type(name), len(node.gpus), memory)
