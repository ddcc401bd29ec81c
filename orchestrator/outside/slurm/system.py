"""Slurm as a system that queues jobs."""

from __future__ import annotations

from orchestrator.errors import YardError
from orchestrator.outside.protocol import MAX_JOBS, Order, Outside
from orchestrator.settings import Settings
from orchestrator.views import AttemptView, EventView, JobView


class Slurm(Outside):
    """The Slurm that this machine's commands speak to."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def render(self, order: Order) -> str:
        raise self._absent(order)

    def submit(self, order: Order) -> list[JobView]:
        raise self._absent(order)

    def jobs(self, limit: int = MAX_JOBS, array: str | None = None) -> list[JobView]:
        raise self._absent(limit, array)

    def job(self, job_id: str) -> JobView:
        raise self._absent(job_id)

    def attempts(self, job_id: str) -> list[AttemptView]:
        raise self._absent(job_id)

    def events(self, job_id: str) -> list[EventView]:
        raise self._absent(job_id)

    def log(self, job_id: str, *, rank: int | None, attempt: int | None = None, offset: int = 0) -> tuple[bytes, int]:
        raise self._absent(job_id, rank, attempt, offset)

    def cancel(self, job_id: str) -> list[JobView]:
        raise self._absent(job_id)

    def is_array(self, job_id: str) -> bool:
        raise self._absent(job_id)

    def _absent(self, *_: object) -> YardError:
        return YardError("Slurm is not spoken to yet", hint="use a yard")
