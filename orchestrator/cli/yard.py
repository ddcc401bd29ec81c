"""Which yard, or system outside, a verb speaks to."""

from __future__ import annotations

import os

from orchestrator.client import Client
from orchestrator.errors import NotFoundError
from orchestrator.outside.protocol import Outside, System, system_of
from orchestrator.settings import Settings
from orchestrator.yard.home import connect

ENV_URL = "TUNEYARD_URL"


def client(job: str | None = None) -> Client:
    """The yard named by TUNEYARD_URL (with TUNEYARD_TOKEN), or else the one of TUNEYARD_HOME.

    Raises:
        NotFoundError: `job` is a job of a system outside, and what is asked of it only a yard can do.
    """
    if job is not None and (system := system_of(job)) is not None:
        raise NotFoundError(
            f"{job} is not a yard's job: {system.value} queues it, and this is for jobs that a yard queues",
            code="not-in-a-yard",
            field="job",
            hint=f"what is possible with it: ls --on {system.value}, describe, logs, wait, cancel",
        )
    return connect(Settings(), os.environ.get(ENV_URL))


def outside(system: System) -> Outside:
    """A system that queues jobs itself."""
    from orchestrator.outside.systems import open_system

    return open_system(system, Settings())


def holder(job: str) -> Client | Outside:
    """Who has the job: the system that its id names, else the yard."""
    system = system_of(job)
    return client() if system is None else outside(system)
