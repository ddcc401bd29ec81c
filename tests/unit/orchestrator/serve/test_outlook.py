"""The API looks ahead: the queue in its order, and why a job waits."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from orchestrator.cluster.model import Node
from orchestrator.control.loop import Controller
from orchestrator.store.rows import HistoryRow
from tests.builders import a_command_job, a_node


@pytest.fixture
def nodes() -> list[Node]:
    return [a_node("node-0", slots=2)]


def test_an_empty_queue(http: TestClient) -> None:
    answer = http.get("/v1/queue").json()
    assert (answer["turns"], answer["reservation"], answer["queues"]) == ([], None, [])


def test_the_queue_is_told_in_its_order(http: TestClient, controller: Controller) -> None:
    store = controller.store
    store.add_job("first-1", a_command_job(2), 1.0)
    store.add_job("second-1", a_command_job(1), 2.0)
    store.add_job("urgent-1", a_command_job(1, priority="high"), 3.0)
    turns = http.get("/v1/queue").json()["turns"]
    assert [(turn["position"], turn["job"]) for turn in turns] == [(1, "urgent-1"), (2, "first-1"), (3, "second-1")]
    assert [turn["reason"]["code"] for turn in turns][1] == "insufficient-free"
    assert all(turn["reason"]["sentence"] for turn in turns)


def test_why_tells_place_story_and_expected_start(http: TestClient, controller: Controller) -> None:
    store = controller.store
    store.add_job("first-1", a_command_job(2), 1.0)
    store.add_job("second-1", a_command_job(2), 2.0)
    controller.lease = store.acquire_lease("me", 0.0, 1e12)
    assert controller.lease is not None
    with store.acting(controller.lease) as write:
        for number in range(20):
            write.add_history(
                HistoryRow(queue="default", name="job", processes=2, ran_s=100.0 + number, succeeded=True, time=1.0)
            )
    told = http.get("/v1/jobs/second-1/why").json()
    assert told["turn"]["position"] == 2
    assert (told["ahead"], told["jobs_ahead"]) == (["first-1"], 1)
    assert told["turn"]["eta"]["expected"] is not None
    assert any("queue default" in sentence for sentence in told["story"])
    assert any("level" in sentence for sentence in told["story"])


def test_why_of_a_job_that_does_not_wait_is_its_reason(http: TestClient, controller: Controller) -> None:
    controller.store.add_job("job-1", a_command_job(1), 1.0)
    controller.store.request_cancel("job-1", 2.0)
    controller.store.add_job("late-1", a_command_job(1, after=["job-1"]), 3.0)
    told = http.get("/v1/jobs/late-1/why").json()
    assert told["turn"] is None
    assert http.get("/v1/jobs/nobody/why").status_code == 404
