"""Many starts in one tick: none hurts the others, and nothing starts that is not stored. The test plays executor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.contract import RunContract
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus, NodeReport
from orchestrator.control.actions import Note, StartAttempt
from orchestrator.control.admission import FIRST, Admission
from orchestrator.control.loop import Controller
from orchestrator.control.reconcile import START_AGAIN_S
from orchestrator.errors import ExecutorError, LeaseLostError
from orchestrator.job.lifecycle import JobState
from orchestrator.memory.ladder import Relief
from orchestrator.memory.plan import plan
from orchestrator.schedule.place import place
from orchestrator.settings import Settings
from orchestrator.store.jobs import NewJob
from orchestrator.store.rows import Lease
from orchestrator.store.store import Store
from tests.builders import a_command_job, a_node

MANY = 3 * FIRST
NODES = [a_node(name, slots=MANY) for name in ("n0", "n1")]


class Killed(BaseException):
    """The controller's process ends here."""


class Gangs:
    """Gangs that start in this object alone. Whether they are stored is looked up as they do."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.silent: set[str] = set()
        self.fail: set[str] = set()
        self.dead = False
        self.asked: list[dict[str, int]] = []
        self.started: dict[str, RunContract] = {}
        self._lock = threading.Lock()

    def nodes(self) -> list[Node]:
        return NODES

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        self.asked.append(dict(wanted))
        return {node: list(range(1000, 1000 + count)) for node, count in wanted.items() if node not in self.silent}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        if self.dead:
            raise Killed
        stored = [attempt.run for attempt in self.store.live_attempts()]
        assert all(contract in stored for contract in contracts)
        with self._lock:
            self.started |= {one.run_id: one for one in contracts if one.run_id not in self.fail}
        return {one.run_id: ExecutorError("not granted") for one in contracts if one.run_id in self.fail}

    def poll(self, contracts: Sequence[RunContract], _offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        def status(one: RunContract) -> AttemptStatus:
            report = NodeReport(node_index=0, reachable=True, claimed=one.run_id in self.started)
            return AttemptStatus(reports=(report,))

        return {one.run_id: status(one) for one in contracts}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'yard.db'}")
    store.prepare()
    yield store
    store.close()


def submit(store: Store, count: int) -> list[str]:
    names = [f"job-{number:03}" for number in range(count)]
    store.add_jobs([NewJob(name, a_command_job()) for name in names], 1.0)
    return names


def a_start(job_id: str, node: int = 0, **changes: Any) -> StartAttempt:
    placement = place(Capacity(nodes=(NODES[node],)), 1, "any")
    assert placement is not None
    return StartAttempt(job_id, 1, placement, plan(a_command_job(), 1, "cpu"), **changes)


def lease_of(store: Store, holder: str = "me", now: float = 0.0) -> Lease:
    lease = store.acquire_lease(holder, now, ttl=10)
    assert lease is not None
    return lease


def admit(store: Store, gangs: Gangs, starts: Sequence[StartAttempt], lease: Lease, now: float = 2.0) -> None:
    admission = Admission(store, gangs, Settings(home=Path("/nowhere")), lambda: now)  # type: ignore[arg-type]
    admission.start(starts, [], store.live_jobs(), lease)


def test_what_goes_wrong_with_some_does_not_keep_the_others_from_starting(store: Store) -> None:
    names, gangs, lease = submit(store, MANY), Gangs(store), lease_of(store)
    silent, taken, refused = names[4::10], names[5], names[FIRST + 1]
    gangs.silent, gangs.fail = {"n1"}, {f"{refused}.1"}
    admit(store, Gangs(store), [a_start(taken)], lease, now=1.5)  # by another controller, between look and act
    admit(store, gangs, [a_start(name, node=int(name in silent)) for name in names], lease)
    assert set(gangs.started) == {f"{name}.1" for name in names} - {f"{name}.1" for name in (*silent, taken, refused)}
    states = {row.id: row.state for row in store.jobs(live=True)}
    assert [name for name in names if states[name] == JobState.QUEUED] == silent
    failed = [event.kind for event in store.events(refused)]
    assert failed == ["submitted", "attempt-placed", "job-starting", "start-failed"]
    assert store.events(refused)[-1].data["message"] == "not granted"
    (kept,) = store.attempts(taken)
    assert kept.created_at == 1.5


def test_gangs_that_start_on_a_node_together_have_different_ports(store: Store) -> None:
    names, gangs = submit(store, MANY), Gangs(store)
    admit(store, gangs, [a_start(name, node=number % 2) for number, name in enumerate(names)], lease_of(store))
    assert gangs.asked == [{"n0": MANY / 2, "n1": MANY / 2}]
    ports = {(contract.nodes[0].node, contract.main_port) for contract in gangs.started.values()}
    assert len(ports) == MANY


def test_what_belongs_to_a_start_is_stored_with_it(store: Store) -> None:
    one, other = submit(store, 2)
    relief = Relief(min_stage=2)
    starts = [a_start(one, relief=relief, notes=(Note("remembered", {"x": 1}),), predicted={"peak": 7}), a_start(other)]
    admit(store, Gangs(store), starts, lease_of(store))
    rows = [store.job(name) for name in (one, other)]
    assert [row.relief for row in rows] == [relief, None]
    assert [(row.state, row.reason.sentence, row.started_at) for row in rows] == [
        (JobState.STARTING, "attempt 1 starts", 2.0)
    ] * 2
    assert [event.kind for event in store.events(one)][-1] == "remembered"
    assert [attempt.predicted for attempt in store.live_attempts()] == [{"peak": 7}, None]


def test_without_the_lease_nothing_is_stored_nor_started(store: Store) -> None:
    names, gangs, lease = submit(store, MANY), Gangs(store), lease_of(store)
    lease_of(store, "other", now=100.0)
    with pytest.raises(LeaseLostError):
        admit(store, gangs, [a_start(name) for name in names], lease)
    assert (gangs.started, store.live_attempts()) == ({}, [])


def test_what_a_controller_has_stored_and_not_started_the_next_one_starts(store: Store, tmp_path: Path) -> None:
    names, gangs = submit(store, MANY), Gangs(store)
    now = 2.0

    def controller() -> Controller:
        return Controller(store, gangs, Settings(home=tmp_path), clock=lambda: now)  # type: ignore[arg-type]

    gangs.dead = True
    with pytest.raises(Killed):
        controller().tick()
    left = {attempt.run.run_id: attempt.run for attempt in store.live_attempts()}
    assert len(left) == MANY
    gangs.dead, now = False, 2.0 + 10 * START_AGAIN_S  # by then its lease has ended, too
    successor = controller()
    successor.tick()
    assert gangs.started == left
    assert [len(store.attempts(name)) for name in names] == [1] * MANY
    gangs.started.pop(f"{names[0]}.1")
    now += 1.0
    successor.tick()
    assert gangs.started == left
