"""Arrays over the REST API: stored whole, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from orchestrator.control.loop import Controller
from orchestrator.serve import api
from tests.served import JOB, submit, typed


def elements(count: int, **keys: Any) -> list[dict[str, Any]]:
    """Of an array, as `tuneyard submit` sends them."""
    of = [{"id": "job-x", "index": index, "at_once": 2} for index in range(count)]
    return [{"job": JOB | {"name": f"job-{place['index']}", "array_of": place} | keys} for place in of]


def test_an_array_is_stored_whole(http: TestClient, controller: Controller) -> None:
    submit(http)
    answer = http.post("/v1/arrays", json={"elements": elements(3), "git": {"commit": "0" * 40, "dirty": False}})
    assert answer.status_code == 201
    views = answer.json()
    assert [view["name"] for view in views] == ["job-0", "job-1", "job-2"]
    assert {view["array_id"] for view in views} == {"job-x"}
    assert controller.wake.is_set()
    assert http.get("/v1/jobs?array=job-x").json() == views
    row = controller.store.job(views[1]["id"])
    assert (row.array_at_once, row.origin and row.origin.git and row.origin.git.commit) == (2, "0" * 40)
    assert len(http.get("/v1/jobs").json()) == 4


TWICE = [elements(2)[0], elements(2)[0]]
ARRAYS: list[tuple[Any, int, str, str | None]] = [
    ({}, 400, "bad-request", "elements"),
    ({"elements": []}, 400, "bad-request", "elements"),
    ({"elements": [{}]}, 400, "bad-request", "elements.job"),
    ({"elements": elements(1) * 1001}, 400, "bad-request", "elements"),
    ({"elements": [{"job": JOB}]}, 422, "inconsistent", "elements"),
    ({"elements": TWICE}, 422, "inconsistent", "elements"),
    ({"elements": elements(2)[::-1]}, 422, "inconsistent", "elements"),
    ({"elements": elements(2, array=2)}, 422, "is-array", "array"),
    ({"elements": elements(2, array_of={"id": "A", "index": 0})}, 422, "bad-name", "array_of.id"),
    ({"elements": elements(2, array_of={"id": "a", "index": -1})}, 422, "out-of-range", "array_of.index"),
    ({"elements": elements(2, resources={"num_processes": 64})}, 422, "impossible-gang", "resources.num_processes"),
    ({"elements": elements(2, after=["none-such"])}, 404, "not-found", "after"),
    ({"elements": [*elements(1), *elements(2, colour="red")[1:]]}, 422, "unknown-key", "colour"),
]


@pytest.mark.parametrize(("body", "status", "code", "field"), ARRAYS, ids=[str(body[0])[:60] for body in ARRAYS])
def test_of_a_bad_array_nothing_is_stored(
    http: TestClient, controller: Controller, body: Any, status: int, code: str, field: str | None
) -> None:
    assert typed(http.post("/v1/arrays", json=body), status, code, field)["hint"]
    assert controller.store.jobs() == []


def test_an_array_may_be_larger_than_a_job_and_has_a_bound(http: TestClient) -> None:
    assert http.post("/v1/arrays", json={"elements": elements(3, env={"A": "x" * 500_000})}).status_code == 201
    typed(http.post("/v1/arrays", content=b" " * (api.MAX_ARRAY + 1)), 413, "too-large")
