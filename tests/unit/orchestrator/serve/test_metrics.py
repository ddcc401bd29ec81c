"""GET /metrics: for the yard's token or the one for it alone, in a format that Prometheus' own parser reads."""

from __future__ import annotations

import sys

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from orchestrator.control.loop import Controller
from orchestrator.serve.metrics import KEEP_S, LastHour
from tests.builders import a_command_job
from tests.served import SLOTS, TOKEN, finish

WATCHER = "a-token-for-metrics-alone"


def read(http: TestClient) -> dict[tuple[str, str], float]:
    answer = http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, "/".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_it_tells_what_a_controller_did(http: TestClient, controller: Controller) -> None:
    controller.settings = controller.settings.model_copy(update={"lease": 3600.0})  # however slow this machine is
    assert read(http)["tuneyard_controller_acting", ""] == 0
    controller.store.add_job("good-1", a_command_job(run=(sys.executable, "-c", "pass")), 1.0)
    finish(controller, "good-1")
    found = read(http)
    assert found["tuneyard_controller_acting", ""] == 1
    assert found["tuneyard_controller_tick_seconds_count", ""] >= 1
    assert found["tuneyard_attempts_ended_total", "succeeded/done"] == 1
    assert found["tuneyard_jobs_ended_total", "succeeded"] == 1
    assert found["tuneyard_cpu_slots", "free"] == SLOTS
    assert found["tuneyard_nodes", "free"] == 1
    assert sum(value for (name, _), value in found.items() if name == "tuneyard_slot_seconds") > 0


def test_a_token_for_metrics_is_good_for_nothing_else(http: TestClient, controller: Controller) -> None:
    http.headers["Authorization"] = f"Bearer {WATCHER}"
    assert http.get("/metrics").status_code == 401
    controller.settings = controller.settings.model_copy(update={"metrics_token": SecretStr(WATCHER)})
    assert http.get("/metrics").status_code == 200
    assert http.get("/v1/jobs").status_code == 401
    http.headers["Authorization"] = f"Bearer {TOKEN}"
    assert http.get("/metrics").status_code == 200
    http.headers["Authorization"] = "Bearer "
    assert http.get("/metrics").status_code == 401


def test_accounts_are_kept_for_a_while(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [1000.0], []

    def slot_seconds(*arguments: object) -> dict[str, float]:
        asked.append(arguments)
        return {"training": float(len(asked))}

    monkeypatch.setattr("orchestrator.serve.metrics.slot_seconds", slot_seconds)
    hour = LastHour(controller.store, lambda: now[0])
    assert hour() == hour() == {"training": 1.0}
    now[0] += KEEP_S
    assert hour() == {"training": 2.0}


def test_too_many_jobs_have_no_account(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    controller.store.add_job("good-1", a_command_job(run=(sys.executable, "-c", "pass")), 1.0)
    finish(controller, "good-1")
    assert LastHour(controller.store, controller.clock)() is not None
    monkeypatch.setattr("orchestrator.serve.metrics.MOST_JOBS", 0)
    assert LastHour(controller.store, controller.clock)() is None
