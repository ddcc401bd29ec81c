"""The reservation of the first gang that cannot start, and who may go around it. Pure.

EASY backfilling (Lifka, The ANL/IBM SP Scheduling System, 1995): the first one gets its slots as soon as running
gangs are expected to leave them; others start before it where they do not delay that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.capacity import Capacity
from orchestrator.schedule.gang import Gang, Reservation
from orchestrator.schedule.place import room_after
from orchestrator.schedule.standing import End
from orchestrator.schedule.yard import Yard


def ends_by(yard: Yard, gang: Gang, now: float) -> float:
    """When a gang that starts now is gone at the latest, if estimates hold."""
    if gang.oracle_s is not None:
        left = max(0.0, gang.oracle_s - gang.ran_s)
    else:
        found = yard.history.left_s(gang, gang.ran_s, yard.rules.backfill_quantile)
        left = math.inf if found is None else found
    return now + min(left, gang.left_s if gang.left_s is not None else math.inf)


@dataclass(frozen=True)
class Shadow:
    """A reservation, and what is free beside it for those that outlast its beginning."""

    reservation: Reservation
    lasting: Capacity
    nodes: int
    """Those that it is on, as a mask."""


def reserve(
    free: Capacity, soon: Capacity, ends: Sequence[End], gang: Gang, most: int, now: float, *, consolidate: bool = False
) -> Shadow | None:
    """When and where `gang`, of at most `most` ranks, starts if others end as expected; None if never.

    `soon` is what is free when those that were told to stop, now or before, have ended; `ends` is of the others, in
    order.
    """
    later = soon.copy()
    leaving = (placement for _, _, _, placement in ends)
    found = room_after(later, gang, most, leaving, consolidate=consolidate)
    if found is None:
        return None
    count, where, need = found
    later.promise(where, gang.accelerator, need)
    lasting = free.copy()
    lasting.limit(where, later)
    slots = tuple((free.nodes[node].id, ranks) for node, ranks in where)
    at = max(now, ends[count - 1][0])
    return Shadow(Reservation(gang.job_id, at, slots), lasting, sum(1 << node for node, _ in where))
