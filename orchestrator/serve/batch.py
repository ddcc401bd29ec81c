"""`python -m orchestrator.serve.batch`, which a batch script of Slurm's becomes: the controller of one job.

What it is to do is its standard input (outside.slurm.record). Slurm's warning before the time limit is a pause, as a
user may ask a yard for one: the ranks save and end. Then this run has itself requeued, and the next one resumes the job
on whatever nodes it has. SIGTERM is a pause, too, in the time that Slurm leaves; whether another run follows, Slurm
decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import structlog

from launch.attempt import write_atomically
from orchestrator.control.loop import Controller
from orchestrator.errors import ConflictError, NotFoundError, TuneyardError
from orchestrator.execute.slurm import SlurmExecutor
from orchestrator.execute.slurm_agent import stop_within
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.job.spec import TrainingJob
from orchestrator.outside.record import Task, job_of
from orchestrator.outside.slurm import record
from orchestrator.outside.slurm.commands import addresses, ask, end_of, kill_wait
from orchestrator.outside.slurm.record import Files, Handed, Run
from orchestrator.serve.telling import Telling, stored
from orchestrator.settings import Settings
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store

DONE, FAILED, REFUSED = 0, 1, 2
"""Exit statuses, which Slurm shows: the job succeeded, or this run has; it failed; it cannot run here."""
LIMIT_S = 5.0
"""A SIGTERM that comes no sooner than that before the time limit is the limit's."""
MARGIN_S = 15.0
"""Of the warning, what is kept for ending what does not save in time, and for the requeue."""
REQUEUED_S = 120.0
"""In that time Slurm ends a run that has been requeued."""


