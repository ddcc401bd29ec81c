"""The REST API: nothing without the token, every refusal typed, nothing stored that was refused."""

from __future__ import annotations

import hmac
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from orchestrator.control.loop import Controller
from orchestrator.errors import ExecutorError
from orchestrator.serve import api
from tests.served import JOB, JSON, SLOTS, TOKEN, TRAINING, submit, typed

ROUTES = [
    (method.upper(), path.replace("{job_id}", "job-1").replace("{name}", "name"))
    for path, methods in api.create_app(cast(Controller, SimpleNamespace(store=None, executor=None)), TOKEN)
    .openapi()["paths"]
    .items()
    for method in methods
]


def test_the_routes_are_found() -> None:
    paths = {path for _, path in ROUTES}
    assert {"/healthz", "/metrics", "/v1/jobs", "/v1/jobs/job-1/logs", "/v1/nodes", "/v1/queues/name"} <= paths
    assert len(ROUTES) == 28


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_the_api_describes_itself_to_nobody(http: TestClient, path: str) -> None:
    typed(http.get(path), 404, "bad-request")


@pytest.mark.parametrize("route", [route for route in ROUTES if route[1] != "/healthz"], ids=" ".join)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN.upper()}",
        "Bearer \xe9",
    ],
)
def test_no_route_answers_without_the_token(http: TestClient, route: tuple[str, str], header: str | None) -> None:
    http.headers.pop("Authorization")
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = http.request(*route, headers=headers, json={"job": JOB} if route[0] in ("POST", "PUT") else None)
    error = typed(answer, 401, "unauthorized")
    assert "Authorization: Bearer TOKEN" in error["hint"]
    assert TOKEN not in answer.text


def test_a_wrong_token_stores_nothing(http: TestClient, controller: Controller) -> None:
    http.headers["Authorization"] = "Bearer wrong"
    assert submit(http).status_code == 401
    assert controller.store.jobs() == []


