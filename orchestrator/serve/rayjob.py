"""`python -m orchestrator.serve.rayjob ORDER`, a RayJob's entrypoint: the controller of one job, on its Ray cluster.

What it is to do is a file (outside.k8s.record.RunOrder). It waits until all nodes are there: the job starts as a gang.
SIGTERM, and `--leave` in the preStop hook of its pod, are a pause: the ranks save and end. The next run, on
another Ray cluster, has the same database on the volume, and goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import structlog

from launch.attempt import write_atomically
from orchestrator.control.loop import Controller
from orchestrator.errors import ConflictError, ExecutorError, TuneyardError
from orchestrator.execute.protocol import Executor
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.k8s.record import Files, RunOrder
from orchestrator.serve.telling import Telling, stored
from orchestrator.settings import Settings
from orchestrator.store.rows import JobRow
from orchestrator.store.store import Store

DONE, FAILED, REFUSED, LEFT = 0, 1, 2, 75
"""Exit statuses: the job succeeded; it failed, or was cancelled; it cannot run here; this run ended before its job has,
and another goes on. KubeRay starts another run after each that is not 0, `backoffLimit` times: one of a job that has
ended says so at once."""
MARGIN_S = 20.0
"""Of a pod's grace, what is kept for ending what does not save in time."""
LEAVE_S = 0.1
LOOK_S = 0.2


def main(arguments: list[str] | None = None) -> int:
    """Run the job as far as this run goes, or end the run that goes on in this pod. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("order", type=Path, help="what is to be done")
    parser.add_argument("--leave", action="store_true", help="let the run in this pod save and end")
    parser.add_argument("--grace", type=float, default=60.0, help="with --leave: seconds until the pod is gone")
    options = parser.parse_args(arguments)
    order = RunOrder.model_validate_json(options.order.read_bytes())
    if options.leave:
        return DONE if leave(order, options.grace) else FAILED
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ]
    )
    try:
        return Run(order, _ray).drive()
    except TuneyardError as problem:
        print(problem, file=sys.stderr)
        return REFUSED


def _ray() -> Executor:
    from orchestrator.execute.ray import RayExecutor

    return RayExecutor("auto")


class Run:
    """One run of a job; `connect` gives the executor, once it is needed.

    Raises:
        TuneyardError: Ray, the directory or the database cannot be used.
    """

    def __init__(self, order: RunOrder, connect: Callable[[], Executor]) -> None:
        self._order, self._files = order, Files(order.root, order.task.job_id)
        self._told_to_end = self._pausing = False
        signal.signal(signal.SIGTERM, self._on_term)
        self._files.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._files.run, _this_process())
        self._store = Store(f"sqlite:///{self._files.database}", shared=True)
        self._store.prepare()
        self._telling = Telling(
            self._store, self._files.status, lambda: "Kubernetes takes this run's pods", lambda: self._told_to_end
        )
        self._connect = connect

    def _on_term(self, _signum: int, _frame: object) -> None:
        self._told_to_end = True  # nothing more: a handler runs between any two instructions

    def drive(self) -> int:
        """Until the job has ended, or this run has. Returns an exit status."""
        row = self._store.job(self._order.task.job_id) if self._has_row() else None
        if row is not None and row.state.final:
            self._telling.tell(row)
            return self._end(row)
        row = stored(self._store, self._order.task)
        executor = self._connect()
        signal.signal(signal.SIGTERM, self._on_term)  # again: Ray has put its own in its place
        try:
            if not self._gathered(executor, row):
                return LEFT
            return self._drive(Controller(self._store, executor, _settings(self._order)))
        finally:
            executor.close()
            self._store.close()

    def _has_row(self) -> bool:
        return bool(self._store.states_of([self._order.task.job_id]))

    def _gathered(self, executor: Executor, row: JobRow) -> bool:
        """Whether as many nodes are there as the job was planned for, before this run is told to end."""
        while not self._told_to_end:
            try:
                there = sum(bool(node.gpus) or node.cpu_slots > 0 for node in executor.nodes())
            except ExecutorError as problem:
                print(problem.message, file=sys.stderr, flush=True)
                there = 0
            if there >= self._order.nodes:
                return True
            sentence = f"{there} of {self._order.nodes} nodes of its Ray cluster are there"
            self._telling.tell(row, Reason(code=ReasonCode.STARTING, sentence=sentence))
            time.sleep(LOOK_S)
        return False

    def _drive(self, controller: Controller) -> int:
        job_id = self._order.task.job_id
        try:
            while True:
                self._heed(job_id)
                controller.step()
                row = self._store.job(job_id)
                self._telling.tell(row)
                if row.state.final:
                    return self._end(row)
                if row.state == JobState.PAUSED:
                    return LEFT
                controller.wait()
        finally:
            controller.close()

    def _heed(self, job_id: str) -> None:
        if self._files.cancelled.exists():
            with contextlib.suppress(ConflictError):
                self._store.request_cancel(job_id, time.time())
        elif self._told_to_end and not self._pausing:
            self._pausing = True
            with contextlib.suppress(ConflictError):  # it has just ended
                self._store.request_pause(job_id, time.time())

    def _end(self, row: JobRow) -> int:
        return DONE if row.state == JobState.SUCCEEDED else FAILED


def leave(order: RunOrder, grace_s: float) -> bool:
    """Tell the run on this host to save and end; whether it has within `grace_s` seconds. True where there is none."""
    process = _running(Files(order.root, order.task.job_id).run)
    if process is None:
        return True
    ends_at = time.monotonic() + grace_s
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        while process.status() != psutil.STATUS_ZOMBIE:  # whoever started it may not look for its end so soon
            if time.monotonic() > ends_at:
                return False
            time.sleep(LEAVE_S)
    return True


def _this_process() -> str:
    me = psutil.Process()
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "created": me.create_time()})


def _running(path: Path) -> psutil.Process | None:
    """The process that wrote a file with _this_process, if it lives on this host."""
    try:
        told = json.loads(path.read_bytes())
        process = psutil.Process(told["pid"])
        same = told["host"] == socket.gethostname() and abs(process.create_time() - told["created"]) < 1.0
        return process if same else None
    except (OSError, ValueError, KeyError, psutil.Error):
        return None


def _settings(order: RunOrder) -> Settings:
    """Those of the home that it was handed over from, for a controller that has one job on one Ray cluster."""
    return Settings(
        home=Path(order.root),
        database_url=None,
        standbys=0,
        pause_grace=max(order.grace_s / 2, order.grace_s - MARGIN_S),
        **order.patience.model_dump(),
    )


if __name__ == "__main__":
    sys.exit(main())
