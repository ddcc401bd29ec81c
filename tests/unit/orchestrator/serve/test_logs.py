"""What a real attempt left behind, over the REST API: its log in pages, its events."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from launch.contract import AttemptFiles
from orchestrator.control.loop import Controller
from orchestrator.execute.local import log_path
from orchestrator.job.lifecycle import JobState
from orchestrator.serve import api
from tests.served import AUTH, TOKEN, a_controller, finish, submit, typed

SAY = "import os, sys; print('héllo from', os.environ['RANK'], flush=True); print('x' * 5000)"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Controller, TestClient, str]]:
    """A job of two ranks that has run to its end."""
    with (
        a_controller(tmp_path_factory.mktemp("yard")) as controller,
        TestClient(api.create_app(controller, TOKEN), headers=AUTH, raise_server_exceptions=False) as client,
    ):
        keys = {"run": [sys.executable, "-c", SAY], "resources": {"num_processes": 2}}
        job = submit(client, **keys).json()["id"]
        finish(controller, job)
        yield controller, client, job


def test_the_job_succeeded(ended: tuple[Controller, TestClient, str]) -> None:
    controller, http, job = ended
    assert controller.store.job(job).state == JobState.SUCCEEDED
    view = http.get(f"/v1/jobs/{job}").json()
    assert (view["attempts"], view["plan"]["world_size"]) == (1, 2)
    typed(http.post(f"/v1/jobs/{job}/cancel"), 409, "conflict")
    (attempt,) = http.get(f"/v1/jobs/{job}/attempts").json()
    assert (attempt["state"], attempt["outcome"]) == ("ended", "succeeded")
    assert "accelerate-0.yaml" in attempt["launch"]


@pytest.mark.parametrize("limit", [1, 7, 1000, api.MAX_LOG])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_is_paged_without_loss(ended: tuple[Controller, TestClient, str], rank: int, limit: int) -> None:
    controller, http, job = ended
    (attempt,) = controller.store.attempts(job)
    whole = log_path(attempt.run, rank).read_bytes()
    assert f"héllo from {rank}\n".encode() in whole
    told, offset = b"", 0 if limit > 100 else len(whole) - 50  # one byte at a time: the end of it
    start = offset
    while True:
        answer = http.get(f"/v1/jobs/{job}/logs", params={"rank": rank, "offset": offset, "limit": limit})
        assert answer.status_code == 200
        assert len(answer.content) <= limit
        assert int(answer.headers["X-Next-Offset"]) == offset + len(answer.content)
        if not answer.content:
            break
        told += answer.content
        offset += len(answer.content)
    assert told == whole[start:]


def test_a_log_of_what_does_not_exist(ended: tuple[Controller, TestClient, str]) -> None:
    _, http, job = ended
    error = typed(http.get(f"/v1/jobs/{job}/logs", params={"rank": 2}), 404, "not-found", "rank")
    assert "ranks 0 to 1" in error["message"]
    typed(http.get(f"/v1/jobs/{job}/logs", params={"attempt": 2}), 404, "not-found", "attempt")
    assert http.get(f"/v1/jobs/{job}/logs", params={"rank": 0, "offset": 1 << 40}).content == b""


def test_events_go_on_after_an_id(ended: tuple[Controller, TestClient, str]) -> None:
    _, http, job = ended
    events = http.get(f"/v1/jobs/{job}/events").json()
    ids = [event["id"] for event in events]
    assert ids == sorted(ids)
    assert events[0]["kind"] == "submitted"
    assert events[-1]["kind"] == "job-succeeded"
    for index, event in enumerate(events):
        later = http.get(f"/v1/jobs/{job}/events", params={"after": event["id"]}).json()
        assert later == events[index + 1 :]
    assert http.get(f"/v1/jobs/{job}/events", params={"limit": 2}).json() == events[:2]


def test_a_deleted_run_directory_is_an_empty_log(ended: tuple[Controller, TestClient, str], tmp_path: Path) -> None:
    controller, http, job = ended
    (attempt,) = controller.store.attempts(job)
    folder = AttemptFiles(attempt.run.run_dir).run_dir
    folder.rename(tmp_path / "moved")
    try:
        assert http.get(f"/v1/jobs/{job}/logs", params={"rank": 0}).content == b""
    finally:
        (tmp_path / "moved").rename(folder)
