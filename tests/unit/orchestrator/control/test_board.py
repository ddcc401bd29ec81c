"""A board that is kept up to date by small changes shows what one that is made anew shows."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from launch.contract import RunContract, StopRequest
from launch.shape import shape_of_config
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node, Placement
from orchestrator.control.board import AVOIDED_S, Board, held_of
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.job.spec import TrainingJob, dump_job
from orchestrator.memory.plan import plan
from orchestrator.memory.sizing import sizing_of
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Queue, Rules
from orchestrator.schedule.history import Ran
from orchestrator.schedule.place import place
from orchestrator.schedule.yard import Yard
from orchestrator.store.rows import AttemptRow, JobRow, Mark
from tests.builders import a_command_job, a_gang, a_node, a_training_job

NODES = (a_node("n0", slots=4, memory_gib=50), a_node("n1", slots=3, memory_gib=50), a_node("n2", slots=2))
SMALL = (a_node("n0", slots=4, memory_gib=2), NODES[1])
RULES = Rules(min_run_s=100.0, patience_s=10.0, starving_s=977.0)


@lru_cache
def the_job(kind: str) -> Any:
    if kind == "command":
        return a_command_job(2, max_duration="1h")
    return a_training_job("1..3", train={"max_steps": 1, "global_batch_size": 12})


@lru_cache
def the_sizing() -> str:
    """Of a BERT."""
    shape = shape_of_config({"model_type": "bert"}, "sequence-classification")
    job = the_job("training")
    assert shape is not None
    assert isinstance(job, TrainingJob)
    return sizing_of(job, shape).model_dump_json()


def a_row(number: int = 1, kind: str = "training", **changes: Any) -> JobRow:
    values: dict[str, Any] = {
        "sequence": number, "id": f"job-{number}", "name": "job", "queue": "default", "priority": 0,
        "spec": dump_job(the_job(kind)), "state": JobState.QUEUED,
        "reason": Reason(code=ReasonCode.SUBMITTED, sentence="s"), "attempts": 0, "cancel_requested": False,
        "not_before": None, "submitted_at": 0.0, "started_at": None, "finished_at": None, "error": None,
        "result": None, "sizing": the_sizing() if kind == "training" else None,
    }  # fmt: skip
    return JobRow(**(values | changes))


def an_attempt(job: JobRow, placement: Placement, now: float = 0.0, **changes: Any) -> AttemptRow:
    processes = placement.world_size
    contract = RunContract(
        run_id=f"{job.id}.{job.attempts}", job_id=job.id, attempt=max(1, job.attempts),
        plan=plan(a_command_job(processes), processes, "cpu"), nodes=placement.shares, main_port=1, run_dir="/nowhere",
        output_dir="/nowhere", checkpoint_dir="/nowhere", tracker_dir="/nowhere", command=("true",), leash_s=10,
    )  # fmt: skip
    values: dict[str, Any] = {
        "job_id": job.id, "number": max(1, job.attempts), "state": AttemptState.RUNNING,
        "contract": contract.model_dump_json(), "placement": placement.model_dump_json(), "created_at": now,
        "started_at": None, "ended_at": None, "last_contact": now, "stop": None, "outcome": None, "progress": None,
    }  # fmt: skip
    return AttemptRow(**(values | changes))


def some(processes: int = 2) -> Placement:
    found = place(Capacity(NODES), processes, "any")
    assert found is not None
    return found


def saved(time: float) -> LastCheckpoint:
    return LastCheckpoint(id="c", step=1, time=time, url="/c")


# An attempt as the scheduler sees it.


def test_what_an_attempt_holds_and_since_when() -> None:
    job = a_row(target=1, checkpoint=saved(40.0))
    held = held_of(an_attempt(job, some(), 30.0), job, a_gang("job-1", 1, 3, target=1))
    assert (held.placement, held.since, held.saved_at, held.processes) == (some(), 30.0, 40.0, 2)
    assert held.gang.target is None, "it has gone on"
    assert held.can_stop


def test_with_how_many_ranks_a_job_goes_on_is_told_unless_its_user_stops_it() -> None:
    stop = {"stop": StopRequest(reason="resized", deadline=9.0), "target": 1}
    for columns, target in (({}, 1), ({"pause_requested": True}, None), ({"cancel_requested": True}, None)):
        row = a_row(**columns)
        assert held_of(an_attempt(row, some(), **stop), row, a_gang("job-1")).target == target


def test_what_was_saved_before_it_started_counts_from_its_start() -> None:
    job = a_row(checkpoint=saved(20.0))
    assert held_of(an_attempt(job, some(), 30.0), job, a_gang("job-1")).saved_at is None


@pytest.mark.parametrize(
    ("job", "attempt"),
    [
        ({}, {"stop": StopRequest(reason="preempted", deadline=9.0)}),
        ({}, {"state": AttemptState.STOPPING}),
        ({}, {"state": AttemptState.LOST}),
        ({"cancel_requested": True}, {}),
        ({"pause_requested": True}, {}),
    ],
)
def test_nothing_more_is_asked_of_what_is_about_to_end(job: dict[str, Any], attempt: dict[str, Any]) -> None:
    row = a_row(**job)
    assert held_of(an_attempt(row, some(), **attempt), row, a_gang("job-1")).stopping


# The world that the board follows.


class World:
    """Rows that change, as the store has them: a row that has not changed is the same object."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.now = 1000.0
        self.count = 0
        self.jobs: dict[str, JobRow] = {}
        self.attempts: dict[str, AttemptRow] = {}
        self.nodes: tuple[Node, ...] = NODES
        self.marks: dict[str, Mark] = {}
        self.queues: tuple[Queue, ...] = ()
        self.factors: Any = ()
        self.ended: list[Ran] = []

    def one(self, of: Any) -> Any:
        return self.data.draw(st.sampled_from(sorted(of)))

    def change(self, job_id: str, **columns: Any) -> None:
        self.jobs[job_id] = self.jobs[job_id].model_copy(update=columns)

    def submits(self) -> None:
        self.count += 1
        kind = self.one(["training", "command"])
        row = a_row(
            self.count, kind, queue=self.one("qr"), priority=self.one([0, 0, 1]), submitted_at=self.now,
            array_id=self.one(["a", ""]) or None, array_at_once=2,
        )  # fmt: skip
        self.jobs[row.id] = row

    def starts(self, yard: Yard) -> None:
        for start in decide(yard, self.now).starts:
            row = self.jobs[start.job_id]
            waited = row.waited_s + self.now - (row.queued_at or row.submitted_at)
            self.change(row.id, state=JobState.RUNNING, attempts=row.attempts + 1, waited_s=waited, target=None)
            self.attempts[row.id] = an_attempt(self.jobs[row.id], start.placement, self.now)

    def ends(self) -> None:
        if self.attempts:
            job_id = self.one(self.attempts)
            attempt, row = self.attempts.pop(job_id), self.jobs.pop(job_id)
            self.ended.append(Ran(row.queue, "job", 1, row.ran_s + self.now - attempt.created_at))

    def goes_back(self) -> None:
        if self.attempts:
            job_id = self.one(self.attempts)
            attempt = self.attempts.pop(job_id)
            ran, target = self.jobs[job_id].ran_s + self.now - attempt.created_at, self.one([0, 1, 2]) or None
            self.change(job_id, state=JobState.QUEUED, queued_at=self.now, ran_s=ran, target=target, preemptions=1)

    def tells(self) -> None:
        """An attempt shows that it lives, saves, is told to stop, or is lost."""
        if self.attempts:
            job_id = self.one(self.attempts)
            update: dict[str, Any] = self.one_of(
                {"last_contact": self.now},
                {"stop": StopRequest(reason="preempted", deadline=self.now)},
                {"state": AttemptState.LOST},
                {"state": AttemptState.RUNNING},
            )
            self.attempts[job_id] = self.attempts[job_id].model_copy(update=update)
            if self.one([True, False]):
                self.change(job_id, checkpoint=saved(self.now))

    def one_of(self, *values: Any) -> Any:
        return values[self.data.draw(st.integers(0, len(values) - 1))]

    def is_asked(self) -> None:
        """By its user."""
        if self.jobs:
            columns = self.one_of(
                {"priority": 3}, {"cancel_requested": True}, {"pause_requested": True}, {"queue": "s"}
            )
            self.change(self.one(self.jobs), **columns)

    def is_administered(self) -> None:
        self.nodes = self.one_of(NODES, NODES[:1], SMALL, ())
        self.marks = self.one_of({}, {"n0": Mark.CORDONED}, {"n1": Mark.DRAINED})
        self.queues = self.one_of((), (Queue("q", 2.0, 2), Queue("r", 1.0, 1, 3, False)))
        self.factors = self.one_of((), ((("bert", "ddp", "default"), 2.0),))

    def passes(self) -> None:
        self.now += self.data.draw(st.sampled_from([0.37, 11.3, 61.7, 407.9]))

    def look(self, board: Board) -> Yard:
        waiting = [row for row in self.jobs.values() if row.id not in self.attempts and not row.pause_requested]
        holding = [(self.jobs[job_id], attempt) for job_id, attempt in self.attempts.items()]
        return board.sync(
            waiting, holding, self.nodes, marks=self.marks, queues=self.queues, factors=self.factors, now=self.now,
        )  # fmt: skip


