"""The scheduler against a yard to which anything happens: what it promises of gangs, queues and reservations holds."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.cluster.model import Node
from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.explain import NOT_FOR_ROOM
from orchestrator.schedule.gang import Decisions, Gang, Held, Queue, Rules, Start, Stop, Why
from orchestrator.schedule.history import History, Ran
from orchestrator.schedule.preempt import sizes
from orchestrator.schedule.yard import MOMENT_S, Yard
from tests.builders import a_gang, a_node
from tests.scheduled import (
    EVICTED,
    NAMES,
    QUICK,
    RULES,
    back,
    gangs,
    look,
    on_open,
    open_slots,
    queues,
    started,
    yards,
)


class AnythingGoes(RuleBasedStateMachine):
    """Jobs come, end, save and are cancelled; nodes come and go; queues change. Stops take a while."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.count = 0
        self.nodes: tuple[Node, ...] = ()
        self.down: set[str] = set()
        self.closed: set[str] = set()
        self.drained: set[str] = set()
        self.queues: dict[str, Queue] = {}
        self.ran: list[Ran] = []
        self.leaving: dict[str, Stop | None] = {}
        """Gangs that were told to stop; None for those whose node is lost."""
        self.cancelled: set[str] = set()
        self.yard = Yard()

    @initialize(nodes=yards, consolidate=st.booleans(), first=st.lists(gangs(), min_size=2, max_size=6))
    def a_yard(self, nodes: tuple[Node, ...], consolidate: bool, first: list[Gang]) -> None:
        self.nodes = nodes
        self.yard = Yard(nodes, rules=replace(RULES, consolidate=consolidate))
        for gang in first:
            self.submit(gang)
        self.time_passes(0.37)

    # What happens.

    @rule(gang=gangs())
    def submit(self, gang: Gang) -> None:
        self.count += 1
        self.yard.wait(replace(gang, job_id=f"j{self.count}", sequence=self.count, queued_at=self.now))

    @rule(seconds=st.sampled_from([5.3, 23.9, 111.7, 111.7, 1207.3]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    @rule(wanted=gangs())
    def a_moment_after_a_job_came(self, wanted: Gang) -> None:
        self.submit(wanted)
        self.time_passes(0.37)

    @precondition(lambda self: self.leaving)
    @rule()
    def all_let_go(self) -> None:
        self.let_go()
        self.time_passes(0.37)

    @precondition(lambda self: self.yard.running)
    @rule(data=st.data())
    def a_gang_ends(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.yard.running)))
        held = self.yard.release(job_id)
        self.leaving.pop(job_id, None)
        ran = Ran(held.gang.queue, held.gang.name, held.gang.min_processes, held.gang.ran_s + self.now - held.since)
        self.ran.append(ran)
        self.yard.history.add(ran)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data(), saved=st.booleans())
    def a_gang_lets_go(self, data: st.DataObject, saved: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.leaving)))
        stop = self.leaving.pop(job_id)
        if job_id in self.cancelled:
            self.yard.release(job_id)
        else:
            back(self.yard, job_id, self.now, stop if saved else None)

    @precondition(lambda self: self.yard.running)
    @rule(data=st.data())
    def a_gang_saves(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.yard.running)))
        self.yard.hold(replace(self.yard.running[job_id], saved_at=self.now))

    @precondition(lambda self: self.yard.running or self.yard.waiting)
    @rule(data=st.data())
    def a_job_is_cancelled(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted({**self.yard.running, **self.yard.waiting})))
        if job_id in self.yard.waiting:
            self.yard.leave(job_id)
        else:
            self.yard.stopping(job_id)
            self.leaving[job_id] = None
            self.cancelled.add(job_id)

    @precondition(lambda self: self.yard.waiting)
    @rule(data=st.data(), priority=st.integers(0, 3))
    def a_job_gets_another_priority(self, data: st.DataObject, priority: int) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.yard.waiting)))
        self.yard.wait(replace(self.yard.waiting[job_id], priority=priority))

    @rule(data=st.data())
    def a_node_goes_or_comes(self, data: st.DataObject) -> None:
        """One at a time, so that there is something to decide."""
        node = data.draw(st.sampled_from(self.nodes)).id
        self.down = set() if self.down else {node}
        for job_id, held in list(self.yard.running.items()):
            if node in self.down and any(share.node == node for share in held.placement.shares):
                self.yard.stopping(job_id)
                self.leaving.setdefault(job_id, None)
        self.set_nodes()

    @rule(data=st.data(), mark=st.sampled_from(["closed", "drained"]))
    def a_node_is_marked_or_not(self, data: st.DataObject, mark: str) -> None:
        node = data.draw(st.sampled_from(self.nodes)).id
        setattr(self, mark, set() if getattr(self, mark) else {node})
        self.set_nodes()

    @rule(queue=queues)
    def a_queue_changes(self, queue: Queue) -> None:
        self.queues[queue.name] = queue
        self.yard.set_queues(self.queues.values())

    def let_go(self) -> None:
        for job_id in sorted(self.leaving):
            stop = self.leaving.pop(job_id)
            if job_id in self.cancelled:
                self.yard.release(job_id)
            else:
                back(self.yard, job_id, self.now, stop)

    def set_nodes(self) -> None:
        up = [node for node in self.nodes if node.id not in self.down]
        self.yard.set_nodes(up, closed=self.closed, drained=self.drained)

    # What is decided.

    def decide(self) -> Decisions:
        """Decide, check and carry out."""
        yard, before = self.yard, look(self.yard)
        decisions = decide(yard, self.now)
        assert look(yard) == before, "it only looks"
        assert decide(yard, self.now) == decisions, "and sees the same again"
        assert decide(self.anew(), self.now) == decisions, "as if it had never looked before"
        assert decisions.next_at is None or decisions.next_at > self.now
        named = [one.job_id for one in (*decisions.starts, *decisions.waits)]
        assert len(named) == len(set(named))
        assert set(named) <= set(yard.waiting)
        self.check_stops(decisions)
        self.check_that_shrinking_was_not_enough(decisions)
        for start in decisions.starts:
            self.check_start(start)
            started(yard, start, self.now)
            self.check_quota(yard.running[start.job_id], decisions)
        for stop in decisions.stops:
            yard.stopping(stop.job_id, stop.target)
            self.leaving[stop.job_id] = stop
        return decisions

    def anew(self) -> Yard:
        """A yard that is built from what there is, the other way round."""
        history = History()
        for ran in self.ran:
            history.add(ran)
        old = self.yard
        yard = Yard(
            [node for node in reversed(self.nodes) if node.id not in self.down],
            queues=reversed(self.queues.values()), rules=old.rules, history=history, closed=self.closed,
            drained=self.drained,
        )  # fmt: skip
        for gang in reversed(old.waiting.values()):
            yard.wait(gang)
        for held in reversed(old.running.values()):
            yard.hold(held)
        return yard

    def check_start(self, start: Start) -> None:
        """A whole gang, as it may be, where it may be."""
        gang, placement, option = self.yard.waiting[start.job_id], start.placement, start.option
        assert gang.min_processes <= placement.world_size <= gang.most
        shut = self.down | self.closed | self.drained
        assert not any(share.node in shut for share in placement.shares)
        nodes = {node.id: node for node in self.nodes}
        assert all(nodes[share.node].takes(gang.accelerator) for share in placement.shares)
        assert len({bool(nodes[share.node].gpus) for share in placement.shares}) == 1
        if gang.options is not None:
            assert option in gang.options
            assert option is not None
            assert (placement.world_size, placement.device) == (option.processes, option.device)
            assert placement.host_bytes == option.need.host_bytes
            for share in placement.shares:
                large = {gpu.index: gpu.memory_bytes or 2**50 for gpu in nodes[share.node].gpus}
                assert all(large[index] >= option.need.device_bytes for index in share.gpus)
        if gang.at_once is not None and gang.group is not None:
            assert self.yard.groups[gang.group] < gang.at_once
        if self.yard.rules.consolidate and len(placement.shares) > 1:
            whole = {node.id: len(node.gpus) or node.cpu_slots for node in self.nodes}
            assert sum(share.processes < whole[share.node] for share in placement.shares) <= 1

    def check_quota(self, held: Held, decisions: Decisions) -> None:
        """What its queue holds is below its ceiling, and no part of what others do not lend."""
        yard = self.yard
        queue = yard.queue(held.gang.queue)
        assert queue.ceiling is None or yard.held[queue.name] <= queue.ceiling
        if queue.guaranteed is not None and yard.held[queue.name] <= queue.guaranteed:
            return
        kept = sum(
            max(0, (other.guaranteed or 0) - yard.held[other.name])
            for other in self.queues.values()
            if other.name != queue.name and not other.lendable
        )
        told = {stop.job_id for stop in decisions.stops}
        soon = sum(on_open(yard, one, "any") for job, one in yard.running.items() if one.stopping or job in told)
        assert kept == 0 or open_slots(yard, "any") + soon >= kept

    def check_stops(self, decisions: Decisions) -> None:
        """Each for a reason that there is."""
        yard, rules = self.yard, self.yard.rules
        assert len({stop.job_id for stop in decisions.stops}) == len(decisions.stops)
        for stop in decisions.stops:
            held = yard.running[stop.job_id]
            gang, ran = held.gang, self.now - held.since
            assert held.can_stop
            if stop.why == Why.DRAINED:
                assert any(share.node in self.drained for share in held.placement.shares)
                continue
            if stop.why == Why.GROW:
                assert stop.target is not None
                assert held.processes < stop.target <= gang.max_processes
                assert ran >= rules.grow_after_s
                continue
            assert stop.for_job is not None
            other = yard.waiting[stop.for_job]
            assert gang.priority <= other.priority
            assert ran >= (rules.min_run_s if stop.why == Why.SHORTER else rules.min_run_for_class_s)
            if stop.why == Why.SHRINK:
                assert stop.target is not None
                assert gang.min_processes <= stop.target < held.processes
            elif stop.why == Why.HIGHER_CLASS:
                assert gang.priority < other.priority
            elif stop.why == Why.QUOTA:
                own = yard.queue(other.queue).guaranteed
                assert own is not None
                assert yard.held[other.queue] + other.min_processes <= own + self.leaving_of(other.queue, decisions)
            else:
                assert gang.evictions < rules.max_evictions
                assert self.now - other.queued_at >= rules.patience_s

    def leaving_of(self, queue: str, decisions: Decisions) -> int:
        """Ranks of a queue that will soon be free."""
        running = self.yard.running
        leaving = {*self.leaving, *(stop.job_id for stop in decisions.stops)}
        return sum(running[job_id].processes for job_id in leaving if running[job_id].gang.queue == queue)

    def check_that_shrinking_was_not_enough(self, decisions: Decisions) -> None:
        """Of gangs whose slots are all the same to each other, which can be counted; for the first that needs room."""
        yard = self.yard
        first = next((stop for stop in decisions.stops if stop.why != Why.DRAINED), None)
        if first is None or first.why not in EVICTED or decisions.starts or decisions.reservation is not None:
            return
        gang = yard.waiting[first.for_job or ""]
        making = [wait.job_id for wait in decisions.waits if wait.reason.code == ReasonCode.MAKING_ROOM]
        if making[0] != gang.job_id:
            return  # what is free soon is promised to others
        if gang.options is not None or gang.accelerator not in ("cpu", "gpu") or yard.rules.consolidate:
            return
        room = open_slots(yard, gang.accelerator)
        for job_id, held in yard.running.items():
            other = held.gang
            if held.stopping or any(stop == Stop(job_id, Why.DRAINED) for stop in decisions.stops):
                room += on_open(yard, held, gang.accelerator)
            elif (
                held.can_stop
                and other.priority <= gang.priority
                and self.now - held.since >= yard.rules.min_run_for_class_s
                and other.options is None
                and other.accelerator == gang.accelerator
                and on_open(yard, held, gang.accelerator) == held.processes
            ):
                room += held.processes - min(sizes(other)[-1], held.processes)
        assert room < gang.min_processes

    # What always holds.

    @invariant()
    def no_slot_is_held_twice(self) -> None:
        slots: dict[str, int] = {}
        gpus: set[tuple[str, int]] = set()
        memory: dict[str, int] = {}
        for held in self.yard.running.values():
            for share in held.placement.shares:
                assert held.placement.device == "cpu" or len(share.gpus) == share.processes
                for index in share.gpus:
                    assert (share.node, index) not in gpus
                    gpus.add((share.node, index))
                slots[share.node] = slots.get(share.node, 0) + share.processes
                memory[share.node] = memory.get(share.node, 0) + share.processes * held.placement.host_bytes
        for node in self.nodes:
            assert slots.get(node.id, 0) <= (len(node.gpus) or node.cpu_slots)
            assert node.memory_bytes is None or memory.get(node.id, 0) <= node.memory_bytes
            if node.id not in self.down:
                free = (len(node.gpus) or node.cpu_slots) - slots.get(node.id, 0)
                assert self.yard.capacity.free(node) == free

    @invariant()
    def what_queues_and_arrays_hold_is_counted(self) -> None:
        for queue in NAMES:
            held = sum(held.processes for held in self.yard.running.values() if held.gang.queue == queue)
            assert self.yard.held[queue] == held
        for group in ("x", "y"):
            assert self.yard.groups[group] == sum(held.gang.group == group for held in self.yard.running.values())

    def teardown(self) -> None:
        """Nobody starves: with all nodes there and nothing new, every job starts, or is told what it lacks."""
        self.down, self.closed, self.drained = set(), set(), set()
        self.set_nodes()
        done: set[str] = set()
        for _ in range(60 + 20 * self.count):
            self.let_go()
            self.now += 131.9
            decisions = self.decide()
            oldest = min(self.yard.running.values(), key=lambda held: (held.since, held.gang.job_id), default=None)
            if oldest is not None and not oldest.stopping:
                self.yard.release(oldest.gang.job_id)
                done.add(oldest.gang.job_id)
            elif oldest is None and not decisions.starts:
                break
        assert not self.yard.running
        assert {wait.reason.code for wait in decisions.waits} <= NOT_FOR_ROOM


