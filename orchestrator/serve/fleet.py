"""Lets the yard's cluster grow and shrink: a thread beside the controller, which acts only where that does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

import structlog

from orchestrator.cluster.group import Group
from orchestrator.control.board import Board
from orchestrator.control.dispatch import yard_of
from orchestrator.control.facts import Facts, Prospect
from orchestrator.control.fleet import Idle, Look, Present, Wishes, potential, wish
from orchestrator.control.loop import Controller, history_of
from orchestrator.control.rules import rules_of
from orchestrator.errors import ConflictError, TuneyardError
from orchestrator.outside.k8s.cluster import RayCluster, group_of_node, groups_of
from orchestrator.schedule import explain
from orchestrator.schedule.decide import decide
from orchestrator.settings import Settings
from orchestrator.store.rows import Mark, NodeMark

log = structlog.get_logger()
LOOK_S = 2.0
WATCH_AGAIN_S = 1.0
MINE = "fleet: idle, and about to be given back"
"""The reason of the marks that it sets: other marks are left alone."""


def open_fleet(controller: Controller, settings: Settings) -> Fleet | None:
    """The fleet that the settings name; None where they name none."""
    if settings.fleet is None:
        return None
    from orchestrator.outside.k8s.api import Api

    namespace, _, name = settings.fleet.partition("/")
    return Fleet(controller, RayCluster(Api(), namespace, name), settings.fleet_idle)


class Fleet:
    """Looks at the RayCluster and at the queue, and asks for more nodes or fewer."""

    def __init__(
        self, controller: Controller, cluster: RayCluster, idle_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._controller, self._cluster, self._idle_s, self._clock = controller, cluster, idle_s, clock
        self._groups: list[Group] | None = None
        self._idle = Idle()
        self._closed_at: dict[str, float] = {}
        """By node's name: when it was closed here, or first seen to be."""
        self._wake, self._ended = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for name, target in (("fleet", self._run), ("fleet-watch", self._watch)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        self._ended.set()
        self._wake.set()
        self._threads[0].join(timeout=5)  # the other one may wait for the server

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(LOOK_S)
            self._wake.clear()
            try:
                self.look()
            except TuneyardError as problem:
                log.warning("the fleet cannot be looked at", error=problem.message)

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                for found in self._cluster.changes():
                    self._groups = groups_of(found)
                    self._wake.set()
                    self._controller.wake.set()
                    if self._ended.is_set():
                        return
            except TuneyardError as problem:
                log.warning("the RayCluster cannot be watched", error=problem.message)
            self._ended.wait(WATCH_AGAIN_S)

    def look(self) -> Wishes | None:
        """One look and what follows from it; None without the lease, and before the RayCluster is known.

        Raises:
            TuneyardError: cluster, database or API server cannot be asked.
        """
        if self._controller.lease is None:
            return None
        groups = self._groups if self._threads else groups_of(self._cluster.read())
        if groups is None:
            return None
        now = self._clock()
        look = self._see(groups, now)
        wishes, self._idle = wish(look, self._idle, self._idle_s, now)
        self._controller.prospect = Prospect(potential(groups, look.nodes), wishes.reasons)
        self._carry_out(groups, wishes, now)
        return wishes

    def _see(self, groups: list[Group], now: float) -> Look:
        controller = self._controller
        ticked_at = controller.ticked_at
        state, facts = controller.look()
        marks = {row.name: row for row in controller.store.node_marks()}
        doomed = {name for group in groups for name in group.doomed}
        nodes = []
        busy = {share.node for attempt in state.attempts for share in attempt.held.shares}
        settled = set()
        for node in facts.nodes:
            name = group_of_node(node, self._cluster.name, groups)
            if name is None:
                continue
            mark = marks.get(node.name)
            mine = mark is not None and mark.reason == MINE
            if node.name in doomed:  # it is about to leave: nothing is to start on it meanwhile
                if mark is None:
                    controller.store.mark_node(node.name, Mark.CORDONED, MINE, now)
                continue
            nodes.append(Present(node, name, node.id in busy, mine, mark is not None and not mine))
            if mine:
                closed_at = self._closed_at.setdefault(node.name, now)
                if ticked_at > closed_at:
                    settled.add(node.id)
        self._forget({node.name for node in facts.nodes}, marks.values())
        board = Board(rules_of(controller.settings), history_of(controller.store))
        # As if the cluster were as large as it may become: what its nodes are decides how jobs could run.
        grown = Facts(nodes=[*facts.nodes, *potential(groups, nodes)])
        yard = yard_of(state, grown, now, board)
        waits = {wait.job_id: wait.reason.code for wait in decide(yard, now).waits}
        waiting = [gang for gang in yard.in_order() if waits.get(gang.job_id) not in explain.NOT_FOR_ROOM]
        return Look(groups, nodes, waiting, [attempt.held for attempt in state.attempts], settled)

    def _forget(self, there: set[str], marks: Iterable[NodeMark]) -> None:
        """Take away the marks of nodes that have left."""
        for mark in marks:
            if mark.reason == MINE and mark.name not in there:
                self._open(mark.name)

    def _carry_out(self, groups: list[Group], wishes: Wishes, now: float) -> None:
        store = self._controller.store
        for node in wishes.open:
            self._open(node.name)
        for node in wishes.close:
            store.mark_node(node.name, Mark.CORDONED, MINE, now)
            self._closed_at[node.name] = now
        if wishes.open or wishes.close:
            self._controller.wake.set()
        changed = any(wishes.replicas[group.name] != group.replicas for group in groups)
        if not changed or self._controller.lease is None:
            return
        there = {node.name for node in self._controller.executor.nodes()}
        doomed = {
            group.name: [
                *(name for name in group.doomed if name in there),
                *(node.name for node in wishes.give_back[group.name]),
            ]
            for group in groups
        }
        log.info("the cluster is to have", replicas=dict(wishes.replicas), given_back=doomed)
        self._groups = groups_of(self._cluster.resize(wishes.replicas, doomed))

    def _open(self, name: str) -> None:
        self._closed_at.pop(name, None)
        with contextlib.suppress(ConflictError):  # it is already
            self._controller.store.unmark_node(name)
