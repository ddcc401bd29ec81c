"""The controller: observe → reconcile → apply → dispatch → apply, while it holds the lease."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import structlog

from launch.contract import Device, RunContract, dumps
from launch.footprint_record import Footprint
from orchestrator.cluster.model import Node
from orchestrator.cluster.spec import NodeKind
from orchestrator.control.actions import (
    Action,
    EndAttempt,
    Explain,
    MarkLost,
    MarkRunning,
    MoveJob,
    NoteCheckpoints,
    NoteProgress,
    SendStop,
    SendStopAgain,
    StartAgain,
    StartAttempt,
)
from orchestrator.control.admission import Admission
from orchestrator.control.board import Board
from orchestrator.control.dispatch import dispatch
from orchestrator.control.facts import Facts, Policy, Prospect, State
from orchestrator.control.inventory import Inventory
from orchestrator.control.reconcile import reconcile
from orchestrator.control.rules import rules_of
from orchestrator.control.stops import PREEMPT
from orchestrator.control.suspicion import Suspicion
from orchestrator.control.tally import Tally
from orchestrator.control.wishes import label_of, ways_of
from orchestrator.errors import ExecutorError, LeaseLostError, StoreError
from orchestrator.execute.protocol import Executor
from orchestrator.execute.tracing import Tracer
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, TrainingJob
from orchestrator.memory.alike import key_of
from orchestrator.memory.options import factors_of, kinds_of
from orchestrator.memory.sizing import Sizing
from orchestrator.schedule.gang import Queue
from orchestrator.schedule.history import Ran as JobRan
from orchestrator.settings import Settings
from orchestrator.store.rows import HistoryRow, JobRow, Lease, NodeFault
from orchestrator.store.store import Store
from orchestrator.store.transaction import Transaction

log = structlog.get_logger()

SIGNS = (NoteProgress, SendStopAgain, StartAgain, Explain)
"""Actions after which the scheduler knows nothing new."""


class Controller:
    """Acts on one database through one executor. Several may run; the lease lets one act."""

    def __init__(
        self, store: Store, executor: Executor, settings: Settings, clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.executor = executor
        self.settings = settings
        self.clock = clock
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self.lease: Lease | None = None
        self.tracer = Tracer(clock)
        self.tally = Tally()
        self.wake = threading.Event()
        self.prospect = Prospect()
        """Set by whoever lets the cluster grow."""
        self.ticked_at = 0.0
        """When the last tick began that has come to its end."""
        self._policy = Policy(
            leash=settings.leash,
            leash_margin=settings.leash_margin,
            stop_grace=settings.stop_grace,
            pause_grace=settings.pause_grace,
            rules=rules_of(settings),
        )
        self._admission = Admission(store, executor, settings, clock)
        self._board: Board | None = None
        self._inventory = Inventory()
        self._suspicion = Suspicion(store, executor, str(settings.root))
        self._nodes: Sequence[Node] = ()
        self._jobs: dict[str, JobRow] = {}
        self._created: dict[tuple[str, int], float] = {}

    def run_until(self, done: Callable[[], bool]) -> None:
        """Tick until `done`, sooner than the period when woken. A database that is away is waited for."""
        while not done():
            self.step()
            self.wait()

    def step(self) -> None:
        """One tick whose foreseen troubles are logged; the next one tries again."""
        self.wake.clear()
        began = time.monotonic()
        try:
            self.tick()
            if self.lease is not None:
                self.tally.tick(time.monotonic() - began, self.clock())
        except LeaseLostError as problem:
            log.warning("lease lost", error=problem.message)
            self.lease = self._board = None
        except StoreError as problem:
            log.error("database trouble; nothing is done until it is back", error=problem.message)

    def wait(self) -> None:
        """Until the next tick is due, or somebody wakes the controller."""
        self.wake.wait(self.settings.tick)

    def close(self) -> None:
        """Let another controller act at once. Attempts go on."""
        self.tracer.close()
        if self.lease is not None:
            self._inventory.close(self.store, self.lease, self.clock())
            self.store.release_lease(self.lease)
            self.lease = self._board = None

    def tick(self) -> list[Action]:
        """One look and what follows from it; nothing at all without the lease.

        Raises:
            LeaseLostError: another controller took over meanwhile.
            StoreError: the database cannot be used.
        """
        now = self.clock()
        self.lease = self.store.acquire_lease(self.holder, now, self.settings.lease)
        if self.lease is None:
            self._board = None
            return []
        if self._board is None:
            self._board = Board(self._policy.rules, history_of(self.store))
            self._inventory = Inventory()
            self._suspicion = Suspicion(self.store, self.executor, str(self.settings.root))
        self._jobs = self.store.live_jobs(self._jobs)
        state = self._state(self._jobs)
        try:
            facts = self._observe(state)
        except ExecutorError as problem:
            log.error("the cluster cannot be asked", error=problem.message)
            return []
        self._inventory.note(self.store, self.lease, facts.nodes, self.clock())
        self._nodes = facts.nodes
        self._suspicion.look(facts.nodes, dict(state.marks), self.clock())
        actions = self._carry_out(reconcile(state, facts, self.clock(), self._policy), state, self.lease)
        if not all(isinstance(action, SIGNS) for action in actions):
            # Who goes back to the queue stands in it before its slots are given away.
            self._jobs = self.store.live_jobs(self._jobs)
            state = self._state(self._jobs)
        facts = replace(facts, tracing=self._trace(state, facts.nodes), coming=self.prospect.reasons)
        decided = dispatch(state, facts, self.clock(), self._policy, self._board)
        actions += self._carry_out(list(decided), state, self.lease)
        self.ticked_at = now
        return actions

    @property
    def acting(self) -> bool:
        """Whether it holds the lease, and nobody may have taken it meanwhile; from any thread."""
        lease = self.lease
        return lease is not None and lease.expires_at > self.clock()

    @property
    def nodes(self) -> Sequence[Node]:
        """As they were seen last; none before the first tick under the lease."""
        return self._nodes

    def look(self) -> tuple[State, Facts]:
        """What is stored of the living and which nodes there are, for who only wants to know; from any thread.

        Raises:
            StoreError, ExecutorError: one of them cannot be asked.
        """
        return self._state(self.store.live_jobs()), Facts(nodes=self.executor.nodes())

    def _state(self, live: dict[str, JobRow]) -> State:
        jobs = list(live.values())
        queued = [job for job in jobs if job.state == JobState.QUEUED]
        keys = {key for job in queued if job.attempts == 0 and (key := key_of(job.job)) is not None}
        before = {other for job in queued for other in job.job.after if other not in live}
        return State(
            jobs=jobs,
            attempts=self.store.live_attempts(),
            peaks=self.store.peaks(keys) if keys else (),
            factors=factors_of(self.store.forecasts()) if any(job.sizing for job in queued) else (),
            queues=queues_of(self.store),
            marks={row.name: row.mark for row in self.store.node_marks()},
            ended=self.store.states_of(before) if before else {},
        )

    def _observe(self, state: State) -> Facts:
        nodes = self.executor.nodes()
        contracts = [attempt.run for attempt in state.attempts]
        offsets = {attempt.run.run_id: attempt.progress_offset for attempt in state.attempts}
        statuses = self.executor.poll(contracts, offsets) if contracts else {}
        if any(not report.reachable for status in statuses.values() for report in status.reports):
            nodes = self.executor.nodes()  # a node may have been lost meanwhile: nothing is to start there
        return Facts(nodes=nodes, statuses=statuses)

    def _trace(self, state: State, nodes: Sequence[Node]) -> frozenset[str]:
        """Jobs that wait for their memory to be traced: those that need most of a place, as far as formulas tell, and
        have not begun. What is found is stored, and so is that nothing was."""
        kinds, waits = kinds_of(nodes), set()
        for job in state.jobs:
            if job.state != JobState.QUEUED or job.attempts or job.sizing is None:
                continue
            if job.cancel_requested or job.pause_requested:
                continue
            found = ways_of(job, kinds, state.factors)
            if found is None or not (found.tight or found.misfit):
                continue
            sizing, spec = Sizing.model_validate_json(job.sizing), job.job
            device = found.options[0].device if found.options else _device_of(spec, kinds or ())
            known = sizing.on(device)
            if known.source == "traced" or known.reason is not None or not isinstance(spec, TrainingJob):
                continue
            answer = self.tracer.ask(job.id, spec.train_spec(), device)
            waits.add(job.id)
            if answer is not None and self.lease is not None:
                better = answer if isinstance(answer, Footprint) else known.model_copy(update={"reason": answer})
                with self.store.acting(self.lease) as write:
                    write.set_sizing(job.id, sizing.traced(better, device).model_dump_json())
                self.tracer.forget(job.id)
        return frozenset(waits)

    def _carry_out(self, actions: list[Action], state: State, lease: Lease) -> list[Action]:
        contracts = {(attempt.job_id, attempt.number): attempt.run for attempt in state.attempts}
        self._created = {(attempt.job_id, attempt.number): attempt.created_at for attempt in state.attempts}
        starts: list[StartAttempt] = []
        again: list[RunContract] = []
        told: list[Explain | NoteProgress] = []
        for action in actions:
            match action:
                case StartAttempt():
                    starts.append(action)
                case StartAgain(job_id, number):
                    again.append(contracts[job_id, number])
                case Explain() | NoteProgress():
                    told.append(action)
                case _:
                    self._apply(action, lease, contracts)
        self._admission.start(starts, again, self._jobs, lease)
        if told:  # there may be thousands
            now = self.clock()
            with self.store.acting(lease) as write:
                for action in told:
                    if isinstance(action, Explain):
                        write.explain(action.job_id, action.reason)
                    else:
                        told_of = action.progress, action.offset, now, action.spent
                        write.set_progress(action.job_id, action.number, *told_of)
                        for note in action.notes:
                            write.event(action.job_id, action.number, now, note.kind, note.data)
        return actions

    def _apply(self, action: Action, lease: Lease, contracts: dict[tuple[str, int], RunContract]) -> None:
        now = self.clock()
        match action:
            case MarkRunning(job_id, number):
                reason = Reason(code=ReasonCode.RUNNING, sentence=f"attempt {number} runs")
                with self.store.acting(lease) as write:
                    write.set_attempt(job_id, number, AttemptState.RUNNING, now, started_at=now, last_contact=now)
                    write.set_job(job_id, JobState.RUNNING, reason, now)
            case MarkLost(job_id, number, reason):
                with self.store.acting(lease) as write:
                    write.set_attempt(job_id, number, AttemptState.LOST, now)
                    write.explain(job_id, reason)
            case NoteCheckpoints(job_id, number, lines, offset):
                directory = contracts[job_id, number].checkpoint_dir
                with self.store.acting(lease) as write:
                    write.note_checkpoints(job_id, number, lines, offset, directory)
            case SendStop(job_id, number, request, reason):
                with self.store.acting(lease) as write:
                    write.set_stop(job_id, number, request, now, action.preempted_by, action.target)
                    write.set_job(job_id, JobState.STOPPING, reason, now)
                    if request.reason == PREEMPT:
                        write.count_preemption(job_id)
                    for note in action.notes:
                        write.event(job_id, number, now, note.kind, note.data)
                self.executor.stop(contracts[job_id, number], request)
            case SendStopAgain(job_id, number, request):
                self.executor.stop(contracts[job_id, number], request)
            case EndAttempt():
                self._end(action, lease, contracts[action.job_id, action.number], now)
                self.tally.end(action)
            case MoveJob(job_id, state, reason):
                with self.store.acting(lease) as write:
                    # What it waited for before is over, and so is what was told of its last attempt.
                    write.set_job(job_id, state, reason, now, not_before=None, error=None)

    def _end(self, action: EndAttempt, lease: Lease, contract: RunContract, now: float) -> None:
        self.executor.release(contract)
        with self.store.acting(lease) as write:
            told_of = action.outcome.value, action.spent, action.energy
            write.end_attempt(action.job_id, action.number, now, *told_of)
            processes = contract.plan.world_size
            failed = action.outcome.value if action.failed else None
            write.count_attempt(
                action.job_id, action.number, now, processes=processes, failed=failed, progressed=action.progressed
            )
            names = {node.id: node.name for node in self._nodes}
            for node in action.suspects:
                if node in names:
                    fault = {"node": names[node], "job_id": action.job_id, "attempt": action.number, "time": now}
                    write.add_node_fault(NodeFault(outcome=action.outcome.value, **fault))
                    self._suspicion.aroused()
            if action.error is not None:
                write.event(action.job_id, action.number, now, "attempt-error", action.error)
            for note in action.notes:
                write.event(action.job_id, action.number, now, note.kind, note.data)
            if action.peak is not None:
                write.add_peak(action.peak)
            relief = {} if action.relief is None else {"relief": dumps(action.relief)}
            write.set_job(
                action.job_id,
                action.job_state,
                action.reason,
                now,
                not_before=action.not_before,
                error=action.error if action.job_state in (JobState.FAILED, JobState.PAUSED) else None,
                result=action.result,
                target=action.target,
                avoid=action.avoid or None,
                **relief,
            )
            if action.job_state.final:
                self._remember(write, self._jobs[action.job_id], action, now)

    def _remember(self, write: Transaction, row: JobRow, action: EndAttempt, now: float) -> None:
        """How long a job ran, all attempts together, for what is expected of the next one like it."""
        job = row.job
        ran_s = row.ran_s + self._ran_s(action, now)
        ran = JobRan(row.queue, label_of(job), job.resources.bounds[0], ran_s)
        succeeded = action.job_state == JobState.SUCCEEDED
        write.add_history(
            HistoryRow(
                queue=ran.queue, name=ran.name, processes=ran.processes, ran_s=ran_s, succeeded=succeeded, time=now
            )
        )
        if self._board is not None:
            self._board.learn(ran)

    def _ran_s(self, action: EndAttempt, now: float) -> float:
        return max(0.0, now - self._created[action.job_id, action.number])


def queues_of(store: Store) -> list[Queue]:
    """What was said of queues, as the scheduler wants it."""
    return [Queue(row.name, row.weight, row.guaranteed, row.ceiling, row.lendable) for row in store.queues()]


def history_of(store: Store) -> list[JobRan]:
    """How long jobs ran that have ended."""
    return [JobRan(row.queue, row.name, row.processes, row.ran_s) for row in store.history()]


def _device_of(job: AnyJob, kinds: Iterable[NodeKind]) -> Device:
    """Where a job would run, if it fitted."""
    return "cuda" if any(kind.gpu and kind.takes(job.resources.accelerator) for kind in kinds) else "cpu"
