"""Where a gang goes: best fit on one node if one is enough, else over as few nodes as will do. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from launch.contract import NodeShare
from orchestrator.cluster.model import UNKNOWN_NEED, Need, Node, Placement, Snapshot

DEVICES = ("cuda", "cpu")
"""Where both would do, GPUs are taken."""


def place(
    snapshot: Snapshot,
    processes: int,
    accelerator: str,
    need: Need = UNKNOWN_NEED,
    devices: Sequence[str] = DEVICES,
) -> Placement | None:
    """A placement of `processes` ranks on free slots, or None if the whole gang does not fit at once.

    A gang never mixes GPUs with CPUs.
    """
    for device in devices:
        nodes = [node for node in snapshot.nodes if bool(node.gpus) == (device == "cuda")]
        shares = _shares(snapshot, nodes, processes, accelerator, need)
        if shares:
            return Placement(device=device, shares=shares, host_bytes=need.host_bytes)
    return None


def largest_gang(snapshot: Snapshot, accelerator: str) -> int:
    """How many ranks `place` could place at once, of which nobody knows what they need."""
    kinds: dict[bool, int] = {True: 0, False: 0}
    for node in snapshot.nodes:
        kinds[bool(node.gpus)] += snapshot.free(node, accelerator)
    return max(kinds.values())


def _shares(
    snapshot: Snapshot, nodes: list[Node], processes: int, accelerator: str, need: Need
) -> tuple[NodeShare, ...]:
    free = {node.id: snapshot.free(node, accelerator, need) for node in nodes}
    enough = [node for node in nodes if free[node.id] >= processes]
    if enough:
        best = min(enough, key=lambda node: (free[node.id], node.id))
        return (_share(snapshot, best, processes, accelerator, need),)
    if sum(free.values()) < processes:
        return ()
    shares: list[NodeShare] = []
    left = processes
    for node in sorted(nodes, key=lambda node: (-free[node.id], node.id)):
        taken = min(left, free[node.id])
        if taken:
            shares.append(_share(snapshot, node, taken, accelerator, need))
            left -= taken
    return tuple(shares)


def _share(snapshot: Snapshot, node: Node, processes: int, accelerator: str, need: Need) -> NodeShare:
    gpus = snapshot.free_gpus(node, accelerator, need)[:processes]
    # CPU ranks of one gang divide the cores that are there; other gangs' ranks may compete for them.
    threads = max(1, node.cores // processes)
    return NodeShare(node=node.id, address=node.address, processes=processes, gpus=gpus, threads=threads)
