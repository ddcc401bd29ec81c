"""A job's way through the production tables of states, and what becomes of its work."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.cluster.model import Placement
from orchestrator.job.lifecycle import (
    AttemptState,
    JobState,
    check_attempt_transition,
    check_job_transition,
)
from orchestrator.simulate.workload import SimulatedJob


@dataclass(slots=True)
class Attempt:
    """One start of the gang."""

    number: int
    placement: Placement
    processes: int
    since: float
    works_from: float
    """When start-up is over."""
    speed: float
    """Beside that on num_gpus."""
    saved_at: float
    """Up to when its work was committed."""
    state: AttemptState = AttemptState.STARTING
    until: float | None = None

    def worked_s(self, now: float) -> float:
        """Seconds of work on num_gpus that it has done."""
        return max(0.0, now - self.works_from) * self.speed


class Life:
    """What has happened to one job."""

    __slots__ = (
        "attempt", "attempts", "done_at", "failures", "job", "left_s", "preemptions", "queued_at", "resizes", "state",
        "waited_s",
    )  # fmt: skip

    def __init__(self, job: SimulatedJob) -> None:
        self.job = job
        self.left_s = job.duration_s
        """Seconds of work on num_gpus, with what has to be done again."""
        self.state = JobState.QUEUED
        self.attempts: list[Attempt] = []
        self.attempt: Attempt | None = None
        """The one that holds slots."""
        self.queued_at = job.submit_s
        self.waited_s = 0.0
        """Time without slots, up to the last start."""
        self.done_at: float | None = None
        self.preemptions = 0
        self.resizes = 0
        self.failures = 0

    def start(self, now: float, placement: Placement, speed: float, startup_s: float) -> Attempt:
        self._become(JobState.STARTING)
        works_from = now + startup_s
        attempt = Attempt(
            len(self.attempts) + 1, placement, placement.world_size, now, works_from, speed, saved_at=works_from
        )
        self.attempts.append(attempt)
        self.attempt = attempt
        self.waited_s += now - self.queued_at
        if not startup_s:
            self.runs()
        return attempt

    def runs(self) -> None:
        """Start-up is over."""
        self._become(JobState.RUNNING)
        self._attempt_becomes(AttemptState.RUNNING)

    def end(self, now: float) -> None:
        """Its work is done."""
        self.left_s = 0.0
        self._leave(now)
        self._become(JobState.SUCCEEDED)
        self.done_at = now

    def stop(self, now: float, cost_s: float) -> None:
        """It commits what it has done and goes back to the queue, with `cost_s` of work to do again."""
        self._become(JobState.STOPPING)
        assert self.attempt is not None
        self._attempt_becomes(AttemptState.STOPPING)
        self.left_s += cost_s - self.attempt.worked_s(now)
        self._leave(now)
        self._queue(now)

    def fail(self, now: float) -> float:
        """Its node is gone, and with it what was not committed. Returns for how long slots were held in vain."""
        attempt = self.attempt
        assert attempt is not None
        self._attempt_becomes(AttemptState.LOST)
        self.left_s -= attempt.worked_s(attempt.saved_at)
        self.failures += 1
        self._leave(now)
        self._queue(now)
        return max(0.0, now - attempt.saved_at)

    def _leave(self, now: float) -> None:
        assert self.attempt is not None
        self._attempt_becomes(AttemptState.ENDED)
        self.attempt.until = now
        self.attempt = None

    def _queue(self, now: float) -> None:
        self._become(JobState.QUEUED)
        self.queued_at = now

    def _become(self, state: JobState) -> None:
        check_job_transition(self.job.job_id, self.state, state, self._story)
        self.state = state

    def _attempt_becomes(self, state: AttemptState) -> None:
        assert self.attempt is not None
        check_attempt_transition(self.job.job_id, self.attempt.number, self.attempt.state, state, self._story)
        self.attempt.state = state

    def _story(self) -> tuple[str, ...]:
        return (
            ()
            if not self.attempts
            else (f"{len(self.attempts)} attempts, the last since {self.attempts[-1].since:g} s",)
        )