def test_tokens_are_compared_in_constant_time(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def spy(one: bytes, two: bytes) -> bool:
        compared.append((one, two))
        return original(one, two)

    monkeypatch.setattr(api.hmac, "compare_digest", spy)  # the same function, seen
    http.headers["Authorization"] = "Bearer guess"
    assert http.get("/v1/jobs").status_code == 401
    assert compared == [(b"guess", TOKEN.encode())]


def test_health_needs_no_token_and_tells_nothing_of_jobs(http: TestClient, controller: Controller) -> None:
    http.headers.pop("Authorization")
    assert http.get("/healthz").json() == {"ok": True, "version": api.__version__, "acting": False}
    controller.step()
    assert http.get("/healthz").json()["acting"] is True


def test_submitting_queues_a_job_and_wakes_the_controller(http: TestClient, controller: Controller) -> None:
    answer = submit(http)
    assert answer.status_code == 201
    view = answer.json()
    assert view["id"].startswith("job-")
    assert (view["state"], view["attempts"]) == ("queued", 0)
    assert controller.wake.is_set()
    assert [row.id for row in controller.store.jobs()] == [view["id"]]
    assert http.get(f"/v1/jobs/{view['id']}").json()["reason"]["code"] == "submitted"
    assert [job["id"] for job in http.get("/v1/jobs").json()] == [view["id"]]


BODIES = [
    (b"", 400, "bad-request", None),
    (b"{", 400, "bad-request", None),
    (b"[]", 400, "bad-request", None),
    (b"{}", 400, "bad-request", "job"),
    (b'{"job": []}', 400, "bad-request", "job"),
    (b'{"job": ' + b"[" * 100_000, 400, "bad-request", None),
    (b'{"job": {"name": ' + b"1" * 5000 + b"}}", 400, "bad-request", None),
    (b"\xff\xfe", 400, "bad-request", None),
    (b'{"job": {}}', 422, "nothing-to-do", None),
    (b'{"job": {"run": ["true"]}}', 422, "missing-key", "name"),
    (b'{"job": {"name": "x", "run": "true"}}', 422, "wrong-type", "run"),
    (b'{"job": {"name": "x", "run": []}}', 422, "out-of-range", "run"),
    (b'{"job": {"name": "X", "run": ["true"]}}', 422, "bad-name", "name"),
    (b'{"job": {"name": "../x", "run": ["true"]}}', 422, "bad-name", "name"),
    (b'{"job": {"name": "x", "run": ["a\\u0000"]}}', 422, "not-text", "run[0]"),
    (b'{"job": {"name": "x", "run": ["\\ud800"]}}', 422, "not-text", "run[0]"),
    (b'{"job": {"name": "x", "run": ["a"], "env": {"A\\u0000": "b"}}}', 422, "not-text", "env"),
    (b'{"job": {"name": "x", "run": ["a"], "max_duration": Infinity}}', 422, "wrong-type", "max_duration"),
    (b'{"job": {"name": "x", "run": ["a"], "max_duration": NaN}}', 422, "wrong-type", "max_duration"),
    (b'{"job": {"name": "x", "run": ["a"], "model": {}}}', 422, "run-and-model", "run"),
    (b'{"job": {"name": "x", "run": ["a"], "env": {"API_KEY": "v"}}}', 422, "secret-by-value", "env.API_KEY"),
    (b'{"job": {"name": "x", "run": ["a"], "resources": {"num_processes": 64}}}',
     422, "impossible-gang", "resources.num_processes"),
    (b'{"job": {"name": "x", "run": ["a"], "resources": {"accelerator": "H100"}}}',
     422, "impossible-gang", "resources.accelerator"),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs:dry-run"])
@pytest.mark.parametrize(("body", "status", "code", "field"), BODIES, ids=[str(body[0][:50]) for body in BODIES])
def test_a_bad_body_is_a_typed_error_and_stores_nothing(
    http: TestClient, controller: Controller, path: str, body: bytes, status: int, code: str, field: str | None
) -> None:
    answer = http.post(path, content=body, headers=JSON)
    typed(answer, status, code, field)
    assert controller.store.jobs() == []


def test_all_faults_of_a_job_come_back(http: TestClient) -> None:
    answer = submit(http, name="Not A Name", colour="red", retry={"max_restarts": -1})
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} == {"name", "colour", "retry.max_restarts"}


def test_a_body_too_large_is_refused_before_it_is_read(http: TestClient, controller: Controller) -> None:
    body = json.dumps({"job": JOB | {"run": ["x" * api.MAX_BODY]}})
    typed(http.post("/v1/jobs", content=body), 413, "too-large")
    typed(http.post("/v1/jobs", content=b"{}", headers={"Content-Length": "many"}), 413, "too-large")
    typed(http.post("/v1/jobs", content=iter([b"{}"])), 413, "too-large")  # chunked: no length is given
    assert controller.store.jobs() == []


@pytest.mark.parametrize("path", ["", "/attempts", "/events", "/logs"])
def test_an_unknown_job_is_not_found(http: TestClient, path: str) -> None:
    typed(http.get(f"/v1/jobs/none-such{path}"), 404, "not-found", "job")


@pytest.mark.parametrize("what", ["cancel", "pause", "resume", "priority"])
def test_asking_something_of_an_unknown_job(http: TestClient, what: str) -> None:
    body = {"priority": 1} if what == "priority" else None
    typed(http.post(f"/v1/jobs/none-such/{what}", json=body), 404, "not-found", "job")


def test_an_unknown_route_is_typed_too(http: TestClient) -> None:
    typed(http.get("/v2/jobs"), 404, "bad-request")
    typed(http.delete("/v1/jobs"), 405, "bad-request")


@pytest.mark.parametrize(
    "job_id", ["..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a%00b", "JOB", "a" * 5000, "%ff", "' OR 1=1"]
)
@pytest.mark.parametrize("path", ["", "/logs", "/attempts", "/events"])
def test_ids_reach_no_file(http: TestClient, job_id: str, path: str) -> None:
    answer = http.get(f"/v1/jobs/{job_id}{path}")
    assert answer.status_code == 404
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "query",
    [
        "events?after=-1", f"events?after={2**70}", "events?limit=0", "events?limit=99999", "events?after=x",
        "logs?offset=-1", f"logs?offset={2**70}", "logs?limit=0", f"logs?limit={2**30}", "logs?rank=-1",
        "logs?attempt=0",
    ],
)  # fmt: skip
def test_numbers_out_of_bounds_are_bad_requests(http: TestClient, query: str) -> None:
    job = submit(http).json()["id"]
    field = query.partition("?")[2].partition("=")[0]
    typed(http.get(f"/v1/jobs/{job}/{query}"), 400, "bad-request", field)


