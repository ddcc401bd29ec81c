"""The API's queues and marks of nodes: what an administrator says is kept, and what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from orchestrator.cluster.model import Node
from orchestrator.control.loop import Controller
from orchestrator.serve import api
from orchestrator.store.rows import Mark
from tests.builders import a_command_job, a_node

DEFAULTS = {
    "weight": 1.0, "guaranteed": None, "ceiling": None, "lendable": True, "configured": False,
    "running": 0, "waiting": 0, "held": 0,
}  # fmt: skip


@pytest.fixture
def nodes() -> list[Node]:
    """What the executor tells; tests change it."""
    return [a_node("node-0"), a_node("node-1")]


def typed(answer: Any, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """The error of an answer, once it is of the right kind and says what to do."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (error["code"], error["field"], bool(error["hint"])) == (code, field, True), error
    return error


def test_queues_are_those_that_were_set_and_those_that_have_jobs(http: TestClient, controller: Controller) -> None:
    assert http.get("/v1/queues").json() == []
    controller.store.add_job("a-1", a_command_job(queue="jobs"), 1.0)
    answer = http.put("/v1/queues/set", json={"weight": 2, "guaranteed": 4})
    assert answer.status_code == 200
    assert controller.wake.is_set()
    configured = DEFAULTS | {"name": "set", "weight": 2.0, "guaranteed": 4, "configured": True}
    assert answer.json() == http.get("/v1/queues/set").json() == configured
    assert http.get("/v1/queues").json() == [DEFAULTS | {"name": "jobs", "waiting": 1}, configured]
    http.put("/v1/queues/set", json={"ceiling": 8, "lendable": False})
    http.put("/v1/queues/set", json={"guaranteed": None})
    assert http.get("/v1/queues/set").json() == configured | {"guaranteed": None, "ceiling": 8, "lendable": False}


def test_a_queue_is_forgotten(http: TestClient, controller: Controller) -> None:
    controller.store.add_job("a-1", a_command_job(queue="jobs"), 1.0)
    http.put("/v1/queues/jobs", json={"weight": 2})
    answer = http.delete("/v1/queues/jobs")
    assert (answer.status_code, answer.content) == (204, b"")
    assert http.get("/v1/queues/jobs").json() == DEFAULTS | {"name": "jobs", "waiting": 1}
    typed(http.delete("/v1/queues/jobs"), 404, "not-found", "queue")
    typed(http.get("/v1/queues/none-such"), 404, "not-found", "queue")


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        (None, 400, "bad-request", None),
        ([], 400, "bad-request", None),
        ({"weight": 0}, 422, "out-of-range", "weight"),
        ({"weight": -1}, 422, "out-of-range", "weight"),
        ({"weight": 1e9}, 422, "out-of-range", "weight"),
        ({"weight": None}, 422, "wrong-type", "weight"),
        ({"weight": "2"}, 422, "wrong-type", "weight"),
        ({"guaranteed": -1}, 422, "out-of-range", "guaranteed"),
        ({"guaranteed": 1.5}, 422, "wrong-type", "guaranteed"),
        ({"guaranteed": 2**40}, 422, "out-of-range", "guaranteed"),
        ({"ceiling": True}, 422, "wrong-type", "ceiling"),
        ({"lendable": "no"}, 422, "wrong-type", "lendable"),
        ({"lendable": None}, 422, "wrong-type", "lendable"),
        ({"quota": 1}, 422, "unknown-key", "quota"),
        ({"guaranteed": 4, "ceiling": 3}, 422, "inconsistent", "guaranteed"),
        ({"ceiling": 1}, 422, "inconsistent", "guaranteed"),  # it is guaranteed 2
        ({"\x00": 1}, 422, "not-text", None),
    ],
)
def test_a_bad_share_changes_nothing(http: TestClient, body: Any, status: int, code: str, field: str | None) -> None:
    before = http.put("/v1/queues/q", json={"guaranteed": 2}).json()
    typed(http.put("/v1/queues/q", json=body), status, code, field)
    assert http.get("/v1/queues").json() == [before]


