"""What travels with a job through a system outside, and what its runs tell of it, whatever the system."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from typing import Any

from launch.contract import GitState, Origin, Record
from orchestrator.job.spec import AnyJob, parse_job
from orchestrator.views import AttemptView, EventView, JobView

ALPHABET = string.ascii_lowercase + string.digits


class Patience(Record):
    """The settings that a run takes from the home that it was handed over from; in seconds."""

    leash: float
    leash_margin: float
    stop_grace: float
    tick: float


class Task(Record):
    """One job."""

    job_id: str
    """Of its directory, and in its checkpoints' names."""
    job: dict[str, Any]
    """A JobSpec as JSON."""
    sizing: str | None = None
    origin: Origin = Origin()


class Status(Record):
    """What a run says of its job, whenever something has changed."""

    job: JobView
    attempts: tuple[AttemptView, ...] = ()
    events: tuple[EventView, ...] = ()
    told_to_end: bool = False
    """Whether the system has sent SIGTERM to the run: a cancellation, a preemption, or its time limit."""


def task_of(job_id: str, job: AnyJob, sizing: str | None, git: GitState | None) -> Task:
    return Task(job_id=job_id, job=job.model_dump(mode="json"), sizing=sizing, origin=Origin(git=git))


def job_of(task: Task) -> AnyJob:
    """Raises pydantic.ValidationError."""
    return parse_job(json.dumps(task.job))


def job_ids(jobs: Sequence[AnyJob]) -> Iterator[str]:
    """New ids for jobs that are handed over, of an array those that it has made."""
    suffix = "".join(secrets.choice(ALPHABET) for _ in range(5))
    for job in jobs:
        yield f"{job.name}-{suffix}" if job.array_of is None else f"{job.array_of.id}-{job.array_of.index}"


def so_far(view: JobView) -> str:
    """What its attempts have come to."""
    attempts = "1 attempt" if view.attempts == 1 else f"{view.attempts} attempts"
    saved = f", saved at step {view.checkpoint.step}" if view.checkpoint is not None else ""
    return f"{attempts} so far{saved}"


def known_as(text: str | None, own: str, job_id: str) -> str | None:
    """`text` with commands that name the job as it is known here."""
    return None if text is None else re.sub(rf"(tuneyard \w+ ){re.escape(own)}\b", rf"\g<1>{job_id}", text)
