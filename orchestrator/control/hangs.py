"""A gang of which a rank does not move, or is slow: who it is, what is said of it, how its attempt is judged. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from launch.attempt import HUNG
from launch.contract import ProgressLine, RankError, RunContract
from orchestrator.cluster.status import AttemptStatus, Stall
from orchestrator.control.actions import Note
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.recover.classify import Outcome, Verdict
from orchestrator.store.rows import AttemptRow

STACKS_S = 12.0
"""Time that agents have to read the stacks of all ranks before they end them."""


def cause(stalls: Sequence[Stall]) -> Stall | None:
    """The rank that keeps the others waiting, if one is overdue: one that a signal has stopped, else the one that is
    behind, else the one that has not moved for longest."""
    if not any(stall.overdue for stall in stalls):
        return None
    return min(stalls, key=lambda stall: (not stall.stopped, stall.count, -stall.seconds))


def description(stall: Stall, contract: RunContract) -> str:
    """`rank 1 (node n2) does not move: for 131 s in step 57, in its backward part; the limit is 120 s`."""
    where = {"step": f"in step {stall.step}", "first-step": "in its first step"}.get(stall.phase, f"in `{stall.phase}`")
    part = f", in its {stall.part} part" if stall.part else ""
    why = "a signal has stopped its process" if stall.stopped else f"the limit is {stall.limit_s:.0f} s"
    return f"{_who(stall.rank, contract)} does not move: for {stall.seconds:.0f} s {where}{part}; {why}"


def hanging(stall: Stall, contract: RunContract) -> Reason:
    """Why a running job is being ended."""
    return Reason(
        code=ReasonCode.HUNG,
        sentence=description(stall, contract),
        remedy="the stacks of all ranks are read, then the gang is ended and started again; nothing to do",
    )


def judged(attempt: AttemptRow, verdict: Verdict, status: AttemptStatus | None) -> Verdict:
    """The verdict on an attempt; if it was ended since a rank hung, that is why, whatever its ranks say."""
    if attempt.stop is None or attempt.stop.reason != HUNG or status is None:
        return verdict
    if verdict.outcome in (Outcome.SUCCEEDED, Outcome.STOPPED):
        return verdict  # it moved on after all
    stall = cause(status.stalls)
    end = next((end for end in status.exits if stall is not None and end.rank == stall.rank), None)
    if stall is None or end is None:
        return verdict
    error = RankError(
        code=HUNG,
        message=description(stall, attempt.run),
        hint=f"stacks of all ranks: {attempt.run.run_dir}/rank-*/stacks.txt; retry.hang_after changes the limit",
        traceback=stall.stack,
    )
    return Verdict(Outcome.HUNG, end.model_copy(update={"error": error}))


def slow_rank(attempt: AttemptRow, progress: ProgressLine | None) -> tuple[Note, ...]:
    """What is noted when the rank that all others wait for becomes another one, or nobody."""
    if progress is None or progress.loss is None:
        return ()  # only lines of steps tell
    before = attempt.progress.slow_rank if attempt.progress is not None else None
    if progress.slow_rank == before:
        return ()
    if progress.slow_rank is None:
        return (Note("slow-rank", {"rank": None, "sentence": "no rank is slower than the others any more"}),)
    who = _who(progress.slow_rank, attempt.run)
    told = f"{who} takes {progress.slow_by:.1f} times as long for its part of a step as the others, which wait for it"
    return (Note("slow-rank", {"rank": progress.slow_rank, "by": progress.slow_by, "sentence": told}),)


def _who(rank: int, contract: RunContract) -> str:
    index = next(index for index in range(len(contract.nodes)) if rank in contract.ranks_of(index))
    return f"rank {rank} (node {contract.nodes[index].node})"