def test_cancelling_twice_is_once_and_an_ended_job_cannot_be(http: TestClient, controller: Controller) -> None:
    job = submit(http).json()["id"]
    for _ in range(2):
        assert http.post(f"/v1/jobs/{job}/cancel").status_code == 200
    kinds = [event["kind"] for event in http.get(f"/v1/jobs/{job}/events").json()]
    assert kinds.count("cancel-requested") == 1
    controller.step()
    assert http.get(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    assert http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert http.get(f"/v1/jobs/{job}/logs").status_code == 404  # it never had an attempt


def test_a_queued_job_is_paused_resumed_and_cancelled(http: TestClient, controller: Controller) -> None:
    job = submit(http).json()["id"]
    error = typed(http.post(f"/v1/jobs/{job}/resume"), 409, "not-paused")
    assert error["hint"]
    for _ in range(2):
        assert http.post(f"/v1/jobs/{job}/pause").status_code == 200
    assert controller.wake.is_set()
    for _ in range(2):
        controller.step()
        view = http.get(f"/v1/jobs/{job}").json()
        assert (view["state"], view["attempts"]) == ("paused", 0)
        assert view["reason"] == {
            "code": "paused", "sentence": "paused by its user", "remedy": f"tuneyard resume {job}",
        }  # fmt: skip
    assert http.post(f"/v1/jobs/{job}/resume").status_code == 200
    controller.tick()
    assert http.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    http.post(f"/v1/jobs/{job}/pause")
    controller.tick()
    http.post(f"/v1/jobs/{job}/cancel")
    typed(http.post(f"/v1/jobs/{job}/resume"), 409, "being-cancelled")
    controller.tick()
    assert http.get(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    for what in ("pause", "resume"):
        assert typed(http.post(f"/v1/jobs/{job}/{what}"), 409, "already-ended")["hint"]
    kinds = [event["kind"] for event in http.get(f"/v1/jobs/{job}/events").json()]
    assert kinds == [
        "submitted", "pause-requested", "job-paused", "resume-requested", "job-queued", "pause-requested", "job-paused",
        "cancel-requested", "job-cancelled",
    ]  # fmt: skip


def test_a_priority_is_as_in_a_job_file(http: TestClient, controller: Controller) -> None:
    job = submit(http).json()["id"]
    controller.wake.clear()
    for wanted, found in ((7, 7), ("low", -100), (-1000, -1000), ("high", 100)):
        answer = http.post(f"/v1/jobs/{job}/priority", json={"priority": wanted})
        assert (answer.status_code, answer.json()["priority"]) == (200, found)
    assert controller.wake.is_set()
    http.post(f"/v1/jobs/{job}/cancel")
    controller.step()
    assert typed(http.post(f"/v1/jobs/{job}/priority", json={"priority": 1}), 409, "already-ended")["hint"]


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        (None, 400, "bad-request", None),
        ([], 400, "bad-request", None),
        ({}, 422, "missing-key", "priority"),
        ({"priority": "hihg"}, 422, "unknown-value", "priority"),
        ({"priority": "7"}, 422, "unknown-value", "priority"),
        ({"priority": 1001}, 422, "out-of-range", "priority"),
        ({"priority": -1001}, 422, "out-of-range", "priority"),
        ({"priority": 1.5}, 422, "wrong-type", "priority"),
        ({"priority": True}, 422, "wrong-type", "priority"),
        ({"priority": None}, 422, "wrong-type", "priority"),
        ({"priority": 1, "queue": "q"}, 422, "unknown-key", "queue"),
        ({"priority": "\x00"}, 422, "not-text", "priority"),
    ],
)
def test_what_is_no_priority_changes_nothing(
    http: TestClient, controller: Controller, body: Any, status: int, code: str, field: str | None
) -> None:
    job = submit(http).json()["id"]
    assert typed(http.post(f"/v1/jobs/{job}/priority", json=body), status, code, field)["hint"]
    assert controller.store.job(job).priority == 0


