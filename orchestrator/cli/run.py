"""`tuneyard run`: a job from start to end in this process, no yard needed."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.files import JobFile, Overrides, read_job, told_where
from orchestrator.cli.output import Format, Output, err, job_json, print_json
from orchestrator.cli.progress import follow, summary
from orchestrator.cli.status import of_job
from orchestrator.cluster.model import Snapshot
from orchestrator.job.spec import AnyJob
from orchestrator.schedule.decide import check_possible
from orchestrator.settings import Settings
from orchestrator.views import JobView

if TYPE_CHECKING:
    from orchestrator.control.loop import Controller
    from orchestrator.execute.local import LocalExecutor


def run(
    file: JobFile,
    set_: Overrides = None,
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="No progress on stderr."),
) -> None:
    """Run a job file on this machine to its end, and print what came of it.

    Needs no yard and no Ray: the controller lives in this process and ends the job with it. Ctrl-C asks the ranks
    to stop at their next step; a second one ends them at once.
    """
    # Imported late: the other verbs need neither database nor executor.
    from orchestrator.control.reconcile import waiting
    from orchestrator.execute.local import LocalExecutor

    job, document = read_job(file, set_)
    settings = Settings()
    executor = LocalExecutor(settings.cpu_slots, owned=True)
    with told_where(document):
        check_possible(Snapshot(nodes=tuple(executor.nodes())), waiting("run", 0, job))
    view = follow(_run(job, settings, executor), quiet=quiet)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        summary(view)
    raise typer.Exit(of_job(view.state))


def _run(job: AnyJob, settings: Settings, executor: LocalExecutor) -> Iterator[JobView]:
    """The job after every look at it, until it is final."""
    from orchestrator.control.loop import Controller
    from orchestrator.serve.views import job_view
    from orchestrator.store.store import Store

    job_id = f"{job.name}-{secrets.token_hex(3)}"
    # A database of its own: other runs and a yard on this machine are none of its business.
    settings = settings.model_copy(update={"home": settings.root / "runs" / job_id, "database_url": None})
    store = Store(settings.url)
    store.prepare()
    store.add_job(job_id, job, time.time())
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
