"""A submission that brings what its model needs of memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from launch.shape import ModelShape, shape_of_config
from orchestrator.cluster.model import Node
from orchestrator.control.loop import Controller
from orchestrator.job.lifecycle import ReasonCode
from orchestrator.job.spec import TrainingJob, check_submission
from orchestrator.memory.sizing import Sizing, sizing_of
from orchestrator.serve import api
from tests.builders import a_node

JOB: dict[str, Any] = {
    "name": "train",
    "model": {"name_or_path": "org/model", "task": "sequence-classification"},
    "data": {"train": ["a.csv"]},
    "train": {"max_steps": 1},
    "resources": {"num_processes": "1..2"},
}
PATHS = ["/v1/jobs", "/v1/jobs:dry-run"]


@pytest.fixture
def nodes() -> list[Node]:
    """What the executor tells; tests change it."""
    return [a_node(memory_gib=100)]


def sizing() -> dict[str, Any]:
    """Of a BERT, as a client makes it."""
    shape: ModelShape | None = shape_of_config({"model_type": "bert"}, "sequence-classification")
    job = check_submission(JOB)
    assert shape is not None
    assert isinstance(job, TrainingJob)
    made: dict[str, Any] = json.loads(sizing_of(job, shape).model_dump_json())
    return made


def submission(**changes: Any) -> dict[str, Any]:
    return {"job": JOB | changes, "sizing": json.dumps(sizing())}


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_what_was_sent_is_stored_with_the_job(http: TestClient, controller: Controller) -> None:
    answer = http.post("/v1/jobs", json=submission())
    assert answer.status_code == 201, answer.text
    (row,) = controller.store.jobs()
    assert row.sizing is not None
    assert json.loads(row.sizing) == sizing()
    assert Sizing.model_validate_json(row.sizing).family == "bert"


@pytest.mark.parametrize("path", PATHS)
def test_what_fits_nowhere_is_refused(http: TestClient, controller: Controller, nodes: list[Node], path: str) -> None:
    nodes[:] = [a_node(memory_gib=1)]
    answer = http.post(path, json=submission())
    assert answer.status_code == 422
    error = error_of(answer)
    assert error["code"] == "does-not-fit"
    assert "misses by least needs" in error["message"]
    assert "tuneyard plan" in error["hint"]
    assert controller.store.jobs() == []
    nodes.append(a_node("large", memory_gib=100))
    assert http.post(path, json=submission()).status_code < 300


@pytest.mark.parametrize("path", PATHS)
def test_without_it_or_where_memory_is_unknown_only_numbers_count(
    http: TestClient, nodes: list[Node], path: str
) -> None:
    nodes[:] = [a_node(memory_gib=1)]
    assert http.post(path, json={"job": JOB}).status_code < 300
    nodes[:] = [a_node()]
    assert http.post(path, json=submission()).status_code < 300


def test_a_dry_run_tells_the_plan_that_fits(http: TestClient, nodes: list[Node]) -> None:
    plan = http.post("/v1/jobs:dry-run", json=submission()).json()["plan"]
    assert (plan["world_size"], plan["micro_batch_size"], plan["allocator"]) == (2, 8, "fast")
    nodes[:] = [a_node(memory_gib=6)]
    told = http.post("/v1/jobs:dry-run", json=submission()).json()
    assert told["waits"] is None
    assert told["placement"]["host_bytes"] * told["plan"]["world_size"] <= 6 * 2**30
    assert told["plan"] != plan


def changed(**changes: Any) -> str:
    return json.dumps(sizing() | changes)


def of_cpu(**changes: Any) -> str:
    return changed(cpu=sizing()["cpu"] | changes)


def of_curve(**changes: Any) -> str:
    """With one of its curves otherwise."""
    passes = sizing()["cpu"]["passes"]
    passes[0]["beside_gradients"] |= changes
    return of_cpu(passes=passes)


BAD = {
    "text": "none",
    "empty": "{}",
    "list": "[]",
    "no-passes": of_cpu(passes=[]),
    "negative": of_cpu(parameters=-1),
    "no-float": of_cpu(moments_bytes=10**400),
    "length": of_cpu(length=10**30),
    "rows-twice": of_curve(rows=[1, 1], bytes=[1, 2]),
    "rows-more": of_curve(rows=[1, 2, 3], bytes=[1, 2]),
    "no-number": of_curve(rows=[1, 2], bytes=["NaN", 2]),
    "infinite": of_curve(rows=[1, 2], bytes=["Infinity", 2]),
    "work": changed(work=sizing()["work"] | {"trainable": 10**400}),
    "work-no-number": changed(work=sizing()["work"] | {"forward": "NaN"}),
    "device": changed(cuda=None),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sizing_is_a_typed_error_and_stores_nothing(
    http: TestClient, controller: Controller, path: str, name: str
) -> None:
    """Whatever is stored is worked with on every tick: it must not be able to end the controller."""
    answer = http.post(path, json={"job": JOB, "sizing": BAD[name]})
    assert answer.status_code == 422, answer.text
    error = error_of(answer)
    assert (error["code"], error["field"], bool(error["hint"])) == ("bad-sizing", "sizing", True)
    assert controller.store.jobs() == []


def test_one_too_large_is_a_bad_request(http: TestClient) -> None:
    answer = http.post("/v1/jobs", json={"job": JOB, "sizing": " " * (api.MAX_SIZING + 1)})
    assert answer.status_code == 400
    assert error_of(answer)["field"] == "sizing"


EXTREMES = {
    "nothing": of_cpu(parameters=0, trainable=0, moments_bytes=0, length=0, small=0, largest=0),
    "large": of_cpu(parameters=1 << 60, trainable=1 << 60, moments_bytes=1 << 60, length=1 << 60),
    "steep": of_curve(rows=[1, 2], bytes=[-1e21, 1e21]),
    "still": changed(work={"forward": 0, "backward": 0, "parameters": 0, "trainable": 0, "layers": 0}),
    "other-precision": of_cpu(passes=[sizing()["cpu"]["passes"][0] | {"precision": "fp16"}]),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_no_sizing_ends_the_controller(
    http: TestClient, controller: Controller, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    answer = http.post("/v1/jobs", json={"job": JOB, "sizing": EXTREMES[name]})
    assert answer.status_code in (201, 422), answer.text
    monkeypatch.setattr(controller.executor, "start", lambda _contracts: {})
    monkeypatch.setattr(controller.tracer, "ask", lambda *_: "not traced: nothing is, here")
    controller.store.add_job("job-1", check_submission(JOB), 1.0, sizing=EXTREMES[name])
    for _ in range(3):
        controller.tick()
    reason = controller.store.job("job-1").reason.code
    assert reason in (ReasonCode.STARTING, ReasonCode.DOES_NOT_FIT)


def test_a_command_brings_none(http: TestClient, nodes: list[Node]) -> None:
    nodes[:] = [a_node(memory_gib=1)]
    answer = http.post("/v1/jobs:dry-run", json=submission() | {"job": {"name": "job", "run": ["true"]}})
    assert answer.status_code == 200, answer.text