def test_a_job_waits_for_those_it_comes_after(http: TestClient, controller: Controller) -> None:
    first = submit(http).json()["id"]
    told = http.post("/v1/jobs:dry-run", json={"job": TRAINING | {"after": [first]}}).json()
    assert (told["placement"], told["waits"]) == (None, f"it would wait until {first} has succeeded")
    assert submit(http, after=[first]).status_code == 201
    http.post(f"/v1/jobs/{first}/cancel")
    controller.step()
    for path in ("/v1/jobs", "/v1/jobs:dry-run"):
        for after, status, code in ((first, 409, "dependency-ended"), ("none-such", 404, "not-found")):
            answer = http.post(path, json={"job": JOB | {"after": [after]}})
            assert typed(answer, status, code, "after")["hint"]
    assert len(controller.store.jobs()) == 2


def test_a_dry_run_stores_nothing_and_says_where_and_how(http: TestClient, controller: Controller) -> None:
    answer = http.post("/v1/jobs:dry-run", json={"job": TRAINING | {"resources": {"num_processes": "2..8"}}})
    assert answer.status_code == 200
    told = answer.json()
    assert told["plan"]["world_size"] == SLOTS
    assert [share["processes"] for share in told["placement"]["shares"]] == [SLOTS]
    assert told["waits"] is None
    assert controller.store.jobs() == []


def test_a_dry_run_of_what_would_wait_says_so(http: TestClient, controller: Controller) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
    submit(http, run=sleeper, resources={"num_processes": SLOTS})
    controller.step()
    assert http.get("/v1/nodes").json()[0]["free"] == 0
    told = http.post("/v1/jobs:dry-run", json={"job": TRAINING}).json()
    assert told["placement"] is None
    assert "wait" in told["waits"]
    assert told["plan"]["world_size"] == 1


def test_nodes(http: TestClient) -> None:
    (node,) = http.get("/v1/nodes").json()
    assert (node["id"], node["free"], node["cpu_slots"]) == ("local", SLOTS, SLOTS)


def test_a_cluster_that_cannot_be_asked_is_no_500(
    http: TestClient, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise ExecutorError("the cluster does not answer")

    monkeypatch.setattr(controller.executor, "nodes", away)
    typed(http.get("/v1/nodes"), 503, "executor")
    typed(submit(http), 503, "executor")
    assert controller.store.jobs() == []


def test_a_database_that_is_away_is_no_500(http: TestClient, controller: Controller, tmp_path: Path) -> None:
    controller.store.close()
    (tmp_path / "yard.db").rename(tmp_path / "away.db")
    (tmp_path / "yard.db").mkdir()
    try:
        typed(http.get("/v1/jobs"), 503, "database")
        typed(submit(http), 503, "database")
    finally:
        controller.store.close()
        (tmp_path / "yard.db").rmdir()
        (tmp_path / "away.db").rename(tmp_path / "yard.db")
    assert http.get("/v1/jobs").json() == []
