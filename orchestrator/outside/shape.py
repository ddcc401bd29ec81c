"""How a job lies on nodes of a system outside: on how many, how many processes on each, what those ask for. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from launch.contract import Device, ExecutionPlan
from orchestrator.cluster.model import Gpu, Node, multiply_bf16
from orchestrator.errors import DoesNotFitError, ImpossibleGangError
from orchestrator.job.spec import AnyJob, TrainingJob, dump_job
from orchestrator.memory.options import kinds_of, ways
from orchestrator.memory.plan import plan

MIB = 1 << 20
ROOM, BESIDE = 2, 1 << 30
"""Of a node's memory, so many times what its processes are predicted to need is asked for, since a plan that takes most
of its place would be traced before it starts; and bytes for launcher, agent and controller."""
Kind = str | None
"""A type of GPU; None for CPUs."""


class Wanted(Protocol):
    """What was said of it to the system alone; None leaves it to what follows from the job."""

    @property
    def nodes(self) -> int | None: ...
    @property
    def cpus(self) -> int | None:
        """Of a process."""

    @property
    def memory_gb(self) -> float | None:
        """Of a node, in 10^9 bytes."""


@dataclass(frozen=True)
class Words:
    """How messages speak of the nodes."""

    where: str
    """Such as `the partition main`."""
    none: str
    """What to do where there is no such node."""
    few: str
    """Where there are too few, behind `ask for fewer, or`."""


@dataclass(frozen=True)
class Shape:
    """What is asked for; all nodes are alike."""

    processes: int
    nodes: int
    per_node: int
    """Processes on the fullest of them."""
    cpus: int
    """Of each node."""
    kind: Kind
    memory_mb: int | None
    """Of each node; None for what the system gives by itself."""
    node: Node
    """What a run is to find on each of them."""
    like: Node
    """One of those that it was planned for."""
    plan: ExecutionPlan


@dataclass(frozen=True)
class _Spot:
    """A node as a job sees it."""

    node: Node
    slots: int
    """Processes that it takes, its memory aside."""

    def room(self, wish: _Wish) -> int:
        memory = self.node.memory_bytes
        return self.slots if memory is None or not wish.host_bytes else min(self.slots, memory // wish.host_bytes)


@dataclass(frozen=True)
class _Wish:
    """A way to run: how many processes, on what, each with so much of its host's memory (0 where nobody knows)."""

    processes: int
    device: Device
    host_bytes: int
    plan: ExecutionPlan

    def most(self, nodes: int) -> int:
        """Processes on the fullest of so many nodes."""
        return -(-self.processes // nodes)


def shape_of(job: AnyJob, sizing: str | None, nodes: Sequence[Node], options: Wanted, words: Words) -> Shape:
    """The best way to run `job` on nodes like these, all idle.

    Raises:
        ImpossibleGangError: they are too few, or none is of the accelerator that it asks for.
        DoesNotFitError: none has the memory.
    """
    spots, misfit = _spots(job, nodes, options), None
    for most in _most_on_a_node(job, spots, options):
        some = {kind: [replace(one, slots=min(one.slots, most)) for one in those] for kind, those in spots.items()}
        wishes = _wishes(job, sizing, some)
        if isinstance(wishes, str):
            misfit = misfit or wishes
            continue
        for wish in wishes:
            found = [
                (count, kind)
                for kind, those in some.items()
                if (kind is None) == (wish.device == "cpu") and (count := _count(those, wish, options.nodes))
            ]
            if found:
                count, kind = min(found, key=lambda one: one[0])
                return _shape(wish, count, kind, spots[kind], options)
    if misfit is not None:
        raise DoesNotFitError(misfit, hint="`tuneyard plan` tells the nearest change that fits")
    raise _impossible(job, spots, options, words)


def _most_on_a_node(job: AnyJob, spots: Mapping[Kind, Sequence[_Spot]], options: Wanted) -> Iterator[int]:
    """How many processes to let onto a node: as many as it takes, then ever fewer, since each has more memory then."""
    high = job.resources.bounds[1]
    if options.nodes is not None:
        yield -(-high // options.nodes)
        return
    most = min(high, max((one.slots for some in spots.values() for one in some), default=0))
    while most:
        yield most
        most //= 2


def _spots(job: AnyJob, nodes: Sequence[Node], options: Wanted) -> dict[Kind, list[_Spot]]:
    """The nodes that would do."""
    wanted, found = job.resources.accelerator.lower(), defaultdict[Kind, list[_Spot]](list)
    for node in nodes:
        if not node.takes(job.resources.accelerator):
            continue
        if not node.gpus:
            found[None].append(_Spot(node, node.cores // (options.cpus or 1)))
        for kind, count in Counter(gpu.type for gpu in node.gpus).items():
            if wanted in ("any", "gpu", kind.lower()):
                found[kind].append(_Spot(node, min(count, node.cores // options.cpus) if options.cpus else count))
    return found


def _wishes(job: AnyJob, sizing: str | None, spots: Mapping[Kind, Sequence[_Spot]]) -> Sequence[_Wish] | str:
    """Ways to run, best first, by numbers of processes alone where nobody knows their needs; or why there is none."""
    nodes = [
        one.node.model_copy(update={"cpu_slots": one.slots, "gpus": _of_kind(one.node, kind)[: one.slots]})
        for kind, some in spots.items()
        for one in some
    ]
    kinds = kinds_of(nodes) if sizing is not None and isinstance(job, TrainingJob) else None
    known = ways(dump_job(job), sizing, kinds) if sizing is not None and kinds else None
    if known is not None:
        if known.misfit is not None:
            return known.misfit
        return [_Wish(one.processes, one.device, one.need.host_bytes, one.plan) for one in known.options]
    low, high = (1, 1) if job.strategy == "single" else job.resources.bounds
    devices: list[Device] = ["cuda"] if any(kind is not None for kind in spots) else []
    devices += ["cpu"] if None in spots else []
    on = {device: [node for node in nodes if bool(node.gpus) == (device == "cuda")] for device in devices}
    return [
        _Wish(processes, device, 0, plan(job, processes, device, bf16=multiply_bf16(on[device], device)))
        for processes in range(high, low - 1, -1)
        for device in devices
    ]


def _of_kind(node: Node, kind: Kind) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in node.gpus if gpu.type == kind)


def _count(spots: Sequence[_Spot], wish: _Wish, wanted: int | None) -> int | None:
    """On how many nodes: as few as will do, or as many as are `wanted`; None if there is no room."""
    rooms = sorted((one.room(wish) for one in spots), reverse=True)
    most = min(len(rooms), wish.processes)
    for count in range(1, most + 1) if wanted is None else range(wanted, min(wanted, most) + 1):
        if wish.most(count) <= rooms[count - 1]:
            return count
    return None


def _shape(wish: _Wish, count: int, kind: Kind, spots: Sequence[_Spot], options: Wanted) -> Shape:
    most = wish.most(count)
    able = [one.node for one in spots if one.room(wish) >= most]
    gpus = tuple(gpu.model_copy(update={"index": index}) for index, gpu in enumerate(_of_kind(able[0], kind)[:most]))
    if options.cpus is not None:
        cpus = options.cpus * most
    elif gpus:  # the GPUs' share of the node's
        cpus = max(1, min(node.cores * most // len(_of_kind(node, kind)) for node in able))
    else:
        cpus = most
    least = min((node.memory_bytes for node in able if node.memory_bytes is not None), default=None)
    asked = int(options.memory_gb * 10**9) if options.memory_gb is not None else None
    if asked is None and wish.host_bytes:
        asked = ROOM * most * wish.host_bytes + BESIDE
        asked = asked if least is None else min(asked, least)
    return Shape(
        processes=wish.processes,
        nodes=count,
        per_node=most,
        cpus=cpus,
        kind=kind,
        memory_mb=None if asked is None else asked // MIB,
        node=Node(
            id="", name="", address="", cores=cpus, cpu_slots=most, memory_bytes=asked if asked is not None else least,
            gpus=gpus,
        ),
        like=able[0],
        plan=wish.plan,
    )  # fmt: skip


def _impossible(
    job: AnyJob, spots: Mapping[Kind, Sequence[_Spot]], options: Wanted, words: Words
) -> ImpossibleGangError:
    low, accelerator = job.resources.bounds[0], job.resources.accelerator
    kind = "" if accelerator == "any" else f" on {accelerator}"
    most = max((sum(one.slots for one in some) for some in spots.values()), default=0)
    nodes = max((len(some) for some in spots.values()), default=0)
    if not most:
        return ImpossibleGangError(
            f"{words.where} has no node that is up and takes processes{kind}",
            field="resources.accelerator",
            hint=words.none,
        )
    if options.nodes is not None and options.nodes > min(nodes, low):
        return ImpossibleGangError(
            f"--with nodes={options.nodes}: {words.where} has {nodes} such nodes, and the job {low} processes",
            field="nodes",
            hint=f"ask for at most {min(nodes, low)} nodes",
        )
    over = f" on {options.nodes} nodes" if options.nodes is not None else ""
    return ImpossibleGangError(
        f"the job asks for {low} processes{kind}; {words.where} takes {most} such processes at most{over}",
        field="resources.num_processes",
        hint=f"ask for fewer, or {words.few}",
    )
