"""The queue as the scheduler sees it: who is next, why each waits, and when it is expected to start."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from fastapi import APIRouter

from orchestrator.control.board import Board
from orchestrator.control.dispatch import yard_of
from orchestrator.control.loop import Controller, history_of
from orchestrator.control.rules import rules_of
from orchestrator.job.lifecycle import JobState, Reason
from orchestrator.schedule import explain
from orchestrator.schedule.decide import decide
from orchestrator.schedule.forecast import Eta, forecast
from orchestrator.schedule.gang import Decisions, Gang, Reservation
from orchestrator.schedule.order import AT_ONCE, lifts, share_of
from orchestrator.schedule.yard import Yard
from orchestrator.serve.administration import queue_views
from orchestrator.serve.names import JobId
from orchestrator.views import EtaView, QueueLook, ReservationView, TurnView, WhyView

MAX_FORECAST = 200
"""Jobs of a queue whose start is forecast; of one job it always is."""
STEPS = 300
"""Decisions played forward for a whole queue."""


class _Look:
    """One look at the queue."""

    def __init__(self, controller: Controller) -> None:
        self.now = time.time()
        state, facts = controller.look()
        self.jobs = {job.id: job for job in state.jobs}
        board = Board(rules_of(controller.settings), history_of(controller.store))
        self.yard: Yard = yard_of(state, facts, self.now, board)
        self.decisions: Decisions = decide(self.yard, self.now)
        self.order: list[Gang] = list(self.yard.in_order())
        self.names = {node.id: node.name for node in facts.nodes}

    def turn(self, position: int, gang: Gang, eta: Eta | None) -> TurnView:
        return TurnView(
            position=position,
            job=gang.job_id,
            queue=gang.queue,
            priority=gang.priority,
            processes=(gang.min_processes, gang.max_processes),
            level=max(0, self.yard.level(gang.job_id)),
            waited_s=self.waited_s(gang),
            preemptions=gang.evictions,
            reason=self.reason(gang),
            eta=_eta_view(eta),
        )

    def waited_s(self, gang: Gang) -> float:
        return gang.waited_s + max(0.0, self.now - gang.queued_at)

    def reason(self, gang: Gang) -> Reason:
        reasons = {wait.job_id: wait.reason for wait in self.decisions.waits}
        stored = self.jobs[gang.job_id].reason
        return reasons.get(gang.job_id) or (stored if self.starts(gang) else explain.behind())

    def starts(self, gang: Gang) -> bool:
        return any(start.job_id == gang.job_id for start in self.decisions.starts)

    def reservation(self) -> ReservationView | None:
        found: Reservation | None = self.decisions.reservation
        if found is None:
            return None
        slots = {self.names.get(node, node): ranks for node, ranks in found.slots}
        return ReservationView(job=found.job_id, at=_finite(found.at), slots=slots)

    def story(self, gang: Gang, ahead: Sequence[Gang]) -> list[str]:
        """What decides the place of a gang, in sentences."""
        yard, level = self.yard, self.yard.level(gang.job_id)
        queue = yard.queue(gang.queue)
        held = yard.held[gang.queue]
        borrows, _ = share_of(queue, held, gang.min_processes)
        share = f"queue {queue.name} (weight {queue.weight:g}) holds {explain.count(held)}"
        if queue.guaranteed is not None:
            share += f" of {queue.guaranteed} that are its own" + (", so it would borrow" if borrows else "")
        told = [share]
        if level == AT_ONCE:
            told.append("it was stopped to go on with another number of processes, and comes first")
            return told
        expected = yard.history.left_s(gang, gang.ran_s, 0.5)
        length = "nobody knows yet how long jobs take here"
        if expected is not None:
            length = f"jobs like it take another {explain.duration(expected)} or so"
        told.append(f"level {level} of {yard.rules.levels}, 0 being the first: {length}, times {gang.min_processes}")
        lifted = lifts(self.waited_s(gang), yard.rules)
        if lifted:
            told.append(f"it has waited for {explain.duration(self.waited_s(gang))}, which lifted it by {lifted}")
        classes = sum(other.priority > gang.priority for other in ahead)
        if classes:
            told.append(f"{classes} of those before it have a higher priority")
        if gang.evictions:
            told.append(f"it made room for others {gang.evictions} times")
        return told


def foresee(guarded: APIRouter, controller: Controller) -> None:
    """Add the routes that look ahead."""

    @guarded.get("/queue")
    def queue() -> QueueLook:
        """The jobs that stand in the queue, in its order; the first of them with their expected start."""
        look = _Look(controller)
        first = [gang.job_id for gang in look.order[:MAX_FORECAST]]
        etas = forecast(look.yard, look.now, first, STEPS)
        turns = tuple(look.turn(at, gang, etas.get(gang.job_id)) for at, gang in enumerate(look.order, start=1))
        views = queue_views(controller.store.queues(), controller.store.queue_uses())
        return QueueLook(time=look.now, turns=turns, reservation=look.reservation(), queues=tuple(views))

    @guarded.get("/jobs/{job_id}/why")
    def why(job_id: JobId) -> WhyView:
        row = controller.store.job(job_id)
        if row.state != JobState.QUEUED:
            return WhyView(job=row.id, state=row.state, reason=row.reason)
        look = _Look(controller)
        at = next((at for at, gang in enumerate(look.order) if gang.job_id == row.id), None)
        if at is None:
            return WhyView(job=row.id, state=row.state, reason=row.reason)
        gang, ahead = look.order[at], look.order[:at]
        eta = forecast(look.yard, look.now, [row.id]).get(row.id)
        turn = look.turn(at + 1, gang, eta)
        return WhyView(
            job=row.id,
            state=row.state,
            reason=turn.reason,
            turn=turn,
            ahead=tuple(other.job_id for other in ahead[:5]),
            jobs_ahead=len(ahead),
            reservation=look.reservation(),
            story=tuple(look.story(gang, ahead)),
        )


def _eta_view(eta: Eta | None) -> EtaView:
    if eta is None:
        return EtaView()
    return EtaView(low=_finite(eta.low), expected=_finite(eta.expected), high=_finite(eta.high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
