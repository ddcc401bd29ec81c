"""The controller against a world that does anything: it never makes an illegal step, and never gives a slot twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from launch.attempt import ExitCode
from launch.contract import CheckpointNote, ProgressLine, RankExit, RunContract, StopRequest
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus, NodeReport
from orchestrator.control.loop import Controller
from orchestrator.errors import ConflictError, ExecutorError
from orchestrator.job.lifecycle import AttemptState, JobState, ReasonCode
from orchestrator.settings import Settings
from orchestrator.store.store import Store
from tests.builders import a_command_job, a_node

NODES = (a_node("n0", slots=3), a_node("n1", slots=2))
PATIENCE = 2000.0  # longer than any leash, back-off or deadline there is


@dataclass
class Gang:
    """What really became of an attempt."""

    contract: RunContract
    begun: bool = False
    stop: StopRequest | None = None
    exits: dict[int, RankExit] = field(default_factory=dict)
    told: list[ProgressLine] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.exits) == self.contract.plan.world_size


class World:
    """An executor whose processes exist in this object alone, and whose nodes come and go."""

    def __init__(self) -> None:
        self.up = {node.id for node in NODES}
        self.gangs: dict[str, Gang] = {}
        self.starts_fail = False
        self.now = 1000.0

    def nodes(self) -> list[Node]:
        return [node for node in NODES if node.id in self.up]

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        return {node: list(range(count)) for node, count in wanted.items() if node in self.up}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        if self.starts_fail:
            return {contract.run_id: ExecutorError("it did not start") for contract in contracts}
        for contract in contracts:
            self.gangs.setdefault(contract.run_id, Gang(contract))
        return {}

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        return {contract.run_id: self._status(contract, offsets[contract.run_id]) for contract in contracts}

    def _status(self, contract: RunContract, offset: int) -> AttemptStatus:
        gang = self.gangs.get(contract.run_id)
        reports = []
        for index, share in enumerate(contract.nodes):
            reachable = share.node in self.up
            exits = tuple(gang.exits[rank] for rank in contract.ranks_of(index) if rank in gang.exits) if gang else ()
            reports.append(
                NodeReport(
                    node_index=index,
                    reachable=reachable,
                    claimed=gang is not None,
                    begun=gang is not None and gang.begun,
                    ended=gang is not None and reachable and len(exits) == share.processes,
                    exits=exits if reachable else (),
                    progress=ProgressLine(time=self.now, phase="train", step=1) if gang and gang.begun else None,
                    # One a look, and a line is a byte: how often one tells what, rank 0's node decides.
                    news=tuple(gang.told[offset : offset + 1]) if gang and index == 0 and reachable else (),
                    offset=min(offset + 1, len(gang.told)) if gang and index == 0 and reachable else offset,
                )
            )
        return AttemptStatus(reports=tuple(reports))

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        if contract.run_id in self.gangs:
            self.gangs[contract.run_id].stop = request

    def release(self, contract: RunContract) -> None:
        """Nothing is held."""

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:  # noqa: ARG002
        return b""

    def close(self) -> None:
        """Nothing is open."""


def some(fits: Callable[[Gang], bool]) -> Callable[[AnythingGoes], bool]:
    return lambda machine: any(fits(gang) for gang in machine.world.gangs.values())


def unbegun(gang: Gang) -> bool:
    return not gang.begun and not gang.ended


def living(gang: Gang) -> bool:
    return not gang.ended


def talking(gang: Gang) -> bool:
    return gang.begun and 0 not in gang.exits


class AnythingGoes(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.store = Store("sqlite:///:memory:")
        self.store.prepare()
        self.controller = Controller(self.store, self.world, Settings(), clock=lambda: self.world.now)
        self.count = 0

    def teardown(self) -> None:
        """Left alone with all nodes back and every rank ending well, every job comes to an end."""
        self.world.up = {node.id for node in NODES}
        self.world.starts_fail = False
        for job in self.store.jobs(live=True):
            if job.pause_requested and not job.cancel_requested:
                self.store.request_resume(job.id, self.world.now)
        for turn in range(400):
            self.controller.tick()
            for gang in self.world.gangs.values() if turn > 4 else ():  # they run for a while before they end
                gang.begun = True
                for rank in range(gang.contract.plan.world_size):
                    gang.exits.setdefault(rank, RankExit(rank=rank, code=ExitCode.DONE, time=self.world.now))
            self.world.now += PATIENCE
            if not self.store.jobs(live=True):
                break
        assert [(job.id, job.state, job.reason.sentence) for job in self.store.jobs(live=True)] == []
        # With all nodes back, all that was ever told on them was heard, once and in order.
        for name, gang in self.world.gangs.items():
            job, _, number = name.rpartition(".")
            events = [event for event in self.store.events(job) if event.attempt == int(number)]
            heard = [event.data["step"] for event in events if event.kind == "checkpoint-committed"]
            assert heard == list(range(len(heard)))
            outcome = next(row.outcome for row in self.store.attempts(job) if row.number == int(number))
            if outcome != "node-lost":
                assert len(heard) == len(gang.told)
        self.store.close()

    @initialize(target=jobs)
    def a_job_runs(self) -> str:
        """Without one there is little that can happen."""
        job = self.submit(2, 2, 2, False)
        self.controller.tick()
        for gang in self.world.gangs.values():
            gang.begun = True
        return job

    @rule(target=jobs, low=st.integers(1, 3), more=st.integers(0, 3), restarts=st.integers(0, 2), limited=st.booleans())
    def submit(self, low: int, more: int, restarts: int, limited: bool) -> str:
        self.count += 1
        keys = {"retry": {"max_restarts": restarts}} | ({"max_duration": "60s"} if limited else {})
        job = a_command_job(f"{low}..{low + more}", **keys)
        self.store.add_job(f"job-{self.count}", job, self.world.now)
        return f"job-{self.count}"

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        before = self.store.job(job).state
        try:
            self.store.request_cancel(job, self.world.now)
        except ConflictError:
            assert before.final

    @rule(job=jobs)
    def pause(self, job: str) -> None:
        before = self.store.job(job)
        try:
            self.store.request_pause(job, self.world.now)
        except ConflictError:
            assert before.state.final or before.cancel_requested

    @rule(job=jobs)
    def resume(self, job: str) -> None:
        before = self.store.job(job)
        try:
            self.store.request_resume(job, self.world.now)
        except ConflictError:
            assert before.state.final or before.cancel_requested or not before.pause_requested

    @precondition(some(talking))
    @rule(data=st.data(), times=st.integers(1, 3))
    def a_gang_saves(self, data: st.DataObject, times: int) -> None:
        gang = self._one(data, talking)
        for step in range(len(gang.told), len(gang.told) + times):
            note = CheckpointNote(id=f"step-{step}.attempt-{gang.contract.attempt}", step=step, outcome="committed")
            gang.told.append(ProgressLine(time=self.world.now, phase="save", step=step, checkpoint=note))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 40.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.controller.tick()

    @rule()
    def tick(self) -> None:
        self.controller.tick()

    @rule(fails=st.booleans())
    def starts(self, fails: bool) -> None:
        self.world.starts_fail = fails

    @rule(node=st.sampled_from([node.id for node in NODES]))
    def node_goes_or_comes(self, node: str) -> None:
        self.world.up ^= {node}

    @precondition(some(unbegun))
    @rule(data=st.data())
    def a_gang_begins(self, data: st.DataObject) -> None:
        self._one(data, unbegun).begun = True

    @precondition(some(living))
    @rule(data=st.data(), code=st.sampled_from(list(ExitCode)))
    def a_rank_ends(self, data: st.DataObject, code: ExitCode) -> None:
        gang = self._one(data, living)
        left = [rank for rank in range(gang.contract.plan.world_size) if rank not in gang.exits]
        rank = data.draw(st.sampled_from(left))
        gang.exits[rank] = RankExit(rank=rank, code=code, time=self.world.now)

    @precondition(some(living))
    @rule(data=st.data(), code=st.sampled_from([ExitCode.DONE, ExitCode.STOPPED, ExitCode.CRASH]))
    def a_gang_ends(self, data: st.DataObject, code: ExitCode) -> None:
        gang = self._one(data, living)
        for rank in range(gang.contract.plan.world_size):
            gang.exits.setdefault(rank, RankExit(rank=rank, code=code, time=self.world.now))

    def _one(self, data: st.DataObject, fits: Callable[[Gang], bool]) -> Gang:
        names = [name for name, gang in self.world.gangs.items() if fits(gang)]
        return self.world.gangs[data.draw(st.sampled_from(names))]

    @rule()
    def the_controller_is_replaced(self) -> None:
        self.controller.close()
        self.controller = Controller(self.store, self.world, Settings(), clock=lambda: self.world.now)

    @invariant()
    def no_slot_is_held_twice(self) -> None:
        shares = [share for attempt in self.store.live_attempts() for share in attempt.held.shares]
        for node in NODES:
            assert sum(share.processes for share in shares if share.node == node.id) <= node.cpu_slots

    @invariant()
    def a_job_has_one_live_attempt_at_most_and_only_while_it_is_live(self) -> None:
        live = [attempt.job_id for attempt in self.store.live_attempts()]
        assert len(live) == len(set(live))
        for job in self.store.jobs():
            numbers = [attempt.number for attempt in self.store.attempts(job.id)]
            assert numbers == list(range(1, job.attempts + 1))
            assert (job.id in live) == (job.state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING))
            assert job.failures <= job.job.retry.max_restarts + 1
            assert job.state != JobState.PAUSED or job.reason.code == ReasonCode.PAUSED
            assert job.reason.sentence

    @invariant()
    def a_gang_that_may_live_keeps_its_slots(self) -> None:
        """Processes on a node that answers are never forgotten by an attempt that counts as ended."""
        ended = {
            attempt.run.run_id
            for job in self.store.jobs()
            for attempt in self.store.attempts(job.id)
            if attempt.state == AttemptState.ENDED and attempt.outcome not in ("node-lost",)
        }
        for name in ended:
            gang = self.world.gangs.get(name)
            assert gang is None or gang.ended


# Not shrunk: that takes minutes, and the steps of a failing world are short enough to read.
AnythingGoes.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
TestController = AnythingGoes.TestCase
