"""Slurm as a system that queues jobs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.attempt import AttemptFiles
from orchestrator.errors import ConflictError, ExecutorError, NotFoundError, SpecError
from orchestrator.execute.protocol import read_bytes
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import AnyJob
from orchestrator.outside.options import read_options
from orchestrator.outside.protocol import MAX_JOBS, Order, Outside, System
from orchestrator.outside.record import Patience, Status, Task, job_ids, task_of
from orchestrator.outside.shape import Shape, Words, shape_of
from orchestrator.outside.slurm import record
from orchestrator.outside.slurm.commands import Partition, Queued, ask, partition, queue
from orchestrator.outside.slurm.options import SlurmOptions
from orchestrator.outside.slurm.record import Files, Handed, Run
from orchestrator.outside.slurm.script import Times, script_of, times_of
from orchestrator.outside.slurm.state import id_of, view_of
from orchestrator.settings import Settings
from orchestrator.views import AttemptView, EventView, JobView

MAX_LOG = 1 << 20
FORGOTTEN = "Invalid job id"


class Slurm(Outside):
    """The Slurm that this machine's commands speak to."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def render(self, order: Order) -> str:
        text, _ = self._script(order)
        return text

    def submit(self, order: Order) -> list[JobView]:
        text, handed = self._script(order)
        try:
            answer = ask("sbatch", "--parsable", text=text)
        except ExecutorError as problem:
            raise SpecError(
                problem.message,
                code=problem.code,
                hint="look at what is asked of it: `tuneyard render slurm FILE`; --with changes it",
            ) from problem
        handed = handed.model_copy(update={"id": answer.strip().partition(";")[0]})
        record.keep(self._settings.root, handed)
        return self._views(handed, self._rows([handed]))

    def _script(self, order: Order) -> tuple[str, Handed]:
        """The script, and what is kept of it once it has an id."""
        _check(order.jobs)
        first = order.jobs[0]
        options = read_options(SlurmOptions, self._settings, System.SLURM, first.queue, order.options)
        there = partition(options.partition)
        shape = _shape(order, there, options)
        times = times_of(first, options, there, self._settings.pause_grace)
        root = Path(options.directory) if options.directory is not None else self._settings.root
        _make(record.folder_of(root))  # Slurm opens what the script prints to before that runs
        run, tasks = self._run(root, shape, times), _tasks(order)
        text = script_of(order.jobs, tasks, shape, run, options, times, sys.executable)
        return text, Handed(
            id="",
            root=str(root),
            job_ids=tuple(task.job_id for task in tasks),
            names=tuple(job.name for job in order.jobs),
            queue=first.queue,
            priority=first.priority,
            is_array=order.is_array,
            submitted_at=time.time(),
        )

    def _run(self, root: Path, shape: Shape, times: Times) -> Run:
        said = self._settings
        patience = Patience(
            leash=said.leash, leash_margin=said.leash_margin, stop_grace=said.stop_grace, tick=max(said.tick, 0.5)
        )
        return Run(root=str(root), home=str(said.root), node=shape.node, warning_s=times.warning_s, patience=patience)

    def jobs(self, limit: int = MAX_JOBS, array: str | None = None) -> list[JobView]:
        if array is not None:
            handed = [self._recall(array)[0]]
        else:
            handed = list(record.recall_all(self._settings.root))[-limit:]
        rows = self._rows(handed)
        return [view for one in handed for view in self._views(one, rows)][-limit:]

    def job(self, job_id: str) -> JobView:
        handed, index = self._one(job_id)
        return self._view(handed, index, self._rows([handed], index))

    def attempts(self, job_id: str) -> list[AttemptView]:
        status = self._status(job_id)
        return list(status.attempts) if status is not None else []

    def events(self, job_id: str) -> list[EventView]:
        status = self._status(job_id)
        return list(status.events) if status is not None else []

    def log(self, job_id: str, *, rank: int | None, attempt: int | None = None, offset: int = 0) -> tuple[bytes, int]:
        handed, index = self._one(job_id)
        attempts = self.attempts(job_id)
        number = attempt or max((one.number for one in attempts), default=0)
        if number not in {one.number for one in attempts}:
            if rank is not None or attempt is not None:
                raise NotFoundError(
                    f"job {job_id} has no attempt {number or 1} yet",
                    field="attempt",
                    hint="`tuneyard logs --launcher` shows what its script printed",
                )
            name = f"{handed.id}_{index}" if handed.is_array else handed.id
            data = read_bytes(record.folder_of(handed.root) / f"{name}.out", offset, MAX_LOG)
            return data, offset + len(data)
        files = AttemptFiles(Files(handed.root, handed.job_ids[index]).folder / f"attempt-{number}")
        data = read_bytes(files.launcher_log(0) if rank is None else files.log(rank), offset, MAX_LOG)
        return data, offset + len(data)

    def cancel(self, job_id: str) -> list[JobView]:
        handed, index = self._recall(job_id)
        rows = self._rows([handed], index)
        wanted = range(len(handed.job_ids)) if index is None else [index]
        before = [self._view(handed, one, rows) for one in wanted]
        live = [one for one, view in zip(wanted, before, strict=True) if not view.state.final]
        if not live and all(view.state == JobState.CANCELLED for view in before):
            return before  # doing so twice is the same as once
        if not live:
            raise ConflictError(f"{job_id} has {before[0].state} already", hint="nothing to cancel")
        for one in live:
            files = Files(handed.root, handed.job_ids[one])
            _make(files.folder)
            files.cancelled.touch()
        try:
            ask("scancel", job_id.removeprefix(record.PREFIX))
        except ExecutorError as problem:
            if FORGOTTEN not in problem.message:
                raise
        rows = self._rows([handed], index)
        return [self._view(handed, one, rows) for one in wanted]

    def is_array(self, job_id: str) -> bool:
        handed, index = self._recall(job_id)
        return handed.is_array and index is None

    def _recall(self, job_id: str) -> tuple[Handed, int | None]:
        """What was handed over, and which element of it an id names; None for an array as a whole."""
        slurm_id, index = record.parse_id(job_id)
        handed = record.recall(self._settings.root, slurm_id)
        if not handed.is_array:
            if index is not None:
                raise NotFoundError(f"slurm:{slurm_id} is no array", field="job", hint=f"write slurm:{slurm_id}")
            return handed, 0
        if index is not None and index >= len(handed.job_ids):
            raise NotFoundError(
                f"the array slurm:{slurm_id} has elements 0 to {len(handed.job_ids) - 1}, no {index}", field="job"
            )
        return handed, index

    def _one(self, job_id: str) -> tuple[Handed, int]:
        """As _recall, of what is one job. Raises NotFoundError for an array as a whole."""
        handed, index = self._recall(job_id)
        if index is None:
            raise NotFoundError(
                f"{job_id} is an array of {len(handed.job_ids)} jobs",
                field="job",
                hint=f"name one of them: {job_id}_0 to {job_id}_{len(handed.job_ids) - 1}",
            )
        return handed, index

    def _rows(self, handed: Sequence[Handed], index: int | None = None) -> dict[str, Queued]:
        """What Slurm knows of them. Of many, all that it knows is asked for: that is one line a job."""
        if len(handed) == 1:
            one = handed[0]
            return queue([f"{one.id}_{index}" if one.is_array and index is not None else one.id])
        return queue() if handed else {}

    def _views(self, handed: Handed, rows: dict[str, Queued]) -> list[JobView]:
        return [self._view(handed, index, rows) for index in range(len(handed.job_ids))]

    def _view(self, handed: Handed, index: int, rows: dict[str, Queued]) -> JobView:
        files = Files(handed.root, handed.job_ids[index])
        known = id_of(handed, index).removeprefix(record.PREFIX)
        # An array that was cancelled before it began is one row.
        row = rows.get(known) or rows.get(handed.id)
        return view_of(handed, index, files.read_status(), row, files.cancelled.exists(), time.time())

    def _status(self, job_id: str) -> Status | None:
        handed, index = self._one(job_id)
        return Files(handed.root, handed.job_ids[index]).read_status()


