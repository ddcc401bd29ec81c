"""Whatever is sent, the answer is typed, and what was refused is not stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.control.loop import Controller
from orchestrator.serve import api
from tests.served import AUTH, JOB, JSON, TOKEN, TRAINING, a_controller

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=10), inside, max_size=3),
    max_leaves=8,
)
KEYS = [
    "name", "run", "env", "queue", "priority", "resources", "retry", "max_duration", "strategy", "working_dir",
    "checkpoint", "model", "data", "train", "adapter", "offload", "trackers", "output_dir", "extra", "after", "array",
    "array_at_once", "array_of",
]  # fmt: skip
SECTIONS = {
    "resources": ["num_processes", "accelerator"], "retry": ["max_restarts"], "checkpoint": ["every_steps"],
    "model": ["name_or_path", "task", "dropout"], "data": ["train", "split", "max_length", "test"],
    "train": ["max_steps", "epochs", "learning_rate", "global_batch_size", "early_stopping", "seed"],
    "adapter": ["r", "target_modules"], "env": ["A", "HF_TOKEN", "TUNEYARD_X"], "array_of": ["id", "index", "at_once"],
}  # fmt: skip
sensible = st.sampled_from(
    ["job", "true", "2..4", "1..99", "2h", "high", "auto", "zero2", "a.csv", 1, 2, 64, 0.1, ["true"]]
)


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """A good job with some of its keys put right, wrong, or out."""
    job: dict[str, Any] = dict(draw(st.sampled_from([JOB, TRAINING, {}])))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        if key in SECTIONS and draw(st.booleans()):
            inside = dict(job[key]) if isinstance(job.get(key), dict) else {}
            inside[draw(st.sampled_from(SECTIONS[key]))] = draw(sensible | values)
            job[key] = inside
        elif draw(st.booleans()):
            job[key] = draw(sensible | values)
        else:
            job.pop(key, None)
    return job


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Controller, TestClient]]:
    with (
        a_controller(tmp_path_factory.mktemp("fuzzed")) as controller,
        TestClient(api.create_app(controller, TOKEN), headers=AUTH) as client,
    ):
        yield controller, client


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(job=jobs())
def test_no_job_body_is_a_500(target: tuple[Controller, TestClient], job: dict[str, Any]) -> None:
    controller, http = target
    before = len(controller.store.jobs(limit=10_000))
    body = json.dumps({"job": job})
    dry = http.post("/v1/jobs:dry-run", content=body, headers=JSON)
    answer = http.post("/v1/jobs", content=body, headers=JSON)
    stored = len(controller.store.jobs(limit=10_000)) - before
    assert (answer.status_code, stored) in ((201, 1), (422, 0), (404, 0)), answer.text  # 404: comes after no job
    assert (dry.status_code == 200) == (answer.status_code == 201)
    if stored:
        view = http.get(f"/v1/jobs/{answer.json()['id']}")
        assert view.status_code == 200
    else:
        for error in answer.json()["errors"]:
            assert error["code"]
            assert error["message"]
            assert error["hint"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_no_body_at_all_is_a_500(target: tuple[Controller, TestClient], body: bytes) -> None:
    controller, http = target
    before = len(controller.store.jobs(limit=10_000))
    answer = http.post("/v1/jobs", content=body, headers=JSON)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["code"]
    assert len(controller.store.jobs(limit=10_000)) == before
