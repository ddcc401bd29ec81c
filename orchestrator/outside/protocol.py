"""What every system can do that queues and starts jobs itself, in place of our controller. Verbs know it only by this.

A job outside is known by the system's name and the system's own id for it: `slurm:1234`. What verbs are told of it are
the views that a yard answers with, so that a job looks the same wherever it runs.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from launch.contract import GitState
from orchestrator.errors import NotFoundError
from orchestrator.follow import follow
from orchestrator.job.spec import AnyJob
from orchestrator.views import AttemptView, EventView, JobView

MAX_JOBS = 10_000


class System(enum.StrEnum):
    """The systems that there are; the value is how ids begin."""

    SLURM = "slurm"
    KUBERNETES = "k8s"


def system_of(job_id: str) -> System | None:
    """The system that an id says its job is in; None for a job of a yard, whose id has no colon."""
    name, colon, _ = job_id.partition(":")
    if not colon:
        return None
    try:
        return System(name)
    except ValueError:
        known = ", ".join(f"{one.value}:ID" for one in System)
        raise NotFoundError(
            f"no system `{name}` is known, which {job_id} names",
            field="job",
            hint=f"ids are a yard's, as `tuneyard ls` prints them, or {known}",
        ) from None


@dataclass(frozen=True)
class Order:
    """What is handed over: one job, or all elements of an array, checked by whoever read the file."""

    jobs: tuple[AnyJob, ...]
    sizings: tuple[str | None, ...]
    """Of each: memory.sizing.Sizing as JSON, where its model is known."""
    git: GitState | None = None
    """Where the job file stands."""
    options: tuple[str, ...] = ()
    """What was said to the system alone: `key=value`, as `--with` gives it."""

    @property
    def is_array(self) -> bool:
        return self.jobs[0].array_of is not None


class Outside(ABC):
    """A system that queues jobs. Its methods raise YardError where it does not answer, NotFoundError for a job that is
    not known here, and are named as those of a yard's client."""

    slowest_look_s = 10.0
    """While a job is followed, the system is asked at least so often."""

    @abstractmethod
    def render(self, order: Order) -> str:
        """The very text that `submit` hands over. Raises as that does."""

    @abstractmethod
    def submit(self, order: Order) -> list[JobView]:
        """Hand an order over: its job, or the elements of its array in order.

        Raises:
            SpecError: an option, or something of the job, that the system cannot do; nothing was handed over then.
        """

    @abstractmethod
    def jobs(self, limit: int = MAX_JOBS, array: str | None = None) -> list[JobView]:
        """The newest `limit` jobs that were handed over from this home, oldest first, or those of an array."""

    @abstractmethod
    def job(self, job_id: str) -> JobView:
        """A job as it is now."""

    @abstractmethod
    def attempts(self, job_id: str) -> list[AttemptView]:
        """Its attempts, oldest first."""

    @abstractmethod
    def events(self, job_id: str) -> list[EventView]:
        """What happened to it, oldest first."""

    @abstractmethod
    def log(self, job_id: str, *, rank: int | None, attempt: int | None = None, offset: int = 0) -> tuple[bytes, int]:
        """A piece of a rank's log (the launcher's for None) and the offset to go on from; empty at the end."""

    @abstractmethod
    def cancel(self, job_id: str) -> list[JobView]:
        """Ask for the end of a job, or of all elements of an array. Raises ConflictError if it has come already."""

    @abstractmethod
    def is_array(self, job_id: str) -> bool:
        """Whether an id is that of an array as a whole, which `jobs`, `follow_array` and `cancel` take alone."""

    def follow(self, job_id: str, timeout: float | None = None) -> Iterator[JobView]:
        """The job again and again until it is final. Raises YardError as orchestrator.follow."""
        yield from follow(
            f"job {job_id}",
            lambda: self.job(job_id),
            lambda view: view.state.final,
            timeout,
            self.slowest_look_s,
        )

    def follow_array(self, array: str, timeout: float | None = None) -> Iterator[list[JobView]]:
        """All jobs of an array again and again until all are final; otherwise as `follow`."""
        yield from follow(
            f"array {array}",
            lambda: self.jobs(array=array),
            lambda views: all(view.state.final for view in views),
            timeout,
            self.slowest_look_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        """Let go of what it holds, if anything."""
