"""What of the nodes is free: one bit a node, so that looking for room costs the same for ten nodes and ten thousand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from launch.contract import NodeShare
from orchestrator.cluster.model import UNKNOWN_NEED, Need, Node, Placement

RACK_LABEL = "tuneyard.io/rack"
SPINE_LABEL = "tuneyard.io/spine"

Fit = tuple[tuple[int, int], ...]
"""Where a gang would go: nodes by their index, each with how many ranks."""


class Ground:
    """The nodes themselves, and which of them have what in common, as bit masks. Never changes."""

    def __init__(self, nodes: Iterable[Node], closed: Iterable[str] = ()) -> None:
        # Neighbours have neighbouring bits: whoever takes the lowest bit packs racks one after the other.
        self.nodes = sorted(nodes, key=lambda node: (*_domain(node), node.id))
        self.index = {node.id: at for at, node in enumerate(self.nodes)}
        self.sizes = [len(node.gpus) or node.cpu_slots for node in self.nodes]
        self.largest = max(self.sizes, default=0)
        shut = set(closed)
        self.open = _mask(at for at, node in enumerate(self.nodes) if node.id not in shut)
        self.on_gpus = _mask(at for at, node in enumerate(self.nodes) if node.gpus)
        self.on_cpus = ~self.on_gpus & _mask(range(len(self.nodes)))
        # GPUs of one node that differ are counted one by one.
        self.mixed = _mask(at for at, node in enumerate(self.nodes) if len({_kind(gpu) for gpu in node.gpus}) > 1)
        self.of_size: dict[int, int] = {}
        for at, size in enumerate(self.sizes):
            self.of_size[size] = self.of_size.get(size, 0) | 1 << at
        self._taking: dict[tuple[str, str], int] = {}

    def taking(self, device: str, accelerator: str) -> int:
        """Nodes of a device that take ranks for `accelerator`; cordoned ones do not."""
        key = (device, accelerator)
        if key not in self._taking:
            takes = _mask(at for at, node in enumerate(self.nodes) if node.takes(accelerator))
            self._taking[key] = takes & (self.on_gpus if device == "cuda" else self.on_cpus) & self.open
        return self._taking[key]

    @cached_property
    def domains(self) -> tuple[tuple[int, ...], ...]:
        """Levels of topology, smallest first: masks of the racks, of the spines, and of all nodes."""
        levels: list[tuple[int, ...]] = []
        for label in (RACK_LABEL, SPINE_LABEL):
            groups: dict[str, int] = {}
            for at, node in enumerate(self.nodes):
                name = node.labels.get(label)
                if name is not None:
                    name = f"{node.labels.get(SPINE_LABEL, '')}/{name}"
                    groups[name] = groups.get(name, 0) | 1 << at
            if len(groups) > 1:
                levels.append(tuple(groups.values()))
        return (*levels, (_mask(range(len(self.nodes))),))


class Capacity:
    """Free slots of every node, and their host memory. Placements take of it and give back."""

    def __init__(self, nodes: Iterable[Node] = (), closed: Iterable[str] = ()) -> None:
        self.ground = Ground(nodes, closed)
        self.free_at = list(self.ground.sizes)
        """Below 0 where a node is smaller now than what is held on it."""
        self._gpus = [(1 << len(node.gpus)) - 1 for node in self.ground.nodes]
        self._memory = [node.memory_bytes for node in self.ground.nodes]
        self.with_free = [0] * (self.ground.largest + 1)
        """By number of free slots, the nodes that have so many."""
        for at, size in enumerate(self.ground.sizes):
            self.with_free[size] |= 1 << at
        self.shut = 0
        """Nodes that nothing goes to, whatever is free there."""

    @classmethod
    def of(cls, nodes: Iterable[Node], placements: Iterable[Placement] = (), closed: Iterable[str] = ()) -> Capacity:
        """What `placements` leave of `nodes`."""
        capacity = cls(nodes, closed)
        for placement in placements:
            capacity.take(placement)
        return capacity

    @property
    def nodes(self) -> Sequence[Node]:
        return self.ground.nodes

    def copy(self) -> Capacity:
        """One that may change without this one."""
        new = Capacity.__new__(Capacity)
        new.ground = self.ground
        new.free_at = self.free_at.copy()
        new._gpus = self._gpus.copy()
        new._memory = self._memory.copy()
        new.with_free = self.with_free.copy()
        new.shut = self.shut
        return new

    def idle(self) -> Capacity:
        """The same nodes with nothing on them."""
        closed = (node.id for at, node in enumerate(self.nodes) if not self.ground.open >> at & 1)
        return Capacity(self.nodes, closed)

    def take(self, placement: Placement) -> None:
        """Nodes that are not there any more are passed over."""
        for share in placement.shares:
            at = self.ground.index.get(share.node)
            if at is not None:
                self._gpus[at] &= ~_positions(self.nodes[at], share.gpus)
                self.change(at, -share.processes, placement.host_bytes)

    def give(self, placement: Placement) -> None:
        """Undo what `take` did."""
        for share in placement.shares:
            at = self.ground.index.get(share.node)
            if at is not None:
                self._gpus[at] |= _positions(self.nodes[at], share.gpus)
                self.change(at, share.processes, placement.host_bytes)

    def change(self, at: int, ranks: int, host_bytes: int = 0) -> None:
        """So many slots of a node more (or fewer) are free, whichever they are; each with `host_bytes`."""
        old = self.free_at[at]
        new = self.free_at[at] = old + ranks
        self.with_free[max(old, 0)] &= ~(1 << at)
        self.with_free[max(new, 0)] |= 1 << at
        memory = self._memory[at]
        if memory is not None and host_bytes:
            self._memory[at] = memory + ranks * host_bytes

    def promise(self, where: Fit, accelerator: str, need: Need) -> None:
        """Slots of a fit are somebody's: whichever they are, and of GPUs that differ such as are wanted."""
        for at, ranks in where:
            if self.ground.mixed >> at & 1:
                self._gpus[at] &= ~_positions(self.nodes[at], self._free_gpus(at, accelerator, need)[:ranks])
            self.change(at, -ranks, need.host_bytes)

    def limit(self, where: Fit, other: Capacity) -> None:
        """No more is free on these nodes than `other` has there."""
        for at, _ in where:
            self.change(at, min(0, other.free_at[at] - self.free_at[at]))
            mine, theirs = self._memory[at], other._memory[at]
            if mine is not None and theirs is not None:
                self._memory[at] = min(mine, theirs)
            if self.ground.mixed >> at & 1:
                self._gpus[at] &= other._gpus[at]

    def taking(self, device: str, accelerator: str) -> int:
        """Nodes of a device to which ranks for `accelerator` may go."""
        return self.ground.taking(device, accelerator) & ~self.shut

    @contextmanager
    def without(self, nodes: Iterable[str]) -> Iterator[None]:
        """Meanwhile nothing goes to these nodes, by their ids."""
        before, index = self.shut, self.ground.index
        self.shut |= _mask(index[node] for node in nodes if node in index)
        yield
        self.shut = before

    def free(self, node: Node, accelerator: str = "any", need: Need = UNKNOWN_NEED) -> int:
        """Ranks that `node` can still take for `accelerator`, cordoned or not."""
        return max(0, self.room_at(self.ground.index[node.id], accelerator, need)) if node.takes(accelerator) else 0

    def room_at(self, at: int, accelerator: str, need: Need) -> int:
        """The same by the node's index, if it takes `accelerator` at all."""
        places = self.free_at[at]
        node = self.nodes[at]
        if self.ground.mixed >> at & 1:
            places = min(places, len(self._free_gpus(at, accelerator, need)))
        elif need.device_bytes and node.gpus:
            memory = node.gpus[0].memory_bytes
            if memory is not None and memory < need.device_bytes:
                return 0
        memory = self._memory[at]
        if need.host_bytes and memory is not None:
            places = min(places, max(0, memory // need.host_bytes))
        return places

    def total(self, mask: int) -> int:
        """Free slots of all nodes in `mask`."""
        return sum(free * (nodes & mask).bit_count() for free, nodes in enumerate(self.with_free) if free)

    def placement(self, fit: Fit, accelerator: str, need: Need) -> Placement:
        """The very slots for a fit that this capacity has room for."""
        nodes = self.nodes
        shares = []
        for at, ranks in fit:
            node = nodes[at]
            gpus = self._free_gpus(at, accelerator, need)[:ranks] if node.gpus else ()
            # CPU ranks of one gang divide the cores that are there; other gangs' ranks may compete for them.
            threads = max(1, node.cores // ranks)
            shares.append(NodeShare(node=node.id, address=node.address, processes=ranks, gpus=gpus, threads=threads))
        device = "cuda" if nodes[fit[0][0]].gpus else "cpu"
        return Placement(device=device, shares=tuple(shares), host_bytes=need.host_bytes)

    def _free_gpus(self, at: int, accelerator: str, need: Need) -> tuple[int, ...]:
        """Indices of the free GPUs of a node that `accelerator` accepts and that are large enough."""
        free, gpus = self._gpus[at], self.nodes[at].gpus
        if not self.ground.mixed >> at & 1:
            # All alike: whoever asks for the node's slots has been told that it takes these.
            return tuple(gpu.index for position, gpu in enumerate(gpus) if free >> position & 1)
        anything = accelerator in ("any", "gpu")
        return tuple(
            gpu.index
            for position, gpu in enumerate(gpus)
            if free >> position & 1
            and (anything or gpu.type.lower() == accelerator.lower())
            and (gpu.memory_bytes is None or gpu.memory_bytes >= need.device_bytes)
        )


def bits(mask: int) -> Iterator[int]:
    """Indices of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _mask(indices: Iterable[int]) -> int:
    mask = 0
    for at in indices:
        mask |= 1 << at
    return mask


def _positions(node: Node, gpus: Sequence[int]) -> int:
    return _mask(position for position, gpu in enumerate(node.gpus) if gpu.index in gpus) if gpus else 0


def _kind(gpu: object) -> tuple[str, int | None]:
    return gpu.type, gpu.memory_bytes  # type: ignore[attr-defined]


def _domain(node: Node) -> tuple[str, str]:
    return node.labels.get(SPINE_LABEL, ""), node.labels.get(RACK_LABEL, "")
