"""Where a gang goes: best fit on one node if one is enough, else on whole nodes of the smallest domain. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.cluster.capacity import Capacity, Fit, bits
from orchestrator.cluster.model import UNKNOWN_NEED, Need, Option, Placement
from orchestrator.schedule.gang import Gang

DEVICES = ("cuda", "cpu")
"""Where both would do, GPUs are taken."""


def place(
    capacity: Capacity,
    processes: int,
    accelerator: str,
    need: Need = UNKNOWN_NEED,
    devices: Sequence[str] = DEVICES,
    *,
    consolidate: bool = False,
) -> Placement | None:
    """A placement of `processes` ranks on free slots, or None if the whole gang does not fit at once."""
    found = fit(capacity, processes, accelerator, need, devices, consolidate=consolidate)
    return capacity.placement(found, accelerator, need) if found else None


def fit(
    capacity: Capacity,
    processes: int,
    accelerator: str,
    need: Need = UNKNOWN_NEED,
    devices: Sequence[str] = DEVICES,
    *,
    consolidate: bool = False,
) -> Fit:
    """Nodes for a gang, empty if there is no room; a gang never mixes GPUs with CPUs.

    To `consolidate`: a gang that a node could hold waits for one, a larger one for whole nodes. Else any slots will
    do where there is nothing better.
    """
    for device in devices:
        mask = capacity.taking(device, accelerator)
        if not mask:
            continue
        found = _on_one_node(capacity, mask, processes, accelerator, need) or _on_whole_nodes(
            capacity, mask, processes, accelerator, need
        )
        if not found and not consolidate:
            found = _anywhere(capacity, mask, processes, accelerator, need)
        if found:
            return found
    return ()


def largest_gang(capacity: Capacity, accelerator: str) -> int:
    """How many ranks could be placed at once, of which nobody knows what they need."""
    most = 0
    for device in DEVICES:
        mask = capacity.taking(device, accelerator)
        odd = mask & capacity.ground.mixed
        ones = sum(capacity.room_at(at, accelerator, UNKNOWN_NEED) for at in bits(odd))
        most = max(most, capacity.total(mask & ~odd) + ones)
    return most


def room_for(
    capacity: Capacity, gang: Gang, most: int, *, consolidate: bool = False
) -> tuple[Fit, Option | None] | None:
    """Where a gang of at most `most` ranks goes in the best way for which there is room; None if in none."""
    if not gang.avoid:
        return _room_for(capacity, gang, most, consolidate=consolidate)
    with capacity.without(gang.avoid):
        return _room_for(capacity, gang, most, consolidate=consolidate)


def least_room(capacity: Capacity, gang: Gang, most: int, *, consolidate: bool = False) -> tuple[Fit, Need] | None:
    """Where a gang goes that would start with the fewest ranks, and what each of them needs; None for nowhere."""
    if not gang.avoid:
        return _least_room(capacity, gang, most, consolidate=consolidate)
    with capacity.without(gang.avoid):
        return _least_room(capacity, gang, most, consolidate=consolidate)


def room_after(
    capacity: Capacity, gang: Gang, most: int, leaving: Iterable[Placement], *, consolidate: bool = False
) -> tuple[int, Fit, Need] | None:
    """Where a gang goes in the same way once enough of `leaving`, in this order, are gone, and after how many; None
    if all are too few. They are given back to `capacity`, so many of them."""
    mask = capacity.taking("cuda", gang.accelerator) | capacity.taking("cpu", gang.accelerator)
    wanted, ground = gang.min_processes, capacity.ground
    size = max((size for size, nodes in ground.of_size.items() if nodes & mask), default=0)
    # It can only go to a node that just became freer.
    one_node = consolidate and wanted <= size and gang.options is None
    free = capacity.total(mask)
    for count, placement in enumerate(leaving, 1):
        capacity.give(placement)
        free += placement.world_size
        if free < wanted:
            continue
        if one_node and not any(
            capacity.free_at[ground.index[share.node]] >= wanted
            for share in placement.shares
            if share.node in ground.index
        ):
            continue
        found = least_room(capacity, gang, most, consolidate=consolidate)
        if found is not None:
            return count, *found
    return None


def _room_for(capacity: Capacity, gang: Gang, most: int, *, consolidate: bool) -> tuple[Fit, Option | None] | None:
    least, most = gang.min_processes, min(most, gang.most)
    if gang.options is None:
        if most > least:
            most = max(least, min(most, largest_gang(capacity, gang.accelerator)))
        while most >= least:
            where = fit(capacity, most, gang.accelerator, consolidate=consolidate)
            if where:
                return where, None
            # Elsewhere than on whole nodes, the largest gang that is free always fits.
            most = most - 1 if consolidate or most == least else least
        return None
    for option in gang.options:
        if option.processes <= most:
            where = fit(
                capacity, option.processes, gang.accelerator, option.need, (option.device,), consolidate=consolidate
            )
            if where:
                return where, option
    return None


def _least_room(capacity: Capacity, gang: Gang, most: int, *, consolidate: bool) -> tuple[Fit, Need] | None:
    if gang.options is None:
        where = fit(capacity, gang.min_processes, gang.accelerator, consolidate=consolidate)
        return (where, UNKNOWN_NEED) if where else None
    for option in sorted(gang.options, key=lambda option: option.processes):
        if option.processes <= min(most, gang.most):
            where = fit(
                capacity, option.processes, gang.accelerator, option.need, (option.device,), consolidate=consolidate
            )
            if where:
                return where, option.need
    return None


def _on_one_node(capacity: Capacity, mask: int, processes: int, accelerator: str, need: Need) -> Fit:
    """The node that has the least room that is enough."""
    plain = need is UNKNOWN_NEED or not (need.device_bytes or need.host_bytes)
    for nodes in capacity.with_free[processes:]:
        for at in bits(nodes & mask):
            if (plain and not capacity.ground.mixed >> at & 1) or capacity.room_at(at, accelerator, need) >= processes:
                return ((at, processes),)
    return ()


def _on_whole_nodes(capacity: Capacity, mask: int, processes: int, accelerator: str, need: Need) -> Fit:
    """Idle nodes of one size, the largest of which there are enough, and the rest where least is left."""
    of_size = capacity.ground.of_size
    for size in sorted((size for size, nodes in of_size.items() if size and nodes & mask), reverse=True):
        if processes <= size:
            if need == UNKNOWN_NEED:
                break  # a node could hold it
            continue  # such a node has the slots, but perhaps not the memory
        found = _on_whole_nodes_of(size, capacity, mask, processes, accelerator, need)
        if found:
            return found
    return ()


def _on_whole_nodes_of(size: int, capacity: Capacity, mask: int, processes: int, accelerator: str, need: Need) -> Fit:
    """In the smallest domain that has so much."""
    ground = capacity.ground
    whole, rest = divmod(processes, size)
    idle = capacity.with_free[size] & ground.of_size[size] & mask
    if idle.bit_count() < whole:
        return ()
    for level in ground.domains:
        enough = [one for one in level if (idle & one).bit_count() >= whole]
        for domain in sorted(enough, key=lambda one: ((idle & one).bit_count(), one)):
            taken: list[tuple[int, int]] = []
            for at in bits(idle & domain):
                if capacity.room_at(at, accelerator, need) >= size:
                    taken.append((at, size))
                    if len(taken) == whole:
                        break
            if len(taken) < whole:
                continue
            if not rest:
                return tuple(taken)
            left = mask & domain
            for at, _ in taken:
                left &= ~(1 << at)
            last = _on_one_node(capacity, left, rest, accelerator, need)
            if last:
                return (*taken, *last)
    return ()


def _anywhere(capacity: Capacity, mask: int, processes: int, accelerator: str, need: Need) -> Fit:
    """Over as few nodes as will do, in the smallest domain that has so much."""
    if capacity.total(mask) < processes:
        return ()
    free = [(slots, nodes & mask) for slots, nodes in enumerate(capacity.with_free) if slots and nodes & mask]
    some = 0
    for _, nodes in free:
        some |= nodes
    for level in capacity.ground.domains:
        used = (one for one in level if one & some)
        totals = ((sum(slots * (nodes & one).bit_count() for slots, nodes in free), one) for one in used)
        for _, domain in sorted((total, one) for total, one in totals if total >= processes):
            taken: list[tuple[int, int]] = []
            left = processes
            for nodes in capacity.with_free[:0:-1]:
                for at in bits(nodes & mask & domain):
                    ranks = min(left, capacity.room_at(at, accelerator, need))
                    if ranks:
                        taken.append((at, ranks))
                        left -= ranks
                        if not left:
                            return tuple(taken)
    return ()
