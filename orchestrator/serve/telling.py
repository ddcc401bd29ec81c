"""What a controller of one job writes down of it, for those who ask its system outside, and how it stores the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launch.attempt import write_atomically
from orchestrator.errors import NotFoundError
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.outside.record import Status, Task, job_of
from orchestrator.serve.views import attempt_view, job_view
from orchestrator.store.rows import EventRow, JobRow
from orchestrator.store.store import Store
from orchestrator.views import EventView

TELL_S = 1.0
MAX_EVENTS = 1000


def stored(store: Store, task: Task) -> JobRow:
    """The job as it is stored; on its first run it is stored now, and on a later one no longer paused."""
    now = time.time()
    try:
        row = store.job(task.job_id)
    except NotFoundError:
        return store.add_job(task.job_id, job_of(task), now, task.origin, task.sizing)
    return store.request_resume(task.job_id, now) if row.pause_requested else row


class Telling:
    """Prints what becomes of a job, and keeps a file of it: outside.record.Status.

    `why` says why a run ends that is told to end before its job has; `told_to_end` whether it is.
    """

    def __init__(self, store: Store, path: Path, why: Callable[[], str], told_to_end: Callable[[], bool]) -> None:
        self._store, self._path, self._why, self._told_to_end = store, path, why, told_to_end
        self._events: list[EventView] = []
        self._told, self._told_at, self._said = "", 0.0, ""

    def tell(self, row: JobRow, reason: Reason | None = None) -> None:
        """Write down what is to be known, if it has changed; at most once a second, but for its state."""
        reason = reason or self._reason(row)
        said = f"{row.state}: {reason.sentence}"
        if said != self._said:
            self._said = said
            print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)
        elif time.monotonic() - self._told_at < TELL_S:
            return
        self._told_at = time.monotonic()
        attempts = self._store.attempts(row.id)
        after = self._events[-1].id if self._events else 0
        new = self._store.events(row.id, after, MAX_EVENTS)
        self._events = [*self._events, *map(_event, new)][-MAX_EVENTS:]
        status = Status(
            job=job_view(row, attempts).model_copy(update={"reason": reason}),
            attempts=tuple(attempt_view(attempt) for attempt in attempts),
            events=tuple(self._events),
            told_to_end=self._told_to_end(),
        ).model_dump_json()
        if status != self._told:
            self._told = status
            write_atomically(self._path, status)

    def _reason(self, row: JobRow) -> Reason:
        """Why the job is where it is, in words of its own for what is a pause to the controller alone."""
        told = _said_otherwise(row.reason.code, self._why())
        if told is None:
            return row.reason
        if row.reason.code == ReasonCode.PAUSED:
            told += f", and it ended badly: {row.error['message']}" if row.error is not None else ""
            told += f"; its last checkpoint is of step {row.checkpoint.step}" if row.checkpoint is not None else ""
        return Reason(code=row.reason.code, sentence=told)


def _said_otherwise(code: str, why: str) -> str | None:
    """A sentence for what is a pause to the controller alone; None for everything else."""
    return {
        ReasonCode.PAUSE_REQUESTED.value: f"{why}: its ranks save at their next step, and end",
        ReasonCode.PAUSED.value: f"{why}: it waits for another run",
        ReasonCode.RESUMED.value: "goes on in another run",
    }.get(code)


def _event(row: EventRow) -> EventView:
    """An event as it is told, maybe of an earlier run."""
    event, reason = EventView.model_validate(row.model_dump()), row.data.get("reason")
    told = _said_otherwise(reason["code"], "this run ends") if isinstance(reason, dict) else None
    if told is None or reason is None:
        return event
    return event.model_copy(update={"data": row.data | {"reason": {"code": reason["code"], "sentence": told}}})