def test_a_share_that_is_no_number_is_typed(http: TestClient) -> None:
    for text in (b'{"weight": NaN}', b'{"weight": Infinity}', b'{"weight": 1e999}'):
        answer = http.put("/v1/queues/q", content=text, headers={"Content-Type": "application/json"})
        typed(answer, 422, "wrong-type", "weight")
    typed(http.put("/v1/queues/q", content=b" " * (api.MAX_BODY + 1)), 413, "too-large")


@pytest.mark.parametrize("name", ["Research", "a_b", "-a", "a" * 64, "%00", "..%2f..", "a b"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_what_is_no_name_of_a_queue_reaches_no_database(http: TestClient, name: str, method: str) -> None:
    answer = http.request(method, f"/v1/queues/{name}", json={"weight": 1} if method == "PUT" else None)
    if "%2f" in name:
        assert answer.status_code == 404
    else:
        typed(answer, 422, "bad-name", "queue")
    assert http.get("/v1/queues").json() == []


def marks(http: TestClient) -> dict[str, tuple[Any, Any, Any]]:
    return {node["name"]: (node["mark"], node["mark_reason"], node["free"]) for node in http.get("/v1/nodes").json()}


def test_a_node_is_cordoned_drained_and_let_go(http: TestClient, controller: Controller) -> None:
    answer = http.post("/v1/nodes/node-1/cordon", json={"reason": "a disk"})
    assert answer.status_code == 200
    told = answer.json()
    assert (told["name"], told["mark"], told["reason"]) == ("node-1", "cordoned", "a disk")
    assert controller.wake.is_set()
    assert marks(http) == {"node-0": (None, None, 4), "node-1": ("cordoned", "a disk", 0)}
    assert http.post("/v1/nodes/node-1/drain").json()["mark"] == "drained"
    assert marks(http)["node-1"] == ("drained", None, 0)
    assert http.post("/v1/nodes/node-1/uncordon").status_code == 204
    assert marks(http)["node-1"] == (None, None, 4)
    typed(http.post("/v1/nodes/node-1/uncordon"), 409, "not-marked", "node")


def test_a_mark_outlives_its_node(http: TestClient, nodes: list[Node], controller: Controller) -> None:
    http.post("/v1/nodes/node-1/cordon")
    gone = nodes.pop()
    assert list(marks(http)) == ["node-0"]
    assert http.post("/v1/nodes/node-1/drain").status_code == 200
    nodes.append(gone.model_copy(update={"id": "another"}))
    assert marks(http)["node-1"][0] == "drained"
    assert [(mark.name, mark.mark) for mark in controller.store.node_marks()] == [("node-1", Mark.DRAINED)]


@pytest.mark.parametrize("what", ["cordon", "drain"])
def test_a_node_that_is_not_there_is_not_marked(http: TestClient, controller: Controller, what: str) -> None:
    assert "did you mean node-0?" in typed(http.post(f"/v1/nodes/node0/{what}"), 404, "not-found", "node")["hint"]
    for name in ("%00", "a" * 256, "-x", "a b", "%ff"):
        typed(http.post(f"/v1/nodes/{name}/{what}"), 404, "not-found", "node")
    typed(http.post(f"/v1/nodes/{'a' * 256}/uncordon"), 404, "not-found", "node")
    assert controller.store.node_marks() == []


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ([], 400, "bad-request", None),
        ("why", 400, "bad-request", None),
        ({"reason": 1}, 422, "wrong-type", "reason"),
        ({"reason": "x" * 501}, 422, "out-of-range", "reason"),
        ({"reason": "a\x00"}, 422, "not-text", "reason"),
        ({"reason": "x", "until": 1}, 422, "unknown-key", "until"),
    ],
)
def test_a_bad_reason_marks_nothing(
    http: TestClient, controller: Controller, body: Any, status: int, code: str, field: str | None
) -> None:
    typed(http.post("/v1/nodes/node-0/drain", json=body), status, code, field)
    assert controller.store.node_marks() == []