AnythingGoes.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, phases=QUICK,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
TestSchedule = AnythingGoes.TestCase


# Reservations.


@st.composite
def known(draw: st.DrawFn) -> Gang:
    """A gang of which all is known beforehand, its end above all."""
    gang = draw(gangs())
    length = draw(st.sampled_from([10.0, 25.0, 40.0, 90.0, 200.0, 1000.0]))
    return replace(gang, queue="default", priority=0, group=None, at_once=None, left_s=None, oracle_s=length)


@settings(max_examples=200, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(yards, st.lists(known(), min_size=3, max_size=14), st.booleans())
def test_backfill_never_delays_a_reservation_when_estimates_hold(
    nodes: tuple[Node, ...], found: list[Gang], consolidate: bool
) -> None:
    rules = Rules(preempt=False, resize=False, starving_s=1e12, consolidate=consolidate)
    yard, now = Yard(nodes, rules=rules), 0.0
    promised: dict[str, float] = {}
    for number, gang in enumerate(found):
        yard.wait(replace(gang, job_id=f"j{number}", sequence=number))
    while True:
        decisions = decide(yard, now)
        for start in decisions.starts:
            assert now <= promised.get(start.job_id, now)
            started(yard, start, now)
        if decisions.reservation is not None:
            job_id, at = decisions.reservation.job_id, decisions.reservation.at
            assert now < at <= promised.get(job_id, at), "only ever sooner"
            promised[job_id] = at
        ends = {job_id: held.since + (held.gang.oracle_s or 0.0) for job_id, held in yard.running.items()}
        if not ends:
            break
        now = min(ends.values())
        for job_id, end in ends.items():
            if end == now:
                yard.release(job_id)
    assert not promised.keys() & yard.waiting.keys()


# Reclaim.


@settings(max_examples=200, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 3]), st.sampled_from("bc")), max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from("bc")), max_size=4),
    st.integers(0, 3),
)
def test_what_is_guaranteed_is_taken_back(
    slots: list[int], borrowing: list[tuple[int, int, str]], own: list[int], others: list[tuple[int, str]], spare: int
) -> None:
    """Gangs of queue a are within its guarantee; whoever runs borrows, except that c has one slot of its own."""
    total = sum(slots)
    while sum(own) > total - 1:
        own = own[:-1]
    queues = [Queue("a", guaranteed=sum(own) + spare), Queue("c", guaranteed=1)]
    yard = Yard([a_node(f"n{at}", slots=count) for at, count in enumerate(slots)], queues=queues, rules=RULES)
    for number, (low, more, queue) in enumerate(borrowing):
        yard.wait(a_gang(f"j{number}", low, low + more, queue=queue))
    for start in decide(yard, 0.0).starts:
        started(yard, start, 0.0)
    now = 1000.0
    for number, low in enumerate(own, 50):
        yard.wait(a_gang(f"j{number}", low, queue="a", queued_at=now))
    for number, (low, queue) in enumerate(others, 70):
        yard.wait(a_gang(f"j{number}", low, queue=queue, queued_at=now))
    for _ in range(4 * (len(own) + 1)):
        decisions = decide(yard, now)
        for start in decisions.starts:
            started(yard, start, now)
        for stop in decisions.stops:
            yard.stopping(stop.job_id, stop.target)
        now += 5.0
        for stop in decisions.stops:
            back(yard, stop.job_id, now, stop)
    assert not [gang for gang in yard.waiting.values() if gang.queue == "a"]


