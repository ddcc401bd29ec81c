"""States of jobs and attempts, their tables of transitions, and the reasons that go with them. Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import IllegalTransitionError


class JobState(enum.StrEnum):
    """Where a job is; the first five are live."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"  # has no attempt and gets none until its user says so
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return not JOB_TRANSITIONS[self]


class AttemptState(enum.StrEnum):
    """Where one gang start is."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    LOST = "lost"  # its node is gone; its ranks may still live until their leash ends
    ENDED = "ended"

    @property
    def final(self) -> bool:
        return not ATTEMPT_TRANSITIONS[self]


_AFTER_AN_ATTEMPT = frozenset(
    {JobState.QUEUED, JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
)
JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.PAUSED, JobState.CANCELLED, JobState.FAILED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.STOPPING, *_AFTER_AN_ATTEMPT}),
    JobState.RUNNING: frozenset({JobState.STOPPING, *_AFTER_AN_ATTEMPT}),
    JobState.STOPPING: _AFTER_AN_ATTEMPT,
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

ATTEMPT_TRANSITIONS: dict[AttemptState, frozenset[AttemptState]] = {
    AttemptState.STARTING: frozenset(
        {AttemptState.RUNNING, AttemptState.STOPPING, AttemptState.LOST, AttemptState.ENDED}
    ),
    AttemptState.RUNNING: frozenset({AttemptState.STOPPING, AttemptState.LOST, AttemptState.ENDED}),
    AttemptState.STOPPING: frozenset({AttemptState.LOST, AttemptState.ENDED}),
    AttemptState.LOST: frozenset({AttemptState.RUNNING, AttemptState.STOPPING, AttemptState.ENDED}),
    AttemptState.ENDED: frozenset(),
}

Story = Callable[[], Sequence[str]]
"""Tells what happened so far; asked only where a transition is illegal."""


def check_job_transition(job_id: str, old: JobState, new: JobState, story: Story = tuple) -> None:
    """Raises IllegalTransitionError, telling the story so far, unless the table allows old → new."""
    if new not in JOB_TRANSITIONS[old]:
        raise _illegal(f"job {job_id}", old, new, story)


def check_attempt_transition(
    job_id: str, attempt: int, old: AttemptState, new: AttemptState, story: Story = tuple
) -> None:
    """Raises IllegalTransitionError, telling the story so far, unless the table allows old → new."""
    if new not in ATTEMPT_TRANSITIONS[old]:
        raise _illegal(f"attempt {attempt} of job {job_id}", old, new, story)


def _illegal(who: str, old: str, new: str, story: Story) -> IllegalTransitionError:
    told = "; ".join(story()) or "nothing recorded"
    return IllegalTransitionError(f"{who} cannot go from {old} to {new}. So far: {told}", hint="please report this")


class ReasonCode(enum.StrEnum):
    """Why a job is where it is."""

    SUBMITTED = "submitted"  # no tick has looked at it yet
    BEHIND_OTHERS = "behind-others"
    INSUFFICIENT_FREE = "insufficient-free"
    MAKING_ROOM = "making-room"  # others were told to stop for it
    OVER_QUOTA = "over-quota"
    ARRAY_FULL = "array-full"  # as many of its array run as may
    AFTER = "after"  # other jobs come before it
    PREEMPTED = "preempted"
    RESIZED = "resized"
    NODE_DRAINED = "node-drained"
    NO_NODES = "no-nodes"
    DOES_NOT_FIT = "does-not-fit"  # no node has the memory
    GANG_TOO_LARGE = "gang-too-large"
    TRACING = "tracing"  # how much memory it needs is being found out
    BACKING_OFF = "backing-off"
    NEXT_RUNG = "next-rung"  # it ran out of memory, and goes on with a plan that takes less
    HUNG = "hung"  # a rank does not move
    OLD_ATTEMPT_ENDING = "old-attempt-ending"
    HELD = "held"  # somebody must release it
    REFUSED = "refused"  # what it asks for it will never get
    NOT_TOLD = "not-told"  # the system that queues it has a reason that we have no words for
    STARTING = "starting"
    RUNNING = "running"
    PAUSE_REQUESTED = "pause-requested"
    PAUSED = "paused"
    RESUMED = "resumed"
    CANCEL_REQUESTED = "cancel-requested"
    CANCELLED = "cancelled"
    DONE = "done"
    MAX_DURATION = "max-duration"
    FAILED = "failed"


class Reason(BaseModel):
    """An enum value, one sentence a person understands, and what would change it."""

    model_config = ConfigDict(frozen=True)

    code: ReasonCode
    sentence: str
    remedy: str | None = None
