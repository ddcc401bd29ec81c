"""What a queue may take: below its ceiling, and not of what others do not lend. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.cluster.capacity import Capacity
from orchestrator.schedule.gang import Queue
from orchestrator.schedule.yard import Yard

MANY = 1 << 30
"""Ranks, where there is no bound."""


def allowed(yard: Yard, queue: Queue, held: Mapping[str, int], free: Capacity) -> int:
    """Ranks that a queue may still take, when queues hold `held`."""
    most = queue.ceiling - held[queue.name] if queue.ceiling is not None else MANY
    if not yard.keepers:
        return most
    kept = sum(max(0, own - held[name]) for name, own in yard.keepers if name != queue.name)
    if kept:
        own = max(0, (queue.guaranteed or 0) - held[queue.name])
        most = min(most, max(own, free.total(free.ground.open) - kept))
    return most


def most(yard: Yard, queue: Queue) -> int:
    """Ranks that a queue may hold at most, when all that is lent is free."""
    kept = sum(own for name, own in yard.keepers if name != queue.name)
    bound = queue.ceiling if queue.ceiling is not None else MANY
    if kept:
        bound = min(bound, max(queue.guaranteed or 0, yard.idle.total(yard.idle.ground.open) - kept))
    return bound
