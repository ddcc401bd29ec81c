"""Which slots there are, written down whenever that changes: what is idle is measured by it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from orchestrator.cluster.model import Node
from orchestrator.cluster.status import Slots
from orchestrator.errors import LeaseLostError
from orchestrator.store.rows import Lease
from orchestrator.store.store import Store


def slots_of(nodes: Sequence[Node]) -> dict[str, Slots]:
    """By node id, of the nodes that take ranks."""
    found = {
        node.id: Slots(
            name=node.name,
            kind=min(gpu.type for gpu in node.gpus) if node.gpus else "cpu",
            slots=len(node.gpus) or node.cpu_slots,
        )
        for node in nodes
    }
    return {node: slots for node, slots in found.items() if slots.slots}


class Inventory:
    """What the acting controller has written down last."""

    def __init__(self) -> None:
        self._last: Mapping[str, Slots] | None = None

    def note(self, store: Store, lease: Lease, nodes: Sequence[Node], now: float) -> None:
        """Raises LeaseLostError, StoreError."""
        if self._last is None:
            newest = store.inventories(now)
            self._last = newest[-1].nodes if newest else None
        seen = slots_of(nodes)
        if seen != self._last:
            with store.acting(lease) as write:
                write.add_inventory(seen, now)
            self._last = seen

    def close(self, store: Store, lease: Lease, now: float) -> None:
        """The controller ends. Where nothing runs on, nobody offers slots until there is another. Raises StoreError."""
        if self._last and not store.live_attempts():
            with contextlib.suppress(LeaseLostError):  # there is another already
                self.note(store, lease, (), now)
