"""Exit statuses of the command line."""

from __future__ import annotations

from collections.abc import Iterable

from launch.checkpoint.manifest import CheckpointError
from orchestrator.errors import (
    ConflictError,
    NotFoundError,
    SpecError,
    StoreError,
    TuneyardError,
    UnauthorizedError,
    YardError,
)
from orchestrator.job.lifecycle import JobState

OK = 0
JOB_FAILED = 1
BAD_INPUT = 2  # also what click answers to a wrong flag
NO_YARD = 3
NOT_POSSIBLE = 4  # not found, or not in a state for it
CANCELLED = 5
INTERRUPTED = 130


def of_error(problem: TuneyardError) -> int:
    """The status for an error that ends a command."""
    if isinstance(problem, YardError | StoreError | UnauthorizedError):
        return NO_YARD
    if isinstance(problem, NotFoundError | ConflictError | CheckpointError):
        return NOT_POSSIBLE
    return BAD_INPUT if isinstance(problem, SpecError) else JOB_FAILED


def of_job(state: JobState) -> int:
    """The status for a job that has ended so."""
    return {JobState.SUCCEEDED: OK, JobState.CANCELLED: CANCELLED}.get(state, JOB_FAILED)


def of_jobs(states: Iterable[JobState]) -> int:
    """The status for jobs that have all ended: 0 if all succeeded, else that of the worst."""
    each = {of_job(state) for state in states}
    return next((status for status in (JOB_FAILED, CANCELLED) if status in each), OK)
