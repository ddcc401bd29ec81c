"""One scheduling decision: which waiting gangs start now, where, and why the others wait. Pure.

Gang or nothing; higher priority first, then first come, first served; the head blocks, so nobody starves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.model import Option, Placement, Snapshot
from orchestrator.errors import DoesNotFitError, ImpossibleGangError
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule.place import largest_gang, place


@dataclass(frozen=True)
class Waiting:
    """A job that wants to start."""

    job_id: str
    sequence: int
    """Order of submission."""
    priority: int
    min_processes: int
    max_processes: int
    accelerator: str
    options: tuple[Option, ...] | None = None
    """Best first; None where nobody knows what the job needs, so that any free slots will do."""
    misfit: Reason | None = None
    """Why there are no options."""


@dataclass(frozen=True)
class Start:
    job_id: str
    placement: Placement
    option: Option | None = None
    """The one that was taken."""


@dataclass(frozen=True)
class Wait:
    job_id: str
    reason: Reason


Decision = Start | Wait


def decide(snapshot: Snapshot, waiting: Sequence[Waiting]) -> list[Decision]:
    """A decision for every waiting job, in queue order.

    A gang that no idle cluster of these nodes could hold does not block the others: it waits with a reason of
    its own. Any other gang that does not fit holds back all behind it.
    """
    decisions: list[Decision] = []
    head: Waiting | None = None
    for job in sorted(waiting, key=lambda job: (-job.priority, job.sequence)):
        impossible = why_impossible(snapshot, job)
        if impossible is not None:
            decisions.append(Wait(job.job_id, impossible))
            continue
        if head is not None:
            decisions.append(Wait(job.job_id, _behind(head)))
            continue
        start = first_that_fits(snapshot, job)
        if start is None:
            head = job
            decisions.append(Wait(job.job_id, _no_room(snapshot, job)))
        else:
            snapshot = snapshot.with_placement(start.placement)
            decisions.append(start)
    return decisions


def why_impossible(snapshot: Snapshot, job: Waiting) -> Reason | None:
    """The reason why the gang could not start even if nothing else ran; None if it could."""
    if not snapshot.nodes:
        return Reason(code=ReasonCode.NO_NODES, sentence="the yard has no nodes", remedy="start or join a node")
    most = largest_gang(snapshot.idle(), job.accelerator)
    if most >= job.min_processes:
        return _why_no_memory(snapshot, job)
    kind = "" if job.accelerator == "any" else f" on {job.accelerator}"
    return Reason(
        code=ReasonCode.GANG_TOO_LARGE,
        sentence=f"the gang needs {_count(job.min_processes)}{kind}; the whole yard holds {most}",
        remedy=f"ask for at most {_count(most)}" if most else "ask for another accelerator, or add such a node",
    )


def check_possible(snapshot: Snapshot, job: Waiting) -> None:
    """Raises ImpossibleGangError if no placement on these nodes, all idle, holds the gang."""
    reason = why_impossible(snapshot, job)
    if reason is not None:
        if reason.code == ReasonCode.DOES_NOT_FIT:
            raise DoesNotFitError(reason.sentence, hint=reason.remedy)
        others_would_do = largest_gang(snapshot.idle(), "any") >= job.min_processes
        field = "resources.accelerator" if others_would_do else "resources.num_processes"
        raise ImpossibleGangError(reason.sentence, field=field, hint=reason.remedy)


def _why_no_memory(snapshot: Snapshot, job: Waiting) -> Reason | None:
    """The reason why the gang has too little memory even on an idle yard; None if it has enough, or nobody knows."""
    if job.options is None or first_that_fits(snapshot.idle(), job) is not None:
        return None
    if job.misfit is not None:
        return job.misfit
    return Reason(
        code=ReasonCode.DOES_NOT_FIT,
        sentence="no placement on these nodes leaves each process as much memory as it needs",
        remedy="see `tuneyard plan` for the nearest change that fits, or add a node with more memory",
    )


def first_that_fits(snapshot: Snapshot, job: Waiting) -> Start | None:
    """The best option for which there is room; without options, the largest gang."""
    if job.options is None:
        most = min(job.max_processes, largest_gang(snapshot, job.accelerator))
        placement = place(snapshot, most, job.accelerator) if most >= job.min_processes else None
        return Start(job.job_id, placement) if placement is not None else None
    for option in job.options:
        placement = place(snapshot, option.processes, job.accelerator, option.need, (option.device,))
        if placement is not None:
            return Start(job.job_id, placement, option)
    return None


def _no_room(snapshot: Snapshot, job: Waiting) -> Reason:
    free = largest_gang(snapshot, job.accelerator)
    if job.options and free >= job.min_processes:
        least = min(option.need.host_bytes for option in job.options)
        return Reason(
            code=ReasonCode.INSUFFICIENT_FREE,
            sentence=f"first in the queue; needs {least / 2**30:.1f} GiB of host memory a process, "
            "which running jobs hold",
            remedy="starts when running jobs end; cancel one, or ask for fewer processes",
        )
    kind = "" if job.accelerator == "any" else f" on {job.accelerator}"
    return Reason(
        code=ReasonCode.INSUFFICIENT_FREE,
        sentence=f"first in the queue; needs {_count(job.min_processes)}{kind} at once, {free} can start now",
        remedy="starts when running jobs end; cancel one, or ask for fewer processes",
    )


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _behind(head: Waiting) -> Reason:
    return Reason(
        code=ReasonCode.BEHIND_OTHERS,
        sentence=f"waits behind {head.job_id}, which is first in the queue",
        remedy="a higher priority moves it forward",
    )
