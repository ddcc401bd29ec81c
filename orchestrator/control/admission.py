"""Carries out the starts of a tick, all together: while the next ones are stored, those before are being started."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import structlog

from launch.contract import Origin, RunContract, checkpoints_of_job, dumps
from orchestrator.control.actions import StartAttempt
from orchestrator.errors import ExecutorError
from orchestrator.execute.protocol import Executor
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.job.spec import FromEnvironment, TrainingJob, array_env
from orchestrator.recover.classify import Outcome
from orchestrator.recover.reliability import LOOK_BACK_S, Ran, mean_time_between_failures
from orchestrator.settings import Settings
from orchestrator.store.rows import JobRow, Lease
from orchestrator.store.store import Store
from orchestrator.store.transaction import NewAttempt

FIRST, AT_ONCE = 32, 256
"""Attempts in the first transaction and call of the executor, and in each of the others: it has something to do soon,
and the next are stored by the time it has done that."""
CALLS = 4
"""Calls of the executor at the same time."""

T = TypeVar("T")
log = structlog.get_logger()


class Admission:
    """Stores attempts, and starts the gangs of what is stored: nothing runs that the database does not know.

    One that is killed in between leaves attempts that no agent has taken on, which the next controller starts again.
    """

    def __init__(
        self, store: Store, executor: Executor, settings: Settings, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._executor = executor
        self._root = settings.root
        self._leash = settings.leash
        self._clock = clock

    def start(
        self, starts: Sequence[StartAttempt], again: Sequence[RunContract], jobs: Mapping[str, JobRow], lease: Lease
    ) -> None:
        """Store `starts` and start their gangs, and those of `again`, which are stored. What cannot be started does not
        keep the others from it: without a port it is left for another tick, stored it gets an event.

        Raises:
            LeaseLostError: another controller has taken over; nothing was stored since, nor started that was not.
        """
        begun: list[tuple[Sequence[RunContract], Future[dict[str, ExecutorError]]]] = []
        with ThreadPoolExecutor(CALLS, "start") as calls:
            for contracts in _batches(again):
                begun.append((contracts, calls.submit(self._executor.start, contracts)))
            ports = self._ports(starts)
            mtbf_s = cache(partial(mean_time_between_failures, self._history() if starts else []))
            for some in _batches(starts):
                contracts = self._store_all(self._planned(some, jobs, ports, mtbf_s), lease)
                begun.append((contracts, calls.submit(self._executor.start, contracts)))
        failed = [
            (contract, problem)
            for contracts, call in begun
            for contract in contracts
            if (problem := call.result().get(contract.run_id)) is not None
        ]
        if failed:
            self._tell(failed, lease)

    def _ports(self, starts: Sequence[StartAttempt]) -> dict[str, Iterator[int]]:
        """Free ports of the nodes of rank 0, one for each start; without nodes that do not answer."""
        wanted = Counter(start.placement.shares[0].node for start in starts)
        found = self._executor.free_ports(wanted) if wanted else {}
        return {node: iter(some) for node, some in found.items()}

    def _planned(
        self,
        starts: Sequence[StartAttempt],
        jobs: Mapping[str, JobRow],
        ports: Mapping[str, Iterator[int]],
        mtbf_s: Callable[[int], float],
    ) -> list[tuple[StartAttempt, RunContract]]:
        """With the contract of each; without those whose node has no port to give. `mtbf_s` is a gang's mean time
        between failures, by its number of nodes."""
        planned = []
        for start in starts:
            shares = start.placement.shares
            first = shares[0].node
            if first in ports:
                contract = self._contract(start, jobs[start.job_id], next(ports[first]), mtbf_s(len(shares)))
                planned.append((start, contract))
            else:
                log.warning("node does not answer", job=start.job_id, node=first)
        return planned

    def _store_all(self, some: Sequence[tuple[StartAttempt, RunContract]], lease: Lease) -> list[RunContract]:
        """The contracts whose attempt is stored now."""
        now = self._clock()
        with self._store.acting(lease) as write:
            attempts = [NewAttempt(contract, start.placement, start.predicted) for start, contract in some]
            stored = write.add_attempts(attempts, now)
            begun = [(start, contract) for start, contract in some if start.job_id in stored]
            write.set_jobs({start.job_id: _reason(start) for start, _ in begun}, JobState.STARTING, now, target=None)
            for start, _ in begun:
                if start.relief is not None:
                    write.set_relief(start.job_id, dumps(start.relief))
                for note in start.notes:
                    write.event(start.job_id, start.number, now, note.kind, note.data)
        for start, contract in some:
            if start.job_id not in stored:
                log.warning("attempt exists already", job=start.job_id, run=contract.run_id)
        return [contract for _, contract in begun]

    def _tell(self, failed: Sequence[tuple[RunContract, ExecutorError]], lease: Lease) -> None:
        now = self._clock()
        with self._store.acting(lease) as write:
            for contract, problem in failed:
                log.error("start failed", run=contract.run_id, error=problem.message)
                write.event(contract.job_id, contract.attempt, now, "start-failed", problem.as_dict())

    def _history(self) -> list[Ran]:
        """How attempts ended on this yard: how often to save depends on it."""
        return [
            Ran(row.ended_at - row.started_at, len(row.held.shares), Outcome(row.outcome))
            for row in self._store.ended_attempts(self._clock() - LOOK_BACK_S)
            if row.ended_at is not None and row.started_at is not None and row.outcome is not None
        ]

    def _contract(self, start: StartAttempt, row: JobRow, port: int, mtbf_s: float) -> RunContract:
        job = row.job
        folder = job_dir(self._root, start.job_id)
        training = job if isinstance(job, TrainingJob) else None
        output = training.output_dir if training and training.output_dir else str(folder / "model")
        return RunContract(
            run_id=f"{start.job_id}.{start.number}",
            job_id=start.job_id,
            attempt=start.number,
            plan=start.plan,
            nodes=start.placement.shares,
            main_port=port,
            run_dir=str(folder / f"attempt-{start.number}"),
            output_dir=output,
            checkpoint_dir=checkpoints_of_job(job.checkpoint.directory, start.job_id, folder),
            tracker_dir=str(folder / "trackers"),
            spec=training.train_spec() if training else None,
            command=job.run if not isinstance(job, TrainingJob) else None,
            working_dir=job.working_dir if not isinstance(job, TrainingJob) else None,
            env={name: value for name, value in job.env.items() if isinstance(value, str)} | array_env(job),
            env_from={name: value.from_env for name, value in job.env.items() if isinstance(value, FromEnvironment)},
            leash_s=self._leash,
            hang_s=None if job.retry.hang_after == "auto" else job.retry.hang_after,
            mtbf_s=mtbf_s,
            log_patterns=job.retry.log_patterns,
            origin=row.origin or Origin(),
        )


def job_dir(root: Path, job_id: str) -> Path:
    """Where all files of a job lie."""
    return root / "jobs" / job_id


def _reason(start: StartAttempt) -> Reason:
    return Reason(code=ReasonCode.STARTING, sentence=f"attempt {start.number} starts")


def _batches(some: Sequence[T]) -> Iterator[Sequence[T]]:
    bounds = [0, *range(FIRST, len(some), AT_ONCE), len(some)]
    return (some[begin:end] for begin, end in pairwise(bounds) if begin < end)
