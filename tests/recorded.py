"""A run of the real controller on a virtual clock, written down: what was submitted, and all that was decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from launch.attempt import ExitCode
from launch.contract import CheckpointNote, ProgressLine, RankExit, RunContract, StopRequest
from orchestrator.cluster.model import Node, Placement
from orchestrator.control import dispatch
from orchestrator.control.actions import Action, EndAttempt, SendStop, StartAttempt
from orchestrator.control.loop import Controller
from orchestrator.errors import ExecutorError
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Queue
from orchestrator.schedule.yard import Yard
from orchestrator.settings import Settings
from orchestrator.simulate.conditions import Conditions
from orchestrator.simulate.policy import Production
from orchestrator.simulate.workload import SimulatedJob
from orchestrator.store.rows import Mark
from orchestrator.store.store import Store
from tests.builders import a_training_job
from tests.virtual import Gang, World

MOST_TICKS = 100
"""At one instant; more would never come to an end."""


@dataclass(frozen=True)
class Scene:
    """A yard, and what happens to it."""

    nodes: Sequence[Node]
    jobs: Sequence[SimulatedJob]
    """In order of submission."""
    queues: Sequence[Queue] = ()
    cordoned: frozenset[str] = frozenset()
    rules: Mapping[str, bool | float] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=Conditions)


@dataclass(frozen=True)
class Decision:
    """A start or a stop."""

    at: float
    job: str
    placement: Placement | None = None
    """Of a start."""
    why: str | None = None
    """Of a stop, and the rest of it."""
    for_job: str | None = None
    target: int | None = None


@dataclass
class Work:
    """What an attempt does until it ends."""

    gang: Gang
    works_from: float
    speed: float
    ends: float
    saves: float


class Ranks(World):
    """Ranks that work for as long as their job truly takes, save now and then, and stop as soon as they are told to."""

    def __init__(self, nodes: Sequence[Node], jobs: Iterable[SimulatedJob], conditions: Conditions) -> None:
        super().__init__(nodes)
        self.jobs = {job.job_id: job for job in jobs}
        self.conditions = conditions
        self.left = {job.job_id: job.duration_s for job in jobs}
        """Seconds of work on num_gpus."""
        self.works: dict[str, Work] = {}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        new = [contract for contract in contracts if contract.run_id not in self.gangs]
        refused = super().start(new)
        for contract in new:
            self._work(contract)
        return refused

    def _work(self, contract: RunContract) -> None:
        job, conditions = self.jobs[contract.job_id], self.conditions
        speed = conditions.speed(contract.plan.world_size, job.num_gpus)
        works_from = self.now + conditions.startup_s
        lasts = conditions.startup_s + self.left[job.job_id] / speed
        gang = self.gangs[contract.run_id]
        gang.begun = not conditions.startup_s
        self.works[job.job_id] = Work(
            gang, works_from, speed, self.now + lasts, works_from + (conditions.checkpoint_s or math.inf)
        )

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        super().stop(contract, request)
        work = self.works.pop(contract.job_id, None)
        if work is not None:
            done = max(0.0, self.now - work.works_from) * work.speed
            self.left[contract.job_id] += self.conditions.preemption_cost_s - done
            self._end(work.gang, ExitCode.STOPPED)

    @property
    def next_at(self) -> float:
        """When something happens that is to be heard at once; math.inf if nothing does."""
        return min((min(work.ends, work.saves) for work in self.works.values()), default=math.inf)

    def happen(self) -> None:
        """What is due."""
        for job_id, work in list(self.works.items()):
            gang = work.gang
            gang.begun |= work.works_from <= self.now
            if work.ends <= self.now:
                self._end(gang, ExitCode.DONE)
                del self.works[job_id]
            elif work.saves <= self.now:
                step = len(gang.told)
                note = CheckpointNote(id=f"step-{step}.attempt-{gang.contract.attempt}", step=step, outcome="committed")
                gang.told.append(ProgressLine(time=self.now, phase="save", step=step, checkpoint=note))
                assert self.conditions.checkpoint_s is not None
                work.saves += self.conditions.checkpoint_s

    def _end(self, gang: Gang, code: ExitCode) -> None:
        for rank in range(gang.contract.plan.world_size):
            gang.exits[rank] = RankExit(rank=rank, code=code, time=self.now)


def carried_out(scene: Scene, store: Store, looks: Iterable[float] = ()) -> list[Decision]:
    """All that the controller decides. It looks when something happens, when the scheduler asked for it, and at
    `looks`; each time until there is nothing more to be done."""
    ranks = Ranks(scene.nodes, scene.jobs, scene.conditions)
    controller = Controller(store, ranks, Settings(rules=dict(scene.rules)), clock=lambda: ranks.now)
    ranks.now = scene.jobs[0].submit_s
    for queue in scene.queues:
        store.set_queue(
            queue.name,
            weight=queue.weight, guaranteed=queue.guaranteed, ceiling=queue.ceiling, lendable=queue.lendable,
        )  # fmt: skip
    for name in scene.cordoned:
        store.mark_node(name, Mark.CORDONED, None, ranks.now)
    to_come, more_looks, unfinished = list(scene.jobs), iter([*sorted(looks), math.inf]), len(scene.jobs)
    found: list[Decision] = []
    look = next(more_looks)
    with decisions() as made:
        while unfinished:
            wake = made[-1].next_at if made else None
            submit = to_come[0].submit_s if to_come else math.inf
            now = min(submit, ranks.next_at, math.inf if wake is None else wake, look)
            assert math.isfinite(now), [(job.id, job.reason.sentence) for job in store.jobs(live=True)]
            ranks.now = now
            while look <= now:
                look = next(more_looks)
            while to_come and to_come[0].submit_s <= now:
                submit_to(store, to_come.pop(0))
            ranks.happen()
            for _ in range(MOST_TICKS):
                actions = controller.tick()
                found += noted(actions, now)
                unfinished -= sum(isinstance(action, EndAttempt) and action.job_state.final for action in actions)
                if not any(isinstance(action, DONE) for action in actions):
                    break
            else:
                raise AssertionError(f"it does not come to rest: {actions}")
    controller.close()
    return found


DONE = (StartAttempt, SendStop)
"""Actions after which there may be more to do."""


def submit_to(store: Store, job: SimulatedJob) -> None:
    resources: dict[str, Any] = {"num_processes": f"{job.least}..{job.most}", "accelerator": "gpu"}
    keys = {"name": job.name, "queue": job.tenant, "priority": job.priority, "resources": resources}
    store.add_job(job.job_id, a_training_job(**keys), job.submit_s)


def noted(actions: Sequence[Action], now: float) -> Iterator[Decision]:
    """The scheduler's decisions among what the controller did."""
    for action in actions:
        if isinstance(action, StartAttempt):
            yield Decision(now, action.job_id, action.placement)
        elif isinstance(action, SendStop):
            (told,) = (note.data for note in action.notes if note.kind == "told-to-stop")
            yield Decision(now, action.job_id, None, told["why"], told["for"], told["target"])


@contextmanager
def decisions() -> Iterator[list[Decisions]]:
    """What the controller is told by the scheduler within."""
    made: list[Decisions] = []

    def spy(yard: Yard, now: float) -> Decisions:
        made.append(decide(yard, now))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "decide", spy)
        yield made


class Noting(Production):
    """The production policy, which notes what it decides."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        decided = super().decide(yard, now)
        for stop in decided.stops:
            self.decisions.append(Decision(now, stop.job_id, None, stop.why, stop.for_job, stop.target))
        for start in decided.starts:
            self.decisions.append(Decision(now, start.job_id, start.placement))
        return decided