def shown(yard: Yard, now: float) -> list[Any]:
    """All that decisions are made from, and they themselves."""
    decisions = decide(yard, now)
    capacity, standing = yard.capacity, yard.standing
    for_level = {
        (priority, name): +levels
        for priority, queues in standing.for_level.items()
        for name, levels in queues.items()
        if +levels
    }
    return [
        decisions,
        yard.waiting,
        yard.running,
        +yard.held,
        +yard.groups,
        capacity.free_at,
        [capacity.free(node) for node in capacity.nodes],
        yard.lines.classes,
        standing.ranks,
        standing.elastic,
        +standing.for_class,
        for_level,
        standing.ends,
        yard.leaving,
        {job_id: yard.level(job_id) for job_id in (*yard.waiting, *yard.running)},
        yard.queues,
        yard.drained,
    ]


DOES = ("submits", "submits", "ends", "goes_back", "tells", "is_asked", "is_administered", "passes", "passes")


# Not shrunk: that takes minutes.
@settings(
    max_examples=100,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_a_board_that_is_kept_shows_what_a_new_one_shows(data: st.DataObject) -> None:
    world, board, learned = World(data), Board(RULES), 0
    for _ in range(data.draw(st.integers(1, 12))):
        for _ in range(data.draw(st.integers(1, 4))):
            getattr(world, data.draw(st.sampled_from(DOES)))()
        for ran in world.ended[learned:]:
            board.learn(ran)
        learned = len(world.ended)
        yard = world.look(board)
        anew = world.look(Board(RULES, world.ended))
        assert shown(yard, world.now) == shown(anew, world.now)
        if data.draw(st.booleans()):
            world.starts(yard)


def test_a_gang_keeps_away_from_nodes_as_long_as_others_will_do() -> None:
    row = a_row(1, "command").model_copy(update={"avoid": (NODES[0].id,)})
    for nodes, avoid in ((NODES, (NODES[0].id,)), (NODES[:1], ())):
        yard = Board(RULES).sync([row], [], nodes, marks={}, queues=(), factors=(), now=0.0)
        assert yard.waiting[row.id].avoid == avoid


def test_after_a_while_a_gang_does_not_wait_for_other_nodes_any_more() -> None:
    row = a_row(1, "command").model_copy(update={"avoid": (NODES[0].id,), "queued_at": 10.0, "not_before": 50.0})
    board = Board(RULES)
    avoided = [
        board.sync([row], [], NODES, marks={}, queues=(), factors=(), now=now).waiting[row.id].avoid
        for now in (50.0, 50.0 + AVOIDED_S, 51.0 + AVOIDED_S)
    ]
    assert avoided == [(NODES[0].id,), (NODES[0].id,), ()]


def test_a_row_that_has_not_changed_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick costs what has changed, whatever waits and runs."""
    asked: list[str] = []
    from orchestrator.control import board as module

    real = module.gang_of
    monkeypatch.setattr(module, "gang_of", lambda row, *more: asked.append(row.id) or real(row, *more))
    board, rows = Board(RULES), [a_row(number, "command") for number in range(1, 6)]
    attempt = an_attempt(rows[0], some())

    def look() -> list[str]:
        asked.clear()
        board.sync(rows[1:], [(rows[0], attempt)], NODES, marks={}, queues=(), factors=(), now=0.0)
        return sorted(asked)

    assert look() == [f"job-{number}" for number in range(1, 6)]
    assert look() == []
    rows[2] = rows[2].model_copy(update={"priority": 2})
    attempt = attempt.model_copy(update={"last_contact": 5.0})
    assert look() == ["job-3"]
    assert json.loads(rows[2].spec)["priority"] == 0
    assert board.yard.waiting["job-3"].priority == 2, "what the row says counts"
