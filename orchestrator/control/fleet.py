"""How many nodes a cluster is to have that gives and takes them: facts in, wishes out. Pure.

It grows at once, for gangs that wait and would start on more nodes of a group, in the order in which they wait, and by
no node that would not complete a gang. It shrinks by nodes that have been idle for long: first they are closed, so that
nothing starts on them, and only then, when nothing has, are they given back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.group import Group
from orchestrator.cluster.model import UNKNOWN_NEED, Node, Placement
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule.gang import Gang
from orchestrator.schedule.place import room_for

COMING = "+"
"""In the id of a node that is not there yet: GROUP+NUMBER."""
MAX_GANGS = 200
"""Of those that wait, so many are looked at."""


@dataclass(frozen=True)
class Present:
    """A node of a group that is there."""

    node: Node
    group: str
    busy: bool
    """Whether an attempt holds slots of it."""
    closed: bool = False
    """By the fleet, so that it can be given back."""
    closed_for_others: bool = False
    """By an administrator, or as a suspect."""


@dataclass(frozen=True)
class Look:
    groups: Sequence[Group]
    nodes: Sequence[Present]
    waiting: Sequence[Gang]
    """In the order in which they would start."""
    held: Sequence[Placement] = ()
    """By attempts."""
    settled: Collection[str] = ()
    """Ids of nodes that were closed before the scheduler last looked: nothing is about to start there."""


@dataclass(frozen=True)
class Wishes:
    replicas: Mapping[str, int] = field(default_factory=dict)
    """By group."""
    give_back: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    """By group: closed nodes without ranks, which are not among `replicas` any more."""
    close: tuple[Node, ...] = ()
    open: tuple[Node, ...] = ()
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    """Of gangs for which nodes are on their way, by job id."""


@dataclass(frozen=True)
class Idle:
    """Since when what is not needed is so; what `wish` needs to remember."""

    since: Mapping[str, float] = field(default_factory=dict)
    """By node id; by group's name of nodes that are asked for and not there."""


def wish(look: Look, idle: Idle, idle_s: float, now: float) -> tuple[Wishes, Idle]:
    """What is to be done now, and what to remember until the next look."""
    need = _need(look)
    since: dict[str, float] = {}
    close: list[Node] = []
    opened: list[Node] = []
    give_back: dict[str, tuple[Node, ...]] = {}
    replicas: dict[str, int] = {}

    def long_idle(what: str) -> bool:
        since[what] = idle.since.get(what, now)
        return now - since[what] >= idle_s

    for group in look.groups:
        target = max(group.least, need.replicas[group.name])
        spare = target - group.least
        leaving: list[Node] = []
        mine = [one for one in look.nodes if one.group == group.name]
        for one in mine:
            wanted = one.busy or one.node.id in need.nodes
            if one.closed_for_others:
                continue
            if wanted or not long_idle(one.node.id) or not spare:
                if one.closed:
                    opened.append(one.node)
                continue
            spare -= 1
            if not one.closed:
                close.append(one.node)
            elif one.node.id in look.settled:
                leaving.append(one.node)
        missing = target - len(mine)
        if missing > 0 and spare and group.name not in need.growing and long_idle(group.name):
            target -= min(missing, spare)  # asked for, never come, and nobody waits for them any more
        give_back[group.name] = tuple(leaving)
        replicas[group.name] = target - len(leaving)
    return Wishes(replicas, give_back, tuple(close), tuple(opened), need.reasons), Idle(since)


@dataclass(frozen=True)
class _Need:
    """What the gangs that wait will take, if nothing ends."""

    nodes: Collection[str]
    growing: Collection[str]
    """Groups of which they need nodes that are not there yet."""
    replicas: Mapping[str, int]
    reasons: Mapping[str, Reason]


def _need(look: Look) -> _Need:
    replicas = {group.name: group.replicas for group in look.groups}
    there = {group.name: sum(one.group == group.name for one in look.nodes) for group in look.groups}
    nodes = [one.node for one in look.nodes if not one.closed_for_others]
    for group in look.groups:
        nodes += [_to_come(group, number) for number in range(there[group.name], group.replicas)]
    taken = list(look.held)
    used: set[str] = set()
    growing: set[str] = set()
    reasons: dict[str, Reason] = {}
    capacity = Capacity.of(nodes, taken)
    for gang in look.waiting[:MAX_GANGS]:
        found = room_for(capacity, gang, gang.most)
        if found is None:
            grown = _grown(look.groups, replicas, nodes, taken, gang)
            if grown is None:
                continue  # not even the largest cluster has room while others run
            group, more = grown
            nodes += more
            replicas[group.name] += len(more)
            capacity = Capacity.of(nodes, taken)
            found = room_for(capacity, gang, gang.min_processes)
            assert found is not None  # it was tried
        where, option = found
        placement = capacity.placement(where, gang.accelerator, option.need if option is not None else UNKNOWN_NEED)
        capacity.take(placement)
        taken.append(placement)
        ids = {share.node for share in placement.shares}
        used |= ids
        coming = {group.name for group in look.groups if any(one.startswith(f"{group.name}{COMING}") for one in ids)}
        if coming:
            growing |= coming
            asked = ", ".join(f"{name} to {replicas[name]} nodes" for name in sorted(coming))
            reasons[gang.job_id] = Reason(
                code=ReasonCode.NO_NODES,
                sentence=f"the cluster grows for it: {asked}",
                remedy="starts when they are there; nothing to do",
            )
    return _Need(used, growing, replicas, reasons)


def _grown(
    groups: Sequence[Group], replicas: Mapping[str, int], nodes: Sequence[Node], taken: Sequence[Placement], gang: Gang
) -> tuple[Group, list[Node]] | None:
    """The group that needs the fewest more nodes for a gang to start, and those; None if none can have enough."""
    best: tuple[Group, list[Node]] | None = None
    for group in groups:
        left = group.most - replicas[group.name] if group.like.takes(gang.accelerator) else 0
        for extra in range(1, (min(left, len(best[1]) - 1) if best is not None else left) + 1):
            more = [_to_come(group, replicas[group.name] + number) for number in range(extra)]
            if room_for(Capacity.of([*nodes, *more], taken), gang, gang.min_processes) is not None:
                best = group, more
                break
    return best


def potential(groups: Sequence[Group], there: Sequence[Present]) -> tuple[Node, ...]:
    """Nodes that are not there and could be."""
    return tuple(
        _to_come(group, number)
        for group in groups
        for number in range(sum(one.group == group.name for one in there), group.most)
    )


def _to_come(group: Group, number: int) -> Node:
    node_id = f"{group.name}{COMING}{number}"
    return group.like.model_copy(update={"id": node_id, "name": node_id, "address": node_id})
