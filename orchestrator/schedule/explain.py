"""Why a gang waits: a code, a sentence, and what would let it start. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Need, Option
from orchestrator.errors import DoesNotFitError, ImpossibleGangError
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule.gang import DAY_S, HOUR_S, Gang, Queue, Stop, Why
from orchestrator.schedule.place import fit, largest_gang, room_for

NOT_FOR_ROOM = frozenset(
    {
        ReasonCode.NO_NODES,
        ReasonCode.GANG_TOO_LARGE,
        ReasonCode.DOES_NOT_FIT,
        ReasonCode.ARRAY_FULL,
        ReasonCode.OVER_QUOTA,
    }
)
"""Reasons that more free slots would not change."""


def why_impossible(idle: Capacity, gang: Gang, *, consolidate: bool = False) -> Reason | None:
    """The reason why the gang could not start even if nothing else ran; None if it could."""
    if not idle.nodes:
        return Reason(code=ReasonCode.NO_NODES, sentence="the yard has no nodes", remedy="start or join a node")
    most = largest_gang(idle, gang.accelerator)
    kind = "" if gang.accelerator == "any" else f" on {gang.accelerator}"
    if most >= gang.min_processes:
        if gang.options is not None:
            return _why_no_memory(idle, gang, consolidate)
        if not consolidate or fit(idle, gang.min_processes, gang.accelerator, consolidate=True):
            return None
        return Reason(
            code=ReasonCode.GANG_TOO_LARGE,
            sentence=f"the gang needs {count(gang.min_processes)}{kind} on whole nodes of one size, which are too few",
            remedy="ask for fewer processes, or let gangs be scattered (the rule `consolidate`)",
        )
    return Reason(
        code=ReasonCode.GANG_TOO_LARGE,
        sentence=f"the gang needs {count(gang.min_processes)}{kind}; the whole yard holds {most}",
        remedy=f"ask for at most {count(most)}" if most else "ask for another accelerator, or add such a node",
    )


def check_possible(idle: Capacity, gang: Gang) -> None:
    """Raises ImpossibleGangError, or DoesNotFitError, if no placement on these nodes, all idle, holds the gang."""
    reason = why_impossible(idle, gang)
    if reason is not None:
        if reason.code == ReasonCode.DOES_NOT_FIT:
            raise DoesNotFitError(reason.sentence, hint=reason.remedy)
        others_would_do = largest_gang(idle, "any") >= gang.min_processes
        field = "resources.accelerator" if others_would_do else "resources.num_processes"
        raise ImpossibleGangError(reason.sentence, field=field, hint=reason.remedy)


def _why_no_memory(idle: Capacity, gang: Gang, consolidate: bool) -> Reason | None:
    """The reason why the gang has too little memory even on an idle yard; None if it has enough."""
    if room_for(idle, gang, gang.max_processes, consolidate=consolidate) is not None:
        return None
    if gang.misfit is not None:
        return gang.misfit
    return Reason(
        code=ReasonCode.DOES_NOT_FIT,
        sentence="no placement on these nodes leaves each process as much memory as it needs",
        remedy="see `tuneyard plan` for the nearest change that fits, or add a node with more memory",
    )


def no_room(free: Capacity, gang: Gang) -> Reason:
    """Why the first in the queue does not start."""
    room = largest_gang(free, gang.accelerator)
    kind = "" if gang.accelerator == "any" else f" on {gang.accelerator}"
    if gang.options and room >= gang.min_processes:
        needs = f"needs {_memory(free, gang.options, gang.accelerator)} a process, which running jobs hold"
    elif room >= gang.min_processes:
        needs = f"needs {count(gang.min_processes)}{kind} on nodes of its own, and none are free"
    else:
        needs = f"needs {count(gang.min_processes)}{kind} at once, {room} can start now"
    return Reason(
        code=ReasonCode.INSUFFICIENT_FREE,
        sentence=f"first in the queue; {needs}",
        remedy="starts when running jobs end; cancel one, or ask for fewer processes",
    )


def _memory(free: Capacity, options: Sequence[Option], accelerator: str) -> str:
    """Which memory a gang lacks: the host's if its GPUs alone are to be had."""
    for option in options:
        if fit(free, option.processes, accelerator, Need(option.need.device_bytes), (option.device,)):
            least = min(one.need.host_bytes for one in options)
            return f"{least / 2**30:.1f} GiB of host memory"
    least = min(one.need.device_bytes for one in options)
    return f"a GPU with {least / 2**30:.1f} GiB of memory for"


@lru_cache(maxsize=1)
def behind() -> Reason:
    return Reason(
        code=ReasonCode.BEHIND_OTHERS,
        sentence="waits behind others, which come first",
        remedy="`tuneyard why JOB` tells who and how long; a higher priority moves it forward",
    )


@lru_cache(maxsize=1)
def room_is_made() -> Reason:
    return Reason(
        code=ReasonCode.MAKING_ROOM,
        sentence="running jobs save and stop to make room for it",
        remedy="starts when they have; nothing to do",
    )


def makes_room(stops: Sequence[Stop]) -> Reason:
    shrink = all(stop.why == Why.SHRINK for stop in stops)
    who = stops[0].job_id if len(stops) == 1 else f"{len(stops)} jobs"
    does = "goes on with fewer processes" if shrink else "saves and goes back to the queue"
    if len(stops) > 1:
        does = "go on with fewer processes" if shrink else "save and go back to the queue"
    return Reason(
        code=ReasonCode.MAKING_ROOM,
        sentence=f"{who} {does} to make room for it",
        remedy="starts when the room is there; nothing to do",
    )


@lru_cache(maxsize=256)
def array_full(at_once: int) -> Reason:
    return Reason(
        code=ReasonCode.ARRAY_FULL,
        sentence=f"{at_once} of its array run already, as many as may at once",
        remedy="starts when one of them ends; submit with a larger array_at_once",
    )


def over_quota(needs: int, queue: Queue, held: int, allowed: int) -> Reason:
    if queue.ceiling is not None and queue.ceiling - held == allowed:
        sentence = f"queue {queue.name} holds {held} of at most {queue.ceiling}; the gang needs {needs}"
    else:
        sentence = f"queue {queue.name} may take {max(allowed, 0)} more: the rest is kept for queues that do not lend"
    return Reason(
        code=ReasonCode.OVER_QUOTA,
        sentence=sentence,
        remedy=f"starts when jobs of queue {queue.name} end; `tuneyard queues set` changes its share",
    )


def count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * HOUR_S:
        return f"{seconds / 60:.0f} min"
    if seconds < 1.5 * DAY_S:
        return f"{seconds / HOUR_S:.1f} h"
    return f"{seconds / DAY_S:.1f} days"
