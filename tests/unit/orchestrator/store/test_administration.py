"""Shares of queues, marks of nodes, and how long jobs ran."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import ConflictError, NotFoundError, SpecError
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.store.rows import HistoryRow, Mark, NodeMark, QueueRow, QueueUse
from orchestrator.store.store import Store
from orchestrator.store.transaction import NewAttempt
from tests.builders import a_command_job
from tests.unit.orchestrator.store.test_store import a_start, lease_of

WHY = Reason(code=ReasonCode.STARTING, sentence="because")


def test_a_queue_is_set_piece_by_piece(store: Store) -> None:
    assert store.queues() == []
    assert store.set_queue("research", weight=2.0) == QueueRow(name="research", weight=2.0)
    store.set_queue("research", guaranteed=4, lendable=False)
    store.set_queue("batch", ceiling=0)
    row = store.set_queue("research", ceiling=8)
    assert row == QueueRow(name="research", weight=2.0, guaranteed=4, ceiling=8, lendable=False)
    assert store.queues() == [QueueRow(name="batch", ceiling=0), row]
    assert store.set_queue("research") == row
    assert store.set_queue("research", guaranteed=None, lendable=True).guaranteed is None
    assert store.queues()[1] == QueueRow(name="research", weight=2.0, ceiling=8)


@pytest.mark.parametrize(
    ("settings", "code", "field"),
    [
        ({"weight": 0.0}, "out-of-range", "weight"),
        ({"weight": -1.0}, "out-of-range", "weight"),
        ({"weight": float("nan")}, "out-of-range", "weight"),
        ({"weight": float("inf")}, "out-of-range", "weight"),
        ({"weight": 1e7}, "out-of-range", "weight"),
        ({"guaranteed": -1}, "out-of-range", "guaranteed"),
        ({"guaranteed": 2_000_000}, "out-of-range", "guaranteed"),
        ({"ceiling": -1}, "out-of-range", "ceiling"),
        ({"guaranteed": 9}, "inconsistent", "guaranteed"),  # with a ceiling of 8 that it has
        ({"guaranteed": 3, "ceiling": 2}, "inconsistent", "guaranteed"),
    ],
)
def test_a_share_that_cannot_be_changes_nothing(store: Store, settings: dict[str, Any], code: str, field: str) -> None:
    before = store.set_queue("research", guaranteed=1, ceiling=8)
    with pytest.raises(SpecError) as told:
        store.set_queue("research", **settings)
    assert (told.value.code, told.value.field, bool(told.value.hint)) == (code, field, True)
    assert store.queues() == [before]


def test_a_queue_is_forgotten_once(store: Store) -> None:
    store.add_job("a-1", a_command_job(queue="research"), 1.0)
    store.set_queue("research", weight=2.0)
    store.delete_queue("research")
    assert store.queues() == []
    assert store.job("a-1").queue == "research"
    with pytest.raises(NotFoundError) as told:
        store.delete_queue("research")
    assert (told.value.field, bool(told.value.hint)) == ("queue", True)


def test_what_the_jobs_of_queues_do_is_counted(store: Store) -> None:
    assert store.queue_uses() == {}
    for job_id, queue in (("a-1", "q"), ("a-2", "q"), ("b-1", "p"), ("b-2", "p"), ("c-1", "r"), ("d-1", "s")):
        store.add_job(job_id, a_command_job(2, queue=queue), 1.0)
    with store.acting(lease_of(store)) as write:
        for job_id in ("a-1", "b-1"):
            write.add_attempts([NewAttempt(*a_start(job_id))], 2.0)
            write.set_job(job_id, JobState.STARTING, WHY, 2.0)
        write.set_attempt("b-1", 1, AttemptState.ENDED, 3.0)
        write.set_job("b-1", JobState.SUCCEEDED, WHY, 3.0)
        write.set_job("c-1", JobState.FAILED, WHY, 3.0)
        write.set_job("d-1", JobState.PAUSED, WHY, 3.0)
    assert store.queue_uses() == {"p": QueueUse(waiting=1), "q": QueueUse(running=1, waiting=1, held=2)}


def test_a_node_has_one_mark_at_a_time(store: Store) -> None:
    first = store.mark_node("n1", Mark.CORDONED, "disk", 1.0)
    assert first == NodeMark(name="n1", mark=Mark.CORDONED, reason="disk", since=1.0)
    second = store.mark_node("n1", Mark.DRAINED, None, 2.0)
    store.mark_node("n0", Mark.DRAINED, None, 3.0)
    assert store.node_marks() == [NodeMark(name="n0", mark=Mark.DRAINED, since=3.0), second]
    store.unmark_node("n1")
    assert [mark.name for mark in store.node_marks()] == ["n0"]
    with pytest.raises(ConflictError) as told:
        store.unmark_node("n1")
    assert (told.value.code, told.value.field, bool(told.value.hint)) == ("not-marked", "node", True)


def test_how_long_jobs_ran_comes_back_with_the_newest_last(store: Store) -> None:
    rows = [
        HistoryRow(queue="q", name=f"job-{index}", processes=index + 1, ran_s=2.5, succeeded=index != 1, time=index)
        for index in range(4)
    ]
    assert store.history() == []
    with store.acting(lease_of(store)) as write:
        for row in rows:
            write.add_history(row)
    assert store.history() == rows
    assert store.history(limit=2) == rows[2:]