# Nobody starves.


@settings(max_examples=100, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(yards, gangs(), st.lists(gangs(), min_size=1, max_size=5), st.sampled_from([None, 20.0, 300.0]), st.booleans())
def test_a_gang_starts_however_many_others_come_behind_it(
    nodes: tuple[Node, ...], gang: Gang, stream: list[Gang], length: float | None, consolidate: bool
) -> None:
    """Of its class and queue: as soon as one ends, two more have come."""
    alike = {"priority": 0, "queue": "default", "group": None, "at_once": None, "left_s": None, "oracle_s": length}
    yard, now, count = Yard(nodes, rules=replace(RULES, consolidate=consolidate)), 0.0, 1
    yard.wait(replace(gang, job_id="j0", sequence=0, **alike))
    for round_ in range(400):
        if round_:
            for other in (stream[count % len(stream)], stream[(count + 1) % len(stream)]):
                count += 1
                yard.wait(replace(other, job_id=f"j{count}", sequence=count, queued_at=now, **alike))
        decisions = decide(yard, now)
        for stop in decisions.stops:
            back(yard, stop.job_id, now, stop)
        for start in decisions.starts:
            started(yard, start, now)
        reason = next((wait.reason for wait in decisions.waits if wait.job_id == "j0"), None)
        if "j0" in yard.running or (reason is not None and reason.code in NOT_FOR_ROOM):
            return
        now += 20.0
        lasts = length or 60.0
        for job_id, held in list(yard.running.items()):
            if now - held.since + held.gang.ran_s >= lasts:
                yard.release(job_id)
                yard.history.add(Ran("default", held.gang.name, held.gang.min_processes, lasts))
    raise AssertionError("it starved")


# When to decide again.


@st.composite
def quiet_yards(draw: st.DrawFn) -> Yard:
    """In which gangs run and others wait, of which nobody knows how long they take; and nothing is to be done now."""
    rules = replace(RULES, consolidate=draw(st.booleans()), starving_s=500.3)
    found = draw(st.lists(queues, max_size=3, unique_by=lambda queue: queue.name))
    yard = Yard(draw(yards), queues=found, rules=rules)
    for number, gang in enumerate(draw(st.lists(gangs(), min_size=3, max_size=12))):
        more = {"queued_at": -draw(st.sampled_from([0.3, 7.7, 90.1, 480.9])), "oracle_s": None, "left_s": None}
        yard.wait(
            replace(gang, job_id=f"j{number}", sequence=number, ran_s=draw(st.sampled_from([0.0, 33.3, 2e3])), **more)
        )
    for start in decide(yard, 0.0).starts:
        since = -draw(st.sampled_from([0.1, 11.3, 42.1, 95.9, 300.7]))
        started(yard, start, 0.0)
        yard.hold(replace(yard.running[start.job_id], since=since))
    for _ in range(60):
        decisions = decide(yard, 0.0)
        for stop in decisions.stops:
            back(yard, stop.job_id, 0.0, stop)
        for start in decisions.starts:
            started(yard, start, 0.0)
        if not decisions.starts and not decisions.stops:
            return yard
    raise AssertionError("it does not come to rest")


@settings(max_examples=200, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(quiet_yards(), st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3))
def test_until_next_at_nothing_is_to_be_done(yard: Yard, parts: list[float]) -> None:
    now = 0.0
    for _ in range(12):
        decisions = decide(yard, now)
        if decisions.starts or decisions.stops:
            return
        until = decisions.next_at if decisions.next_at is not None else now + 1e5
        # It is told a moment late, so as not to be too early by a rounding error.
        for at in sorted(min(now + part * (until - now), until - 2 * MOMENT_S) for part in parts):
            between = decide(yard.copy(), max(now, at))
            assert (between.starts, between.stops) == ((), ())
        if decisions.next_at is None:
            return
        now = decisions.next_at
