"""What administrators ask of a yard: shares of its queues, and which of its nodes rest."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.responses import Response
from pydantic import Field, field_validator

from launch.config import Section, validate
from launch.errors import Refused
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import ProbeCheck, StandbyReport
from orchestrator.control.loop import Controller
from orchestrator.control.probing import Probing
from orchestrator.errors import NotFoundError
from orchestrator.job.spec import received
from orchestrator.serve.names import NodeName, QueueName
from orchestrator.store.administration import MAX_SHARE, MAX_WEIGHT
from orchestrator.store.rows import Mark, NodeMark, QueueRow, QueueUse
from orchestrator.views import MarkView, NodeView, ProbeView, QueueView

MAX_REASON = 500
PROBE_LOOK_S = 0.2


class QueueChange(Section):
    """What is to be changed of a queue; what is left out stays as it is."""

    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = 1.0
    guaranteed: Annotated[int, Field(ge=0, le=MAX_SHARE)] | None = None
    ceiling: Annotated[int, Field(ge=0, le=MAX_SHARE)] | None = None
    lendable: bool = True


class ProbeAsked(Section):
    nodes: Annotated[tuple[str, ...], Field(max_length=10_000)] = ()
    """Their names."""


class MarkRequest(Section):
    reason: str | None = None
    """Whatever the next administrator should know."""

    @field_validator("reason")
    @classmethod
    def _is_short(cls, reason: str | None) -> str | None:
        if reason is not None and len(reason) > MAX_REASON:
            raise Refused(
                f"`reason` has {len(reason)} characters", code="out-of-range", hint=f"write at most {MAX_REASON}"
            )
        return reason


def administer(guarded: APIRouter, controller: Controller) -> None:
    """Add the routes of queues and nodes."""
    store, executor = controller.store, controller.executor

    @guarded.get("/queues")
    def queues() -> list[QueueView]:
        """Every queue of which something was said, or that has live jobs."""
        return queue_views(store.queues(), store.queue_uses())

    @guarded.get("/queues/{name}")
    def queue(name: QueueName) -> QueueView:
        return _one_queue(name)

    @guarded.put("/queues/{name}")
    def set_queue(name: QueueName, body: dict[str, Any]) -> QueueView:
        change = validate(QueueChange, received(body))
        store.set_queue(name, **change.model_dump(exclude_unset=True))
        controller.wake.set()
        return _one_queue(name)

    @guarded.delete("/queues/{name}", status_code=204)
    def delete_queue(name: QueueName) -> Response:
        """Forget what was said of a queue: it has the defaults again, and its jobs stay."""
        store.delete_queue(name)
        controller.wake.set()
        return Response(status_code=204)

    def _one_queue(name: str) -> QueueView:
        for view in queue_views(store.queues(), store.queue_uses()):
            if view.name == name:
                return view
        raise NotFoundError(f"there is no queue {name}", field="queue", hint="see `tuneyard queues`")

    @guarded.get("/nodes")
    def nodes() -> list[NodeView]:
        seen, marks = executor.nodes(), {mark.name: mark for mark in store.node_marks()}
        held = [attempt.held for attempt in store.live_attempts()]
        capacity, busy = Capacity.of(seen, held), Counter[str]()
        for share in (share for placement in held for share in placement.shares):
            busy[share.node] += share.processes
        standbys = executor.standbys()
        return [
            _node_view(node, capacity, busy[node.id], marks.get(node.name), standbys.get(node.id, StandbyReport()))
            for node in seen
        ]

    def mark(name: str, what: Mark, body: dict[str, Any] | None) -> MarkView:
        request = validate(MarkRequest, received(body or {}))
        _check_node(name, executor.nodes(), store.node_marks())
        row = store.mark_node(name, what, request.reason, time.time())
        controller.wake.set()
        return MarkView.model_validate(row.model_dump())

    @guarded.post("/probe")
    def probe(body: Annotated[dict[str, Any] | None, Body()] = None) -> list[ProbeView]:
        """Probe nodes, all of them if none is named, each by itself and with a neighbour. Takes half a minute or so."""
        asked = validate(ProbeAsked, received(body or {}))
        seen, marks = executor.nodes(), store.node_marks()
        for name in asked.nodes:
            _check_node(name, seen, marks)
        probed = [node for node in seen if node.name in asked.nodes or not asked.nodes]
        probing = Probing(executor, probed, seen, f"asked-{uuid.uuid4().hex}", str(controller.settings.root))
        while (reports := probing.poll()) is None:
            time.sleep(PROBE_LOOK_S)
        views = [ProbeView(name=node.name, ok=reports[node.id].ok, checks=reports[node.id].checks) for node in probed]
        away = [name for name in asked.nodes if name not in {node.name for node in probed}]
        gone = ProbeCheck(name="agent", ok=False, told="the node is not here")
        return [*views, *(ProbeView(name=name, ok=False, checks=(gone,)) for name in away)]

    @guarded.post("/nodes/{name}/cordon")
    def cordon(name: NodeName, body: Annotated[dict[str, Any] | None, Body()] = None) -> MarkView:
        """Let a node have no new attempts; those on it go on."""
        return mark(name, Mark.CORDONED, body)

    @guarded.post("/nodes/{name}/drain")
    def drain(name: NodeName, body: Annotated[dict[str, Any] | None, Body()] = None) -> MarkView:
        """Let a node have no new attempts, and those on it save and go elsewhere."""
        return mark(name, Mark.DRAINED, body)

    @guarded.post("/nodes/{name}/uncordon", status_code=204)
    def uncordon(name: NodeName) -> Response:
        """Let a node have attempts again, whether it was cordoned or drained."""
        store.unmark_node(name)
        controller.wake.set()
        return Response(status_code=204)


def queue_views(rows: Sequence[QueueRow], uses: dict[str, QueueUse]) -> list[QueueView]:
    said = {row.name: row for row in rows}
    return [
        QueueView(
            **said.get(name, QueueRow(name=name)).model_dump(),
            **uses.get(name, QueueUse()).model_dump(),
            configured=name in said,
        )
        for name in sorted({*said, *uses})
    ]


def _node_view(node: Node, capacity: Capacity, busy: int, mark: NodeMark | None, standbys: StandbyReport) -> NodeView:
    return NodeView(
        **node.model_dump(),
        free=0 if mark is not None else capacity.free(node),
        busy=busy,
        standbys=standbys,
        mark=None if mark is None else mark.mark.value,
        mark_reason=None if mark is None else mark.reason,
    )


def _check_node(name: str, nodes: Sequence[Node], marks: Sequence[NodeMark]) -> None:
    """Raises NotFoundError for a node that is neither here nor marked already: a slip would go unnoticed."""
    known = {node.name for node in nodes} | {mark.name for mark in marks}
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        raise NotFoundError(
            f"there is no node {name}",
            field="node",
            hint=f"did you mean {near[0]}? " if near else "see `tuneyard nodes`",
        )