def _check(jobs: Sequence[AnyJob]) -> None:
    """Raises SpecError for what a yard does and Slurm does otherwise."""
    if any(job.after for job in jobs):
        raise SpecError(
            "`after` names jobs of a yard, and this job goes to Slurm",
            code="not-in-slurm",
            field="after",
            hint="leave it out, and say it in Slurm's words: --with dependency=afterok:1234",
        )


def _shape(order: Order, there: Partition, options: SlurmOptions) -> Shape:
    """One for all jobs of an order, with the memory of the one that needs most.

    Raises:
        SpecError: they differ in what they ask Slurm for.
    """
    words = Words(
        where=f"the partition {there.name}",
        none="`sinfo -o '%P %N %T %G'` tells what there is; --with partition=OTHER takes another partition",
        few="for another partition: --with partition=OTHER",
    )
    shapes = {
        (job.model_copy(update={"name": "job", "array_of": None}).model_dump_json(), sizing): (job, sizing)
        for job, sizing in zip(order.jobs, order.sizings, strict=True)
    }
    found = [shape_of(job, sizing, there.nodes, options, words) for job, sizing in shapes.values()]
    asked = {(one.processes, one.nodes, one.cpus, one.kind) for one in found}
    if len(asked) > 1:
        told = "; ".join(f"{processes} processes on {nodes} nodes" for processes, nodes, *_ in sorted(asked, key=str))
        raise SpecError(
            f"the elements of the array ask for different things ({told}), and Slurm gives all elements the same",
            code="inconsistent",
            field="array",
            hint="vary what decides that in several files, or fix it: resources.num_processes, --with nodes=N",
        )
    largest = max(found, key=lambda one: one.memory_mb or 0)
    return replace(found[0], memory_mb=largest.memory_mb, node=largest.node)


def _tasks(order: Order) -> list[Task]:
    return [
        task_of(job_id, job, sizing, order.git)
        for job_id, job, sizing in zip(job_ids(order.jobs), order.jobs, order.sizings, strict=True)
    ]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise SpecError(
            f"cannot make {folder}: {problem.strerror}",
            code="directory",
            field="directory",
            hint="name one that all nodes see and you may write to: --with directory=/shared/me, or TUNEYARD_HOME",
        ) from problem
