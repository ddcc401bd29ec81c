"""One job from start to end in this process: a controller, a database and an executor of its own."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator

from launch.contract import Origin
from orchestrator.cli.output import err
from orchestrator.control.loop import Controller
from orchestrator.execute.local import LocalExecutor
from orchestrator.job.spec import AnyJob
from orchestrator.serve.views import job_view
from orchestrator.settings import Settings
from orchestrator.store.store import Store
from orchestrator.views import JobView


def run_here(
    job: AnyJob, origin: Origin, settings: Settings, executor: LocalExecutor, sizing: str | None = None
) -> Iterator[JobView]:
    """The job after every look at it, until it is final.

    SIGINT and SIGTERM ask the ranks to stop at their next step; a second one ends them at once.
    """
    job_id = f"{job.name}-{secrets.token_hex(3)}"
    # A database of its own: other runs and a yard on this machine are none of its business.
    settings = settings.model_copy(update={"home": settings.root / "runs" / job_id, "database_url": None})
    store = Store(settings.url)
    store.prepare()
    store.add_job(job_id, job, time.time(), origin, sizing)
    controller = Controller(store, executor, settings)
    interrupts = 0

    def on_interrupt(_signum: int, _frame: object) -> None:
        nonlocal interrupts
        interrupts += 1  # nothing more: waking the controller takes a lock that this very thread may hold

    before = signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_interrupt)
    try:
        while True:
            if interrupts:
                _interrupt(controller, job_id, interrupts)
            controller.step()
            row = store.job(job_id)
            yield job_view(row, store.attempts(job_id))
            if row.state.final:
                return
            controller.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        controller.close()
        store.close()


def _interrupt(controller: Controller, job_id: str, times: int) -> None:
    """Once: ask. Twice: end."""
    row = controller.store.job(job_id)
    if not row.state.final and not row.cancel_requested:
        err.print("stopping at the next step; Ctrl-C again ends it at once")
        controller.store.request_cancel(job_id, time.time())
    if times > 1:
        from orchestrator.execute.processes import kill, of_run

        for attempt in controller.store.attempts(job_id):
            kill(of_run(attempt.run.run_id))