def main() -> int:
    """Run the job of this script, or this element of its array, as far as this run goes. Returns an exit status."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ]
    )
    run, tasks = record.parse_script_data(sys.stdin.read())
    try:
        batch = Batch(run, tasks, int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")))
        return batch.drive()
    except TuneyardError as problem:
        print(problem, file=sys.stderr)
        return REFUSED


class Batch:
    """One run of a job.

    Raises:
        ConflictError: another job of Slurm's has this very script.
        TuneyardError: Slurm, the directory or the database cannot be used.
    """

    def __init__(self, run: Run, tasks: list[Task], index: int) -> None:
        self._warned = self._pausing = False
        self._told_to_end_at: float | None = None
        signal.signal(signal.SIGUSR1, self._on_warning)
        signal.signal(signal.SIGTERM, self._on_term)
        self._slurm_id = os.environ["SLURM_JOB_ID"]
        self._task, self._files = tasks[index], Files(run.root, tasks[index].job_id)
        self._job = job_of(self._task)
        self._nowhere = self._files.folder / "runs-without-progress"
        self._own()
        self._keep(run, tasks)
        self._grace_s, self._ends_at = kill_wait(), end_of(self._slurm_id)
        self._store = Store(f"sqlite:///{self._files.database}", shared=True)
        self._store.prepare()
        self._saved_before = stored(self._store, self._task).checkpoint
        self._executor = SlurmExecutor(
            [
                run.node.model_copy(update={"id": name, "name": name, "address": address})
                for name, address in addresses(os.environ["SLURM_JOB_NODELIST"]).items()
            ],
            cpus=run.node.cores,
            grace_s=self._grace_s,
        )
        self._controller = Controller(self._store, self._executor, _settings(run))
        self._telling = Telling(
            self._store,
            self._files.status,
            lambda: "the time limit comes" if self._warned else "Slurm ends this run",
            lambda: self._told_to_end_at is not None,
        )

    def _on_warning(self, _signum: int, _frame: object) -> None:
        self._warned = True  # nothing more: a handler runs between any two instructions

    def _on_term(self, _signum: int, _frame: object) -> None:
        self._told_to_end_at = self._told_to_end_at or time.time()

    def _own(self) -> None:
        """This directory is for one job of Slurm's, however often that is requeued."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        me = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self._slurm_id
        mine = json.dumps({"id": me, "cluster": os.environ.get("SLURM_CLUSTER_NAME")})
        self._files.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._files.owner.open("x") as stream:
                stream.write(mine)
        except FileExistsError:
            if self._files.owner.read_text() != mine:
                raise ConflictError(
                    f"{self._files.folder} belongs to another job of Slurm's: this script was submitted before",
                    code="submitted-twice",
                    hint="each job has a script of its own: `tuneyard render slurm FILE` writes another",
                ) from None

    def _keep(self, run: Run, tasks: list[Task]) -> None:
        """Who this is, for those who ask, where the script was submitted by hand."""
        slurm_id = os.environ.get("SLURM_ARRAY_JOB_ID", self._slurm_id)
        try:
            if record.recall(run.home, slurm_id).job_ids[0] == tasks[0].job_id:
                return
        except NotFoundError:
            pass  # or it is another one's, of a Slurm that has begun to count anew
        handed = Handed(
            id=slurm_id,
            root=run.root,
            job_ids=tuple(task.job_id for task in tasks),
            names=tuple(task.job["name"] for task in tasks),
            queue=self._job.queue,
            priority=self._job.priority,
            is_array="SLURM_ARRAY_JOB_ID" in os.environ,
            submitted_at=time.time(),
        )
        record.keep(run.home, handed)

    def drive(self) -> int:
        """Until the job has ended, or this run has. Returns an exit status."""
        try:
            while True:
                self._heed()
                self._controller.step()
                row = self._store.job(self._task.job_id)
                self._telling.tell(row)
                if row.state.final:
                    return DONE if row.state == JobState.SUCCEEDED else FAILED
                if row.state == JobState.PAUSED or (row.state == JobState.QUEUED and self._executor.lost):
                    break
                self._controller.wait()
        finally:
            self._controller.close()
        return self._leave(row)

    def _heed(self) -> None:
        """Do what Slurm's signals ask for."""
        if self._told_to_end_at is not None:
            self._executor.hurry(self._told_to_end_at + stop_within(self._grace_s))
        if (self._warned or self._told_to_end_at is not None) and not self._pausing:
            self._pausing = True
            with contextlib.suppress(ConflictError):  # it has just ended
                self._store.request_pause(self._task.job_id, time.time())

    def _leave(self, row: JobRow) -> int:
        """Have this run requeued, unless Slurm ends it for a reason of its own."""
        told_at = self._told_to_end_at
        if told_at is not None and (self._ends_at is None or told_at < self._ends_at - LIMIT_S):
            return FAILED  # cancelled, or preempted and requeued by Slurm
        if self._warned and self._got_nowhere(row):
            sentence = f"{self._nowhere.read_text()} runs in a row have ended before anything new was saved"
            return self._stay(row, sentence, "more --with time=... or warning=... lets it load and save in a run")
        try:
            ask("scontrol", "requeue", self._slurm_id)
        except TuneyardError as problem:
            sentence = f"it has saved and could not be requeued: {problem.message}"
            return self._stay(row, sentence, f"`scontrol requeue {self._slurm_id}` lets it go on")
        print("requeued", flush=True)
        self._told_to_end_at = None
        deadline = time.monotonic() + REQUEUED_S
        while self._told_to_end_at is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return DONE

    def _got_nowhere(self, row: JobRow) -> bool:
        """Whether too many runs have ended at their time limit without a new checkpoint. Of a command nobody knows."""
        if not isinstance(self._job, TrainingJob):
            return False
        new = row.checkpoint is not None and row.checkpoint != self._saved_before
        before = int(self._nowhere.read_text()) if self._nowhere.exists() else 0
        count = 0 if new else before + 1
        write_atomically(self._nowhere, str(count))
        return count > self._job.retry.max_restarts

    def _stay(self, row: JobRow, sentence: str, remedy: str) -> int:
        self._telling.tell(row, Reason(code=ReasonCode.HELD, sentence=sentence, remedy=remedy))
        return FAILED


def _settings(run: Run) -> Settings:
    """Those of the home that it was handed over from, for a controller that has one job in one allocation."""
    margin = min(MARGIN_S, run.warning_s / 4)
    return Settings(
        home=Path(run.root),
        database_url=None,
        standbys=0,
        pause_grace=run.warning_s - margin,
        **run.patience.model_dump(),
    )


if __name__ == "__main__":
    sys.exit(main())
